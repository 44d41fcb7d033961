"""Tensors as plain data: the constants of a graph on the way out and back."""

from __future__ import annotations

import math
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat

#: Names of the dtypes that travel, as torch spells them without the module.
DTYPES: Final[dict[str, torch.dtype]] = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_NAMES: Final[dict[torch.dtype, str]] = {value: str(value).removeprefix("torch.") for value in DTYPES.values()}


def _extent(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements from the first to the last that a tensor reaches; 0 when it has none."""
    if any(size == 0 for size in shape):
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def encode(tensor: torch.Tensor) -> dict[str, Any]:
    """A real tensor as `{dtype, shape, stride, device, requires_grad, parameter, bytes}`, data included.

    Raises:
        UnserializableError: for a layout whose bytes cannot be read (sparse, opaque, subclass), or a fake tensor.
    """
    if isinstance(tensor, compat.FakeTensor):
        raise UnserializableError("fake_constant", f"{tuple(tensor.shape)}: no data to send")
    if tensor.layout is torch._mkldnn:
        return _encode_packed(tensor)
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise UnserializableError("opaque_constant", f"layout {tensor.layout}, {tensor.dtype}")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
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
        "device": str(tensor.device),
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


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 62 for item in value):
        raise WireError(f"tensor {what} must be a list of sizes, got {value!r:.80}")
    return tuple(value)


def decode(data: Any) -> torch.Tensor:
    """The tensor that :func:`encode` described, on its own device.

    Raises:
        WireError: when the description is malformed or does not fit its bytes.
        UnserializableError: when its device is not there.
    """
    keys = {"dtype", "shape", "stride", "device", "requires_grad", "parameter", "frozen", "packed", "bytes"}
    if not isinstance(data, dict) or set(data) != keys:
        raise WireError("a tensor must be a table of dtype, shape, stride, device, requires_grad, parameter, bytes")
    dtype, raw, device = data["dtype"], data["bytes"], data["device"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise WireError(f"tensor dtype {dtype!r:.80} is unknown")
    if not isinstance(raw, bytes) or not isinstance(device, str):
        raise WireError("tensor bytes must be bytes and its device a string")
    shape, stride = _ints(data["shape"], "shape"), _ints(data["stride"], "stride")
    if len(shape) != len(stride):
        raise WireError(f"tensor has {len(shape)} sizes and {len(stride)} strides")
    count = _extent(shape, stride)
    if count * DTYPES[dtype].itemsize != len(raw):
        raise WireError(f"tensor of extent {count} x {DTYPES[dtype].itemsize} bytes came with {len(raw)} bytes")
    if math.prod(shape) >= 1 << 48:
        raise WireError(f"tensor of {math.prod(shape)} elements is too large")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise WireError(f"tensor device {device!r:.80}: {error}") from None
    with compat.disable_current_modes(), torch.no_grad():
        flat = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
        tensor = flat.view(DTYPES[dtype])
        if place.type != "cpu":
            try:
                tensor = tensor.to(place)
            except (RuntimeError, AssertionError) as error:
                raise UnserializableError("device_constant", f"a constant lives on {device}: {error}") from None
        tensor = torch.as_strided(tensor, shape, stride)
        if data["packed"]:
            tensor = tensor.to_mkldnn()
        if data["parameter"]:
            tensor = torch.nn.Parameter(tensor, requires_grad=bool(data["requires_grad"]))
        elif data["requires_grad"]:
            tensor.requires_grad_(True)
        if data["frozen"]:
            tensor._is_frozen_param = True
    return tensor
