"""Scratch folders: one root per forkserver, one folder per job, and their removal whatever is in them.

The root is held by an advisory lock (flock) of the process that made it, so that a later process can tell the roots
of the living from those of the dead (:mod:`sandbox.leftovers`): by the lock, not by a pid, which means nothing in
another container.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOCK: Final = "lock"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: Things that could not be removed and are named in the answer, a count at most.
_MAX_LEFT: Final = 20


class LockedFolder:
    """A new folder, mode 0700, that this process holds by a lock: while it lives, nobody takes it for abandoned."""

    def __init__(self, parent: Path, prefix: str) -> None:
        """Make it in ``parent``, with a random name after ``prefix``.

        Raises:
            OSError: ``parent`` cannot be written.
        """
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                break
            # Between the two lines above another process took it for the folder of a dead one.
            os.close(self._lock)
        # systemd-tmpfiles, which removes what is old in /tmp, leaves a folder alone that is locked (tmpfiles.d(5)).
        self._kept = os.open(self.path, _DIRECTORY)
        fcntl.flock(self._kept, fcntl.LOCK_SH)

    def remove(self) -> tuple[str, ...]:
        """Remove it and all that is in it; returns what could not be removed. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            os.close(self._kept)
            self._lock = -1
        return remove(self.path)


class Root(LockedFolder):
    """The folder of one forkserver, in the temporary folder."""

    def __init__(self) -> None:
        """Make it.

        Raises:
            OSError: the temporary folder cannot be written.
        """
        super().__init__(Path(tempfile.gettempdir()), root_prefix())

    def folder(self, prefix: str) -> Path:
        """A new, empty folder in the root.

        Raises:
            OSError: the disk is full, or the root is gone.
        """
        return Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=self.path))


def root_prefix() -> str:
    """How the names of this user's roots begin."""
    return f"sandbox-{os.geteuid()}-"


@contextlib.contextmanager
def abandoned(folder: Path) -> Iterator[bool]:
    """Whether ``folder`` is a :class:`LockedFolder` of this user that nobody holds. In the block nobody else takes it,
    and what was abandoned stays so."""
    try:
        held = _open_lock(folder)
    except OSError:
        yield False  # none of ours, gone, being made just now, or of another user
        return
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = True
        except BlockingIOError:
            taken = False  # its process lives
        yield taken
    finally:
        os.close(held)


def _open_lock(folder: Path) -> int:
    """The lock in a folder of this user's. Everybody can put a name beside it in a shared temporary folder: a link to
    a folder of ours that is something else, or a lock with a lease on it, which an open without O_NONBLOCK waits for.

    Raises:
        OSError: there is none, or folder or lock are another user's, or a link.
    """
    opened = os.open(folder, _DIRECTORY)
    try:
        _check_ours(opened)
        held = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=opened)
    finally:
        os.close(opened)
    try:
        _check_ours(held)
    except OSError:
        os.close(held)
        raise
    return held


def _check_ours(handle: int) -> None:
    if os.fstat(handle).st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "another user's")


def remove(folder: Path) -> tuple[str, ...]:
    """Remove a folder tree; returns what could not be removed, at most 20 names with the reason.

    Nothing may run in it any more. Follows no link. Holds two descriptors and no recursion however deep the tree is:
    what lies deeper is moved up first. Folders without permissions are given them.
    """
    left: list[str] = []
    try:
        root = os.open(folder, _DIRECTORY)
    except FileNotFoundError:
        return ()
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            return (f"{folder}: {error.strerror}",)
        # Somebody has put a link or a file in the folder's place.
        with _told(left, str(folder)):
            os.unlink(folder)
        return tuple(left)
    try:
        # A job could have taken a name that it knows, and nothing could be moved.
        prefix, moved = f".moved-{uuid.uuid4().hex}-", 0
        progress = True
        while progress:
            progress = False
            left.clear()
            for name in os.listdir(root):
                is_folder, moved = _empty(root, name, prefix, moved, left)
                with _told(left, f"{folder}/{name}"):
                    (os.rmdir if is_folder else os.unlink)(name, dir_fd=root)
                    progress = True
    finally:
        os.close(root)
    with _told(left, str(folder)):
        os.rmdir(folder)
    return tuple(left[:_MAX_LEFT])


def _empty(root: int, name: str, prefix: str, moved: int, left: list[str]) -> tuple[bool, int]:
    """If ``name`` in ``root`` is a folder, unlink its files and move its folders up into ``root``, under new names."""
    try:
        inner = os.open(name, _DIRECTORY, dir_fd=root)
    except PermissionError:
        with _told(left, name):
            os.chmod(name, 0o700, dir_fd=root)
        try:
            inner = os.open(name, _DIRECTORY, dir_fd=root)
        except OSError:
            return True, moved
    except OSError:
        return False, moved  # not a folder
    try:
        with contextlib.suppress(PermissionError):
            os.fchmod(inner, 0o700)  # of another owner: what follows tells
        for entry in os.listdir(inner):
            with _told(left, entry):
                try:
                    os.unlink(entry, dir_fd=inner)
                except (IsADirectoryError, PermissionError):  # which of the two, depends on the file system
                    with contextlib.suppress(OSError):
                        os.rmdir(entry, dir_fd=inner)  # mostly it is empty, and there is nothing to move
                        continue
                    # Moving a folder writes to it: to its entry for the parent.
                    with contextlib.suppress(PermissionError):
                        os.chmod(entry, 0o700, dir_fd=inner)
                    os.rename(entry, f"{prefix}{moved}", src_dir_fd=inner, dst_dir_fd=root)
                    moved += 1
    finally:
        os.close(inner)
    return True, moved


@contextlib.contextmanager
def _told(left: list[str], name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        pass  # gone already
    except OSError as error:
        left.append(f"{name!r}: {error.strerror}")
