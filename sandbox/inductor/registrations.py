"""What others have registered with torch or Inductor in this process, and what of it a graph needs in its child.

A child knows what torch brings and what the modules in `forkserver.preload` register. A graph with an op that it does
not know cannot be compiled there; with a lowering, a backend or patterns that it does not know it would be compiled to
something else, which nobody would notice. So all of them are named in the payload, and looked for in the child before
anything is compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError
from sandbox.inductor import compat

#: What torch says of an op that is not there, whoever asks for it (2.11, 2.13).
_NO_OP: Final = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'")
#: Namespaces in which only torch defines ops.
_OWN: Final = frozenset({"aten", "prim", "prims", "inductor", "higher_order", "rngprims", "_c10d_functional"})


def needed(gm: torch.fx.GraphModule) -> dict[str, str]:
    """`{what: module that registered it}` for each lowering, backend and list of patterns, not of torch, that compiling
    ``gm`` uses."""
    found: dict[str, str] = {}
    for op in _ops(gm):
        if (module := _foreign(compat.lowering.lowerings.get(op))) is not None:
            found[f"the lowering of {op}"] = module
    for device in sorted(_devices(gm)):
        backend = compat.device_codegens.get(device)
        if (module := _foreign(getattr(backend, "scheduling", None))) is not None:
            found[f"the Inductor backend of {device}"] = module
    for module in sorted(_pattern_modules()):
        found[f"the graph patterns of {module}"] = module
    return found


def check(needs: dict[str, str], gm: torch.fx.GraphModule) -> None:
    """In a child: all of ``needs`` is registered here, too, by the same modules, and nothing else.

    Raises:
        UnserializableError: reason `unregistered`; it names what is not, and the module to name in the policy.
    """
    here = needed(gm)
    for what, module in needs.items():
        if here.get(what) != module:
            raise UnserializableError("unregistered", complaint(what, module))


def complaint(what: str, module: str) -> str:
    """What to do about ``what``, in one sentence. ``module``: who registered it, empty if unknown."""
    if module == "__main__":
        return (
            f"{what} is registered by the script itself, which no child imports: move it into a module, and name that "
            "in forkserver.preload"
        )
    return f"{what} is not registered in the child: name {module or 'the module that does it'} in forkserver.preload"


def definer(op: Any) -> str:
    """The module that has defined an op by `torch.library.custom_op`; empty where that is not known."""
    name = op._schema.name if isinstance(op, compat.OpOverload) else op._qualified_op_name
    definition = compat.custom_op_definitions.get(name)
    return "" if definition is None else str(getattr(definition._init_fn, "__module__", ""))


def missing_op(error: BaseException) -> UnserializableError | None:
    """In a child: what to say if ``error`` comes from an op that is not there: a custom pass asked for it."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, AttributeError) and (match := _NO_OP.search(str(current))):
            return UnserializableError("unknown_op", complaint(f"{match[1]}::{match[2]}", ""))
        current = current.__cause__
    return None


class Refused:
    """What children of one sandbox have said that they do not know: the next graph with it starts none."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def note(self, gm: torch.fx.GraphModule, detail: str) -> None:
        """A child has ended with ``detail``. Only what ``gm`` uses counts: one child cannot refuse for others."""
        for reason in ("unknown_op", "unregistered"):
            if reason in detail:
                # As :func:`complaint` says it: one name may be the beginning of another.
                self._known.update((what, detail) for what in _names(gm) if f" {what} is " in detail)

    def check(self, gm: torch.fx.GraphModule) -> None:
        """Raises UnserializableError, with the words of that child, if ``gm`` uses any of it."""
        for what in _names(gm) if self._known else ():
            if what in self._known:
                reason, _, detail = self._known[what].removeprefix("UnserializableError: ").partition(": ")
                raise UnserializableError(reason, detail)


def _names(gm: torch.fx.GraphModule) -> list[str]:
    ops = [op._schema.name for op in _ops(gm)]
    return [name for name in ops if name.partition("::")[0] not in _OWN] + list(needed(gm))


def _ops(gm: torch.fx.GraphModule) -> Iterator[Any]:
    seen = set()
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if isinstance(node.target, compat.OpOverload) and node.target not in seen:
                seen.add(node.target)
                yield node.target


def _devices(gm: torch.fx.GraphModule) -> set[str]:
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return {value.device.type for value in values if isinstance(value, torch.Tensor)}


def _foreign(function: Any) -> str | None:
    """The module of a function or class, if it is not torch's."""
    if isinstance(function, functools.partial):
        function = function.func
    module = getattr(function, "__module__", None)
    if not isinstance(module, str) or module.partition(".")[0] in ("torch", "functools", "builtins"):
        return None
    return module


def _pattern_modules() -> set[str]:
    """The modules, other than torch's, whose patterns are among those that Inductor looks for in each graph that it
    lowers."""
    found = set()
    for matcher in compat.post_grad_patterns:
        for entries in matcher.patterns.values():
            for entry in entries:
                for name in ("handler", "extra_check"):
                    if (module := _foreign(getattr(entry, name, None))) is not None:
                        found.add(module)
    return found
