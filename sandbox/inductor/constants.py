"""Constants of a graph that are more than one block of bytes, on their way to a child: taken apart into plain tensors.

They never come back: a reply names the parent's own.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError
from sandbox.inductor import compat, tensors

#: A function and its arguments, as pickle's `__reduce__` gives them.
Form = tuple[Callable[..., Any], tuple[Any, ...]]

#: Layouts of compressed sparse tensors, and the methods that give their two tensors of indices.
_COMPRESSED: Final = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def reduced(tensor: torch.Tensor) -> Form | None:
    """How a tensor subclass, a sparse or a quantised tensor is made again; None for a plain one.

    Raises:
        UnserializableError: reason `opaque_constant`.
    """
    special = type(tensor) not in tensors.PLAIN
    if special and hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        inner = {name: getattr(tensor, name) for name in names}
        return _make_wrapper, (type(tensor), inner, context, tuple(tensor.size()), tuple(tensor.stride()))
    with compat.disable_current_modes(), torch.no_grad():
        if special and tensor.layout is torch.strided:
            return _make_subclass, (type(tensor), tensor.detach().as_subclass(torch.Tensor), tensor.requires_grad)
        if tensor.layout is torch.sparse_coo:
            parts = tensor._indices(), tensor._values(), tuple(tensor.shape), tensor.is_coalesced()
            return _make_coo, (*parts, tensor.requires_grad)
        if tensor.layout in _COMPRESSED:
            rows, columns = (getattr(tensor, name)() for name in _COMPRESSED[tensor.layout])
            shape = tuple(tensor.shape)
            return _make_compressed, (rows, columns, tensor.values(), shape, tensor.layout, tensor.requires_grad)
        return _quantized(tensor) if tensor.is_quantized else None


def _make_wrapper(cls: Any, inner: dict[str, Any], context: Any, size: Any, stride: Any) -> Any:
    return cls.__tensor_unflatten__(inner, context, size, stride)


def _make_subclass(cls: Any, base: torch.Tensor, requires_grad: bool) -> Any:
    return base.as_subclass(cls).requires_grad_(requires_grad)


def _make_coo(indices: Any, values: Any, shape: Any, coalesced: bool, requires_grad: bool) -> Any:
    return torch.sparse_coo_tensor(
        indices, values, shape, is_coalesced=coalesced, check_invariants=False, requires_grad=requires_grad
    )


def _make_compressed(rows: Any, columns: Any, values: Any, shape: Any, layout: Any, requires_grad: bool) -> Any:
    return torch.sparse_compressed_tensor(
        rows, columns, values, shape, layout=layout, check_invariants=False, requires_grad=requires_grad
    )


def _quantized(obj: torch.Tensor) -> Form:
    if obj.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return compat.make_quantized, (obj.int_repr(), obj.q_scale(), obj.q_zero_point())
    if obj.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        parts = obj.int_repr(), obj.q_per_channel_scales(), obj.q_per_channel_zero_points(), obj.q_per_channel_axis()
        return compat.make_quantized_channels, parts
    raise UnserializableError("opaque_constant", f"quantised by {obj.qscheme()}")


def put(gm: torch.fx.GraphModule) -> int:
    """In a child without a GPU: constants of the graph that stand on one are here as copies in memory, and the graph
    says itself that they are to be put there, which Inductor does when it compiles. Returns how many there are."""
    count = 0
    for module in [each for each in gm.modules() if isinstance(each, torch.fx.GraphModule)]:
        before = count
        for node in module.graph.find_nodes(op="get_attr"):
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part, None)
            device = tensors.place_of(value) if isinstance(value, torch.Tensor) else None
            if device is None:
                continue
            with module.graph.inserting_after(node):
                there = module.graph.call_function(torch.ops.prims.device_put.default, (node, device))
            there.meta.update(node.meta)
            node.replace_all_uses_with(there, delete_user_cb=functools.partial(operator.is_not, there))
            if isinstance(fake := node.meta.get("val"), compat.FakeTensor):
                with fake.fake_mode:
                    node.meta["val"] = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device="cpu")
            count += 1
        if count > before:
            module.recompile()
    return count
