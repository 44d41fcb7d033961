"""`first`, `steady` and their cache hits: one process, one scheme."""

from __future__ import annotations

import random
import time
from typing import Any, Final

from sandbox.cli.bench.summary import INDUCTOR, Answer

#: Seconds for compiles that nobody waits for.
WAIT_SECONDS: Final = 120.0
#: Modes in which a first answer comes before the compile has ended.
BACKGROUND: Final = ("async", "progressive")
#: Variants of the graphs, so that no measure meets code that another has compiled.
_VARIANTS: Final = {"off": 1, "on": 2, "hits": 2}


def measure(task: dict[str, Any]) -> Answer:
    """``task``: `scheme`, `policy`, `measures` (first, steady), `caches` (off, on; or hits alone), `seed`."""
    answer = Answer(task["scheme"])
    started = time.perf_counter()
    import torch

    # Imported beforehand in all schemes: what is compared is compiling.
    import torch._dynamo
    import torch._inductor.compile_fx

    answer.facts["import_seconds"] = time.perf_counter() - started
    mode = None if task["scheme"] in INDUCTOR else task["scheme"]
    if mode is not None:
        _install(task["policy"], mode, answer)
    torch.manual_seed(0)
    bench = _Bench(answer, mode)
    from sandbox.cli.bench.graphs import FIRST, STEADY

    caches = list(task["caches"])
    # The first compile of the process is the first one, measured or not: what follows is steady.
    first = "hits" if caches == ["hits"] else "off"
    bench.sweep("first" if "first" in task["measures"] else "", first, (FIRST,))
    if "steady" in task["measures"]:
        random.Random(task["seed"]).shuffle(caches)
        for cache in caches:
            if cache == "on":  # so that `hits` finds it
                bench.sweep("", "on", (FIRST,))
            bench.sweep("steady", cache, STEADY)
    return answer


def _install(policy: str, mode: str, answer: Answer) -> None:
    started = time.perf_counter()
    from sandbox.inductor.install import install, installed

    install(policy, mode)
    answer.facts["install_seconds"] = time.perf_counter() - started
    scheme = installed()
    if scheme is not None and mode != "serialize":
        scheme.sandbox.wait_ready()
    answer.facts["ready_seconds"] = time.perf_counter() - started


class _Bench:
    """Compiles graphs under the scheme of this process and notes what it took."""

    def __init__(self, answer: Answer, mode: str | None) -> None:
        self.answer = answer
        self.mode = mode

    def sweep(self, measure: str, cache: str, graphs: tuple[Any, ...]) -> None:
        """Compile ``graphs`` one after the other. Without a name for the ``measure`` only the results are checked."""
        import torch

        torch.compiler.config.force_disable_caches = cache == "off"
        isolated, hits = _isolated(self.mode), _hits()
        made = [(graph, *graph.make(_VARIANTS[cache])) for graph in graphs]
        expected = [graph.call(function, inputs) for graph, function, inputs in made]
        torch.compiler.reset()
        # The variants of a graph share their Python code: Dynamo would take their sizes as one that changes.
        compiled = [(graph, torch.compile(function, dynamic=False), inputs) for graph, function, inputs in made]
        started = time.perf_counter()
        found = [graph.call(function, inputs) for graph, function, inputs in compiled]
        answers = time.perf_counter() - started
        self.answer.check(f"{measure or 'warm-up'}, caches {cache}", zip(found, expected, strict=True))
        if self.mode in BACKGROUND:
            wait(self.answer)
            found = [graph.call(function, inputs) for graph, function, inputs in compiled]
        lasts = time.perf_counter() - started
        if self.mode in BACKGROUND:
            self.answer.check(f"{measure or 'warm-up'}, after the switch", zip(found, expected, strict=True))
        if not measure:
            return
        # In the background modes the code is there once the second answers are; the first ones come before.
        self.answer.add(
            measure, cache, "seconds", [lasts if self.mode in BACKGROUND else answers],
            isolated=_isolated(self.mode) - isolated, hits=_hits() - hits,
        )  # fmt: skip
        if self.mode in BACKGROUND:
            self.answer.add(measure, cache, "seconds to first answers", [answers])


def wait(answer: Answer) -> None:
    """Until what is compiled in the background is there. A graph that keeps the code it began with is a problem."""
    import sandbox

    if not sandbox.wait(WAIT_SECONDS):
        answer.wrong(f"compiles had not ended after {WAIT_SECONDS:.0f} s")
    if kept := sandbox.stats().kept:
        answer.wrong(f"graphs kept the code that they began with: {kept}")


def _hits() -> int:
    from sandbox.inductor import compat

    return int(compat.counters["inductor"]["fxgraph_cache_hit"])


def _isolated(mode: str | None) -> int:
    """Graphs that were compiled in another process so far, a count."""
    if mode is not None:
        from sandbox.inductor.install import stats

        return stats().in_child
    from torch._inductor.compile_fx import FxCompile

    # Inductor's SUBPROCESS counts what it really sent; what it cannot pickle it compiles in-process, silently.
    # Not by `compat`: this belongs to what is compared, and its absence must not stop the sandbox.
    kinds = FxCompile._compile_stats.items()
    return sum(int(stats.codegen_and_compile) for kind, stats in kinds if "Subprocess" in kind.__name__)
