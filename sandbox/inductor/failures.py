"""What the compiler raised, as plain data and back: the user sees what in-process Inductor would have raised."""

from __future__ import annotations

import builtins
import sys
from typing import Any, Final

from sandbox.results import Failure

#: Words that end the name of a class that says "this failed".
_ENDINGS: Final = ("Error", "Exception", "Warning")
#: Classes that Inductor raises, or lets through, under other names (2.11, 2.13).
_OTHERS: Final = frozenset(
    {
        "torch._inductor.exc.OperatorIssue",
        "torch._inductor.exc.MissingOperatorWithDecomp",
        "torch._inductor.exc.MissingOperatorWithoutDecomp",
        "torch._inductor.exc.InvalidCxxCompiler",
        "torch._inductor.exc.TritonMissing",
        "torch._inductor.exc.GPUTooOldForTriton",
        "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
        "torch.fx.experimental.symbolic_shapes.PendingUnbackedSymbolNotFound",
        # Of Triton 3.6 and 3.7. By the first and the last its autotuner knows a configuration that does not fit.
        "triton.compiler.errors.CompileTimeAssertionFailure",
        "triton.compiler.errors.UnsupportedLanguageConstruct",
        "triton.runtime.errors.OutOfResources",
    }
)
#: With these Dynamo steers itself (SkipFrame, RestartAnalysis, Unsupported, ...): no Dynamo runs in a child, and
#: Inductor raises none of them.
_CONTROL: Final = "torch._dynamo."


#: Of these and of Triton's own is what a compile of Triton's raises; no server takes one of them for a client that is
#: gone, or a GPU.
_BARE: Final = frozenset(
    {"AssertionError", "AttributeError", "IndexError", "KeyError", "NameError", "NotImplementedError", "RuntimeError",
     "SyntaxError", "TypeError", "ValueError"}
)  # fmt: skip


def rebuild_exception(failure: Failure, *, bare: bool = False) -> BaseException:
    """An exception of the failure's class with its message, or a RuntimeError that says the same.

    Args:
        bare: nothing stands between this exception and the caller's code (Dynamo wraps those of a graph), so it is one
            of Triton's own, or of the few of Python's that say nothing of the world outside.

    The class is taken only from `builtins` or from the module of torch or Triton that defines it and that this process
    has imported already; it must be one that says that something failed, and none that Dynamo steers itself by. Its
    `__init__` is not run. The child's traceback is the exception's note.
    """
    cls = _class_of(failure)
    if bare and cls is not None and cls.__module__.partition(".")[0] != "triton" and cls.__name__ not in _BARE:
        cls = None
    error: BaseException
    if cls is None:
        error = RuntimeError(f"{failure.module}.{failure.qualname}: {failure.message}")
    else:
        try:
            error = cls.__new__(cls)
            error.args = (failure.message,)
            if _says(error) != failure.message:
                error = _with_message(cls, failure.message)
        except Exception:  # noqa: BLE001 - a class that cannot be made without its arguments
            error = RuntimeError(f"{failure.module}.{failure.qualname}: {failure.message}")
    if failure.traceback:
        error.add_note(f"In the sandboxed child:\n{failure.traceback}")
    return error


def _says(error: BaseException) -> str | None:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - it needs what only its `__init__` would have set
        return None


def _with_message(cls: type[Exception], message: str) -> BaseException:
    """An instance of ``cls`` whose `str` is ``message`` although the class has a `__str__` of its own."""
    own = {
        "__module__": cls.__module__,
        "__str__": lambda self: message,
        # The class's own may ask for what only its `__init__` would have set.
        "__reduce__": lambda self: (RuntimeError, (message,)),
    }
    shown: Any = type(cls.__name__, (cls,), own)
    shown.__qualname__ = cls.__qualname__
    made: BaseException = shown.__new__(shown)
    made.args = (message,)
    return made


def _class_of(failure: Failure) -> type[Exception] | None:
    root = failure.module.partition(".")[0]
    if root not in ("builtins", "torch", "triton") or failure.module.startswith(_CONTROL):
        return None
    if not failure.qualname.endswith(_ENDINGS) and f"{failure.module}.{failure.qualname}" not in _OTHERS:
        return None
    found: object = builtins if root == "builtins" else sys.modules.get(failure.module)
    for part in failure.qualname.split("."):
        # Looked up in the dictionary only: a module's __getattr__ may import.
        found = getattr(found, "__dict__", {}).get(part)
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None
    # A module may hold a class of another, Dynamo's among them.
    return found if (found.__module__, found.__qualname__) == (failure.module, failure.qualname) else None
