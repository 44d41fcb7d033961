"""`sandbox run`: any script, unchanged, with every compile sandboxed.

    options checked ─▶ the script becomes `__main__` ─▶ it imports torch ─▶ sandbox.install() ─▶ … ─▶ report

The sandbox is installed when the script itself has imported torch, not before: environment variables that
the script sets before that import (OMP_NUM_THREADS, TORCH_LOGS, TORCHINDUCTOR_…) work as they do without us.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from sandbox.cli.output import (
    BAD_INPUT,
    OK,
    add_mode,
    add_policy,
    checked_mode,
    error,
    subcommand,
    user_errors,
    write_whole,
)
from sandbox.cli.program import find
from sandbox.errors import SandboxError
from sandbox.policy import Policy, load
from sandbox.report import Stats

_HELP = """\
Runs a Python program, unchanged, with every torch.compile of it in the sandbox. Its arguments, output and exit code
are its own; one line on stderr at the end says what was compiled where.

examples:
  sandbox run -- train.py --epochs 3
  sandbox run --policy production --report r.json -- serve.py
  sandbox run -m package.module --flag
  echo 'print(1)' | sandbox run -- -

exit codes: the program's own; 2 also if policy, mode or program are wrong: nothing was started then.

--report is rewritten every two seconds and at the end, always whole, so that it survives a program that is killed;
its key `finished` says whether the program came to its end.
"""
#: Seconds between two looks at whether the report has changed.
REFRESH_SECONDS: Final = 2.0
#: Options that take a value.
_VALUED: Final = ("--policy", "--mode", "--report")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "run", "any script, unchanged, with every compile sandboxed", _HELP)
    parser.usage = "sandbox run [--policy P] [--mode M] [--report FILE.json] (-- SCRIPT.py | -m MODULE | -- -) ARG..."
    add_policy(parser)
    add_mode(parser)
    parser.add_argument("--report", metavar="FILE.json", type=Path, help="write the counts and a row per job there")
    parser.set_defaults(handler=_run, program=[])


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the program with its arguments, which argparse must not touch."""
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word == "--":
            return list(arguments[:position]), list(arguments[position + 1 :])
        if word in ("-m", "-") or not word.startswith("-"):
            return list(arguments[:position]), list(arguments[position:])
        position += 2 if word in _VALUED else 1
    return list(arguments), []


def _run(arguments: argparse.Namespace) -> int:
    with user_errors():
        policy, mode = load(arguments.policy), checked_mode(arguments.mode)
        report: Path | None = arguments.report
        if report is not None:
            report = report.absolute()  # the script may change the working directory
            if report.is_dir() or not os.access(report.parent, os.W_OK):
                raise SandboxError(f"--report {report}: no file can be written there")
        program = find(arguments.program)
    session = _Session(policy, mode, report)
    session.begin()
    program.run()
    return OK


class _Session:
    """One run: installs the sandbox when torch comes, keeps the report, says the last word."""

    def __init__(self, policy: Policy, mode: str, report: Path | None) -> None:
        self._policy = policy
        self._mode = mode
        self._report = report
        self._pid = os.getpid()
        self._scheme: Any = None
        self._written = ""
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def begin(self) -> None:
        """Before the program: from now on the report is kept."""
        # Registered before the script runs, so called after all that the script registers.
        atexit.register(self._end)
        when_imported("torch", self._install)
        if self._report is not None:
            self._write(finished=False)
            threading.Thread(target=self._refresh, name="sandbox-report", daemon=True).start()

    def _install(self) -> None:
        from sandbox.inductor.install import install, installed

        try:
            install(self._policy, self._mode)
        except SandboxError as problem:
            error(str(problem))
            raise SystemExit(BAD_INPUT) from None
        self._scheme = installed()

    def _stats(self) -> Stats:
        """The counts of all sandboxes of this process; those of the beginning if the script has uninstalled it."""
        if self._scheme is None:
            return Stats(policy=self._policy.name, mode=self._mode)
        from sandbox.inductor.install import installed, stats

        counts: Stats = stats() if installed() is not None else self._scheme.sandbox.stats()
        return counts

    def _refresh(self) -> None:
        while not self._ended.wait(REFRESH_SECONDS):
            with contextlib.suppress(OSError):  # told at the end, if it still is so then
                self._write(finished=False)

    def _write(self, finished: bool) -> None:
        if self._report is None:
            return
        with self._lock:
            if self._ended.is_set() and not finished:
                return
            text = json.dumps({**self._stats().model_dump(mode="json"), "finished": finished}, indent=2) + "\n"
            if text != self._written:
                write_whole(self._report, text)
                self._written = text

    def _end(self) -> None:
        if os.getpid() != self._pid:
            return  # a fork of the script: the report belongs to the process that was started
        self._ended.set()
        try:
            self._write(finished=True)
        except OSError as problem:
            error(f"the report was not written: {problem}")
        with contextlib.suppress(OSError, ValueError, AttributeError):  # the script may have closed stderr
            print(summary(self._stats(), self._report), file=sys.stderr)


def summary(stats: Stats, report: Path | None = None) -> str:
    """The one line at the end."""
    leaks = sum(stats.leaks.values())
    words = [
        f"sandbox: {stats.graphs} graphs: {stats.in_child} compiled in children, {stats.in_process} in this process, "
        f"{stats.eager} run uncompiled",
        f"{stats.children_started} children, {leaks} leaks",
    ]
    if stats.launches:
        told = ", ".join(f"{count} {where.replace('_', ' ')}" for where, count in sorted(stats.launches.items()))
        words.append(f"kernels of launches: {told}")
    if stats.pending or stats.kept:
        kept = sum(stats.kept.values())
        words.append(f"{stats.switched} exchanged for better code, {kept} not, {stats.pending} under way")
    if stats.in_process_reasons:
        words.append("in this process because: " + ", ".join(sorted(stats.in_process_reasons)))
    if report is not None:
        words.append(f"report: {report}")
    return "; ".join(words)


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` once, as soon as the module ``name`` has been imported, or now if it is already."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _OnImport(name, action))


class _OnImport(importlib.abc.MetaPathFinder):
    """Finds nothing itself: lets the others find the module, and acts when it has run."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self._name = name
        self._action = action
        self._asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The others' answer, its loader taught to call us back. Also asked by `importlib.util.find_spec`."""
        if fullname != self._name or getattr(self._asking, "now", False):
            return None
        self._asking.now = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.now = False
        loader: Any = spec.loader if spec is not None else None
        if loader is None:
            return None
        load_module = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # The loader is a fresh object of this spec; it is left as it was found.
            del loader.exec_module
            load_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._action()

        loader.exec_module = exec_module
        return spec
