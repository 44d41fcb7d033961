"""What all commands share: errors for people, one JSON document for programs, files written whole or not at all."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sandbox.errors import PolicyError, SandboxError

if TYPE_CHECKING:
    from rich.console import Console

#: Exit statuses, see `sandbox --help`.
OK: Final = 0
FAILED: Final = 1
BAD_INPUT: Final = 2
#: What a shell gives a command that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED: Final = 130
#: The modes that `install` knows, told here so that a wrong one is refused before torch is imported; a test compares.
MODES: Final = ("normal", "serialize", "subprocess", "async", "progressive")
#: Columns of a table when the output is not a terminal, so that logs and pipes are not squeezed into 80.
WIDTH: Final = 140


def error(message: str) -> None:
    """Tell a user error on stderr, one `sandbox: error:` per line."""
    for line in message.splitlines() or [""]:
        print(f"sandbox: error: {line}", file=sys.stderr)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """What the user can put right ends the process with one readable message and status 2, never a traceback.

    Raises:
        SystemExit: instead of SandboxError, KeyboardInterrupt and a closed pipe.
    """
    try:
        yield
    except SandboxError as problem:
        error(str(problem))
        raise SystemExit(BAD_INPUT) from None
    except KeyboardInterrupt:
        print("sandbox: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader (`| head`) has enough. The interpreter would complain once more when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(FAILED) from None


def subcommand(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, summary: str, description: str
) -> argparse.ArgumentParser:
    """A subcommand's parser; ``description`` is the whole help text, with example and exit codes."""
    text, _, rest = description.strip().partition("\n\n")
    return commands.add_parser(
        name,
        help=summary,
        description=text,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_policy(parser: argparse.ArgumentParser) -> None:
    """The option `--policy`; its default is the variable TORCH_COMPILE_SANDBOX, or else `default`."""
    parser.add_argument(
        "--policy",
        metavar="P",
        default=os.environ.get("TORCH_COMPILE_SANDBOX") or "default",
        help="a shipped policy (see `sandbox policy list`) or a TOML file; default: "
        "$TORCH_COMPILE_SANDBOX, or else `default`",
    )


def add_mode(parser: argparse.ArgumentParser) -> None:
    """The option `--mode`; its default is the variable TORCH_COMPILE_SANDBOX_MODE, or else `subprocess`."""
    parser.add_argument(
        "--mode",
        metavar="M",
        default=os.environ.get("TORCH_COMPILE_SANDBOX_MODE") or "subprocess",
        help="subprocess: each graph in a child; async: the same, but it runs uncompiled until then; progressive: "
        "compiled in a hurry, then better; serialize: through the same bytes, in this process, for debugging; "
        "normal: in this process, only counted. Default: $TORCH_COMPILE_SANDBOX_MODE, or else `subprocess`",
    )


def checked_mode(mode: str) -> str:
    """``mode``, if it is one; needs no torch.

    Raises:
        PolicyError: naming those that are.
    """
    if mode not in MODES:
        raise PolicyError(f"no compile mode {mode!r}: allowed are {', '.join(MODES)}")
    return mode


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument(
        "--json", action="store_true", help="print exactly one JSON document on stdout; all else goes to stderr"
    )


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(document, indent=2, sort_keys=False))


@contextlib.contextmanager
def only_ours_on_stdout() -> Iterator[None]:
    """Inside the block, what libraries and compilers print on stdout goes to stderr, whoever writes it, also C code."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def console(stderr: bool = False) -> Console:
    """Where tables and progress go."""
    from rich.console import Console

    made = Console(stderr=stderr)
    return made if made.is_terminal else Console(stderr=stderr, width=WIDTH)


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: it cannot be written; what stood there is untouched.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp gives 0600; a report is as readable as any file that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def size(count: float) -> str:
    """Bytes for people: `41 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB".replace(".0 ", " ")
