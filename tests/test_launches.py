"""Direct launches of Triton kernels: compiled in a child, found by Triton in its own cache.

Triton is told that there is an H100, and kernels are warmed up, which is a launch without its end.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import launched_kernels as kernels
import pytest

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

import sandbox  # noqa: E402
from sandbox import faults  # noqa: E402
from sandbox.errors import CompileFailed  # noqa: E402
from sandbox.inductor import install  # noqa: E402
from sandbox.policy import ForkserverSettings, Ladder, Policy, QuarantineSettings  # noqa: E402

pytestmark = [pytest.mark.timeout(300)]

POLICY = Policy(
    name="launches",
    allow_faults=True,
    quarantine=QuarantineSettings(persist=False),
    forkserver=ForkserverSettings(warm_up=False, standby=0),
)


class Driver:
    """Answers for an H100, as far as a compile asks."""

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        return None


@pytest.fixture(scope="module")
def installed() -> Iterator[sandbox.Sandbox]:
    sandbox.install(POLICY)
    scheme = install.installed()
    assert scheme is not None
    scheme.sandbox.wait_ready()
    yield scheme.sandbox
    sandbox.uninstall()


@pytest.fixture
def box(installed: sandbox.Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sandbox.Sandbox]:
    """The sandbox, with an empty cache of Triton's, and kernels that were never launched."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    active = triton.runtime.driver.active if triton.runtime.driver._active is not None else None
    triton.runtime.driver.set_active(Driver())
    for kernel in vars(kernels).values():
        if isinstance(kernel, triton.runtime.JITFunction):
            kernel.device_caches.clear()
    yield installed
    triton.runtime.driver._active = active


def launch(kernel: Any, *arguments: Any, **constants: Any) -> Any:
    return kernel.warmup(*arguments, grid=(1,), **constants)


def add() -> Any:
    return launch(kernels.add, torch.float32, torch.float32, torch.float32, 1024, BLOCK=256)


def counted(box: sandbox.Sandbox, function: Callable[[], Any]) -> tuple[dict[str, int], int]:
    """What a call adds to the counts of launches and of children."""
    before = sandbox.stats()
    function()
    after = sandbox.stats()
    launches = {name: count - before.launches.get(name, 0) for name, count in after.launches.items()}
    return {name: count for name, count in launches.items() if count}, after.children_started - before.children_started


