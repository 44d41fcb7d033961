"""Kernels that a program launches itself, of the kinds that people write."""

import triton
import triton.language as tl
from triton.language import constexpr

WIDTH = 32
SCALE = tl.constexpr(3)


@triton.constexpr_function
def twice(n):
    return 2 * n


@triton.jit
def scaled(x):
    return x * SCALE


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, scaled(x + y), mask=mask)


@triton.jit
def applied(x_ptr, out_ptr, function: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, twice(BLOCK))
    tl.store(out_ptr + offsets, function(tl.load(x_ptr + offsets)))


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128}, num_warps=8)], key=["n"])
@triton.jit
def tuned(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.exp(tl.load(x_ptr + offsets, mask=offsets < n)), mask=offsets < n)


@triton.jit
def also_scaled(x_ptr, BLOCK: tl.constexpr):
    places = x_ptr + tl.arange(0, BLOCK)
    tl.store(places, scaled(tl.load(places)) + 1)


@triton.jit
def load(places):
    return tl.load(places) + 2


@triton.jit
def shadows(x_ptr, BLOCK: tl.constexpr):
    places = x_ptr + tl.arange(0, BLOCK)
    load = load(places)  # noqa: F823
    tl.store(places, load)


@triton.jit
def wrong(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), not_defined_anywhere)  # noqa: F821


def made_with(n):
    """A kernel of a function, which has a parameter of that function as a default."""

    @triton.jit
    def inner(x_ptr, BLOCK: tl.constexpr = n):
        places = x_ptr + tl.arange(0, BLOCK)
        tl.store(places, tl.load(places) * 2)

    return inner


def made_here():
    """A kernel of a function, with a variable of that function in it."""
    offset = tl.constexpr(7)

    @triton.jit
    def inner(x_ptr, BLOCK: tl.constexpr):
        places = x_ptr + tl.arange(0, BLOCK)
        tl.store(places, tl.load(places) + offset)

    return inner


@triton.jit
def max(a, b):  # one of this name is Triton's as well
    return a * 3 + b


@triton.jit
def larger(x_ptr, BLOCK: tl.constexpr):
    places = x_ptr + tl.arange(0, BLOCK)
    tl.store(places, max(tl.load(places), 1.0))


@triton.jit
def with_default(x_ptr, BLOCK: constexpr = WIDTH):
    places = x_ptr + tl.arange(0, BLOCK)
    tl.store(places, tl.load(places).to(tl.float32) * 2)
