"""Kinds of numbers, random numbers, inputs and constants."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.corpus.cases import Compile, case, step

F = torch.nn.functional


@case
def complex_numbers(compile: Compile) -> Any:
    x = torch.randn(4, 3, dtype=torch.complex64)
    return compile(lambda x: (torch.view_as_real(x * x.conj() + 1j), x.abs(), x.angle(), x.conj()))(x)


@case
def complex_constant(compile: Compile) -> Any:
    twiddle = torch.exp(torch.arange(4) * 1j)
    return compile(lambda x: x * twiddle)(torch.randn(3, 4))


@case
def complex_backward(compile: Compile) -> Any:
    return step(compile, lambda x: torch.fft.rfft(x).abs(), torch.randn(3, 8))


@case
def int64_reductions(compile: Compile) -> Any:
    x = torch.randint(-(2**40), 2**40, (7, 33))
    return compile(lambda x: (x.sum(0), x.prod(1), x.amax(0), x.amin(), x.cumsum(1), x.sum()))(x)


@case
def nan_in_argmax(compile: Compile) -> Any:
    x = torch.randn(6, 40)
    x[2, 5] = x[3, 39] = x[3, 0] = float("nan")
    return compile(lambda x: (x.argmax(1), x.argmin(1), x.argmax(), x.argmin(0), x.max(1), x.amin(0)))(x)


@case
def low_precision(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> Any:
        return F.gelu(x) * x.sigmoid() + x.sum(-1, keepdim=True), x.float().softmax(-1).to(x.dtype), x > 0

    return [compile(run)(torch.randn(5, 67).to(dtype)) for dtype in (torch.bfloat16, torch.float16)]


@case
def low_precision_backward(compile: Compile) -> Any:
    return step(compile, lambda x: F.layer_norm(x, (48,)).relu(), torch.randn(5, 48).bfloat16())


@case
def float8(compile: Compile) -> Any:
    return compile(lambda x: x.to(torch.float8_e4m3fn).to(torch.float32) * 2)(torch.randn(5, 32))


@case
def autocast(compile: Compile) -> Any:
    layer = torch.nn.Linear(8, 8)

    def run(x: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x).sin()

    return compile(run)(torch.randn(3, 8)).float()


@case
def layer_norm_with_generators(compile: Compile) -> Any:
    x = torch.randn(2, 3, 4)

    def run(x: torch.Tensor) -> torch.Tensor:
        shape = tuple(size for size in x.shape[1:])
        return F.layer_norm(x, shape) + F.layer_norm(x, list(n for n in (3, 4)))

    return compile(run)(x), step(compile, run, x)


@case
def dropout(compile: Compile) -> Any:
    """Of the same kind of compile only are the numbers the same: eager's are others."""
    torch.manual_seed(3)
    return step(compile, lambda x: F.dropout(x, 0.5) + torch.rand_like(x), torch.randn(40, 40))


@case
def dropout_fallback_random(compile: Compile) -> Any:
    with torch._inductor.config.patch(fallback_random=True):
        torch.manual_seed(3)
        return step(compile, lambda x: F.dropout(x, 0.5) + torch.rand_like(x), torch.randn(40, 40))


@case
def random_kinds(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> Any:
        return (
            torch.randint(0, 99, (5,)), torch.randn(4), torch.rand(4), torch.bernoulli(x), torch.randperm(6),
            torch.empty(4).exponential_(), torch.empty(4).normal_(), torch.multinomial(x, 3),
        )  # fmt: skip

    torch.manual_seed(5)
    return compile(run)(torch.rand(6))


@case
def mutated_inputs(compile: Compile) -> Any:
    def run(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y[1:].mul_(x[:-1])
        return x.t_() if x.dim() == 2 else x * y

    x, y = torch.randn(6), torch.randn(6)
    return compile(run)(x, y), x, y


@case
def aliased_inputs(compile: Compile) -> Any:
    def run(x: torch.Tensor, y: torch.Tensor) -> Any:
        x.mul_(2)
        return y + 1, x.view(2, 3), x

    base = torch.randn(6)
    return compile(run)(base, base[:3]), base


@case
def buffers(compile: Compile) -> Any:
    norm = torch.nn.BatchNorm1d(4)
    compiled = compile(norm)
    results = [compiled(torch.randn(5, 4)) for _ in range(2)]
    return results, norm.running_mean, norm.running_var


@case
def subclass_input(compile: Compile) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(torch.ones(3, 3), torch.arange(9.0).view(3, 3))
    result = compile(lambda x: (x.sin() + 1) @ x)(x)
    return result.a, result.b


@case
def subclass_training(compile: Compile) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(torch.ones(3, 3), torch.arange(9.0).view(3, 3)).requires_grad_()
    result = compile(lambda x: (x.sin() + 1) @ x)(x)
    result.sum().backward()
    return result.detach().a, x.grad.a, x.grad.b


@case
def subclass_constant(compile: Compile) -> Any:
    from torch.testing._internal.two_tensor import TwoTensor

    held = TwoTensor(torch.ones(3), torch.arange(3.0))
    result = compile(lambda x: x * held)(torch.randn(3))
    return result.a, result.b


@case
def plain_subclass(compile: Compile) -> Any:
    class Named(torch.Tensor):
        pass

    result = compile(lambda x: x.sin() * 2)(torch.randn(4).as_subclass(Named))
    return result.as_subclass(torch.Tensor)


@case
def nested_jagged(compile: Compile) -> Any:
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    result = compile(lambda x: (x * 2).sin())(nested)
    return result.values()


@case
def sparse_input(compile: Compile) -> Any:
    x = torch.eye(4).to_sparse()
    return compile(lambda x, y: torch.mm(x, y) + 1)(x, torch.randn(4, 4))


@case
def sparse_constant(compile: Compile) -> Any:
    held = torch.eye(4).to_sparse()
    return compile(lambda y: torch.mm(held, y.sin()) + 1)(torch.randn(4, 4))


@case
def csr_constant(compile: Compile) -> Any:
    held = torch.eye(4).to_sparse_csr()
    return compile(lambda y: torch.mm(held, y.sin()) + 1)(torch.randn(4, 4))


@case
def quantized_constant(compile: Compile) -> Any:
    held = torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8)
    return compile(lambda y: held.dequantize() * y)(torch.randn(4))


@case
def quantized_ops(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> Any:
        quantized = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.1, 3, -128, 127, torch.int8)
        return torch.ops.quantized_decomposed.dequantize_per_tensor(quantized, 0.1, 3, -128, 127, torch.int8)

    import torch.ao.quantization.fx._decomposed

    return compile(run)(torch.randn(4, 8))


@case
def int8_weights(compile: Compile) -> Any:
    weight, scale = torch.randint(-9, 9, (8, 8), dtype=torch.int8), torch.rand(8)
    return compile(lambda x: F.linear(x, weight.to(x.dtype)) * scale)(torch.randn(3, 8))