@pytest.fixture
def hits(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each compile that Triton is asked for in this process: whether its cache had it."""
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
    return found


def test_a_launch_is_compiled_in_a_child_and_found_by_triton(box: sandbox.Sandbox, hits: list[bool]) -> None:
    made: list[Any] = []
    assert counted(box, lambda: made.append(add())) == ({"in_child": 1}, 1)
    assert hits == [True], "Triton has compiled it in this process"
    assert made[0].asm["cubin"][:4] == b"\x7fELF"
    # Neither the same launch nor another process starts a second child.
    kernels.add.device_caches.clear()
    assert counted(box, add) == ({}, 0)
    assert hits == [True, True]


def test_a_source_that_is_compiled_by_name(box: sandbox.Sandbox, hits: list[bool]) -> None:
    """`triton.compile`, as code that builds kernels ahead calls it."""
    signature = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(kernels.add, dict(zip(kernels.add.arg_names, signature.values(), strict=True)),
                                       {"BLOCK": 256})  # fmt: skip
    target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
    made: list[Any] = []
    assert counted(box, lambda: made.append(triton.compile(source, target, {"num_warps": 8}))) == ({"in_child": 1}, 1)
    assert hits == [True] and made[0].metadata.num_warps == 8 and made[0].metadata.target.arch == 80


def test_kernels_that_inductor_compiles_late(
    box: sandbox.Sandbox, hits: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it tunes by running it, it compiles in the service, kernel after kernel: by children, too."""
    import gpu_graphs

    from sandbox.gpus import recorded
    from sandbox.inductor import compat, snapshot

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    ((gm, inputs, _),) = gpu_graphs.captured(
        lambda compile: compile(lambda x: torch.softmax(x, -1).sum(0))(torch.randn(300, 5000))
    )
    result = box.submit(sandbox.graph_job(gm, inputs)).result()
    assert result.status.value == "ok", result.detail
    code = result.value["graph"]["source_code"]
    name, source = next(
        (part.split("'")[1], part.split("'''")[1]) for part in code.split("async_compile.triton(")[1:] if "'''" in part
    )
    gpus = recorded("cuda:90")
    assert gpus is not None
    with snapshot.answering(gpus):
        kernel = compat.load_triton_kernel(name, source)
        count = len(kernel.configs)
        counts, children = counted(box, lambda: kernel.precompile(warm_cache_only=True))
    assert hits and all(hits), "Triton has compiled it in this process"
    assert counts == {"in_child": children} and children == count >= 1


CASES: dict[str, Callable[[], Any]] = {
    "helper": add,
    "constexpr function": lambda: launch(
        kernels.applied, torch.float32, torch.float32, function=kernels.scaled, BLOCK=64
    ),
    "closure": lambda: launch(kernels.made_here(), torch.float16, BLOCK=64),
    "a local of a kernel's name": lambda: launch(kernels.shadows, torch.float32, BLOCK=64),
    "a builtin's name": lambda: launch(kernels.larger, torch.float32, BLOCK=64),
    "defaults and annotations": lambda: launch(kernels.with_default, torch.float32),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_triton_would_have_made(
    box: sandbox.Sandbox, case: str, hits: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, with the lines of the source in its debug information."""
    children: list[Any] = []
    assert counted(box, lambda: children.append(CASES[case]())) == ({"in_child": 1}, 1)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "own"))
    for kernel in vars(kernels).values():
        if isinstance(kernel, triton.runtime.JITFunction):
            kernel.device_caches.clear()
    made: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(install.installed(), "policy", POLICY.model_copy(update={"triton_launches": False}))
        assert counted(box, lambda: made.append(CASES[case]())) == ({}, 0)
    (own,) = made
    assert hits == [True, False]
    assert (own.hash, own.metadata) == (children[0].hash, children[0].metadata)
    for stage in own.asm:
        assert own.asm[stage] == children[0].asm[stage], stage
    assert __file__.rpartition("/")[0] in own.asm["ttir"]


def test_kernels_that_share_a_helper(box: sandbox.Sandbox) -> None:
    """Triton's own hash of the second depends on whether the first was asked for its before."""

    def work() -> None:
        add()
        launch(kernels.also_scaled, torch.float32, BLOCK=64)

    assert counted(box, work) == ({"in_child": 2}, 2)


def test_an_autotuned_kernel_gets_a_child_for_each_configuration(box: sandbox.Sandbox) -> None:
    assert counted(box, lambda: launch(kernels.tuned, torch.float32, torch.float32, 1000)) == ({"in_child": 2}, 2)


def test_threads_that_launch_the_same_share_one_child(box: sandbox.Sandbox) -> None:
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        add()

    def together() -> None:
        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    launches, children = counted(box, together)
    assert set(launches) == {"in_child"} and children == 1


def test_the_error_of_a_wrong_kernel_is_tritons(box: sandbox.Sandbox) -> None:
    def work() -> None:
        with pytest.raises(Exception, match="not_defined_anywhere") as caught:
            launch(kernels.wrong, torch.float32, BLOCK=64)
        assert type(caught.value).__name__ == "CompilationError"

    assert counted(box, work) == ({"raised": 1}, 1)


def test_what_triton_cannot_do_is_tritons_error(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default that is a variable of the function around it: Triton finds no such global, here as in a child."""
    said = []
    for policy in (POLICY, POLICY.model_copy(update={"triton_launches": False})):
        monkeypatch.setattr(install.installed(), "policy", policy)
        with pytest.raises(triton.CompilationError, match="n is not defined") as caught:
            launch(kernels.made_with(64), torch.float16)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_compiler_that_crashes_costs_its_child(box: sandbox.Sandbox) -> None:
    with faults.inject("sigsegv", times=1):
        assert counted(box, add) == ({"in_child": 1}, 2)


def test_a_kernel_that_kills_every_child_raises_and_is_quarantined(box: sandbox.Sandbox) -> None:
    def work() -> None:
        with faults.inject("sigsegv"), pytest.raises(CompileFailed, match="crashed"):
            add()

    # A kernel has no settings to reduce, and cannot run uncompiled, so `eager` of the ladder raises.
    assert counted(box, work) == ({"raised": 1}, 2)

    def again() -> None:
        with pytest.raises(CompileFailed, match="quarantine"):
            add()

    assert counted(box, again) == ({"raised": 1}, 0)
    scheme = install.installed()
    assert scheme is not None
    scheme.quarantine.clear()


def test_settings_of_triton_hold_in_the_child_too(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that no policy lets through: they are part of the entry's name, so of what is in it."""
    made: list[Any] = []
    assert counted(box, lambda: made.append(add())) == ({"in_child": 1}, 1)
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    monkeypatch.setenv("DISABLE_LLVM_OPT", "1")
    assert "DISABLE_PTXAS_OPT" not in box.environment()
    kernels.add.device_caches.clear()
    assert counted(box, lambda: made.append(add())) == ({"in_child": 1}, 1)
    optimised, plain = (each.asm["ptx"] for each in made)
    assert made[0].hash != made[1].hash and optimised != plain


def entry_of(box: sandbox.Sandbox) -> Path:
    """That of `add`, without its group: as if the process had lost power, or another folder had been copied there."""
    add()
    (entry,) = Path(triton.knobs.cache.dir).iterdir()
    kernels.add.device_caches.clear()
    return entry


def test_what_a_child_hands_back_is_read_before_triton_may(
    box: sandbox.Sandbox, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it were hostile: facts that nothing should be allocated by. They are gone when Triton looks."""
    from sandbox import artifacts

    place = artifacts._copy

    def hostile(artifact: Any, source: Path, copy: Path, owner: int) -> Path:
        made = place(artifact, source, copy, owner)
        if artifact.path.endswith("/add.json"):
            made.write_text(json.dumps({**json.loads(made.read_text()), "shared": -1}))
        return made

    monkeypatch.setattr(artifacts, "_copy", hostile)
    made: list[Any] = []
    assert counted(box, lambda: made.append(add())) == ({"in_process": 1}, 2)
    assert hits == [False] and made[0].metadata.shared >= 0


@pytest.mark.parametrize("what", ["group", "list", "facts", "other", "cubin", "count", "huge", "dimensions"])
def test_an_entry_that_is_of_no_use_is_made_again(box: sandbox.Sandbox, what: str) -> None:
    entry = entry_of(box)
    facts = json.loads((entry / "add.json").read_text())
    if what == "group":
        (entry / "__grp__add.json").write_text('{"child_paths": {}}')
    elif what == "list":
        (entry / "__grp__add.json").write_text("[]")
    elif what == "cubin":
        (entry / "add.cubin").unlink()
    else:
        text = {
            "facts": "[",
            "other": json.dumps({**facts, "hash": "0" * 64}),
            "count": json.dumps({**facts, "shared": -1}),
            "huge": json.dumps({**facts, "x": "y" * 100_000}),
            "dimensions": json.dumps({**facts, "tensordesc_meta": [{"block_size": [1] * 6}]}),
        }[what]
        (entry / "add.json").write_text(text)
    made: list[Any] = []
    assert counted(box, lambda: made.append(add())) == ({"in_child": 1}, 1)
    assert made[0].asm["cubin"][:4] == b"\x7fELF" and json.loads((entry / "add.json").read_text()) == facts


def test_a_launch_hands_back_its_own_entry_only(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that makes more in Triton's folder, libraries and other kernels among them."""
    results: list[Any] = []
    job = box.submit
    monkeypatch.setattr(box, "submit", lambda *a, **k: results.append(job(*a, **k)) or results[-1])
    # As if it were another kernel's: what the child makes is none of the files that belong to it.
    from sandbox.inductor import launches

    spec = launches.TritonLaunchSpec
    monkeypatch.setattr(launches, "TritonLaunchSpec", lambda **k: spec(**{**k, "entry": "A" * 52}))
    assert counted(box, add) == ({"in_process": 1}, 2)
    assert [result.result().artifacts for result in results] == [(), ()]


def test_what_cannot_be_sent_is_compiled_in_this_process(
    box: sandbox.Sandbox, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
    before = sandbox.stats().in_process_reasons
    assert counted(box, add) == ({"in_process": 1}, 0)
    assert hits == [False]
    reason = "unserializable: triton_hooks"
    assert sandbox.stats().in_process_reasons[reason] == before.get(reason, 0) + 1


def test_a_ladder_that_forbids_it_raises(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", lambda *_: ("", ""))
    scheme = install.installed()
    monkeypatch.setattr(scheme, "policy", POLICY.model_copy(update={"ladder": Ladder(unserializable=("raise",))}))
    with pytest.raises(CompileFailed, match="add_stages_inspection_hook"):
        add()


def test_an_entry_under_another_name_is_no_answer(box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a child finds another ptxas."""
    from sandbox.inductor import launches

    encode = launches.launch.encode

    def other(
        kernel: Any, signature: Any, constants: Any, attrs: Any, options: Any, target: Any, variables: Any
    ) -> Any:
        target = triton.backends.compiler.GPUTarget("cuda", 80, 32)
        return encode(kernel, signature, constants, attrs, options, target, variables)

    monkeypatch.setattr(launches.launch, "encode", other)
    before = sandbox.stats().in_process_reasons.get("unserializable: name", 0)
    assert counted(box, add) == ({"in_process": 1}, 2)
    assert sandbox.stats().in_process_reasons["unserializable: name"] == before + 1


def test_a_deadline_of_the_caller_is_the_callers(box: sandbox.Sandbox) -> None:
    """What its signal handler raises while a launch waits is neither swallowed nor a reason to compile here."""

    def late(*_: Any) -> None:
        raise TimeoutError("the caller's deadline")

    def work() -> None:
        with faults.inject("hang"), pytest.raises(TimeoutError, match="the caller's deadline"):
            before = signal.signal(signal.SIGALRM, late)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            try:
                add()
            finally:
                signal.signal(signal.SIGALRM, before)

    assert counted(box, work) == ({}, 1)


def test_another_backend_is_told_what_is_known(box: sandbox.Sandbox) -> None:
    from sandbox.inductor import launches

    add()
    ((_, _, target, *_),) = kernels.add.device_caches.values()
    one = launches._Launch.__new__(launches._Launch)
    one.target = type(target)("xpu", "pvc", 32)
    with pytest.raises(launches.UnserializableError, match="a kernel for xpu; known are cuda, hip"):
        one._attempt("first", way=None)  # type: ignore[arg-type]


def test_without_the_policys_word_triton_compiles(
    box: sandbox.Sandbox, hits: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = install.installed()
    monkeypatch.setattr(scheme, "policy", POLICY.model_copy(update={"triton_launches": False}))
    assert counted(box, add) == ({}, 0)
    assert hits == [False]


def test_uninstall_gives_triton_and_dynamo_their_own_back() -> None:
    from torch._dynamo.backends.common import AotAutograd

    jit = triton.runtime.JITFunction
    sandbox.uninstall()
    before = jit._do_compile, AotAutograd.__call__
    for _ in range(2):
        sandbox.install(POLICY, "normal")
        assert jit._do_compile is not before[0] and AotAutograd.__call__ is not before[1]
        sandbox.uninstall()
        assert (jit._do_compile, AotAutograd.__call__) == before
