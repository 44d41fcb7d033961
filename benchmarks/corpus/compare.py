"""Results as plain tensors, kept in a file, and how two of them differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

#: What is kept of one result: where it stands, its form, its values.
Kept = list[tuple[str, tuple[Any, ...], Any]]


def keep(tree: Any, place: str) -> Kept:
    """Every tensor and number in ``tree``, detached and copied; other leaves as text of their class."""
    found: Kept = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        where = place + pytree.keystr(path)
        if isinstance(leaf, torch.Tensor):
            form, plain = _plain(leaf)
            found.append((where, form, plain))
        elif isinstance(leaf, (bool, int, float, complex, str, type(None))):
            found.append((where, (type(leaf).__name__,), leaf))
        else:
            found.append((where, (type(leaf).__name__,), None))
    return found


def _plain(value: torch.Tensor) -> tuple[tuple[Any, ...], torch.Tensor | None]:
    """How it is laid out, and a dense copy."""
    value = value.detach()
    if hasattr(value, "to_local"):
        value = value.to_local()
    form: tuple[Any, ...] = (
        str(value.dtype),
        str(value.layout),
        tuple(value.shape) if not value.is_nested else "nested",
    )
    if value.is_meta:
        return form, None
    if value.is_nested:
        return form, value.values().clone() if value.layout is torch.jagged else torch.cat(
            [part.flatten() for part in value.unbind()]
        )
    if value.layout is not torch.strided:
        return form, value.to_dense()
    if value.is_quantized:
        return form, value.int_repr()
    return (*form, _strides(value)), value.resolve_conj().resolve_neg().contiguous().clone()


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    """Strides where they mean something. Of a dimension of one element autograd returns the one or the other, in the
    same mode: it keeps a gradient as it is if nobody else holds it, and else copies it."""
    return tuple(stride if size > 1 else 1 for size, stride in zip(value.shape, value.stride(), strict=True))


def save(kept: Kept, path: Path) -> None:
    """Write it."""
    torch.save(kept, path)


def load(path: Path) -> Kept:
    """Read what :func:`save` has written."""
    found: Kept = torch.load(path, weights_only=False)  # our own file, in our own folder
    return found


def difference(ours: Kept, theirs: Kept, tolerance: tuple[float, float] | None = None) -> str:
    """Empty if equal, bit by bit or within ``tolerance`` (relative, absolute); else what differs first, as text."""
    if len(ours) != len(theirs):
        return f"{len(ours)} values against {len(theirs)}"
    for (place, form, value), (other_place, other_form, other) in zip(ours, theirs, strict=True):
        if place != other_place or form != other_form:
            return f"{place} {form} against {other_place} {other_form}"
        if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor):
            if told := _tensors(value, other, tolerance):
                return f"{place}: {told}"
        elif not _same(value, other):
            return f"{place}: {value!r} against {other!r}"
    return ""


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) or (value != value and other != other)


def _tensors(value: torch.Tensor, other: torch.Tensor, tolerance: tuple[float, float] | None) -> str:
    if tolerance is None:
        if torch.equal(_bits(value), _bits(other)):
            return ""
    elif torch.allclose(value, other, rtol=tolerance[0], atol=tolerance[1], equal_nan=True):
        return ""
    if value.dtype == torch.bool:
        return f"{int((value != other).sum())} of {value.numel()} differ"
    wide = torch.complex128 if value.is_complex() else torch.float64
    far = (value.to(wide) - other.to(wide)).abs().nan_to_num(nan=0.0)
    unequal = int((_bits(value) != _bits(other)).sum())
    return f"{unequal} of {value.numel()} bytes differ, by at most {float(far.max()):.3g}" if far.numel() else "differ"


def _bits(value: torch.Tensor) -> torch.Tensor:
    """The bytes, every NaN the same one."""
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.is_floating_point():
        value = (
            torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
            if value.element_size() > 1
            else value
        )
    return value.reshape(-1).contiguous().view(torch.uint8)
