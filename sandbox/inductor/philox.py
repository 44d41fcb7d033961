"""Inductor's random numbers without its kernels: Philox-4x32-10 over (seed, index), in plain tensor operations.

A graph's random ops are functions of a seed: a backward pass that recomputes a dropout mask looks up the seed that
its forward pass drew. Their own eager implementation ignores it. These follow it, number for number.

- CPU: what `normalized_rand_cpu`, `randn_cpu` and `randint64_cpu` compute (torch/csrc/inductor/cpp_prefix.h,
  ATen/core/PhiloxRNGEngine.h; 2.11 and 2.13): the key is the seed's lower 32 bits, the counter the linear index.
  Bit for bit, except that `randn` may differ by one rounding of a logarithm.
- GPU: what `tl.rand`, `tl.randn` and `triton_helpers.randint64` compute: all 64 bits of the seed. Inductor may also
  draw four numbers a counter, by the shape of its kernel (`triton_helpers.rand4x`), which the graph does not say. So
  there these agree with each other, but not with compiled code: see `sandbox.inductor.eager.mixes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

_MASK: Final = 0xFFFFFFFF
_SCALE: Final = 4.6566127342e-10  # the largest float32 that keeps every product below 1
_KEYS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = (0xD2511F53, 0xCD9E8D57)
#: Numbers made at once, a count: a dozen int64 tensors of this size are alive in between.
_CHUNK: Final = 1 << 21

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def seeds(count: int, device: Any) -> torch.Tensor:
    """`prims.inductor_seeds`, drawn as compiled code draws them: the same generator gives the same seeds."""
    limits = torch.iinfo(torch.int64)
    out = torch.empty([count], dtype=torch.int64, device=device)
    return torch.ops.aten.randint.low_out(limits.min, limits.max, [count], out=out)


def seed(device: Any) -> torch.Tensor:
    """`prims.inductor_seed`."""
    return seeds(1, device)[0]


def random(size: Sequence[int], seed: torch.Tensor, mode: str, *, align_dtype: Any = None) -> torch.Tensor:
    """`prims.inductor_random`: float32, ``mode`` is `rand` or `randn`."""
    if seed.dim() == 1:  # config.align_random_eager: the seed and where the generator stood
        return _fill(size, torch.float32, seed.device, lambda at: _rand_eager(seed, at, align_dtype))
    cpu = seed.device.type == "cpu"
    make = {"rand": _rand_cpu if cpu else _rand_gpu, "randn": _randn_cpu if cpu else _randn_gpu}[mode]
    return _fill(size, torch.float32, seed.device, lambda at: make(_words(seed, at)))


def randint(low: int, high: int, size: Sequence[int], seed: torch.Tensor) -> torch.Tensor:
    """`prims.inductor_randint`: int64 from ``low`` up to ``high``, without it."""

    def make(at: torch.Tensor) -> torch.Tensor:
        first, second, _, _ = _words(seed, at)
        return _unsigned_remainder(first | (second << 32), (int(high) - int(low)) & ((1 << 64) - 1)) + int(low)

    return _fill(size, torch.int64, seed.device, make)


def _fill(
    size: Sequence[int], dtype: torch.dtype, device: torch.device, make: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    count = math.prod(int(extent) for extent in size)
    out = torch.empty([count], dtype=dtype, device=device)
    for start in range(0, count, _CHUNK):
        end = min(count, start + _CHUNK)
        out[start:end] = make(torch.arange(start, end, dtype=torch.int64, device=device) & _MASK)
    return out.view([int(extent) for extent in size])


def _words(seed: torch.Tensor, at: torch.Tensor) -> Words:
    """Four words for each index, by seed and index alone."""
    zero = torch.zeros_like(at)
    high = (seed >> 32) & _MASK if seed.device.type != "cpu" else torch.zeros_like(seed)
    return _philox((at, zero, zero, zero), (seed & _MASK, high))


def _philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds. Words are int64 between 0 and 2**32: a product wraps, and both its halves come out right."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        first, second = a * _ROUNDS[0], c * _ROUNDS[1]
        a, b, c, d = (
            ((second >> 32) & _MASK) ^ b ^ k0,
            second & _MASK,
            ((first >> 32) & _MASK) ^ d ^ k1,
            first & _MASK,
        )
        k0, k1 = (k0 + _KEYS[0]) & _MASK, (k1 + _KEYS[1]) & _MASK
    return a, b, c, d


def _uniform_cpu(word: torch.Tensor) -> torch.Tensor:
    return (word & 0x7FFFFFFF).to(torch.float32) * _SCALE


def _uniform_gpu(word: torch.Tensor) -> torch.Tensor:
    # As int32: -x - 1 where x is negative.
    return torch.where(word > 0x7FFFFFFF, _MASK - word, word).to(torch.float32) * _SCALE


def _rand_cpu(words: Words) -> torch.Tensor:
    return _uniform_cpu(words[0])


def _rand_gpu(words: Words) -> torch.Tensor:
    return _uniform_gpu(words[0])


def _randn_cpu(words: Words) -> torch.Tensor:
    one, two = 1 - _uniform_cpu(words[0]), 1 - _uniform_cpu(words[1])
    # `std::log` is of float32, all else of float64; in float64 and rounded is the nearest that log can come.
    logarithm = one.double().log().float().double()
    return ((-2.0 * logarithm).sqrt() * (2.0 * math.pi * two.double()).cos()).float()


def _randn_gpu(words: Words) -> torch.Tensor:
    one, two = _uniform_gpu(words[0]).clamp_min(1.0e-7), _uniform_gpu(words[1])
    return (-2.0 * one.log()).sqrt() * (6.283185307179586 * two).cos()


def _rand_eager(state: torch.Tensor, at: torch.Tensor, dtype: Any) -> torch.Tensor:
    """`triton_helpers.rand_eager_kernel`: the numbers that `torch.rand` draws on this GPU."""
    properties = torch.cuda.get_device_properties(state.device)
    vector = 8 if dtype in (torch.float16, torch.bfloat16) else 4
    period = vector * properties.multi_processor_count * properties.max_threads_per_multi_processor
    block, lane = at % period, at % 4
    offset = state[1] + at // period * (vector // 4) + block % vector // 4
    thread = block // vector
    words = _philox(
        (offset & _MASK, (offset >> 32) & _MASK, thread & _MASK, torch.zeros_like(at)),
        (state[0] & _MASK, (state[0] >> 32) & _MASK),
    )
    word = torch.stack(words, -1).gather(-1, lane.unsqueeze(-1)).squeeze(-1)
    step = 1.0 / 4294967296.0
    return 1.0 - (word.to(torch.float32) * step + step * 0.5)


def _unsigned_remainder(value: torch.Tensor, divisor: int) -> torch.Tensor:
    """``value`` read as uint64, modulo ``divisor`` (1 to 2**64 - 1); torch divides signed numbers only."""
    lowest = -(1 << 63)
    signed = divisor - (1 << 64) if divisor >= 1 << 63 else divisor
    if signed < 0:  # at most one subtraction
        return torch.where((value ^ lowest) >= (signed ^ lowest), value - signed, value)
    half = (value >> 1) & ((1 << 63) - 1)
    rest = value - (torch.div(half, signed, rounding_mode="floor") << 1) * signed
    return torch.where((rest ^ lowest) >= (signed ^ lowest), rest - signed, rest)
