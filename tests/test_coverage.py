"""What is known to be trouble for a compile in another process goes to a child, with eager's results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import inductor_harness
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils import _pytree as pytree

from benchmarks.corpus import special_graphs, special_registered, special_uses, special_values  # noqa: F401
from benchmarks.corpus.cases import CASES
from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import aoti, compat, outputcode, pickling, registrations
from sandbox.inductor.scheme import Scheme
from sandbox.policy import ForkserverSettings, Policy

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # torch's own, about complex numbers, profilers and what is to go
]

POLICY = Policy(name="coverage", forkserver=ForkserverSettings(preload=("benchmarks.corpus.lowered",)))
#: Cheap ones of all kinds; `python -m benchmarks.corpus` runs the rest.
CHEAP = (
    "cond_nested_dynamic", "while_loop", "flex_attention", "nested_compile_region", "selective_checkpoint",
    "unbacked_nonzero", "unbacked_item", "mark_dynamic", "complex_numbers", "nan_in_argmax", "mutated_inputs",
    "subclass_training", "nested_jagged", "set_stance", "custom_op", "custom_lowering", "pass_joint", "pass_by_value",
    "pass_with_custom_op",
)  # fmt: skip
#: A pass changes what is computed: how eager computes it.
CHANGED: dict[str, Callable[[Any], Any]] = {
    "pass_by_value": lambda x: torch.cos(x) + 1,
    "pass_with_custom_op": lambda x: x * 3 + 1,
}


@pytest.fixture(scope="module")
def scheme() -> Iterator[Scheme]:
    with inductor_harness.installed(POLICY) as one:
        yield one


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    # Eager draws its random numbers otherwise.
    settings = {"fx_graph_cache": False, "fallback_random": True}
    with torch._inductor.config.patch(settings), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def uncompiled(function: Any, **options: Any) -> Any:
    return function


def plain(value: Any) -> list[Any]:
    return [item.detach() if isinstance(item, torch.Tensor) else item for item in pytree.tree_leaves(value)]


@pytest.mark.parametrize("name", CHEAP)
def test_every_graph_goes_to_a_child_and_computes_what_eager_does(scheme: Scheme, name: str) -> None:
    before = scheme.sandbox.stats()
    torch.manual_seed(7)
    got = plain(CASES[name](torch.compile))
    after = scheme.sandbox.stats()
    assert after.graphs - before.graphs == after.in_child - before.in_child > 0, after.in_process_reasons
    if name == "pass_joint":
        return  # it runs before the hook: that the graph was sent all the same is the point
    torch.manual_seed(7)
    eager = (lambda function, **options: CHANGED[name]) if name in CHANGED else uncompiled
    torch.testing.assert_close(got, plain(CASES[name](eager)), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_equal_seeds_give_equal_numbers(scheme: Scheme) -> None:
    with torch._inductor.config.patch(fallback_random=False):
        results = []
        for seed in (3, 3, 4):
            torch._dynamo.reset()
            compiled = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.5) + torch.rand_like(x))
            torch.manual_seed(seed)
            results.append(compiled(torch.ones(64)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A group of this process alone. `python -m benchmarks.corpus.distributed` has two."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_groups_and_meshes_are_known_in_a_child(scheme: Scheme, mesh: Any) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        summed = collectives.all_reduce(x.sin(), "sum", dist.group.WORLD)
        made = DTensor.from_local(summed, mesh, [Shard(0)], run_check=False)
        return made.redistribute(mesh, [Replicate()]).to_local() + 1

    before = scheme.sandbox.stats()
    x = torch.randn(4)
    torch.testing.assert_close(torch.compile(run)(x), x.sin() + 1)
    after = scheme.sandbox.stats()
    assert after.graphs - before.graphs == after.in_child - before.in_child == 1, after.in_process_reasons


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse().coalesce().requires_grad_(),
        lambda: torch.eye(4).to_sparse_csr(),
        lambda: torch.eye(4).to_sparse_csc(),
        lambda: torch.eye(4).to_sparse_bsr((2, 2)),
        lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
        lambda: torch.quantize_per_channel(
            torch.randn(2, 3), torch.ones(2), torch.zeros(2, dtype=torch.int64), 0, torch.quint8
        ),
        lambda: TwoTensor(torch.ones(2, 3).t(), torch.arange(6.0).view(2, 3).t()),
        lambda: torch.randn(3).as_subclass(Named).requires_grad_(),
        lambda: torch.nn.Parameter(torch.randn(2)),
    ],
)
def test_constants_of_any_layout_and_class_arrive(make: Callable[[], torch.Tensor]) -> None:
    sent = make()
    got = pickling.loads(pickling.dumps({"constant": sent}), None)["constant"]
    assert type(got) is type(sent) and got.layout is sent.layout and got.requires_grad == sent.requires_grad
    assert got.dtype is sent.dtype and got.shape == sent.shape
    if isinstance(sent, TwoTensor):
        assert torch.equal(got.a, sent.a) and torch.equal(got.b, sent.b) and got.stride() == sent.stride()
    elif sent.is_quantized:
        assert got.qscheme() is sent.qscheme() and torch.equal(got.int_repr(), sent.int_repr())
    else:
        assert torch.equal(got.detach().to_dense(), sent.detach().to_dense())


def test_a_class_of_opaque_values_comes_back_only_if_it_is_registered_here() -> None:
    for where in ("builtins:dict", "subprocess:Popen", "torch:Tensor", "os:system", "nowhere:Thing", "", None, 3):
        with pytest.raises(WireError):
            outputcode.decode_class(where)
    for where in ("x" * 100_000, f"{'x' * 100_000}:Thing", "torch:\x1b[2J", "torch:Tensor\n"):
        with pytest.raises(WireError) as refused:
            outputcode.decode_class(where)
        assert len(str(refused.value)) < 200 and str(refused.value).isprintable()


class Named(torch.Tensor):
    """A subclass without tensors inside."""


# What only this process knows ----------------------------------------------------------------------------------

LIBRARY = torch.library.Library("coverage_only_here", "DEF")
LIBRARY.define("double(Tensor x) -> Tensor")
LIBRARY.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
LIBRARY.define("double_it(Tensor x) -> Tensor")
torch.library.register_fake("coverage_only_here::double", lambda x: torch.empty_like(x), lib=LIBRARY)


def refused(scheme: Scheme, function: Callable[[torch.Tensor], torch.Tensor], reason: str) -> int:
    """Compile in this process for ``reason``, with eager's result. Returns how many children were started."""
    torch._dynamo.reset()
    before = scheme.sandbox.stats()
    x = torch.randn(5)
    torch.testing.assert_close(torch.compile(function)(x), function(x))
    after = scheme.sandbox.stats()
    assert after.in_process - before.in_process == 1
    assert after.raised == before.raised
    assert after.in_process_reasons[reason] == before.in_process_reasons.get(reason, 0) + 1
    return after.children_started - before.children_started


