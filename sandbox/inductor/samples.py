"""The sample graphs of the template's warm-up: small, and between them they touch what most graphs touch.

Traced with fake tensors only: Dynamo and the autograd engine would start CUDA, and threads, in the template. Those for
a GPU are made where a snapshot answers for one (:mod:`sandbox.inductor.snapshot`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch.nn import functional

from sandbox.inductor import compat, payload

_Outputs = tuple[torch.Tensor, ...]
_aten: Final = torch.ops.aten


def built(device: str = "cpu") -> bytes:
    """The payload of the one graph that is compiled to its end."""
    return _sample(_linear, (torch.ones(8, 8), torch.ones(8, 8)), device)


def lowered(device: str = "cpu") -> Iterator[tuple[str, Callable[[], bytes]]]:
    """The others: a name, and what makes the payload."""
    square, image, heads = torch.ones(8, 8), torch.ones(2, 3, 12, 12), torch.ones(2, 4, 6, 8)
    low, numbers = square.bfloat16(), torch.arange(8)
    graphs: dict[Callable[..., _Outputs], tuple[torch.Tensor, ...]] = {
        _backward: (square, square),
        _shapes: (torch.ones(6, 8), square),
        _convolution: (image, torch.ones(8, 3, 3, 3), torch.ones(8)),
        _attention: (heads, heads, heads),
        _reductions: (torch.ones(24, 40),),
        _indexing: (square, numbers, torch.ones(8, 8, dtype=torch.int64)),
        _low_precision: (low, low),
        _integers: (numbers, numbers),
        _random: (square,),
    }
    for function, arguments in graphs.items():
        name = function.__name__.strip("_")
        yield (
            name,
            partial(_sample, function, arguments, device, is_backward=name == "backward", dynamic=name == "shapes"),
        )


def _linear(x: torch.Tensor, y: torch.Tensor) -> _Outputs:
    return (torch.softmax(functional.gelu(x @ y), -1).sum(0) + torch.arange(8, device=x.device),)


def _backward(x: torch.Tensor, w: torch.Tensor) -> _Outputs:
    out, mean, rstd = _aten.native_layer_norm(_aten.addmm(x, x, w), [8], None, None, 1e-5)
    grad, _, _ = _aten.native_layer_norm_backward(
        torch.where(out > 0, out, 0), x, [8], mean, rstd, None, None, [True, False, False]
    )
    image, kernel = x.view(1, 1, 8, 8), w.view(1, 1, 8, 8)[..., :1, :1]
    down, weight, _ = _aten.convolution_backward(
        image, image, kernel, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    return grad.t() @ x, grad.sum(0, keepdim=True), down, weight, _aten.gelu_backward(x, w), _aten.tanh_backward(x, w)


def _shapes(x: torch.Tensor, y: torch.Tensor) -> _Outputs:
    return torch.cat([x, x * 2]).relu().mean(0), torch.softmax(x @ y, -1), (x.view(-1) + x.shape[0]).sum()


def _convolution(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> _Outputs:
    hidden = functional.conv2d(x, w, b, padding=1)
    hidden = functional.relu(functional.batch_norm(hidden, b, b, b, b))
    hidden = functional.max_pool2d(hidden, 2)
    return functional.adaptive_avg_pool2d(functional.pad(functional.silu(hidden), (1, 1)), 1).flatten(1), hidden


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Outputs:
    mask = torch.ones(6, 6, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1) * 0.35).masked_fill(~mask, float("-inf"))
    mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(12, 32)
    if q.device.type != "cpu":
        return (mixed * torch.rsqrt(mixed.pow(2).mean(-1, keepdim=True) + 1e-6),)  # which kernel, a driver is asked
    fused = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed * torch.rsqrt(mixed.pow(2).mean(-1, keepdim=True) + 1e-6), fused


def _reductions(x: torch.Tensor) -> _Outputs:
    best, where = x.max(1)
    return (
        x.var(1) + x.amin(1) + x.prod(1) + x.logsumexp(1) + x.argmax(1) + x.cumsum(1).sum(1),
        best, where, x.sum(), x.mean(0), (x > 0).any(1), x.sort(1).values, x.topk(3, 1).values,
    )  # fmt: skip


def _indexing(x: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> _Outputs:
    put = torch.index_put(x, (i,), x)
    added = torch.scatter_add(x, 0, j, x)
    return functional.embedding(i, x), put, added, x.gather(1, j), torch.where(x > 0, x, 0)[i], x[:, 1::2], x.roll(1)


def _low_precision(x: torch.Tensor, w: torch.Tensor) -> _Outputs:
    return torch.softmax((x @ w).relu() * 2, -1).float().sum(0), functional.layer_norm(x, (8,)), x.half() + 1


def _integers(x: torch.Tensor, y: torch.Tensor) -> _Outputs:
    return x // (y + 1) + x % 3, (x * y).sum(), torch.bitwise_and(x, y), x.to(torch.float64).exp(), x.clamp(1, 5) == y


def _random(x: torch.Tensor) -> _Outputs:
    prims = torch.ops.prims
    seeds = prims.inductor_seeds.default(2, x.device)
    uniform = prims.inductor_random.default([8, 8], prims.inductor_lookup_seed.default(seeds, 0), "rand")
    normal = prims.inductor_random.default([8, 8], prims.inductor_lookup_seed.default(seeds, 1), "randn")
    return (uniform > 0.5) * x * 2.0, normal + x


def _sample(
    function: Callable[..., Any],
    arguments: tuple[torch.Tensor, ...],
    device: str = "cpu",
    *,
    is_backward: bool = False,
    dynamic: bool = False,
) -> bytes:
    with contextlib.nullcontext() if device == "cpu" else compat.FakeTensorMode():
        mode = "symbolic" if dynamic else "fake"
        if device != "cpu":
            mode = "real"  # of what are FakeTensors already
            arguments = tuple(torch.empty(each.shape, dtype=each.dtype, device=device) for each in arguments)
        gm = compat.make_fx(function, compat.decompositions(), mode)(*arguments)
    inputs = [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]
    kwargs = {
        "cudagraphs": compat.BoxedBool(False),
        "static_input_idxs": (),
        "is_backward": is_backward,
        "is_inference": not is_backward,
        "graph_id": 0,
        "cpp_wrapper": False,
        "fx_wrapper": False,
        "boxed_forward_device_index": None,
        "layout_opt": None,
        "extern_node_serializer": None,
    }
    with compat.tracing(compat.TracingContext(compat.detect_fake_mode(inputs))):
        return payload.encode(gm, inputs, [], kwargs)
