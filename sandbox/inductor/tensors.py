"""Tensors as plain data: the constants of a graph on the way out and back."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat
from sandbox.inductor.budget import shown

#: Names of the dtypes that travel, as torch spells them without the module. A quantised tensor is more than bytes.
DTYPES: Final[dict[str, torch.dtype]] = {
    name: value
    for name, value in vars(torch).items()
    if isinstance(value, torch.dtype) and not name.startswith(("qint", "quint"))
}
_NAMES: Final[dict[torch.dtype, str]] = {value: str(value).removeprefix("torch.") for value in DTYPES.values()}


#: Classes whose tensors are their bytes and nothing more.
PLAIN: Final = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements from the first to the last that a tensor reaches; 0 when it has none."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


#: Attributes of a tensor that stands for one on a device that is not here, and of its copy.
_MEANT_FOR: Final = "_sandbox_meant_for"
_COPY_OF: Final = "_sandbox_copy_of"
_kept: list[bool] = []


def meant_for(tensor: torch.Tensor, device: torch.device, of: torch.Tensor | None = None) -> torch.Tensor:
    """``tensor``, which is decoded on ``device`` when it has been sent. ``of``: what it is a copy of."""
    setattr(tensor, _MEANT_FOR, device)
    if of is not None:
        setattr(tensor, _COPY_OF, of)
    return tensor


def place_of(tensor: torch.Tensor) -> torch.device | None:
    """The device that it stands on, if that is not here."""
    found: torch.device | None = getattr(tensor, _MEANT_FOR, None)
    return found


def original_of(tensor: torch.Tensor) -> torch.Tensor:
    """What it is a copy of, if that stands on the same device as the copy; else itself."""
    source = getattr(tensor, _COPY_OF, None)
    return source if source is not None and place_of(source) == place_of(tensor) else tensor


@contextlib.contextmanager
def kept_here() -> Iterator[None]:
    """Inside the block, tensors of a GPU are decoded into this process's memory, and know where they stand."""
    _kept.append(True)
    try:
        yield
    finally:
        _kept.pop()


