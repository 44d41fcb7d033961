"""`async`: when the first answer is there, and what is left of eager's throughput while graphs are compiled."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from sandbox.cli.bench.compiles import wait
from sandbox.cli.bench.summary import Answer
from sandbox.policy import load

#: First answers of each kind, a count.
FIRSTS: Final = 3
LONG_FIRSTS: Final = 2
#: Pairs of compiles during which requests are served, a count.
PAIRS: Final = 2
#: Seconds of serving without a compile, before and after each pair.
QUIET_SECONDS: Final = 1.5
#: (batch, width, layers) of what is asked for a first answer: one request of a batch job, and one eight times as long.
LARGE: Final = (2048, 1024, 8)
LONG: Final = (16384, 1024, 8)
#: The same of what is served, and of what is compiled meanwhile.
SERVED: Final = (64, 256, 4)
COMPILED: Final = (32, 192, 6)


def measure(task: dict[str, Any]) -> Answer:
    """``task``: `policy`, `seed`. Needs two cores: one serves, the other compiles."""
    answer = Answer("async")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        answer.facts["left out"] = "one core only"
        return answer
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.compiler.config.force_disable_caches = True
    import sandbox
    from sandbox.inductor.install import installed

    policy = load(task["policy"]).model_copy(update={"parallel_jobs": 2, "kernel_threads": 1})
    sandbox.install(policy, "async")
    scheme = installed()
    if scheme is None:
        raise RuntimeError("install() has installed nothing")
    scheme.sandbox.wait_ready()
    with torch.no_grad():
        order = random.Random(task["seed"])
        # The first of each is not measured: it pays lazy imports.
        _first_answers(answer, order, LARGE, FIRSTS, unmeasured=1)
        _first_answers(answer, order, LONG, LONG_FIRSTS, suffix=", long request")
        _to_core(cores[1], scheme.sandbox.forkserver_pid)
        _throughput(answer, cores[0])
    if (stats := sandbox.stats()).in_child != stats.graphs:
        answer.wrong(f"of {stats.graphs} graphs {stats.in_child} were compiled in a child: {stats.outcomes}")
    sandbox.uninstall()
    return answer


def _to_core(core: int, forkserver: int | None) -> None:
    """All threads of this process, the forkserver, and what both will start, onto one core."""
    for pid in (os.getpid(), *([forkserver] if forkserver is not None else [])):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), [core])


def _first_answers(
    answer: Answer, order: random.Random, size: tuple[int, int, int], count: int, unmeasured: int = 0, suffix: str = ""
) -> None:
    """Time to the first answer of a model that is new, in four ways."""
    import torch

    from sandbox.cli.bench.graphs import Block

    ways: dict[str, Callable[[Any], Any]] = {
        "eager": lambda model: model,
        # Dynamo alone: nothing that compiles can answer sooner.
        "dynamo": lambda model: torch.compile(model, backend="eager", dynamic=False),
        "aot_eager": lambda model: torch.compile(model, backend="aot_eager", dynamic=False),
        "async": lambda model: torch.compile(model, dynamic=False),
    }
    values: dict[str, list[float]] = {way: [] for way in ways}
    batch, width, layers = size
    for number in range(unmeasured + count):
        for way in order.sample(sorted(ways), len(ways)):
            model = Block(width, layers).eval()
            x = torch.randn(batch + number, width)
            expected = model(x)
            torch.compiler.reset()
            started = time.perf_counter()
            found = ways[way](model)(x)
            seconds = time.perf_counter() - started
            if number >= unmeasured:
                values[way].append(seconds * 1000)
            answer.check(f"first answer, {way}{suffix}", [([found], [expected])])
            wait(answer)
    for way, told in values.items():
        answer.add("async", "", "ms to the first answer", told, scheme=way + suffix)


def _throughput(answer: Answer, core: int) -> None:
    """Requests a second that an eager model answers on a core of its own: alone, and while two graphs are compiled."""
    import torch

    from sandbox.cli.bench.graphs import Block

    batch, width, layers = COMPILED
    shares, whole, lengths = [], [], []
    with _serving(core) as served:
        time.sleep(QUIET_SECONDS)
        quiet = [_rate(served, lambda: time.sleep(QUIET_SECONDS))]
        for pair in range(PAIRS):
            models = [Block(width + 8 * (2 * pair + each), layers).eval() for each in range(2)]
            inputs = [torch.randn(batch, model.layers[0].in_features) for model in models]
            expected = _asked(models, inputs)
            torch.compiler.reset()
            compiled = [torch.compile(model, dynamic=False) for model in models]
            at, begun = len(served), time.perf_counter()
            answer.check("the answers at once", [(_asked(compiled, inputs), expected)])
            begun_jobs = time.perf_counter()
            during = _rate(served, lambda: wait(answer))
            ended = time.perf_counter()
            all_of_it = (len(served) - at) / (ended - begun)
            answer.check("the compiled answers", [(_asked(compiled, inputs), expected)])
            quiet.append(_rate(served, lambda: time.sleep(QUIET_SECONDS)))
            alone = (quiet[-1] + quiet[-2]) / 2
            shares.append(during / alone)
            whole.append(all_of_it / alone)
            lengths.append(ended - begun_jobs)
    answer.add("async", "", "share of throughput", shares, scheme="two compiles")
    answer.add("async", "", "share of throughput", whole, scheme="two compiles and their tracing")
    answer.facts["requests per second, alone"] = quiet
    answer.facts["seconds of compiling"] = lengths


def _asked(models: list[Any], inputs: list[Any]) -> list[Any]:
    return [model(x) for model, x in zip(models, inputs, strict=True)]


def _rate(served: list[float], meanwhile: Callable[[], None]) -> float:
    """Requests a second while ``meanwhile`` runs."""
    before, started = len(served), time.perf_counter()
    meanwhile()
    return (len(served) - before) / (time.perf_counter() - started)


@contextlib.contextmanager
def _serving(core: int) -> Iterator[list[float]]:
    """A thread that answers requests, one after the other, on ``core``; yields the times of its answers."""
    import torch

    from sandbox.cli.bench.graphs import Block

    batch, width, layers = SERVED
    model, x = Block(width, layers).eval(), torch.randn(batch, width)
    answered: list[float] = []
    stop = threading.Event()

    def serve() -> None:
        os.sched_setaffinity(0, [core])  # of this thread
        torch.set_num_threads(1)
        with torch.no_grad():
            while not stop.is_set():
                model(x)
                answered.append(time.perf_counter())

    thread = threading.Thread(target=serve, name="bench-serving")
    thread.start()
    try:
        yield answered
    finally:
        stop.set()
        thread.join()
