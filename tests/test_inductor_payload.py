"""Graphs there and back: payload, child, reply, load. Each test compares with eager."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from inductor_harness import Template  # noqa: E402
from torch import nn  # noqa: E402

from sandbox import child  # noqa: E402
from sandbox.errors import IncompatibleTorchError, UnserializableError, WireError  # noqa: E402
from sandbox.inductor import compat, expressions, failures, jitted, kernels, payload, pickling, reply, sidetable  # noqa: E402
from sandbox.inductor.budget import Budget  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Iterator[Template]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("parent"))
    torch.set_num_threads(1)
    compat.disable_worker_pool()
    made = Template()
    yield made
    made.close()
    kernels.remove_loader()
    compat.enable_worker_pool()


def same(left: Any, right: Any) -> None:
    left, right = torch.utils._pytree.tree_leaves(left), torch.utils._pytree.tree_leaves(right)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def cond(p: Any, x: Any) -> Any:
    return torch.cond(p, lambda x: x.sin() + 1, lambda x: x.cos(), (x,))


def mutates(x: Any, y: Any) -> Any:
    x.add_(1)
    return x + y, x.shape[0] * 2


def constants(x: Any) -> Any:
    return x + torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3) + torch.full((3,), 2.5)


SMALL: dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "matmul": (lambda x, y: torch.softmax(x @ y, -1), lambda: (torch.randn(8, 8), torch.randn(8, 8))),
    "cond": (cond, lambda: (torch.tensor(True), torch.randn(3))),
    "mutates": (mutates, lambda: (torch.randn(4), torch.randn(4))),
    "constants": (constants, lambda: (torch.randn(3),)),
    "complex": (lambda x: (x * x).real + x.abs(), lambda: (torch.randn(4, dtype=torch.complex64),)),
    "fallback": (lambda x: (x.sort()[0], x.topk(2)[1]), lambda: (torch.randn(8),)),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_graphs_compute_what_eager_computes(template: Template, name: str) -> None:
    function, make = SMALL[name]
    arguments = make()
    expected = function(*copy.deepcopy(arguments))
    with template.installed():
        same(torch.compile(function)(*arguments), expected)
    assert template.replies
    assert _plain(template.replies[0])


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_plain(item) for item in value)
    return type(value) in (int, float, str, bytes, bool, type(None))


def test_the_warm_up_leaves_no_thread_behind(template: Template) -> None:
    assert template.threads_added == 0


def test_a_training_step_of_a_conv_net(template: Template) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    other, x = copy.deepcopy(model), torch.randn(2, 3, 8, 8)
    with template.installed():
        torch.compile(model)(x).sum().backward()
    other(x).sum().backward()
    same([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
    assert len(template.replies) == 2


def test_dynamic_shapes_serve_other_sizes_without_a_new_compile(template: Template) -> None:
    def function(x: Any) -> Any:
        return (x * 2).sum(0) / x.shape[0], x.shape[0] * 3

    with template.installed():
        compiled = torch.compile(function, dynamic=True)
        for size in (5, 9, 12):
            x = torch.randn(size, 7)
            same(compiled(x), function(x))
    assert len(template.replies) == 1


def test_a_guard_that_only_lowering_adds_arrives(template: Template) -> None:
    """Lowering specialises adaptive pooling on the size it sees; without the guard, 7 would run the code for 9."""

    def function(x: Any) -> Any:
        return F.adaptive_avg_pool2d(x, 3)

    with template.installed():
        compiled = torch.compile(function, dynamic=True)
        for size in (9, 7, 9):
            x = torch.randn(1, 2, size, size)
            same(compiled(x), function(x))
    assert len(template.replies[0]["guards"]) >= 1
    assert len(template.replies) == 2, "the other size must be compiled anew"


@pytest.mark.parametrize("wrapper", [False, True])
def test_loading_needs_no_compiler_and_starts_no_worker(template: Template, monkeypatch: Any, wrapper: bool) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"the parent started {args}")

    function = SMALL["matmul"][0]
    x = torch.randn(6, 6)
    with template.installed(), monkeypatch.context() as patch, compat.inductor_config.patch(cpp_wrapper=wrapper):
        patch.setattr(subprocess, "Popen", refuse)
        patch.setattr(os, "fork", refuse)
        same(torch.compile(function)(x, x), function(x, x))
    assert not compat.async_compile._pool_set


def test_a_payload_is_the_same_twice_and_names_no_cache_folder(template: Template) -> None:
    seen: list[bytes] = []

    def twice(gm: Any, example_inputs: Any, inputs_to_check: Any, compile_region_name: Any = None, **kw: Any) -> Any:
        seen.extend(payload.encode(gm, example_inputs, inputs_to_check, kw) for _ in range(2))
        return template.compile_locally(gm, example_inputs, inputs_to_check, compile_region_name, **kw)

    with template.installed():
        compat.replace_compile(twice)
        torch.compile(lambda x: x.sin())(torch.randn(3))
    assert seen[0] == seen[1]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].encode() not in seen[0]


def test_weights_do_not_travel(template: Template) -> None:
    model = nn.Linear(256, 256)
    with template.installed():
        torch.compile(model)(torch.randn(2, 256)).sum().backward()
    weight = model.weight.detach().numpy().tobytes()
    assert all(weight[:64] not in data for data in template.payloads)


def test_the_thread_count_of_the_parent_is_in_the_code(template: Template, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with template.installed():
        torch.compile(lambda x: x.sin() + 1)(torch.randn(1 << 20))
    assert "num_threads(7)" in template.replies[0]["graph"]["source_code"]


def test_a_custom_pass_travels_by_value_and_its_error_comes_back(template: Template) -> None:
    def subtracts(graph: Any) -> None:
        for node in graph.nodes:
            if node.target is torch.ops.aten.add.Tensor:
                node.target = torch.ops.aten.sub.Tensor

    def fails(graph: Any) -> None:
        raise ValueError("from the pass")

    x, y = torch.randn(4), torch.randn(4)
    with template.installed(), compat.inductor_config.patch(post_grad_custom_pre_pass=subtracts):
        same(torch.compile(lambda x, y: x.sin() + y)(x, y), x.sin() - y)
    with template.installed(), compat.inductor_config.patch(post_grad_custom_pre_pass=fails):
        with pytest.raises(torch._inductor.exc.InductorError, match="ValueError: from the pass"):
            torch.compile(lambda x: x.sin())(x)


def test_counts_and_output_code_reach_the_parent(template: Template) -> None:
    saved: list[str] = []
    before = compat.metrics.generated_kernel_count
    with template.installed(), compat.replaced(compat.GraphLowering, "save_output_code", staticmethod(saved.append)):
        torch.compile(lambda x: x.sin() + 1)(torch.randn(50))
    assert compat.metrics.generated_kernel_count > before
    assert saved == [template.replies[0]["graph"]["source_code"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_training_steps_of_transformers(template: Template, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    if name == "llama":
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model, x = transformers.LlamaForCausalLM(config), torch.randint(0, 50, (2, 8))
    elif name == "gpt2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model, x = transformers.GPT2LMHeadModel(config), torch.randint(0, 50, (2, 8))
    else:
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
        model, x = transformers.ViTModel(config), torch.randn(2, 3, 16, 16)
    model.eval()
    other = copy.deepcopy(model)

    def loss(output: Any) -> Any:
        return (output.logits if hasattr(output, "logits") else output.last_hidden_state).sin().mean()

    with template.installed():
        loss(torch.compile(model)(x)).backward()
    loss(other(x)).backward()
    # Eager leaves None where the compiled step gives zeros (the pooler that the loss does not use).
    both = zip(model.parameters(), other.parameters(), strict=True)
    pairs = [(p.grad, q.grad) for p, q in both if q.grad is not None]
    same([one for one, _ in pairs], [two for _, two in pairs])
    assert max(float(two.abs().max()) for _, two in pairs) > 1e-4


def test_a_malformed_reply_is_a_wire_error_and_nothing_else(template: Template) -> None:
    kept: list[Any] = []

    def keep(gm: Any, example_inputs: Any, inputs_to_check: Any, compile_region_name: Any = None, **kw: Any) -> Any:
        kept.append((gm, example_inputs, inputs_to_check, kw))
        return template.compile_locally(gm, example_inputs, inputs_to_check, compile_region_name, **kw)

    with template.installed():
        compat.replace_compile(keep)
        torch.compile(lambda x: x.sin() + 1)(torch.randn(5))
    gm, example_inputs, inputs_to_check, kw = kept[0]
    good = template.replies[0]
    with pytest.raises(WireError):
        reply.decode_graph(None, gm, example_inputs, inputs_to_check, kw)
    optional = ("extern_libs_key", "disabled_cudagraphs_reason", "inductor_prov", "_")
    for name in good["graph"]:
        for bad in (object(), {"x": object()}, [object()], -1.5):
            broken = copy.deepcopy(good)
            broken["graph"][name] = bad
            with pytest.raises(WireError):
                reply.decode_graph(broken, gm, example_inputs, inputs_to_check, kw)
        if not name.startswith(optional):
            broken = copy.deepcopy(good)
            del broken["graph"][name]
            if good["graph"][name] is not None:
                with pytest.raises(WireError):
                    reply.decode_graph(broken, gm, example_inputs, inputs_to_check, kw)
    for name in ("guards", "kernels", "counts", "logs", "warnings", "graph"):
        broken = {**good, name: "nonsense"}
        with pytest.raises(WireError):
            reply.decode_graph(broken, gm, example_inputs, inputs_to_check, kw)


@pytest.mark.parametrize(
    "tree",
    [
        ["symbol", "s99"], ["call", "sympy.exec", []], ["int", 1 << 4000], ["int", True], "s0", [],
        ["call", "sympy.Add"], ["call", "sympy.Pow", [["int", 10], ["int", 1 << 60]]], ["rational", 1, 0],
        ["call", "torch.FloorDiv", [["int", 1]]],
    ],
)  # fmt: skip
def test_a_malformed_expression_is_a_wire_error(tree: Any) -> None:
    with pytest.raises(WireError):
        expressions.decode(tree, {}, Budget())


@pytest.mark.parametrize(
    "text", ["__import__('os')", "s0.real", "(lambda: 1)()", "[1]", "s1 * 2", "", "1 +", "print(1)"]
)
def test_a_stride_that_is_not_arithmetic_is_a_wire_error(text: str) -> None:
    with pytest.raises(WireError):
        expressions.check_stride(text, frozenset({"s0"}), Budget())
    assert expressions.check_stride("s0*max(1, s0 // 2)", frozenset({"s0"}), Budget())


def test_an_error_of_the_compiler_is_raised_as_its_own_class() -> None:
    from torch._inductor.exc import LoweringException

    original = LoweringException(ValueError("no"), "aten.foo", (), {})
    failure = child._failure(original)
    assert json.loads(failure.model_dump_json())
    error = failures.rebuild_exception(failure)
    assert isinstance(error, LoweringException)
    assert str(error) == str(original)
    forged = failure.model_copy(update={"module": "os", "qualname": "system"})
    assert type(failures.rebuild_exception(forged)) is RuntimeError
    exits = failure.model_copy(update={"module": "builtins", "qualname": "SystemExit"})
    assert type(failures.rebuild_exception(exits)) is RuntimeError


def test_what_cannot_travel_says_why() -> None:
    with pytest.raises(UnserializableError) as caught:
        pickling.dumps({"a": iter([1]), "b": open(os.devnull)})
    assert caught.value.reason == "not_picklable"


@pytest.mark.parametrize("name", ["contiguous_format", "channels_last", "strided", "sparse_coo", "per_tensor_affine"])
def test_what_does_not_say_where_it_lives_is_found_in_torch(name: str) -> None:
    """A script that has imported multiprocessing before torch is in `sys.modules` as __mp_main__, too."""
    value = getattr(torch, name)
    data = pickling.dumps([value])
    assert f"torch.{name}".encode() not in data
    assert pickling.loads(data, None)[0] is value


def test_a_missing_private_name_is_told(monkeypatch: Any) -> None:
    compat.check()
    monkeypatch.setattr(compat, "NAMES", {"x": compat.Private("torch._inductor.nothing:here")})
    with pytest.raises(IncompatibleTorchError, match=r"2\.11 and 2\.13.*torch\._inductor\.nothing"):
        compat.check()


def test_a_pytorch_built_without_distributed_lacks_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for module in ("torch.distributed.distributed_c10d", "torch.testing._internal.distributed.fake_pg"):
        monkeypatch.setitem(sys.modules, module, None)
    compat.check()


def test_user_triton_kernels_are_rebuilt_from_source_in_another_process() -> None:
    pytest.importorskip("triton")
    import triton_kernels_for_tests as own

    entry = {
        "kernels": {3: jitted.kernel_data(own.autotuned, {}), 5: jitted.kernel_data(own.plain, {})},
        "constants": {7: {"BLOCK": 64}},
    }
    script = (
        "import sys, pickle, torch\n"
        "from sandbox.inductor import pickling, sidetable, compat\n"
        "sidetable.install(pickling.loads(sys.stdin.buffer.read(), None))\n"
        "table = compat.kernel_side_table\n"
        "assert 'triton_kernels_for_tests' not in sys.modules\n"
        "k = table.get_kernel(3)\n"
        "print(type(k).__name__, len(k.configs), k.fn.cache_key == k.fn.cache_key, table.get_constant_args(7))\n"
        "print(k.fn.src)\n"
        "known = k.fn.fn.__globals__\n"
        "print(sorted(n for n in known if n in ('helper', 'SCALE')), known['SCALE'].value)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [os.sys.executable, "-c", script], input=pickling.dumps(entry), capture_output=True, env=environment, cwd="/"
    )  # type: ignore[attr-defined]
    output = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "Autotuner 2 True {'BLOCK': 64}" in output
    assert own.autotuned.fn.src in output
    assert "['SCALE', 'helper'] 3" in output


def test_a_graph_carries_the_side_table_entries_that_it_uses_under_their_own_indices() -> None:
    pytest.importorskip("triton")
    import triton_kernels_for_tests as own

    table = compat.kernel_side_table
    table.add_kernel(own.helper)
    index, constant = table.add_kernel(own.plain), table.add_constant_args({"BLOCK": 32})
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    arguments = {
        "kernel_idx": index, "constant_args_idx": constant, "grid": [(1, 1, 1)], "tma_descriptor_metadata": {},
        "kwargs": {"x_ptr": x, "out_ptr": x, "n": 4}, "tensors_to_clone": ["out_ptr"],
    }  # fmt: skip
    graph.output((graph.call_function(compat.triton_kernel_wrapper_functional, (), arguments),))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    used = sidetable.used_by(gm)
    assert set(used["kernels"]) == {index} and used["constants"] == {constant: {"BLOCK": 32}}
    fake_mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    again, entries = pickling.loads(pickling.dumps((gm, used)), fake_mode)
    sidetable.install(entries)
    rebuilt = table.get_kernel(index)
    assert rebuilt is not own.plain and rebuilt.src == own.plain.src
    assert rebuilt.fn.__globals__["helper"].src == own.helper.src
    assert next(n for n in again.graph.nodes if n.op == "call_function").kwargs["kernel_idx"] == index
    table.reset_table()


def test_pickle_of_a_cond_keeps_the_forward_of_its_branches(template: Template) -> None:
    kept: list[Any] = []

    def keep(gm: Any, example_inputs: Any, inputs_to_check: Any, compile_region_name: Any = None, **kw: Any) -> Any:
        fake_mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
        kept.append(pickling.loads(pickling.dumps(gm), fake_mode))
        return template.compile_locally(gm, example_inputs, inputs_to_check, compile_region_name, **kw)

    with template.installed():
        compat.replace_compile(keep)
        torch.compile(cond)(torch.tensor(True), torch.randn(3))
    nested = [module for module in kept[0].modules() if isinstance(module, torch.fx.GraphModule)]
    assert len(nested) == 3
    assert all(type(module) is not torch.fx.GraphModule and "forward" in vars(type(module)) for module in nested)
    assert "forward" not in vars(torch.fx.GraphModule)


def test_a_graph_with_user_triton_kernels_for_a_gpu_is_whole_in_the_child(tmp_path: Any, monkeypatch: Any) -> None:
    """Traced with fake CUDA tensors, so no GPU is needed: graph, launches and kernels, as the child gets them."""
    triton = pytest.importorskip("triton")
    import triton_kernels_for_tests as own
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")

    def function(x: Any, out: Any) -> Any:
        torch.library.wrap_triton(own.annotated)[(2,)](x, out, 64, BLOCK=32, EVEN=True)
        torch.library.wrap_triton(own.autotuned)[lambda meta: (triton.cdiv(64, meta["BLOCK"]),)](x, out, 64)
        return out + 1

    table = compat.kernel_side_table
    table.reset_table()
    fake_mode = compat.FakeTensorMode(shape_env=compat.ShapeEnv())
    with fake_mode:
        inputs = [torch.empty(64, device="cuda"), torch.empty(64, device="cuda")]
        gm = compat.make_fx(function, {}, "fake")(*inputs)
    nodes = [node for node in gm.graph.nodes if node.target is compat.triton_kernel_wrapper_mutation]
    kernels_before = [table.get_kernel(node.kwargs["kernel_idx"]) for node in nodes]
    constants_before = [table.get_constant_args(node.kwargs["constant_args_idx"]) for node in nodes]
    assert kernels_before == [own.annotated, own.autotuned]
    with compat.tracing(compat.TracingContext(fake_mode)):
        data = payload.encode(gm, inputs, [], {"cudagraphs": compat.BoxedBool(False), "is_inference": True})
    table.reset_table()
    request = payload.decode(data)
    with request.contexts():
        loaded = request.load()
    again = [node for node in loaded.gm.graph.nodes if node.target is compat.triton_kernel_wrapper_mutation]
    assert [str(node.meta["val"].device) for node in loaded.gm.graph.nodes if node.op == "placeholder"] == [
        "cuda:0"
    ] * 2
    assert [(n.kwargs["grid"], n.kwargs["kernel_idx"], n.kwargs["tma_descriptor_metadata"]) for n in again] == [
        (n.kwargs["grid"], n.kwargs["kernel_idx"], n.kwargs["tma_descriptor_metadata"]) for n in nodes
    ]
    assert [str(node.kwargs["kwargs"]) for node in again] == [str(node.kwargs["kwargs"]) for node in nodes]
    rebuilt = [table.get_kernel(node.kwargs["kernel_idx"]) for node in again]
    assert [table.get_constant_args(node.kwargs["constant_args_idx"]) for node in again] == constants_before
    assert [vars(config) for config in rebuilt[1].configs] == [vars(config) for config in own.autotuned.configs]
    assert rebuilt[1].keys == own.autotuned.keys and rebuilt[1].arg_names == own.autotuned.arg_names
    for new, old in ((rebuilt[0], own.annotated), (rebuilt[1].fn, own.autotuned.fn)):
        assert new is not old and new.src == old.src and new.__name__ == old.__name__
        assert new.signature == old.signature and new.arg_names == old.arg_names
        for one, two in zip(new.params, old.params, strict=True):
            for name in (
                "num", "name", "annotation", "annotation_type", "is_constexpr", "is_const", "default", "has_default",
                "do_not_specialize", "do_not_specialize_on_alignment",
            ):  # fmt: skip
                assert getattr(one, name) == getattr(two, name), (one.name, name)
        assert (new.noinline, new.debug, new.do_not_specialize) == (old.noinline, old.debug, old.do_not_specialize)
        asm = []
        for kernel in (new, old):
            known = {"BLOCK": 32, **({"EVEN": True} if "EVEN" in kernel.arg_names else {})}
            types = {"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "scale": "fp32"}
            signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
            source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in known.items()})
            asm.append(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttgir"])
        assert [line.split(" loc(")[0] for line in asm[0].splitlines() if not line.startswith("#loc")] == [
            line.split(" loc(")[0] for line in asm[1].splitlines() if not line.startswith("#loc")
        ]
    table.reset_table()


def test_what_a_backward_graph_may_write_into_tells_it_from_another() -> None:
    """Inductor's key for its caches leaves it out, so graphs with equal keys may only then share a child."""
    told = []
    for donated in ([], [1], [1]):
        context = compat.TracingContext(compat.FakeTensorMode())
        context.fw_metadata = SimpleNamespace(bw_donated_idxs=donated)
        with compat.tracing(context):
            told.append(payload.taken_for_granted([]))
    assert told[0] != told[1] == told[2]


def test_an_op_that_pytorch_defines_when_it_is_first_used() -> None:
    """A child has not used it yet; the service has."""
    pytest.importorskip("torch.nn.modules.linear_cross_entropy", reason="since PyTorch 2.12")
    program = """
        import sys, torch
        from sandbox.inductor import pickling
        module = "torch.nn.modules.linear_cross_entropy"
        assert module not in sys.modules
        name = "torch_nn::_linear_cross_entropy_batch_chunked_no_reduction"
        print(pickling._make_op("overload", name, "", module))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == "torch_nn._linear_cross_entropy_batch_chunked_no_reduction.default", done.stderr