def test_an_op_of_this_process_alone_is_named_and_asked_for_once(scheme: Scheme) -> None:
    double = torch.ops.coverage_only_here.double
    assert refused(scheme, lambda x: double(x) + 1, "unserializable: unknown_op") == 1
    detail = scheme.sandbox.stats().jobs[-1].detail
    assert "coverage_only_here::double" in detail and "forkserver.preload" in detail
    assert refused(scheme, lambda x: double(x.cos()) - 1, "unserializable: unknown_op") == 0


def test_a_lowering_of_this_process_alone_is_not_left_out_in_silence(
    scheme: Scheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lowered(x: Any) -> Any:
        return torch._inductor.lowering.lowerings[torch.ops.aten.mul.Tensor](x, 1)

    monkeypatch.setitem(torch._inductor.lowering.lowerings, torch.ops.aten.alias.default, lowered)
    monkeypatch.setitem(torch._inductor.lowering.lowerings, torch.ops.aten.relu.default, lowered)
    assert refused(scheme, lambda x: x.abs().relu(), "unserializable: unregistered") == 1
    assert f"the lowering of aten.relu.default is not registered in the child: name {__name__} in" in (
        scheme.sandbox.stats().jobs[-1].detail
    )


def test_an_op_that_a_pass_asks_for_is_no_error_of_the_compiler(scheme: Scheme) -> None:
    def to_double(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.coverage_only_here.double.default

    x = torch.ones(4)
    before = scheme.sandbox.stats()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=to_double):
        torch.testing.assert_close(torch.compile(lambda x: torch.sin(x) + 1)(x), x * 2 + 1)
    after = scheme.sandbox.stats()
    assert after.in_process - before.in_process == 1 and after.raised == before.raised
    assert "coverage_only_here::double is not registered" in after.jobs[-1].detail


def test_an_op_whose_name_begins_anothers_is_not_refused_with_it() -> None:
    def graph(*names: str) -> torch.fx.GraphModule:
        made = torch.fx.Graph()
        for name in names:
            made.call_function(getattr(torch.ops.coverage_only_here, name).default, (made.placeholder(f"x_{name}"),))
        return torch.fx.GraphModule({}, made)

    refused = registrations.Refused()
    complaint = registrations.complaint("the op coverage_only_here::double_it", "")
    refused.note(graph("double", "double_it"), f"UnserializableError: unknown_op: {complaint}")
    refused.check(graph("double"))
    with pytest.raises(UnserializableError, match="double_it is not registered"):
        refused.check(graph("double_it"))


# Packages ------------------------------------------------------------------------------------------------------


def test_a_package_is_made_in_a_child_and_lies_where_the_caller_wants_it(scheme: Scheme, tmp_path: Path) -> None:
    x = torch.randn(4, 8)
    module = special_registered.Small()
    before = scheme.sandbox.stats()
    # Without a header of its own: it takes longer than both files that include it.
    settings = {"aot_inductor.output_path": str(tmp_path / "mine.so"), "aot_inductor.precompile_headers": False}
    path = torch._inductor.aot_compile(torch.export.export(module, (x,)).module(), (x,), options=settings)
    after = scheme.sandbox.stats()
    assert after.graphs - before.graphs == after.in_child - before.in_child == 1
    assert path == str(tmp_path / "mine.so")
    torch.testing.assert_close(torch._export.aot_load(path, "cpu")(x), module(x))
    assert all(name == "mine.so" or name.endswith((".cpp", ".json")) for name in os.listdir(tmp_path))
    assert os.stat(path).st_mode & 0o100


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["named.so"], ["named.so", "libc.so"]),
        (["named.so"], ["named.so", "mine.so"]),
        (["named.so"], ["named.so", ".bashrc"]),
        (["named.so"], ["named.so", "sub/named.so"]),
        (["../named.so"], ["named.so"]),
        (["/etc/passwd"], ["named.so"]),
        (["named.so", "named.so"], ["named.so"]),
        ([None], ["named.so"]),
        ([], ["named.so"]),
        (["c" * 52 + ".wrapper.so"], ["named.so"]),
    ],
)
def test_a_package_puts_no_file_under_another_name(tmp_path: Path, files: list[Any], names: list[str]) -> None:
    (tmp_path / "libc.so").write_text("mine")
    with compat.inductor_config.patch({"aot_inductor.output_path": str(tmp_path / "mine.so")}):
        with pytest.raises(WireError), aoti.staging() as staged:
            for name in names:
                (staged / name).parent.mkdir(exist_ok=True)
                (staged / name).write_text("theirs")
            data = {"files": files, "single": True, "device_type": "cpu", "weights": None}
            aoti.decode(data, torch.fx.GraphModule({}, torch.fx.Graph()), staged)
    assert sorted(os.listdir(tmp_path)) == ["libc.so"]
    assert (tmp_path / "libc.so").read_text() == "mine"


@pytest.fixture
def staged_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Decodes a package of one file that is no library, for `mine.so` below the current folder."""
    monkeypatch.chdir(tmp_path)

    def decoded(name: str, **settings: Any) -> Any:
        with compat.inductor_config.patch({"aot_inductor.output_path": "mine.so", **settings}):
            with aoti.staging() as staged:
                (staged / name).write_text("theirs")
                data = {"files": [name], "single": False, "device_type": "cpu", "weights": None}
                return aoti.decode(data, torch.fx.GraphModule({}, torch.fx.Graph()), staged)

    return decoded


def test_a_relative_library_lies_below_the_current_folder(tmp_path: Path, staged_package: Callable[..., Any]) -> None:
    assert staged_package("named.so").filename == [str(tmp_path / "mine.so")]
    assert os.listdir(tmp_path) == ["mine.so"]


@pytest.mark.parametrize("name", ["named.so", "c" * 52 + ".wrapper.cpp"])
def test_a_package_that_cannot_be_loaded_is_the_childs_fault(name: str, staged_package: Callable[..., Any]) -> None:
    with pytest.raises(WireError, match="cannot be loaded"):
        staged_package(name, enable_autograd_for_aot=True)