def encode(tensor: torch.Tensor) -> dict[str, Any]:
    """A real tensor as `{dtype, shape, stride, device, requires_grad, parameter, bytes}`, data included.

    Raises:
        UnserializableError: for a layout whose bytes cannot be read (sparse, opaque, subclass), or a fake tensor.
    """
    if isinstance(tensor, compat.FakeTensor):
        raise UnserializableError("fake_constant", f"{tuple(tensor.shape)}: no data to send")
    if tensor.layout is compat.mkldnn_layout:
        return _encode_packed(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UnserializableError("opaque_constant", f"layout {tensor.layout}, {tensor.dtype}")
    if type(tensor) not in PLAIN:
        raise UnserializableError("tensor_subclass", f"{type(tensor).__module__}.{type(tensor).__qualname__}")
    with compat.disable_current_modes(), torch.no_grad():
        source = tensor.detach().resolve_conj().resolve_neg()
        shape, stride = tuple(source.shape), tuple(source.stride())
        count = _extent(shape, stride)
        flat = torch.as_strided(source, (count,), (1,), source.storage_offset()).cpu().contiguous()
        data = flat.view(torch.uint8).numpy().tobytes() if count else b""
    return {
        "dtype": _NAMES[tensor.dtype],
        "shape": list(shape),
        "stride": list(stride),
        "device": str(getattr(tensor, _MEANT_FOR, tensor.device)),
        "requires_grad": tensor.requires_grad,
        "parameter": isinstance(tensor, torch.nn.Parameter),
        "frozen": bool(getattr(tensor, "_is_frozen_param", False)),
        "packed": False,
        "bytes": data,
    }


def _encode_packed(tensor: torch.Tensor) -> dict[str, Any]:
    """A weight that freezing has packed for oneDNN, unpacked: what is generated depends on its values only."""
    try:
        with compat.disable_current_modes(), torch.no_grad():
            dense = tensor.detach().to_dense()
    except RuntimeError as error:
        raise UnserializableError("opaque_constant", f"a packed weight cannot be unpacked: {error}") from None
    return {**encode(dense), "frozen": bool(getattr(tensor, "_is_frozen_param", False)), "packed": True}


#: Where many of torch's own operations end.
_MAX_DIMENSIONS: Final = 64
_MAX_ELEMENTS: Final = 1 << 48


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        raise WireError(f"tensor {what} must be a list of sizes, got {shown(value)}")
    if not all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        raise WireError(f"tensor {what} must be a list of sizes")
    return tuple(value)


def decode(data: Any) -> torch.Tensor:
    """The tensor that :func:`encode` described, on its own device. It takes no more memory than its bytes.

    Raises:
        WireError: when the description is malformed or does not fit its bytes.
        UnserializableError: when its device is not there.
    """
    keys = {"dtype", "shape", "stride", "device", "requires_grad", "parameter", "frozen", "packed", "bytes"}
    if not isinstance(data, dict) or set(data) != keys:
        raise WireError("a tensor must be a table of dtype, shape, stride, device, requires_grad, parameter, bytes")
    dtype, raw, device = data["dtype"], data["bytes"], data["device"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError(f"tensor dtype {shown(dtype)} is unknown")
    if not isinstance(raw, bytes) or not isinstance(device, str):
        raise WireError("tensor bytes must be bytes and its device a string")
    if not all(type(data[name]) is bool for name in ("requires_grad", "parameter", "frozen", "packed")):
        raise WireError("a tensor's requires_grad, parameter, frozen and packed must be true or false")
    shape, stride = _ints(data["shape"], "shape"), _ints(data["stride"], "stride")
    if len(shape) != len(stride):
        raise WireError(f"tensor has {len(shape)} sizes and {len(stride)} strides")
    count = _extent(shape, stride)
    if count * DTYPES[dtype].itemsize != len(raw):
        raise WireError(f"tensor of another extent than its {len(raw)} bytes")
    elements = math.prod(shape)
    if elements >= _MAX_ELEMENTS or (data["packed"] and elements != count):
        # A stride of 0 makes any number of elements of one; packing would write them all out.
        raise WireError("a tensor of the reply is too large")
    if data["requires_grad"] and not (DTYPES[dtype].is_floating_point or DTYPES[dtype].is_complex):
        raise WireError(f"a tensor of {dtype} cannot require a gradient")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise WireError(f"tensor device {shown(device)} is unknown") from None
    if place.type == "meta":
        raise WireError("a tensor without data")
    try:
        return _make(raw, DTYPES[dtype], shape, stride, place, data)
    except (WireError, UnserializableError):
        raise
    except Exception as error:  # noqa: BLE001 - torch refuses what no encoder sends, each kind in its own way
        raise WireError(f"a tensor of the reply cannot be made: {type(error).__name__}") from None


def _make(
    raw: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], place: Any, data: dict[str, Any]
) -> torch.Tensor:
    with compat.disable_current_modes(), torch.no_grad():
        stands: torch.device | None = None
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        tensor = flat.view(dtype)
        if place.type == "cuda" and _kept:
            stands = place
        elif place.type != "cpu":
            try:
                tensor = tensor.to(place)
            except (RuntimeError, AssertionError) as error:
                raise UnserializableError("device_constant", f"a constant lives on {place}: {error}") from None
        tensor = torch.as_strided(tensor, shape, stride)
        if data["packed"]:
            tensor = tensor.to_mkldnn()
        if data["parameter"]:
            tensor = torch.nn.Parameter(tensor, requires_grad=data["requires_grad"])
        elif data["requires_grad"]:
            tensor.requires_grad_(True)
        if data["frozen"]:
            tensor._is_frozen_param = True
        if stands is not None:
            meant_for(tensor, stands)
    return tensor
