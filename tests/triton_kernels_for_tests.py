"""User-defined kernels as users write them: an autotuned one with a helper and a constexpr global."""

import triton
import triton.language as tl

SCALE = tl.constexpr(3)


@triton.jit
def helper(x):
    return x * SCALE


@triton.jit
def plain(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, helper(tl.load(x_ptr + offsets, mask=mask)), mask=mask)


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, num_warps=8)], key=["n"])
@triton.jit
def autotuned(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    tl.store(out_ptr + offsets, helper(tl.load(x_ptr + offsets, mask=mask)) + SCALE, mask=mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["out_ptr"], noinline=False)
def annotated(x_ptr, out_ptr, n: tl.int32, scale=2.0, BLOCK: tl.constexpr = 16, EVEN: "tl.constexpr" = False):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    if EVEN:
        mask = mask & (offsets % 2 == 0)
    tl.store(out_ptr + offsets, helper(tl.load(x_ptr + offsets, mask=mask)) * scale, mask=mask)
