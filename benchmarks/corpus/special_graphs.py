"""Higher-order ops, and sizes that only the data tell."""

from __future__ import annotations

import functools
from typing import Any

import torch

from benchmarks.corpus.cases import Compile, case, step

F = torch.nn.functional


@case
def cond(compile: Compile) -> Any:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (x,))

    compiled = compile(branches, fullgraph=True)
    return compiled(torch.ones(8)), compiled(-torch.ones(8))


@case
def cond_nested_dynamic(compile: Compile) -> Any:
    def branches(x: torch.Tensor) -> torch.Tensor:
        def inner(y: torch.Tensor) -> torch.Tensor:
            return torch.cond(y.max() > 2, lambda z: z * 2, lambda z: z + 3, (y,))

        return torch.cond(x.shape[0] > 4, inner, lambda y: y.cos(), (x,))

    compiled = compile(branches, dynamic=True)
    return compiled(torch.arange(8.0)), compiled(torch.arange(3.0))


@case
def cond_backward(compile: Compile) -> Any:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (x,))

    return step(compile, branches, torch.ones(8))


@case
def while_loop(compile: Compile) -> Any:
    from torch._higher_order_ops import while_loop as loop

    def run(x: torch.Tensor) -> Any:
        return loop(lambda i, y: i < 3, lambda i, y: (i + 1, y.sin() + 0.5), (torch.zeros((), dtype=torch.int64), x))

    return compile(run, fullgraph=True)(torch.randn(5))


@case
def scan(compile: Compile) -> Any:
    from torch._higher_order_ops import scan as scanned

    def run(x: torch.Tensor) -> Any:
        return scanned(lambda c, y: (c + y, c * y), torch.zeros(3), x, dim=0)

    return compile(run, fullgraph=True)(torch.randn(4, 3))


@case
def scan_backward(compile: Compile) -> Any:
    from torch._higher_order_ops import scan as scanned

    def run(x: torch.Tensor) -> Any:
        return scanned(lambda c, y: (c + y.sin(), c * y), torch.zeros(3), x, dim=0)[1]

    return step(compile, run, torch.randn(4, 3), fullgraph=True)


@case
def associative_scan(compile: Compile) -> Any:
    from torch._higher_order_ops import associative_scan as scanned

    def run(x: torch.Tensor) -> Any:
        return scanned(lambda a, b: a + b, x, dim=0, combine_mode="generic")

    return compile(run, fullgraph=True)(torch.randn(4, 3))


@case
def map_op(compile: Compile) -> Any:
    from torch._higher_order_ops import map as mapped

    def run(x: torch.Tensor, y: torch.Tensor) -> Any:
        return mapped(lambda row, y: row * y + 1, x, y)

    return compile(run, fullgraph=True)(torch.randn(4, 3), torch.randn(3))


@case
def flex_attention(compile: Compile) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu")
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex(q, k, v, score_mod=lambda score, b, h, q, k: score + (q - k) * 0.1, block_mask=mask)

    with torch.no_grad():
        return compile(run, fullgraph=True)(q, k, v)


@case
def flex_attention_captured_bias(compile: Compile) -> Any:
    from torch.nn.attention.flex_attention import flex_attention as flex

    bias = torch.randn(2)
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return flex(q, k, v, score_mod=lambda score, b, h, q, k: score + bias[h])

    with torch.no_grad():
        return compile(run, fullgraph=True)(q, k, v)


@case
def nested_compile_region(compile: Compile) -> Any:
    @torch.compiler.nested_compile_region
    def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ w) + x

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = block(x, w)
        return x

    return step(compile, run, torch.randn(4, 4), torch.randn(4, 4), fullgraph=True)


@case
def checkpoint(compile: Compile) -> Any:
    from torch.utils.checkpoint import checkpoint as save

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return save(lambda x, w: F.dropout(F.gelu(x @ w), 0.5).sin(), x, w, use_reentrant=False)

    return step(compile, run, torch.randn(4, 4), torch.randn(4, 4))


@case
def selective_checkpoint(compile: Compile) -> Any:
    from torch.utils.checkpoint import checkpoint as save
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return save(
            lambda x, w: torch.sigmoid(x @ w).sin(), x, w, use_reentrant=False,
            context_fn=context,
        )  # fmt: skip

    return step(compile, run, torch.randn(4, 4), torch.randn(4, 4))


@case
def out_dtype(compile: Compile) -> Any:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.higher_order.out_dtype(torch.ops.aten.mm.default, torch.int32, x, y)

    ints = torch.randint(-5, 5, (4, 4), dtype=torch.int8)
    return compile(run)(ints, ints.t().contiguous())


@case
def unbacked_nonzero(compile: Compile) -> Any:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return compile(lambda x: (x.nonzero() + 1).sum(0) * 2, fullgraph=True)(torch.tensor([0, 1, 0, 3.0]))


@case
def unbacked_item(compile: Compile) -> Any:
    def run(n: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        size = n.item()
        torch._check(size >= 0)
        torch._check(size <= 100)
        return torch.arange(size) + y.sum()

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        return compile(run, fullgraph=True)(torch.tensor(7), torch.ones(3))


@case
def unbacked_masked_select(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        found = x[x > 0]
        return torch.cat([found, found.exp()]).view(2, -1).sum(0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return compile(run, fullgraph=True)(torch.tensor([-1.0, 2, -3, 4]))


@case
def unbacked_backward(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        return (x[x > 0] * 2).exp()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        return step(compile, run, torch.tensor([-1.0, 2, -3, 4]), fullgraph=True)


@case
def split_by_data(compile: Compile) -> Any:
    def run(x: torch.Tensor, sizes: torch.Tensor) -> Any:
        lengths = sizes.tolist()
        for length in lengths:
            torch._check_is_size(length)
        return [part.sin() for part in torch.split(x, lengths)]

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        return compile(run, fullgraph=True)(torch.randn(9), torch.tensor([2, 3, 4]))


@case
def resize(compile: Compile) -> Any:
    return compile(lambda x: torch.ops.aten.resize(x.sin(), [2, 3]) + 1)(torch.randn(6))


@case
def resize_as(compile: Compile) -> Any:
    return compile(lambda x, y: (x + 1).resize_as_(y) * 2)(torch.randn(6), torch.randn(2, 3))


@case
def mark_dynamic(compile: Compile) -> Any:
    compiled = compile(lambda x: torch.cat([x, x * 2]).relu().mean(0))
    x = torch.randn(6, 5)
    torch._dynamo.mark_dynamic(x, 0)
    return compiled(x), compiled(torch.randn(9, 5))


@case
def mark_unbacked(compile: Compile) -> Any:
    x = torch.randn(6, 5)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    return compile(lambda x: (x.sin() + 1).sum(1))(x)


@case
def dynamic_training(compile: Compile) -> Any:
    compiled = compile(lambda x, w: F.layer_norm(x @ w, (w.shape[1],)).reshape(-1, 2).softmax(-1), dynamic=True)
    results = []
    for size in (4, 7):
        results.append(step(lambda f, **_: f, compiled, torch.randn(size, 3), torch.randn(3, 6)))
    return results


@case
def symbolic_float(compile: Compile) -> Any:
    compiled = compile(lambda x, scale: x * scale + scale, dynamic=True)
    return [compiled(torch.ones(3), value) for value in (1.5, 2.5, 3.5)]
