"""Inductor's caches, local, remote (a real Redis) and mega, in every mode: hit, miss, write, from several processes,
after a death, and on another machine. A hit starts no child and runs no compiler."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis_server
import torch
from torch._dynamo.utils import counters

import sandbox
from sandbox import artifacts, faults
from sandbox.inductor import cached, install
from sandbox.inductor.scheme import MODES, WITH_CHILDREN, Scheme
from sandbox.policy import Policy
from sandbox.triton import kernel

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

POLICY = Policy(name="caches", allow_faults=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_server.Redis]:
    """Redis, and PyTorch told where it is, before any template starts."""
    with redis_server.running(tmp_path_factory.mktemp("redis")) as one, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_REDIS_URL", one.url)
        yield one


@pytest.fixture(scope="module")
def main(server: redis_server.Redis) -> Iterator[Scheme]:
    """The mode `subprocess`, installed; its template takes faults."""
    sandbox.install(policy=POLICY)
    one = install.installed()
    assert one is not None
    one.sandbox.wait_ready()
    yield one
    sandbox.uninstall()


@pytest.fixture(params=MODES)
def scheme(main: Scheme, request: pytest.FixtureRequest) -> Iterator[Scheme]:
    """One in each mode, all with the children of the same template."""
    one = Scheme(POLICY, request.param)
    own, one.sandbox = one.sandbox, main.sandbox
    yield one
    own.close()


@pytest.fixture(autouse=True)
def _empty(server: redis_server.Redis) -> None:
    server.client.flushall()


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
            server.client.flushall()
            forget()
            assert tries.hits(), "what a remote hit leaves on this machine"


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


PROGRAM = """
    import sys, torch, sandbox
    torch._inductor.config.fx_graph_remote_cache = True
    sandbox.install(mode=sys.argv[1])
    if sys.argv[1] == "subprocess":
        sandbox.inductor.install.installed().sandbox.wait_ready()
    torch.compile(lambda x: x.sin() * 3)(torch.ones(3))
    def function(x, n):
        return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum(0) + n
    print("ready", flush=True)
    sys.stdin.readline()
    x = torch.linspace(-1, 1, 49).reshape(7, 7)
    for n in range(3):
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(function)(x, n), function(x, n), rtol=1e-4, atol=1e-5)
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
    others = [start([sys.executable, "-c", code, mode]) for mode in ("subprocess", "serialize")]
    try:
        for other in others:
            assert other.stdout is not None
            assert other.stdout.readline() == "ready\n", other.communicate()
        for other in others:
            assert other.stdin is not None
            other.stdin.write("go\n")
            other.stdin.flush()
        with remote():
            for n in range(3):
                torch._dynamo.reset()
                tries(lambda x, n=n: function(x) + n)
        told = [other.communicate(timeout=200) for other in others]
    finally:
        for other in others:
            other.kill()
            other.wait()
    for other, (output, errors) in zip(others, told, strict=True):
        assert other.returncode == 0, errors
        graphs, eager, raised, jobs, ok = map(int, output.split())
        assert eager == raised == 0 and jobs == ok and graphs <= 4, output
    assert all(artifacts.is_whole(path) for path in folder.glob("??/*.so"))
    assert not list(folder.rglob(f"{artifacts.MAKING}*"))
    shutil.rmtree(folder)
    machine("another")
    with remote():
        assert all(tries.hits(function=lambda x, n=n: function(x) + n) for n in range(3))
