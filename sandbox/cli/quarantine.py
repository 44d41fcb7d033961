"""`sandbox quarantine`: the graphs that have killed a child, listed, shown and cleared."""

from __future__ import annotations

import argparse
import sys
from datetime import UTC, datetime
from typing import Any

from sandbox.cli.output import FAILED, OK, add_json, add_policy, console, print_json, subcommand
from sandbox.errors import QuarantineError, SandboxError
from sandbox.policy import QuarantineSettings, load
from sandbox.quarantine import Entry
from sandbox.quarantine_files import FileStore, folder_of, keep_of
from sandbox.results import printable

_HELP = """\
Lists, shows and clears the quarantine: graphs that have killed a child and got no answer from another. They are not
compiled again until they expire, or are cleared here. Running processes see a change at their next compile.

commands:
  list                   all entries, the newest first
  show DIGEST            all of one; the first digits are enough
  clear DIGEST           give one graph a child again
  clear --all            give all of them one; also removes files that cannot be read
  clear --expired        remove what no longer counts

example:
  sandbox quarantine list --policy production

The policy says where the files are and for how long they count. Entries of all policies of a folder are shown.

exit codes: 0 fine; 1 no such entry, or files or a folder that had to be ignored; 2 bad input, or no folder to look in
"""
_DIGITS = 12


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    group = subcommand(commands, "quarantine", "graphs that have killed a child: list, show, clear", _HELP)
    actions = group.add_subparsers(dest="action", metavar="list|show|clear", required=True)
    listing = subcommand(actions, "list", "all entries", "Lists all entries, the newest first.")
    show = subcommand(
        actions, "show", "all of one entry",
        "Shows all of one entry.\n\nexample: sandbox quarantine show 3f2a\n\nexit codes: 0 fine; 1 no such entry",
    )  # fmt: skip
    show.add_argument("digest", metavar="DIGEST", help="the digest, or so many first digits that one entry fits")
    clear = subcommand(
        actions, "clear", "give graphs a child again",
        "Removes entries, so that their graphs get a child again.\n\nexample: sandbox quarantine clear --expired\n\n"
        "exit codes: 0 fine; 1 no such entry",
    )  # fmt: skip
    which = clear.add_mutually_exclusive_group(required=True)
    which.add_argument("digest", metavar="DIGEST", nargs="?", help="as of `show`")
    which.add_argument("--all", action="store_true", help="every entry of the folder")
    which.add_argument("--expired", action="store_true", help="those that are older than the policy's quarantine.days")
    for parser, handler in ((listing, _list), (show, _show), (clear, _clear)):
        add_policy(parser)
        add_json(parser)
        parser.set_defaults(handler=handler)


class _Quarantine:
    """The files of a policy, and what was wrong with them."""

    def __init__(self, policy: str) -> None:
        """
        Raises:
            SandboxError: the policy keeps no files, or there is no folder to look at.
        """
        settings = load(policy).quarantine
        if not settings.persist:
            raise SandboxError(
                f"the policy {policy!r} says quarantine.persist = false: there are no files, and each process knows "
                "only its own"
            )
        self.problems: list[str] = []
        self.settings: QuarantineSettings = settings
        self.store = FileStore(folder_of(settings), keep_of(settings), self._tell)

    def _tell(self, error: QuarantineError) -> None:
        self.problems.append(str(error))

    def entries(self) -> list[Entry]:
        """All, the newest first."""
        return sorted(self.store.entries(), key=lambda entry: entry.time, reverse=True)

    def expired(self, entry: Entry) -> bool:
        return not entry.fresh(keep_of(self.settings), datetime.now(UTC))

    def one(self, prefix: str) -> Entry | None:
        """
        Raises:
            SandboxError: several fit.
        """
        found = [entry for entry in self.entries() if entry.digest.startswith(prefix.lower())]
        if len(found) > 1:
            raise SandboxError(f"{len(found)} entries begin with {prefix!r}: give more digits")
        return found[0] if found else None

    def finish(self, status: int) -> int:
        for problem in self.problems:
            print(f"sandbox: warning: {problem}", file=sys.stderr)
        return FAILED if self.problems else status


def _list(arguments: argparse.Namespace) -> int:
    quarantine = _Quarantine(arguments.policy)
    entries = quarantine.entries()
    if arguments.json:
        print_json(
            {
                "folder": str(quarantine.store.folder),
                "days": quarantine.settings.days,
                "entries": [_data(quarantine, entry) for entry in entries],
                "ignored": quarantine.problems,
            }
        )
        return quarantine.finish(OK)
    if not entries:
        print(f"No graph is in quarantine in {quarantine.store.folder}.")
        return quarantine.finish(OK)
    from rich.table import Table
    from rich.text import Text

    table = Table("digest", "graph", "ended with", "kills", "newest (UTC)", "policy", "")
    for entry in entries:
        cells = (
            entry.digest[:_DIGITS],
            entry.graph,
            entry.status.value,
            str(entry.kills),
            f"{entry.time.astimezone(UTC):%Y-%m-%d %H:%M}",
            entry.made_for.get("policy", ""),
            "expired" if quarantine.expired(entry) else "",
        )
        # Whoever may write the files wrote these words: neither markup nor control characters.
        table.add_row(*(Text(printable(cell, 80)) for cell in cells))
    console().print(table)
    return quarantine.finish(OK)


def _show(arguments: argparse.Namespace) -> int:
    quarantine = _Quarantine(arguments.policy)
    entry = quarantine.one(arguments.digest)
    if entry is None:
        return _missing(quarantine, arguments)
    data = _data(quarantine, entry)
    if arguments.json:
        print_json(data)
    else:
        for name, value in {**{k: v for k, v in data.items() if k != "made_for"}, **entry.made_for}.items():
            print(f"{printable(name, 20):10} {printable(str(value))}")
    return OK  # what is wrong with other files is the matter of `list`


def _clear(arguments: argparse.Namespace) -> int:
    quarantine = _Quarantine(arguments.policy)
    removed = []
    if arguments.all:
        removed = [entry.digest for entry in quarantine.entries()]
        quarantine.problems.clear()  # what cannot be read is removed, too
        quarantine.store.clear()
    else:
        if arguments.expired:
            chosen = [entry for entry in quarantine.entries() if quarantine.expired(entry)]
        else:
            entry = quarantine.one(arguments.digest)
            if entry is None:
                return _missing(quarantine, arguments)
            chosen = [entry]
        for entry in chosen:
            try:
                if quarantine.store.forget(entry.digest):
                    removed.append(entry.digest)
            except OSError as error:
                raise SandboxError(f"{entry.digest[:_DIGITS]} cannot be removed: {error.strerror}") from None
    if arguments.json:
        print_json({"folder": str(quarantine.store.folder), "cleared": removed})
    else:
        print(f"{len(removed)} cleared in {quarantine.store.folder}.")
    return quarantine.finish(OK)


def _missing(quarantine: _Quarantine, arguments: argparse.Namespace) -> int:
    if arguments.json:
        print_json(None)
    print(f"sandbox: no entry begins with {arguments.digest!r} in {quarantine.store.folder}", file=sys.stderr)
    return quarantine.finish(FAILED)


def _data(quarantine: _Quarantine, entry: Entry) -> dict[str, Any]:
    return {**entry.model_dump(mode="json"), "expired": quarantine.expired(entry)}
