"""Another user for the workers of a service that may choose one: `[confinement] run_as`.

The service hands each job's scratch folder over to that user and takes files back from nobody else; the worker becomes
that user before it confines itself. The keeper stays who the service is, so that it can kill and clean up.
"""

from __future__ import annotations

import os
import pwd
import stat
import sys
from pathlib import Path
from typing import Final, NamedTuple

from sandbox.enforce import libc
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement

#: To give files away and to remove them, to kill, and to become somebody else.
_NEEDED: Final = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7,
}  # fmt: skip


class User(NamedTuple):
    """Who a worker runs as."""

    uid: int
    gid: int


def user_of(confinement: Confinement) -> User | None:
    """The user that `run_as` names, or None if it is not set. A number without an entry has itself as its group.

    Raises:
        EnforcementError: there is no such user, it is root, or this process has not the right to it.
    """
    name = confinement.run_as
    if not name:
        return None
    try:
        entry = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
        user = User(entry.pw_uid, entry.pw_gid)
    except KeyError:
        if not name.isdigit():
            raise EnforcementError(f"confinement.run_as = {name!r}: this host has no such user") from None
        user = User(int(name), int(name))
    if user.uid == 0:
        raise EnforcementError(f"confinement.run_as = {name!r}: that is root; name a user without rights")
    held = _effective()
    missing = [right for right, number in _NEEDED.items() if not held >> number & 1]
    if missing:
        raise EnforcementError(
            f"confinement.run_as = {name!r}: this service may not become another user; it lacks {', '.join(missing)}. "
            f"Run it as root, or leave run_as unset"
        )
    return user


def hand_over(folder: Path, user: User) -> None:
    """Give a new folder of ours, with the empty folders in it, to that user, who can then reach it by its name.

    Raises:
        OSError: the file system does not allow it.
    """
    for path, _, _ in os.walk(folder):
        os.chown(path, user.uid, user.gid)
    os.chmod(folder.parent, 0o711)


def open_to_all(folder: Path) -> None:
    """Let everybody read a folder of ours and all that is in it, but for links."""
    for path, _, files in os.walk(folder):
        os.chmod(path, stat.S_IMODE(os.stat(path).st_mode) | 0o055)
        for name in files:
            file = os.path.join(path, name)
            if not os.path.islink(file):
                os.chmod(file, stat.S_IMODE(os.stat(file).st_mode) | 0o044)


def become(user: User, name: str, scratch: str) -> None:
    """In the worker: be that user, without any group besides.

    It loses the signal that it gets at its parent's death: ask for that again.

    Raises:
        EnforcementError: the kernel refuses, or that user cannot read the code that a job needs.
    """
    try:
        os.setgroups([])
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        # Otherwise /proc/self would be root's, and PyTorch could not read it.
        libc.prctl(libc.PR_SET_DUMPABLE, 1)
    except OSError as error:
        raise EnforcementError(f"confinement.run_as = {name!r}: refused: {libc.reason(error)}") from None
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    for file in (sys.executable, os.__file__, __file__, torch):
        if file and not os.access(file, os.R_OK):
            raise EnforcementError(
                f"confinement.run_as = {name!r}: that user cannot read {file}; perhaps a folder above it is closed to "
                f"others, as home folders are. Install Python and the packages elsewhere"
            )
    if scratch and not os.access(scratch, os.W_OK | os.X_OK):
        raise EnforcementError(
            f"confinement.run_as = {name!r}: that user cannot reach {scratch}; let TMPDIR name a folder that is "
            f"open to others"
        )


def _effective() -> int:
    """The capabilities of this process that are in effect, as a bit mask."""
    with open("/proc/self/status", "rb", buffering=0) as status:
        lines = status.read(65_536).splitlines()
    return next((int(line.split()[1], 16) for line in lines if line.startswith(b"CapEff:")), 0)
