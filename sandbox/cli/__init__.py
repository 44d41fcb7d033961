"""The command `sandbox`: one module per subcommand, found here.

    __init__   the parser and `main`
    output     errors, JSON, tables: what all commands share
    policy     doctor     quarantine     replay     run (program)     demo (models, check)     faults (faults_host)
    bench/ (bench_corpus)

No module here imports torch at its top: `sandbox --help` and `sandbox policy` answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from sandbox.cli import bench, demo, doctor, faults, policy, quarantine, replay, run
from sandbox.cli.output import user_errors

_DESCRIPTION: Final = """\
Runs every torch.compile job in a fresh, confined, resource-limited child process, so that a compiler that
crashes, hangs or eats the memory does not take the service down with it."""

_EPILOG: Final = """\
a first tour:
  sandbox doctor                              what can be enforced on this host
  sandbox demo                                real models, every graph compiled in a child, compared with eager
  sandbox run --report r.json -- script.py    any script, unchanged
  sandbox replay CAPSULE                      what a failed job has left, run again in a child
  sandbox policy show default                 what a policy says, with every key explained

exit codes of all commands (`run` instead gives the script's own):
  0  all went well
  1  a check failed: the output says which
  2  bad input, such as an unknown policy: one readable message on stderr, and nothing was started
"""


class _Parser(argparse.ArgumentParser):
    """One readable line instead of the usage, which hides it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sandbox: error: {message} (see `{self.prog} --help`)\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="sandbox",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    from sandbox import __version__

    top.add_argument("--version", action="version", version=f"sandbox {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (demo, run, doctor, policy, quarantine, replay, faults, bench):
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. ``arguments`` default to those of the process."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program: list[str] = []
    if words[:1] == ["run"]:
        options, program = run.split(words[1:])
        words = ["run", *options]
    given = parser().parse_args(words)
    handler: Callable[[argparse.Namespace], int] = given.handler
    if given.command == "run":
        given.program = program
        # Past its own checks, every exception is the script's, and none of ours to translate.
        return handler(given)
    with user_errors():
        return handler(given)
