"""Inductor's caches, local, remote (a real Redis) and mega, in every mode: hit, miss, write, from several processes,
after a death, and on another machine. A hit starts no child and runs no compiler."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import inductor_harness
import pytest
import redis_server
import torch
from conftest import eventually
from torch._dynamo.utils import counters

import sandbox
from sandbox import artifacts, faults
from sandbox.inductor import cached, compat, identity, install
from sandbox.inductor.scheme import MODES, WITH_CHILDREN, Scheme
from sandbox.policy import Policy
from sandbox.triton import kernel

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

POLICY = Policy(name="caches", allow_faults=True, parallel_jobs=2)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_server.Redis]:
    """Redis, and PyTorch told where it is, before any template starts."""
    with redis_server.running(tmp_path_factory.mktemp("redis")) as one, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_REDIS_URL", one.url)
        yield one


@pytest.fixture(scope="module")
def main(server: redis_server.Redis) -> Iterator[Scheme]:
    """The mode `subprocess`, installed; its template takes faults."""
    with inductor_harness.installed(POLICY) as one:
        yield one


@pytest.fixture(params=MODES)
def scheme(main: Scheme, request: pytest.FixtureRequest) -> Iterator[Scheme]:
    """One in each mode, all with the children of the same template."""
    one = Scheme(POLICY, request.param)
    own, one.sandbox = one.sandbox, main.sandbox
    yield one
    own.close()


@pytest.fixture(autouse=True)
def _empty(server: redis_server.Redis, main: Scheme) -> None:
    server.client.flushall()
    main.quarantine.clear()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Go to a machine, by name: its cache folder is empty when it is new, and this process remembers nothing."""

    def go(name: str) -> Path:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        forget()
        return tmp_path / name

    return go


def forget() -> None:
    """What this process has compiled, loaded and counted."""
    torch._dynamo.reset()
    torch._inductor.utils.clear_caches()
    torch.compiler._cache.CacheArtifactManager.clear()
    counters.clear()


def remote(**more: Any) -> Any:
    return torch._inductor.config.patch(fx_graph_remote_cache=True, **more)


