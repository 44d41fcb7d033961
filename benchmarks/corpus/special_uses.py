"""What people do with torch.compile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.corpus.cases import Compile, case, step
from benchmarks.corpus.entry import Skip

F = torch.nn.functional


@case
def hessians(compile: Compile) -> Any:
    """And vmap. Of both together Dynamo of 2.13 makes no graph."""

    def energy(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).sum()

    def run(x: torch.Tensor) -> Any:
        return torch.func.hessian(energy)(x[0]), torch.vmap(torch.func.grad(energy))(x)

    return compile(run)(torch.randn(3, 4))


@case
def jacobians(compile: Compile) -> Any:
    return compile(lambda x: (torch.func.jacfwd(torch.sin)(x), torch.func.jacrev(torch.cos)(x)))(torch.randn(4))


@case
def lennard_jones(compile: Compile) -> Any:
    def energy(r: torch.Tensor) -> torch.Tensor:
        return 4 * (1 / r**12 - 1 / r**6)

    def forces(net: Callable[..., Any], r: torch.Tensor) -> Any:
        return torch.vmap(torch.func.jacrev(net))(r)

    net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    r = torch.linspace(1, 2, 6).view(-1, 1)
    return compile(lambda r: (energy(r), forces(net, r)))(r)


@case
def double_backward_graph(compile: Compile) -> Any:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(compile(lambda x: x.sin() * x)(x).sum(), x)
    return grad


@case
def autograd_function(compile: Compile) -> Any:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x.sin() * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0].cos() * 2

    return step(compile, lambda x: Twice.apply(x) + 1, torch.randn(4))


@case
def compiled_autograd(compile: Compile) -> Any:
    with torch._dynamo.config.patch(compiled_autograd=True):
        model = torch.nn.Linear(3, 3)

        def run(x: torch.Tensor) -> torch.Tensor:
            loss = model(x).square().sum()
            loss.backward()
            return loss

        loss = compile(run)(torch.randn(2, 3))
        return loss, model.weight.grad


@case
def optimizerstep(compile: Compile) -> Any:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    step = compile(lambda: optimizer.step())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().sum().backward()
        step()
    return list(model.parameters())


@case
def fullgraph(compile: Compile) -> Any:
    return compile(lambda x: x.sin().cumsum(0), fullgraph=True)(torch.randn(7))


@case
def graph_break(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos() + 1

    return step(compile, run, torch.randn(7))


@case
def set_stance(compile: Compile) -> Any:
    compiled = compile(lambda x: x.sin() + 1)
    x = torch.randn(5)
    results = [compiled(x)]
    for stance in ("force_eager", "eager_on_recompile", "fail_on_recompile"):
        with torch.compiler.set_stance(stance):
            results.append(compiled(x))
    with torch.compiler.set_stance("default", force_backend=None):
        results.append(compiled(x.double()))
    return results


@case
def nested_compile(compile: Compile) -> Any:
    inner = compile(lambda x: x.sin() * 2)
    return compile(lambda x: inner(x) + inner(x + 1))(torch.randn(5))


@case
def several_threads(compile: Compile) -> Any:
    inputs = [torch.randn(8, 8) for _ in range(3)]
    results: list[Any] = [None] * 3
    problems: list[Exception] = []
    functions = [
        lambda x: (x @ x).softmax(-1), lambda x: x.sin().cumsum(0), lambda x: F.gelu(x).mean(0),
    ]  # fmt: skip

    def one(number: int) -> None:
        try:
            results[number] = compile(functions[number])(inputs[number])
        except Exception as error:  # noqa: BLE001 - raised below, in the caller
            problems.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    return results


@case
def freezing(compile: Compile) -> Any:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        return compile(model)(torch.randn(1, 3, 8, 8))


@case
def freezing_low_precision(compile: Compile) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)).eval().bfloat16()
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        return compile(model)(torch.randn(4, 16).bfloat16())


@case
def constant_folding(compile: Compile) -> Any:
    weight = torch.randn(6, 6)
    with torch._inductor.config.patch(joint_graph_constant_folding=True):
        return compile(lambda x: x @ (weight.t() * 2 + torch.ones(6)) + torch.full((6,), 3.0) * 2)(torch.randn(2, 6))


@case
def cpp_wrapper(compile: Compile) -> Any:
    with torch._inductor.config.patch(cpp_wrapper=True):
        return step(compile, lambda x: F.gelu(x @ x).sum(0), torch.randn(6, 6))


@case
def max_autotune_cpp_gemm(compile: Compile) -> Any:
    model = torch.nn.Linear(64, 64).eval()
    settings = {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN", "freezing": True}
    with torch._inductor.config.patch(settings), torch.no_grad():
        return compile(model)(torch.randn(32, 64))


@case
def graph_partition(compile: Compile) -> Any:
    with torch._inductor.config.patch(graph_partition=True):
        return compile(lambda x: (x.sin() @ x).relu())(torch.randn(4, 4))


@case
def translation_validation(compile: Compile) -> Any:
    from torch.fx.experimental import _config

    try:
        import z3  # noqa: F401
    except ImportError:
        raise Skip("translation validation needs z3-solver") from None
    with _config.patch(translation_validation=True, translation_validation_no_bisect=True):
        return compile(lambda x: torch.cat([x, x]).sin(), dynamic=True)(torch.randn(5))


@case
def profiled(compile: Compile) -> Any:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return compile(lambda x: x.sin() + 3)(torch.randn(5))


@case
def wrap_compiled_regions(compile: Compile) -> Any:
    with torch._inductor.config.patch(wrap_inductor_compiled_regions=True):
        return compile(lambda x: x.sin() + 3)(torch.randn(5))


@case
def deterministic(compile: Compile) -> Any:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        index = torch.tensor([0, 1, 1, 2])
        return compile(lambda x: torch.zeros(4).index_add(0, index, x))(torch.randn(4))
    finally:
        torch.use_deterministic_algorithms(before)


@case
def debug_assertions(compile: Compile) -> Any:
    def run(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        torch._assert_async((index >= 0).all(), "negative")
        return x[index] * 2

    return compile(run)(torch.randn(5), torch.tensor([1, 2]))


@case
def effects(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        torch.ops.aten._print("")
        return x.sin() + 1

    with contextlib.suppress(ImportError):
        return compile(run)(torch.randn(5))


@case
def scaled_dot_product(compile: Compile) -> Any:
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    return step(compile, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v)


@case
def recurrent(compile: Compile) -> Any:
    net = torch.nn.LSTM(4, 6, batch_first=True)
    with torch.no_grad():
        return compile(net)(torch.randn(2, 3, 4))[0]


@case
def embedding_bag(compile: Compile) -> Any:
    bag = torch.nn.EmbeddingBag(10, 4, mode="sum")
    return compile(lambda i, o: bag(i, o).sin())(torch.randint(0, 10, (6,)), torch.tensor([0, 3]))


@case
def strange_layouts(compile: Compile) -> Any:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    return compile(lambda x, y: (x.relu() + y, torch.empty_like(x).fill_(2)))(x, torch.randn(2, 3, 5, 4).mT)


@case
def many_outputs(compile: Compile) -> Any:
    return compile(lambda x: [*x.unbind(0), x.shape[0], None, x.sum().item()])(torch.randn(40, 3))


@case
def empty_graph(compile: Compile) -> Any:
    return compile(lambda x: (x.view(-1), torch.empty(0) + 1))(torch.randn(0, 3))
