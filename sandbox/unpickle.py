"""Reads and writes values that travel between the processes, where the writer may be hostile.

:class:`pickle.Unpickler` with a strict ``find_class`` is not enough in a parent that has to survive:

- `BUILD` sets attributes on whatever lies on the stack, also on an allowed *class*;
- `LONG_BINPUT` sizes the memo by an index of the attacker's choice; one-byte opcodes make 216-byte sets;
- nested tuples are hashed by recursion in C with no check, a segmentation fault when one is a dict's key, and
  in exponential time when they share their elements; a million equal hashes make a dict quadratic;
- nested slices overflow the C stack when they are freed.

So :mod:`sandbox.opcodes` is an own small machine for what :func:`pickle.dumps` writes in protocol 5. It calls
nothing but a few constructors with checked arguments and the classes that the caller names, and counts depth,
memory, work and time. Whatever goes wrong is one exception, :class:`WireError`.

Not contained: what the caller's classes do with the arguments that they are given, and the time that it takes to
print or compare a value whose parts are shared many times over.
"""

from __future__ import annotations

import pickle
from typing import Any

from sandbox.errors import WireError
from sandbox.opcodes import Machine, Refused, resolve

__all__ = ["resolve", "safe_dumps", "safe_loads"]


def safe_dumps(value: Any) -> bytes:
    """``value`` as a pickle of protocol 5, which :func:`safe_loads` reads. Raises what `pickle.dumps` raises."""
    return pickle.dumps(value, protocol=5)


def safe_loads(data: bytes, allowed: frozenset[str] = frozenset()) -> Any:
    """The value of a pickle of plain data: None, bool, int, float, complex, str, bytes, bytearray, list, tuple,
    dict, OrderedDict, set, frozenset, range, slice; and instances of the classes in ``allowed``. The classes complex,
    OrderedDict, range and slice, and those in ``allowed``, may also be values themselves: pickle writes their names.

    ``allowed`` holds names as `module:qualname`. They are looked up only in modules that are already imported,
    from class to class; anything but an ordinary class is refused, as are metaclasses.

    Memory is bounded by 256 MiB + 4 times the size of ``data``, time by 20 s + 1 s for each MB.

    Raises:
        WireError: whatever is wrong with ``data``.
    """
    try:
        return Machine(data, allowed).run()
    except Refused as error:
        raise WireError(f"the pickle is refused: {error}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - hostile data can raise anything, also through a class
        raise WireError(f"the pickle cannot be read: {type(error).__name__}: {_text(error)}") from None


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except Exception:  # noqa: BLE001 - an allowed class may be an exception with a broken __str__
        return "(no message)"
