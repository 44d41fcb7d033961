"""A Python program, run in this process as if the interpreter had been given it: script, folder, zip, module, stdin.

Not `runpy`: that puts the old `__main__` back when the program's last line is done, and so before the program's
threads, `atexit` functions and pickles have used it. Like pdb, we give the program the real `__main__`.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import pkgutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any, cast

from sandbox.errors import SandboxError


@dataclass(frozen=True)
class Program:
    """What to run, with the surroundings it expects. ``code`` is compiled late: a syntax error is the program's."""

    code: Callable[[], CodeType]
    argv: list[str]
    path: str
    """What stands at `sys.path[0]`."""
    file: str | None = None
    loader: Any = None
    spec: importlib.machinery.ModuleSpec | None = None

    def run(self) -> None:
        """Run it to its last line, as `__main__`.

        Raises:
            whatever the program raises; its traceback, when the interpreter prints it, holds none of our frames.
        """
        sys.argv[:] = self.argv
        if not sys.flags.safe_path:
            sys.path[0] = self.path
        names = sys.modules["__main__"].__dict__
        names.clear()
        names.update(
            __name__="__main__",
            __doc__=None,
            __package__=self.spec.parent if self.spec else None,
            __loader__=self.loader,
            __spec__=self.spec,
            __builtins__=__builtins__,
            __cached__=self.spec.cached if self.spec else None,
        )
        if self.file is not None:
            names["__file__"] = self.file
        code: CodeType | None = None
        try:
            code = self.code()
            exec(code, names)
        except BaseException:
            _hide_our_frames(code)
            raise


def find(words: Sequence[str]) -> Program:
    """The program that the command line names: `SCRIPT ARG…`, `-m MODULE ARG…` or `- ARG…`.

    Raises:
        SandboxError: there is none.
    """
    if not words:
        raise SandboxError("run: which program? For example: sandbox run -- script.py")
    if words[0] == "-m":
        if len(words) < 2:
            raise SandboxError("run: -m needs the name of a module")
        return _module(words[1], words[2:])
    if words[0] == "-":
        return Program(lambda: compile(sys.stdin.read(), "<stdin>", "exec", dont_inherit=True), list(words), "")
    if words[0].startswith("-"):
        raise SandboxError(f"run: {words[0]}: a script, `-m MODULE` or `-` is expected after `--`")
    return _script(words[0], words)


def _script(name: str, argv: Sequence[str]) -> Program:
    if os.path.isdir(name) or (os.path.isfile(name) and zipfile.is_zipfile(name)):
        spec = importlib.machinery.PathFinder.find_spec("__main__", [name])
        if spec is None:
            raise SandboxError(f"run: {name}: no __main__ in it")
        return _of_spec(spec, list(argv), name)
    if not os.path.isfile(name):
        raise SandboxError(f"run: {name}: no such file")
    if not os.access(name, os.R_OK):
        raise SandboxError(f"run: {name}: not readable")
    file = os.path.abspath(name)

    def code() -> CodeType:
        with open(file, "rb") as compiled:
            ready = pkgutil.read_code(compiled)
        if ready is not None:
            return cast("CodeType", ready)
        with open(file, "rb") as source:
            return compile(source.read(), file, "exec", dont_inherit=True)

    loader = importlib.machinery.SourceFileLoader("__main__", file)
    return Program(code, list(argv), os.path.dirname(os.path.realpath(name)), file, loader)


def _module(name: str, arguments: Sequence[str]) -> Program:
    """As `python -m`: a package is run by its `__main__`; its parents are imported to find it."""
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except (ImportError, ValueError) as problem:
        raise SandboxError(f"run: -m {name}: {problem}") from None
    if spec is None:
        raise SandboxError(f"run: -m {name}: no such module, or a package without __main__")
    return _of_spec(spec, [spec.origin or name, *arguments], os.getcwd())


def _of_spec(spec: importlib.machinery.ModuleSpec, argv: list[str], path: str) -> Program:
    loader: Any = spec.loader
    if not hasattr(loader, "get_code"):
        raise SandboxError(f"run: {spec.name}: no Python code")

    def code() -> CodeType:
        found: CodeType | None = loader.get_code(spec.name)
        if found is None:
            raise ImportError(f"{spec.name} is no Python code")
        return found

    return Program(code, argv, path, spec.origin, loader, spec)


def _hide_our_frames(code: CodeType | None) -> None:
    """Have the interpreter, which prints an uncaught exception, begin its traceback with the program."""
    hook = sys.excepthook

    def plain(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        theirs = trace
        while theirs is not None and theirs.tb_frame.f_code is not code:
            theirs = theirs.tb_next
        hook(kind, value.with_traceback(theirs), theirs)

    sys.excepthook = plain
