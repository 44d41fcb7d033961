"""What the compiler raised, as plain data and back: the user sees what in-process Inductor would have raised."""

from __future__ import annotations

import builtins
import sys
import traceback
from typing import Any, Final

from sandbox.results import Failure

_MAX_MESSAGE: Final = 1 << 20


def failure_of(error: BaseException) -> Failure:
    """Class, message and traceback of ``error``, as text. In a child."""
    kind = type(error)
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 - an exception's own __str__ may raise anything
        message = f"(its message cannot be shown: {type(broken).__name__})"
    text = "".join(traceback.format_exception(error))
    return Failure(
        module=kind.__module__,
        qualname=kind.__qualname__,
        message=message[:_MAX_MESSAGE],
        traceback=text[-_MAX_MESSAGE:],
    )


def rebuild_exception(failure: Failure) -> BaseException:
    """An exception of the failure's class with its message, or a RuntimeError that says the same.

    The class is taken only from `builtins` or from a module of torch that this process has imported already, and
    its `__init__` is not run. The child's traceback is the exception's note.
    """
    cls = _class_of(failure)
    error: BaseException
    if cls is None:
        error = RuntimeError(f"{failure.module}.{failure.qualname}: {failure.message}")
    else:
        try:
            error = cls.__new__(cls)
            error.args = (failure.message,)
            if str(error) != failure.message:
                error = _with_message(cls, failure.message)
        except Exception:  # noqa: BLE001 - a class that cannot be made without its arguments
            error = RuntimeError(f"{failure.module}.{failure.qualname}: {failure.message}")
    if failure.traceback:
        error.add_note(f"In the sandboxed child:\n{failure.traceback}")
    return error


def _with_message(cls: type[Exception], message: str) -> BaseException:
    """An instance of ``cls`` whose `str` is ``message`` although the class has a `__str__` of its own."""
    shown: Any = type(cls.__name__, (cls,), {"__str__": lambda self: message, "__module__": cls.__module__})
    shown.__qualname__ = cls.__qualname__
    made: BaseException = shown.__new__(shown)
    made.args = (message,)
    return made


def _class_of(failure: Failure) -> type[Exception] | None:
    root = failure.module.partition(".")[0]
    if root not in ("builtins", "torch"):
        return None
    found: object = builtins if root == "builtins" else sys.modules.get(failure.module)
    for part in failure.qualname.split("."):
        # Looked up in the dictionary only: a module's __getattr__ may import.
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and issubclass(found, Exception) else None