def function(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum(0) + torch.arange(x.shape[0])


class Tries:
    """What compiles of ``function`` did, by the counts of its sandbox."""

    def __init__(self, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
        self._scheme = scheme
        self.started: list[str] = []
        original = subprocess.Popen.__init__

        def noting(popen: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
            self.started.append(str(args))
            original(popen, args, *rest, **kwargs)

        monkeypatch.setattr(subprocess.Popen, "__init__", noting)

    def __call__(self, function: Callable[..., torch.Tensor] = function, size: int = 7) -> tuple[int, int]:
        """Compile and run; the answer is right. Returns graphs given to the sandbox, and children started."""
        before = self._scheme.sandbox.stats()
        self.started.clear()
        x = torch.linspace(-1, 1, size * size).reshape(size, size)
        with install.using(self._scheme):
            compiled = torch.compile(function)
            for _ in range(2):  # before and after the exchange, where there is one
                torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)
                settle(self._scheme)
        now = self._scheme.sandbox.stats()
        return now.graphs - before.graphs, now.children_started - before.children_started

    def hits(self, **kwargs: Any) -> bool:
        """Whether it is a hit: nothing compiled, here or in a child."""
        return self(**kwargs) == (0, 0) and not self.started


def settle(scheme: Scheme) -> None:
    """Until nothing is under way that nobody waits for."""
    if (workers := getattr(scheme, "workers", None)) is not None:
        assert workers.wait(120)


@pytest.fixture
def tries(main: Scheme, monkeypatch: pytest.MonkeyPatch) -> Tries:
    return Tries(main, monkeypatch)


Machine = Callable[[str], Path]


def test_local_and_remote_in_every_mode(
    scheme: Scheme, server: redis_server.Redis, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = Tries(scheme, monkeypatch)
    machine("first")
    with remote():
        graphs, children = tries()
        assert graphs == 1
        assert bool(children) == (scheme.mode in WITH_CHILDREN)
        assert len(server.keys("fx-graph")) == 1
        forget()
        assert tries.hits(), "local"
        machine("second")
        assert tries()[0] == 0, "remote"
        assert not tries.started or scheme.mode == "normal", "a compiler ran for a remote hit"
        assert counters["inductor"]["fxgraph_cache_hit"] == 1
        if scheme.mode != "normal":
            forget()
            assert tries.hits(), "remote, with the kernels on this machine by now"


def test_a_training_step_with_the_autograd_cache(
    main: Scheme, tries: Tries, server: redis_server.Redis, machine: Machine
) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        function_of(x).sum().backward()
        assert x.grad is not None
        return x.grad

    function_of: Callable[..., torch.Tensor] = function
    wanted = step(torch.ones(5, 5))
    for backend in ("inductor", "sandbox"):
        server.client.flushall()
        options = {"options": {"policy": POLICY}} if backend == "sandbox" else {}
        for name, children in (("first", 2), ("second", 0)):
            machine(f"{backend}-{name}")
            function_of = torch.compile(function, backend=backend, **options)
            before = main.sandbox.stats().children_started
            tries.started.clear()
            with remote(), torch._functorch.config.patch(enable_remote_autograd_cache=True):
                torch.testing.assert_close(step(torch.ones(5, 5)), wanted, rtol=1e-4, atol=1e-5)
            assert main.sandbox.stats().children_started - before == children
            assert not tries.started
            assert counters["aot_autograd"]["autograd_cache_hit"] == (0 if children else 1)
        assert len(server.keys("autograd")) == 1


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_which_caches_are_asked_and_written_is_the_settings_word(
    tries: Tries, server: redis_server.Redis, machine: Machine
) -> None:
    folder = machine("first")
    with torch._inductor.config.patch(fx_graph_cache=False):
        assert tries() == (1, 1)
    assert not (folder / "fxgraph").exists() and not server.keys("")
    forget()
    with remote(fx_graph_cache=False):
        assert tries() == (1, 1)
        assert not (folder / "fxgraph").exists() and len(server.keys("fx-graph")) == 1
        machine("second")
        assert tries.hits()
        forget()
        with torch.compiler.config.patch(force_disable_caches=True):
            assert tries() == (1, 1)
    assert len(server.keys("")) == 1


def test_kernels_for_another_processor_are_built_in_a_child(
    tries: Tries, server: redis_server.Redis, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote():
        machine("first")
        assert tries() == (1, 1)
        monkeypatch.setattr(cached, "_processor", lambda: "another one")
        machine("second")
        assert tries() == (1, 1)
        assert not tries.started, "a compiler ran in this process"
        machine("third")
        assert tries.hits(), "the entry was not written anew"


def test_an_entry_of_a_process_without_the_sandbox_is_compiled_again_in_a_child(
    tries: Tries, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with remote():
        machine("first")
        with monkeypatch.context() as patch:
            patch.setattr(cached, "packed", lambda key: None)
            assert tries() == (1, 1)
        machine("second")
        assert tries() == (1, 1)
        assert not tries.started
        machine("third")
        assert tries.hits()


def test_the_mega_cache_goes_to_another_machine(tries: Tries, machine: Machine) -> None:
    machine("first")
    assert tries() == (1, 1)
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    machine("second")
    assert torch.compiler.load_cache_artifacts(saved[0]) is not None
    assert tries.hits()


# PyTorch's destructor of half a graph fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_was_cut_short_is_healed(tries: Tries, machine: Machine) -> None:
    folder = machine("first")
    assert tries() == (1, 1)
    for pattern, children in (("??/*.so", 0), ("??/*.kernels.json", 0), ("fxgraph/*/*/*", 1), ("[!t]*/**/*", 1)):
        cut(folder, pattern)
        forget()
        assert tries() == (children, children), pattern
        assert not tries.started, "a compiler ran in this process"
        forget()
        assert tries.hits(), pattern


def cut(folder: Path, pattern: str) -> None:
    """Leave half of each file; as a new one, since this process has the old one mapped."""
    files = [path for path in folder.glob(pattern) if path.is_file() and path.suffix != ".py"]
    assert files, pattern
    for path in files:
        half = path.with_name("half")
        half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        half.replace(path)


@pytest.mark.parametrize("point", ["child.spawn", "child.collect", "wire.reply"])
def test_a_child_that_dies_while_it_writes_leaves_nothing(
    point: str, tries: Tries, machine: Machine, server: redis_server.Redis
) -> None:
    folder = machine("first")
    kind = "truncated" if point.startswith("wire") else "sigkill"
    seen: list[list[str]] = []

    def look(*_: object) -> None:
        seen.append(files_in(folder))

    with remote(), faults.inject(kind, point, times=1), pytest.MonkeyPatch.context() as patch:
        decide = sandbox.fallback.decide
        patch.setattr(sandbox.fallback, "decide", lambda *args: (look(), decide(*args))[1])
        assert tries() == (1, 2)
    assert seen == [[]], "a child that died has left files in the cache"
    assert all(artifacts.is_whole(path) for path in folder.glob("??/*.so"))
    assert not list(folder.rglob(f"{artifacts.MAKING}*"))
    forget()
    assert tries.hits()


def files_in(folder: Path) -> list[str]:
    """Files of the cache, but for the modules that this process wrote itself."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def test_a_service_that_is_killed_while_it_takes_files_over_leaves_whole_ones(tmp_path: Path) -> None:
    source, cache = tmp_path / "job", tmp_path / "cache"
    for name in ("ca", "cb", "cc"):
        (source / "inductor" / "ab").mkdir(parents=True, exist_ok=True)
        (source / "inductor" / "ab" / f"{name}.so").write_bytes(name.encode() * 50_000)
    program = """
        import os, signal, sys
        from pathlib import Path
        from sandbox import artifacts
        from sandbox.limits import Limits
        source, cache, when = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        place, copy, done = artifacts._place, artifacts._copy, []
        def counted(function):
            def wrapper(*args):
                if len(done) == when:
                    os.kill(os.getpid(), signal.SIGKILL)
                done.append(1)
                return function(*args)
            return wrapper
        artifacts._place, artifacts._copy = counted(place), counted(copy)
        artifacts.adopt(artifacts.manifest(source), source, {"inductor": cache}, Limits())
    """
    for when in (1, 3, 4, 99):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), str(source), str(cache), str(when)], timeout=60
        )
        assert done.returncode == (-9 if when != 99 else 0)
        for path in cache.glob("ab/*"):
            assert path.read_bytes() == path.stem.encode() * 50_000
    assert sorted(path.name for path in (cache / "ab").iterdir()) == ["ca.so", "cb.so", "cc.so"]


def test_children_do_not_learn_where_the_remote_cache_is(main: Scheme) -> None:
    def seen() -> str:
        from pathlib import Path

        return "\n".join(
            [*os.environ, *os.environ.values(), Path("/proc/self/environ").read_bytes().decode(errors="replace")]
        )

    result = main.sandbox.submit(sandbox.callable_job(seen)).result()
    assert result.ok, result.detail
    assert redis_server.PASSWORD in os.environ["TORCHINDUCTOR_REDIS_URL"]
    assert "REDIS" not in result.value and redis_server.PASSWORD not in result.value


KERNEL = """
import triton, triton.language as tl

@triton.jit
def double(out, x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)
"""


def test_triton_kernels_of_a_child_are_found_here_and_on_another_machine(
    main: Scheme, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.triton_bundler import TritonBundler
    from triton.backends.nvidia.compiler import CUDABackend

    first, second = machine("first") / "triton", machine("second") / "triton"
    job = sandbox.triton_job(
        KERNEL, "double", {"out": "*fp32", "x": "*fp32", "n": "i32"}, constants={"BLOCK": 128}, target="cuda:90"
    )
    result = main.sandbox.submit(job, cache={"triton": first}).result()
    assert result.ok, result.detail

    def refuse(*_: object) -> None:
        raise AssertionError("Triton compiles in this process")

    monkeypatch.setattr(CUDABackend, "add_stages", refuse)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(first))
    assert kernel.compile_source(job.spec, KERNEL) == result.value
    # Inductor's entries carry Triton's kernels: as they would leave here, and arrive elsewhere.
    TritonBundler.begin_compile()
    (group,) = first.glob("*/__grp__*")
    TritonBundler.put(group.parent.name, 0)
    bundle, _ = TritonBundler.collect()
    shutil.rmtree(first)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(second))
    TritonBundler.read_and_emit(bundle)
    assert kernel.compile_source(job.spec, KERNEL) == result.value


class Meeting:
    """Holds the first child back until two compiles are on their way."""

    def __init__(self, scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
        submit, met = scheme.sandbox.submit, threading.Event()

        def together(*args: Any, **kwargs: Any) -> Any:
            members = scheme.flights._flights.values
            if not met.is_set():
                assert eventually(lambda: sum(n for _, n in members()) == 2, 60), "the other one did not come"
                met.set()
            return submit(*args, **kwargs)

        monkeypatch.setattr(scheme.sandbox, "submit", together)


def traced(
    function: Callable[..., Any] = function, size: tuple[int, ...] = (6, 6), mode: str = "fake"
) -> tuple[Any, list[Any], dict[str, Any]]:
    """``function`` as Inductor gets it: graph, inputs, arguments."""
    gm = compat.make_fx(function, compat.decompositions(), mode)(torch.ones(size))
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = ((output.args[0],),)
    gm.recompile()
    return gm, inputs, {"cudagraphs": compat.BoxedBool(False), "static_input_idxs": (), "is_inference": True}


def in_two_threads(scheme: Scheme, graphs: Sequence[tuple[Any, list[Any], dict[str, Any]]] = ()) -> list[Any]:
    """Two graphs, by default the same one traced twice, compiled in two threads at once; what each got, or raised."""
    graphs = graphs or [traced(), traced()]

    def compiled(gm: Any, inputs: list[Any], kwargs: dict[str, Any]) -> Any:
        try:
            with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
                return scheme.compile(gm, inputs, [], kwargs)
        except BaseException as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda graph: compiled(*graph), graphs))


@pytest.mark.parametrize("fault", [None, "sigkill"])
def test_two_threads_share_one_job(
    fault: str | None, main: Scheme, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("first")
    monkeypatch.setattr(cached, "key_of", lambda gm: "the key of both")
    Meeting(main, monkeypatch)
    before = main.sandbox.stats()
    with faults.inject(fault) if fault else contextlib.nullcontext():
        outputs = in_two_threads(main)
    now = main.sandbox.stats()
    for output in outputs:
        (got,) = output([torch.ones(6, 6)])
        torch.testing.assert_close(got, function(torch.ones(6, 6)))
    assert now.graphs - before.graphs == 2
    assert len(main.flights) == 0
    if fault is None:
        assert now.children_started - before.children_started == 1
        assert now.in_child - before.in_child == 2
    else:
        assert now.children_started - before.children_started == 3, "first, retry, reduced: once for both"
        assert now.eager - before.eager == 2 and now.in_process == before.in_process
        gm, inputs, _ = traced()
        key = identity.quarantine_key(gm, inputs, identity.made_for(POLICY, "cpu"))
        entry = main.quarantine.get(key)
        assert entry is not None and entry.kills == 3, "each kill counts once"


def head(x: torch.Tensor) -> torch.Tensor:
    return x[:10] + 1


def test_one_code_for_sizes_of_which_other_things_are_known_is_two_graphs(
    main: Scheme, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a size is known to be 10 at most the slice is everything: no guard of the reply would say so."""
    machine("first")
    monkeypatch.setattr(cached, "key_of", lambda gm: "the key of both")
    Meeting(main, monkeypatch)
    graphs = [traced(head, (size,), "symbolic") for size in (4, 33)]
    assert graphs[0][0].code == graphs[1][0].code
    before = main.sandbox.stats()
    outputs = in_two_threads(main, graphs)
    for output, size in zip(outputs, (4, 33), strict=True):
        x = torch.arange(float(size))
        torch.testing.assert_close(output([x])[0], head(x))
    now = main.sandbox.stats()
    assert now.in_child - before.in_child == now.children_started - before.children_started == 2


def test_two_compiles_that_nobody_waits_for_share_one_job(
    main: Scheme, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("first")
    scheme = Scheme(POLICY, "async")
    own, scheme.sandbox = scheme.sandbox, main.sandbox
    Meeting(scheme, monkeypatch)
    before = main.sandbox.stats()
    x = torch.ones(4, 4)
    with install.using(scheme):
        both = []
        for _ in range(2):
            torch._dynamo.reset()
            both.append(torch.compile(lambda x: function(x) + 1))
            torch.testing.assert_close(both[-1](x), function(x) + 1)
        settle(scheme)
        torch.testing.assert_close(both[-1](x), function(x) + 1)
    now = main.sandbox.stats()
    assert now.children_started - before.children_started == 1
    assert now.graphs - before.graphs == 2
    own.close()


GRAPHS = """
import torch

def graph_0(x):
    return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum(0)

def graph_1(x):
    return (x.sin() * 3).cumsum(0) + 1
"""
PROGRAM = """
    import sys, torch, sandbox
    torch._inductor.config.fx_graph_remote_cache = True
    sandbox.install(mode=sys.argv[1])
    torch.compile(lambda x: x.cos() * 3)(torch.ones(3))
    exec(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    x = torch.linspace(-1, 1, 49).reshape(7, 7)
    for graph in (graph_0, graph_1):
        assert torch.allclose(torch.compile(graph)(x), graph(x), rtol=1e-4, atol=1e-5)
    stats = sandbox.stats()
    print(stats.graphs, stats.eager, stats.raised, sum(stats.outcomes.values()), stats.outcomes.get("ok", 0))
"""


def test_processes_that_compile_the_same_graphs_at_once(
    main: Scheme, tries: Tries, server: redis_server.Redis, machine: Machine
) -> None:
    folder = machine("shared")
    start = functools.partial(
        subprocess.Popen, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    code = textwrap.dedent(PROGRAM)
    others = [start([sys.executable, "-c", code, mode, GRAPHS]) for mode in ("subprocess", "serialize")]
    graphs: dict[str, Any] = {}
    exec(GRAPHS, graphs)
    try:
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n", other.communicate()
        for other in others:
            assert other.stdin is not None
            other.stdin.write("go\n")
            other.stdin.flush()
        with remote():
            for n in range(2):
                torch._dynamo.reset()
                tries(graphs[f"graph_{n}"])
        told = [other.communicate(timeout=200) for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
    for other, (output, errors) in zip(others, told, strict=True):
        assert other.returncode == 0, errors
        given, eager, raised, jobs, ok = map(int, output.split())
        assert eager == raised == 0 and jobs == ok and given <= 3, output
    assert all(artifacts.is_whole(path) for path in folder.glob("??/*.so"))
    assert not list(folder.rglob(f"{artifacts.MAKING}*"))
    machine("another")
    with remote():
        for n in range(2):
            assert tries(graphs[f"graph_{n}"]) == (0, 0), counters["inductor"]
            assert not tries.started
            torch._dynamo.reset()
