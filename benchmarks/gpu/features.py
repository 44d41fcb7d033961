"""What else compiles for a GPU: one small case each, through `sandbox.install()`, compared with eager.

    python -m benchmarks.gpu.features [--policy default] [--only NAME,NAME] [--json FILE]

A row tells the graphs, how many were compiled in children, how many in the service and why, the Triton kernels that the
service itself has compiled, direct launches, and the largest difference from eager. Exit code 1 if a case fails or
differs. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import triton
import triton.language as tl

from benchmarks.gpu.compare import TOLERANCE, count_kernels

Case = Callable[[], float]
CUDA: Final = "cuda"
CASES: Final[dict[str, Case]] = {}


def case(function: Case) -> Case:
    """Register one; it returns the largest relative difference."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((got.float() - want.float()).abs().max() / want.float().abs().max().clamp(min=1e-6))


def compared(function: Callable[..., Any], *inputs: Any, calls: int = 1, **options: Any) -> float:
    """Compile ``function``, call it, compare with eager."""
    want = function(*inputs)
    compiled = torch.compile(function, **options)
    return max(apart(compiled(*inputs).clone(), want) for _ in range(calls))


@triton.jit
def _scaled(x, y, out, scale, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = where < n
    tl.store(out + where, tl.load(x + where, mask) * scale + tl.load(y + where, mask), mask)


@triton.autotune([triton.Config({"BLOCK": 128}), triton.Config({"BLOCK": 512}, num_warps=8)], key=["n"])
@triton.jit
def _tuned(x, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + where, tl.load(x + where, where < n) * 3.0, where < n)


def scaled(x: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _scaled[(triton.cdiv(x.numel(), 256),)](x, y, out, scale, x.numel(), BLOCK=256)
    return out


class Scaled(torch.autograd.Function):
    """With a backward pass by the same kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scaled(x, y, 2.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return scaled(grad.contiguous(), grad.contiguous(), 1.0), grad


def _grads(dynamic: bool) -> float:
    worst = 0.0
    compiled = torch.compile(lambda x, y: Scaled.apply(x * 2, y).sin(), dynamic=dynamic)
    for length in (1000, 1500) if dynamic else (1000,):
        results = []
        for function in (lambda x, y: Scaled.apply(x * 2, y).sin(), compiled):
            torch.manual_seed(0)
            x = torch.randn(length, device=CUDA, requires_grad=True)
            y = torch.randn(length, device=CUDA, requires_grad=True)
            function(x, y).sum().backward()
            results.append((x.grad, y.grad))
        worst = max(worst, *(apart(got, want) for got, want in zip(results[1], results[0], strict=True)))
    return worst


@case
def user_kernel() -> float:
    x = torch.randn(1000, device=CUDA)
    return compared(lambda x: scaled(x.sin(), x, 2.0).cos(), x)


@case
def user_kernel_native_grad() -> float:
    return _grads(dynamic=False)


@case
def user_kernel_native_grad_dynamic() -> float:
    return _grads(dynamic=True)


@case
def user_kernel_autotuned() -> float:
    def function(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        _tuned[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
        return out + 1

    return compared(function, torch.randn(5000, device=CUDA))


@case
def direct_launch() -> float:
    x, y = torch.randn(3000, device=CUDA), torch.randn(3000, device=CUDA)
    return apart(scaled(x, y, 1.5), x * 1.5 + y)


@case
def direct_launch_autotuned() -> float:
    x = torch.randn(5000, device=CUDA)
    out = torch.empty_like(x)
    _tuned[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
    return apart(out, x * 3)


@case
def cuda_graphs() -> float:
    weight = torch.randn(256, 256, device=CUDA)
    return compared(
        lambda x: torch.softmax(x @ weight, -1).sum(0),
        torch.randn(64, 256, device=CUDA),
        calls=4,
        mode="reduce-overhead",
    )


@case
def cuda_graphs_training() -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).to(CUDA)
    x = torch.randn(32, 64, device=CUDA)

    def step(module: Any) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        module(x).square().mean().backward()
        return torch.cat([one.grad.flatten() for one in model.parameters()])

    want = step(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    return max(apart(step(compiled), want) for _ in range(4))


@case
def streams() -> float:
    stream = torch.cuda.Stream()
    x = torch.randn(1000, device=CUDA)
    compiled = torch.compile(lambda x: (x * 2).tanh().sum())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = compiled(x)
    torch.cuda.current_stream().wait_stream(stream)
    return apart(got, (x * 2).tanh().sum())


@case
def constants() -> float:
    table = torch.arange(16, device=CUDA, dtype=torch.float32)
    return compared(lambda x: x + table + torch.tensor([1.0, 2.0] * 8, device=CUDA), torch.randn(4, 16, device=CUDA))


@case
def convolution_half() -> float:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.SiLU())
    module = module.to(CUDA).half().eval()
    with torch.no_grad():
        return compared(module, torch.randn(2, 3, 64, 64, device=CUDA).half())


@case
def large_reductions() -> float:
    return compared(
        lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]).std(0), torch.randn(2048, 8192, device=CUDA)
    )


@case
def flex_attention() -> float:
    from torch.nn.attention.flex_attention import flex_attention as attention

    q, k, v = (torch.randn(1, 2, 256, 64, device=CUDA) for _ in range(3))

    def causal(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return torch.where(i >= j, score, -float("inf"))

    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return apart(torch.compile(attention)(q, k, v, score_mod=causal), want)


@case
def dropout_training() -> float:
    """Random numbers of a compiled graph are its own; the share of zeros is what can be compared."""
    got = torch.compile(lambda x: torch.nn.functional.dropout(x, 0.25))(torch.ones(100_000, device=CUDA))
    return abs(float((got == 0).float().mean()) - 0.25)


@case
def max_autotune() -> float:
    weight = torch.randn(512, 512, device=CUDA).half()
    return compared(
        lambda x: (x @ weight).relu(), torch.randn(256, 512, device=CUDA).half(), mode="max-autotune-no-cudagraphs"
    )


@case
def coordinate_descent() -> float:
    return compared(
        lambda x: torch.softmax(x, -1).sum(0),
        torch.randn(512, 2048, device=CUDA),
        options={"coordinate_descent_tuning": True},
    )


@case
def benchmark_fusion() -> float:
    return compared(
        lambda x: (x.sin().sum(-1, keepdim=True) + x.cos()).relu(),
        torch.randn(512, 512, device=CUDA),
        options={"benchmark_fusion": True},
    )


def main() -> int:
    """Run the cases, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="default", help="name or file")
    parser.add_argument("--mode", default="subprocess", help="of the sandbox")
    parser.add_argument("--only", default="", help="cases, comma-separated")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    import sandbox
    from sandbox.inductor.install import installed

    compiled = count_kernels()
    sandbox.install(policy=arguments.policy, mode=arguments.mode)
    scheme = installed()
    if scheme is None:
        raise RuntimeError("not installed")
    scheme.sandbox.wait_ready()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = []
    for name, function in CASES.items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        torch._dynamo.reset()
        before, kernels, started = scheme.sandbox.stats(), len(compiled), time.monotonic()
        row: dict[str, Any] = {"case": name}
        try:
            row["difference"] = function()
        except Exception as error:  # noqa: BLE001 - told in the row
            row["error"] = f"{type(error).__name__}: {error}"[:300]
            traceback.print_exc()
        after = scheme.sandbox.stats()
        row |= {
            "graphs": after.graphs - before.graphs,
            "in_child": after.in_child - before.in_child,
            "launches": {key: value - before.launches.get(key, 0) for key, value in after.launches.items()},
            "service_kernels": len(compiled) - kernels,
            "seconds": round(time.monotonic() - started, 2),
            "reasons": {
                key: value - before.in_process_reasons.get(key, 0)
                for key, value in after.in_process_reasons.items()
                if value != before.in_process_reasons.get(key, 0)
            },
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    for job in scheme.sandbox.stats().jobs:
        if job.status != "ok":
            print(f"not ok: {job.name} {job.status} {job.detail[:400]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    sandbox.uninstall()
    failed = [row["case"] for row in rows if row.get("difference", 1.0) > TOLERANCE]
    print(f"{len(rows)} cases; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
