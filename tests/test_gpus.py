"""Graphs for a GPU, compiled on a machine that has none: from a snapshot, down to the binaries."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_graphs
import pytest
import torch
from pydantic import ValidationError

import sandbox
from benchmarks.corpus import models
from benchmarks.corpus.entry import Entry, Skip
from sandbox.errors import JobError
from sandbox.gpus import Gpus, recorded
from sandbox.jobs import Job
from sandbox.results import JobResult, Status

#: Of an ELF file for CUDA (e_machine).
EM_CUDA = 190


@pytest.fixture(scope="module")
def box() -> Iterator[sandbox.Sandbox]:
    with sandbox.Sandbox("default") as one:
        one.wait_ready()
        yield one


def compiled(box: sandbox.Sandbox, gm: Any, inputs: list[Any], folder: Path, **options: Any) -> JobResult:
    cache = {kind: folder / kind for kind in ("inductor", "triton")}
    return box.submit(sandbox.graph_job(gm, inputs, **options), cache=cache).result()


def card(capability: int) -> Gpus:
    """An H100, or what has its figures and another capability."""
    one = recorded("cuda:90")
    assert one is not None
    gpu = one.devices[0].model_copy(update={"major": capability // 10, "minor": capability % 10})
    return one.model_copy(update={"devices": (gpu,)})


def binaries(folder: Path) -> list[Path]:
    return sorted((folder / "triton").glob("*/*.cubin"))


def is_for(path: Path, capability: int) -> bool:
    """Whether it is CUDA's machine code for that capability, by the ELF header's e_flags: ABI 8 (CUDA 13) has it in the
    second byte, the older one in the first."""
    header = path.read_bytes()[:64]
    machine, flags = struct.unpack_from("<H", header, 18)[0], struct.unpack_from("<I", header, 48)[0]
    return header[:4] == b"\x7fELF" and machine == EM_CUDA and capability in (flags & 0xFF, flags >> 8 & 0xFF)


def normed(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm((x @ w).relu(), (64,)).softmax(-1)


def graph_of_normed() -> tuple[Any, list[Any]]:
    ((gm, inputs, role),) = gpu_graphs.captured(
        lambda compile: compile(normed)(torch.randn(32, 128), torch.randn(128, 64))
    )
    assert role == "inference"
    return gm, inputs


@pytest.mark.parametrize("capability", [90, 80])
def test_a_graph_for_a_card_that_is_not_here(box: sandbox.Sandbox, tmp_path: Path, capability: int) -> None:
    before = torch.cuda.is_available()
    result = compiled(box, *graph_of_normed(), tmp_path, target=f"cuda:{capability}", gpus=card(capability))
    assert result.status is Status.OK, result.detail
    found = binaries(tmp_path)
    assert found and all(is_for(path, capability) for path in found)
    assert {path.name for path in found} <= {Path(artifact.path).name for artifact in result.artifacts}
    assert result.leaks.leaks == ()
    assert torch.cuda.is_available() is before, "the snapshot answers in the child only"


def told_of(gpus: dict[str, Any]) -> dict[str, Any]:
    """In a child: what is answered from a snapshot, asked by the function that takes one."""
    from sandbox.gpus import Gpus
    from sandbox.inductor import devices, snapshot

    with snapshot.answering(Gpus.model_validate(gpus, strict=False)):
        return devices.here().model_dump()


def test_a_snapshot_is_what_is_answered_from_it(box: sandbox.Sandbox) -> None:
    one = recorded("cuda:90")
    assert one is not None
    for gpus in (one, Gpus(devices=one.devices * 2, current=1, cuda="12.8", peers=((0, 1),))):
        result = box.submit(sandbox.callable_job(told_of, gpus.model_dump())).result()
        assert result.status is Status.OK, result.detail
        assert result.value == gpus.model_dump()


def test_what_only_a_gpu_can_answer_is_named(box: sandbox.Sandbox, tmp_path: Path) -> None:
    with torch._inductor.config.patch(max_autotune_gemm=True, max_autotune_gemm_backends="TRITON"):
        result = compiled(box, *graph_of_normed(), tmp_path)
    assert result.status is Status.UNSERIALIZABLE
    assert "needs_gpu" in result.detail and "only a GPU can answer" in result.detail


def swallowed(gpus: dict[str, Any]) -> str:
    from sandbox.gpus import Gpus
    from sandbox.inductor import snapshot

    try:
        with snapshot.answering(Gpus.model_validate(gpus, strict=False)):
            try:
                torch.cuda.synchronize()
            except Exception:  # as Inductor does here and there
                return "a guess"
    except Exception as error:
        return str(error)
    return "nothing"


def test_a_question_whose_error_was_swallowed_is_told(box: sandbox.Sandbox) -> None:
    result = box.submit(sandbox.callable_job(swallowed, card(90).model_dump())).result()
    assert "needs_gpu: the compile asks for torch.cuda.synchronize" in result.value, result.detail


def test_a_graph_of_the_service_goes_to_a_child_without_a_gpu(
    box: sandbox.Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `gpu = false`. There is no GPU here either, so the service's is one that was recorded."""
    from sandbox.inductor import compat, devices, scheme
    from sandbox.policy import load

    facts = recorded("cuda:90")
    monkeypatch.setattr(devices, "here", lambda: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(scheme, "Sandbox", lambda policy: box)
    monkeypatch.setattr(
        scheme, "cache_folders", lambda device: {kind: tmp_path / kind for kind in ("inductor", "triton")}
    )
    gm, inputs = graph_of_normed()
    kwargs = {
        "cudagraphs": compat.BoxedBool(False), "static_input_idxs": (), "is_backward": False, "graph_id": None,
        "cpp_wrapper": False, "aot_mode": False, "is_inference": True, "layout_opt": None,
        "extern_node_serializer": None, "boxed_forward_device_index": None,
    }  # fmt: skip
    policy = load("default").model_copy(update={"gpu": False})
    compile_ = scheme._Compile(scheme.Scheme(policy, "subprocess"), gm, inputs, (), kwargs, None)
    with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
        value, _, result = compile_._walk(compile_._way(lambda value, _: value))
    assert result.status is Status.OK and value, result
    assert binaries(tmp_path) and all(is_for(path, 90) for path in binaries(tmp_path))

    def none() -> Gpus:
        raise RuntimeError("no GPU that this PyTorch can use")

    monkeypatch.setattr(devices, "here", none)
    with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
        value, step, result = compile_._walk(compile_._way(lambda value, _: value))
    assert (value, step, result.status) == (None, "in_process", Status.UNSERIALIZABLE)
    assert "gpu_facts: RuntimeError: no GPU that this PyTorch can use" in result.detail


def test_what_is_refused_before_anything_starts() -> None:
    gm, inputs = graph_of_normed()
    with pytest.raises(JobError, match="no snapshot of a GPU was recorded for 'cuda:75'"):
        sandbox.graph_job(gm, inputs, target="cuda:75")
    with pytest.raises(ValidationError, match="the target is 'cuda:75', and the snapshot's current GPU is 'cuda:90'"):
        sandbox.graph_job(gm, inputs, target="cuda:75", gpus=recorded("cuda:90"))
    with pytest.raises(JobError, match="the graph was not traced with FakeTensors"):
        sandbox.graph_job(torch.fx.symbolic_trace(lambda x: x.sin()), [torch.ones(3)])
    snapshot = recorded("cuda:90")
    assert snapshot is not None
    with pytest.raises(ValidationError, match="current is 1, and there are 1 devices"):
        Gpus(devices=snapshot.devices, current=1, cuda="13.0")
    with pytest.raises(ValidationError, match="peers names a device that is none of the 1"):
        Gpus(devices=snapshot.devices, cuda="13.0", peers=((0, 1),))


def test_kernels_side_by_side_are_those_of_one_after_the_other(box: sandbox.Sandbox, tmp_path: Path) -> None:
    def several(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (normed(x, w) @ w.t()).sort(-1).values.cumsum(0).var(1)

    ((gm, inputs, _),) = gpu_graphs.captured(
        lambda compile: compile(several)(torch.randn(32, 128), torch.randn(128, 64))
    )
    names = []
    for count in (1, 3):
        job = sandbox.graph_job(gm, inputs)
        job = Job(job.spec.model_copy(update={"kernel_threads": count}), job.payload)
        folder = tmp_path / str(count)
        result = box.submit(job, cache={kind: folder / kind for kind in ("inductor", "triton")}).result()
        assert result.status is Status.OK and result.leaks.leaks == (), result
        names.append({str(path.relative_to(folder)) for path in binaries(folder)})  # a hash of all that they depend on
    assert len(names[0]) >= 3 and names[0] == names[1]


def helped(dies: str) -> dict[str, str]:
    """In a child: who compiled the configurations of five kernels, if the helper that gets the kernel ``dies`` does."""
    from sandbox.inductor import compat, helpers

    child = os.getpid()

    def configuration(what: tuple[str, str, int]) -> None:
        name, _, number = what
        if name == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "wrong":
            raise ValueError("in a helper")
        with open(f"made-{name}", "a") as file:
            file.write(f"{number} ")

    def alone(self: Any, name: str, source: str, device: str = "cuda") -> str:
        if name == "wrong":
            raise ValueError(f"{source} in {'the child' if os.getpid() == child else 'a helper'}")
        with open(f"made-{name}", "a") as file:
            file.write("child")
        return name

    told: dict[str, str] = {}
    with (
        compat.replaced(compat.AsyncCompile, "triton", alone),
        compat.replaced(helpers, "_compile_one", configuration),
        compat.replaced(helpers, "_configurations", lambda name, source: 2),
        helpers.side_by_side(2),
    ):
        compiler = compat.AsyncCompile()
        made = {name: compiler.triton(name, f"source of {name}") for name in ("one", "two", "three", "four", "wrong")}
        for name, future in made.items():
            try:
                assert future.result() == name
                told[name] = "".join(sorted(Path(f"made-{name}").read_text().removesuffix("child").split()))
            except ValueError as error:
                told[name] = str(error)
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        told["left"] = "none"
    return told


@pytest.mark.parametrize("dies", ["", "two"])
def test_a_helper_that_dies_or_fails_is_no_trouble(box: sandbox.Sandbox, dies: str) -> None:
    result = box.submit(sandbox.callable_job(helped, dies)).result()
    assert result.status is Status.OK, result.detail
    found = result.value
    assert found.pop("left") == "none" and found.pop("wrong") == "source of wrong in the child"
    assert set(found) == {"one", "two", "three", "four"}
    if dies:
        # Both helpers got a configuration of it. What they had before it, they have done; the child does all.
        assert found["two"] == "" and found["one"] == "01"
    else:
        assert all(text == "01" for text in found.values()), found


def crowded(count: int) -> int:
    """In a child: so many kernels with long sources for two helpers, all given before the first is waited for."""
    from sandbox.inductor import compat, helpers

    with (
        compat.replaced(compat.AsyncCompile, "triton", lambda self, name, source, device="cuda": len(source)),
        compat.replaced(helpers, "_compile_one", lambda what: None),
        compat.replaced(helpers, "_configurations", lambda name, source: 1),
        helpers.side_by_side(2),
    ):
        compiler = compat.AsyncCompile()
        made = [compiler.triton(f"kernel_{number}", f"{number:010000}") for number in range(count)]
        return sum(future.result() for future in made)


def test_helpers_of_a_graph_with_very_many_kernels(box: sandbox.Sandbox) -> None:
    """More answers than a socket holds, while the child still gives out kernels."""
    result = box.submit(sandbox.callable_job(crowded, 3000)).result()
    assert (result.status, result.value) == (Status.OK, 30_000_000), result.detail


def test_constants_that_are_needed_on_the_gpu(box: sandbox.Sandbox, tmp_path: Path) -> None:
    """Inductor copies them there while it compiles; from a child without a GPU they come back to be put there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from sandbox.inductor import tensors

    table = torch.arange(16, dtype=torch.float32)

    def function(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + torch.ops.prims.device_put(table, gpu_graphs.CUDA),)

    gpu_graphs.lend_device_guard()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(4, 16, device=gpu_graphs.CUDA)
        gm = make_fx(function, tracing_mode="real")(x)
    result = compiled(box, gm, [x], tmp_path)
    assert result.status is Status.OK, result.detail
    constants = result.value["graph"]["constants"]
    moved = [value["tensor"] for value in constants.values() if "tensor" in value]
    assert [one["device"] for one in moved] == ["cuda:0"], constants
    assert torch.equal(tensors.decode({**moved[0], "device": "cpu"}), table)
    assert binaries(tmp_path)


def test_constants_that_stand_on_the_gpu(box: sandbox.Sandbox, tmp_path: Path) -> None:
    """A tensor that a function makes on the GPU, or a frozen weight. In the child it is a copy in memory; what comes
    back names the service's own."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sandbox.inductor import tensors

    gpu_graphs.lend_device_guard()
    graph = torch.fx.Graph()
    with FakeTensorMode():
        x, table = torch.empty(4, 16, device=gpu_graphs.CUDA), torch.empty(16, device=gpu_graphs.CUDA)
        found = x + table
    first, second = graph.placeholder("x"), graph.get_attr("table")
    total = graph.call_function(torch.ops.aten.add.Tensor, (first, second))
    last = graph.output((total,))
    for node, value in ((first, x), (second, table), (total, found), (last, (found,))):
        node.meta["val"] = value
    holder = torch.nn.Module()
    holder.table = tensors.meant_for(torch.arange(16.0), gpu_graphs.CUDA)  # as one there would be sent
    gm = torch.fx.GraphModule(holder, graph)
    result = compiled(box, gm, [x], tmp_path)
    assert result.status is Status.OK, result.detail
    constants = list(result.value["graph"]["constants"].values())
    assert constants and all(each == {"attribute": "table"} for each in constants), constants
    assert binaries(tmp_path)


def test_only_the_code_generator_is_told_of_helpers() -> None:
    """Whoever else asks would start Inductor's pool of processes, or wait for what a helper does not give."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.triton import async_compile

    from sandbox.inductor import compat, compile

    with compile.threads(2):
        with compat.written_ahead():
            assert async_compile.use_process_pool()
            assert not AsyncCompile().use_process_pool() and not AsyncCompile.use_process_pool()
        assert not async_compile.use_process_pool()


#: Models of the corpus. (That all of them have more than 1,000 kernels was seen; these take a minute.)
MODELS = ("llama", "gpt2", "bert", "vit", "mixer", "lennard-jones")


def model_entries() -> list[Entry]:
    wanted = {f"model/{name}/{what}" for name in MODELS for what in ("inference", "training")}
    return [entry for entry in models.entries() if entry.name in wanted]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_kernels_of_the_models(box: sandbox.Sandbox, tmp_path: Path) -> None:
    """At least 200 different ones, of inference and training."""
    futures = []
    entries = model_entries()
    assert len(entries) == 2 * len(MODELS)
    for entry in entries:
        try:
            case = entry.make()
        except Skip as skip:
            pytest.fail(f"{entry.name}: {skip}: the extra `demo` is not installed")

        def step(compile: Any, case: Any = case, training: bool = entry.training) -> None:
            for call in case.calls:
                with torch.set_grad_enabled(training):
                    found = compile(case.function)(*call.args, **call.kwargs)
                if training:
                    sum(one.float().sum() for one in torch.utils._pytree.tree_leaves(found)).backward()

        for gm, inputs, role in gpu_graphs.captured(step, entry.training):
            cache = {kind: tmp_path / kind for kind in ("inductor", "triton")}
            job = sandbox.graph_job(gm, inputs, role=role)
            futures.append((f"{entry.name} {role}", box.submit(job, cache=cache)))
    for name, future in futures:
        result = future.result()
        assert result.status is Status.OK, f"{name}: {result.detail}"
    found = binaries(tmp_path)
    assert all(is_for(path, 90) for path in found)
    assert len({path.read_bytes() for path in found}) >= 200, len(found)


def compile_of_service(monkeypatch: pytest.MonkeyPatch, policy: Any, gm: Any, inputs: list[Any]) -> Any:
    """A compile of the service's, which seems to have a GPU."""
    from sandbox.inductor import compat, devices, scheme

    facts = recorded("cuda:90")
    monkeypatch.setattr(devices, "here", lambda: facts)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kwargs = {
        "cudagraphs": compat.BoxedBool(False), "static_input_idxs": (), "is_backward": False, "graph_id": None,
        "cpp_wrapper": False, "aot_mode": False, "is_inference": True, "layout_opt": None,
        "extern_node_serializer": None, "boxed_forward_device_index": None,
    }  # fmt: skip
    with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
        compile_ = scheme._Compile(scheme.Scheme(policy, "subprocess"), gm, inputs, (), kwargs, None)
        compile_._encoded()
    return compile_


@pytest.mark.parametrize("granted", [False, True])
def test_a_gpu_is_granted_where_a_child_needs_one(
    box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch, granted: bool
) -> None:
    from sandbox.errors import UnserializableError
    from sandbox.inductor import scheme
    from sandbox.inductor.walk import no_child
    from sandbox.policy import load

    monkeypatch.setattr(scheme, "Sandbox", lambda policy: box)
    policy = load("default").model_copy(update={"gpu": granted})
    compile_ = compile_of_service(monkeypatch, policy, *graph_of_normed())
    had: list[tuple[bool, bool]] = []

    def child(job: Job, *_: Any) -> tuple[Any, JobResult]:
        had.append((job.spec.gpu, job.spec.gpus is not None))
        return None, no_child(Status.UNSERIALIZABLE, "UnserializableError: needs_gpu: the compile asks for more")

    monkeypatch.setattr(compile_.walk, "child", child)
    way = compile_._way(lambda value, _: value)
    without, with_one = (False, True), (True, False)
    compile_._attempt("first", way=way)
    assert had == ([without, with_one] if granted else [without])
    if granted:
        compile_._attempt("retry", way=way)
        assert had == [without, with_one, with_one]
    else:
        with pytest.raises(UnserializableError, match="needs_gpu"):
            compile_._attempt("retry", way=way)
        assert had == [without], "what is certain is not tried again"


def test_a_gpu_is_granted_by_settings_but_for_those_of_the_step(
    box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandbox.inductor import scheme
    from sandbox.inductor.walk import no_child
    from sandbox.policy import load

    monkeypatch.setattr(scheme, "Sandbox", lambda policy: box)
    policy = load("default").model_copy(update={"gpu": True, "reduced": {"max_autotune": False}})
    compile_ = compile_of_service(monkeypatch, policy, *graph_of_normed())
    had: list[bool] = []

    def child(job: Job, *_: Any) -> tuple[Any, JobResult]:
        had.append(job.spec.gpu)
        return None, no_child(Status.CRASHED, "it died")

    monkeypatch.setattr(compile_.walk, "child", child)
    with torch._inductor.config.patch(max_autotune=True):
        for step in ("first", "reduced"):
            compile_._attempt(step, way=compile_._way(lambda value, _: value))
    assert had == [True, False]


def test_a_kernel_that_fails_late_ends_its_graph_by_its_own_status(
    box: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as one that Inductor compiles when it loads the graph; a deadline of the caller's stays one."""
    from sandbox.errors import CompileFailed
    from sandbox.inductor import scheme
    from sandbox.inductor.walk import Walk
    from sandbox.policy import load

    monkeypatch.setattr(scheme, "Sandbox", lambda policy: box)
    made = scheme.Scheme(load("default"), "subprocess")
    walk = Walk(made.policy, box, made.flights, made.quarantine, "a graph")

    def fails(error: BaseException) -> Any:
        def load_(value: Any, job_id: str) -> Any:
            raise error

        way = scheme.Way(load_, "key", {}, {})
        return walk.child(sandbox.callable_job(abs, -1), way, "first", lambda: {"inductor": tmp_path})

    value, result = fails(CompileFailed("timeout", "ptxas hangs", "job-1"))
    assert value is None and result.status is Status.TIMEOUT and "a kernel of it" in result.detail
    with pytest.raises(TimeoutError):
        fails(TimeoutError("the request's time is over"))


def test_a_smaller_block_that_cannot_be_had_is_left_out() -> None:
    from sandbox.errors import CompileFailed
    from sandbox.inductor import compat

    told: list[Exception] = []
    before = compat.CachingAutotuner._dynamic_scale_rblock
    compat.CachingAutotuner._dynamic_scale_rblock = lambda self: (_ for _ in ()).throw(
        CompileFailed("timeout", "", "j")
    )
    try:
        inner = compat.guard_scaling(told.append)
        compat.CachingAutotuner._dynamic_scale_rblock(object.__new__(compat.CachingAutotuner))
        compat.restore_scaling(inner)
        assert [type(error) for error in told] == [CompileFailed]
        with pytest.raises(CompileFailed):
            compat.CachingAutotuner._dynamic_scale_rblock(object.__new__(compat.CachingAutotuner))
    finally:
        compat.CachingAutotuner._dynamic_scale_rblock = before
