"""The quarantine in files: what one process has learned, all of the same user know, also after a restart.

    FOLDER/DIGEST.json     an entry, mode 0600, a few hundred bytes
    FOLDER/.DIGEST.XXXX    one that is being written; renamed when it is whole

No lock: a rename is atomic, and each entry has a file of its own. When two processes write the same entry at once, the
last one wins, so a kill may go uncounted. When one is renewed in the moment in which it is removed as expired, it is
gone: the graph then kills one child more. Nothing is flushed to the disk by force: after a loss of power an entry may
be missing or empty, which is the same as missing.

Who can write the folder can keep graphs from being compiled, or let killers try again, but nothing else. So folder
and files count only if they belong to this user and are writable by nobody else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

from sandbox.errors import QuarantineError
from sandbox.policy import QuarantineSettings
from sandbox.quarantine import MAX_ENTRIES, Entry, MemoryStore, Store

#: A larger file is no entry of ours, in bytes.
MAX_FILE_BYTES: Final = 1 << 16
#: A file that is being written for longer was left by a process that died, in seconds.
STALE_SECONDS: Final = 3600.0
_NAME: Final = re.compile(r"[0-9a-f]{64}\.json")
_PARTIAL: Final = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{32}")
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

Tell = Callable[[QuarantineError], None]


def keep_of(settings: QuarantineSettings) -> timedelta:
    """How long an entry counts."""
    return timedelta(days=settings.days)


def folder_of(settings: QuarantineSettings) -> Path:
    """Where the policy keeps the files. XDG_CACHE_HOME counts only if it is absolute, as its specification says.

    Raises:
        QuarantineError: the policy names no folder, and this user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    text = settings.folder
    if not text:
        base = cache if os.path.isabs(cache) else "~/.cache"
        text = os.path.join(base, "torch-compile-sandbox", "quarantine")
    path = os.path.expanduser(text)
    if not os.path.isabs(path):
        raise QuarantineError(f"quarantine.folder {text!r} is not absolute, or this user has no home folder")
    return Path(path)


def store_of(settings: QuarantineSettings, tell: Tell) -> Store:
    """The store that the policy asks for. ``tell`` is called with what cannot be used, as often as it happens."""
    if not settings.persist:
        return MemoryStore()
    try:
        return FileStore(folder_of(settings), keep_of(settings), tell)
    except QuarantineError as error:
        tell(error)
        return MemoryStore()


class FileStore:
    """Entries as files of one folder, at most ``limit``; beyond it the oldest are removed.

    No method raises for what it finds on the disk: ``tell`` gets it. What cannot be written is kept in memory. Not
    thread-safe, but safe among processes.
    """

    def __init__(self, folder: Path, keep: timedelta, tell: Tell, limit: int = MAX_ENTRIES) -> None:
        """``keep``: files that were not written for longer are removed when another one is."""
        self.folder = folder
        self._keep = keep
        self._tell = tell
        self._limit = limit
        self._unwritten = MemoryStore(limit)

    def load(self, digest: str) -> Entry | None:
        """The entry of ``digest``, the newer one of disk and memory."""
        found = [self._unwritten.load(digest)]
        with self._telling(), self._opened() as folder:
            found.append(self._read(folder, _name(digest)))
        return max((entry for entry in found if entry is not None), key=lambda entry: entry.time, default=None)

    def save(self, entry: Entry) -> None:
        """Write the file of ``entry``, or keep it in memory if that fails."""
        try:
            name = _name(entry.digest)
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            with self._opened() as folder:
                _write(folder, name, entry.model_dump_json().encode())
                self._unwritten.forget(entry.digest)
                self._prune(folder)
        except (OSError, QuarantineError) as error:
            self._unwritten.save(entry)
            self._tell(QuarantineError(f"{self._explain(error)}; {entry.digest[:12]} is kept in memory only"))

    def entries(self) -> Iterator[Entry]:
        """All entries, expired ones included, in no order."""
        with self._telling(), self._opened() as folder:
            for name, _ in self._listed(folder):
                if _NAME.fullmatch(name):
                    with self._telling():
                        entry = self._read(folder, name)
                        if entry is not None:
                            yield entry

    def forget(self, digest: str) -> bool:
        """Remove one entry; returns whether there was one.

        Raises:
            OSError, QuarantineError: the folder or the file cannot be changed.
        """
        in_memory = self._unwritten.forget(digest)
        try:
            with self._opened() as folder:
                os.unlink(_name(digest), dir_fd=folder)
        except FileNotFoundError:
            return in_memory
        return True

    def clear(self) -> None:
        """Remove all entries, also those that cannot be read."""
        self._unwritten.clear()
        with self._telling(), self._opened() as folder:
            for name, _ in list(self._listed(folder)):
                with self._telling():
                    os.unlink(name, dir_fd=folder)

    def __len__(self) -> int:
        count = len(self._unwritten)
        with self._telling(), self._opened() as folder:
            count += sum(1 for name, _ in self._listed(folder) if _NAME.fullmatch(name))
        return count

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """What cannot be used in the block is told, and the block left. What is not there is no trouble."""
        try:
            yield
        except FileNotFoundError:
            pass
        except (OSError, QuarantineError) as error:
            self._tell(QuarantineError(self._explain(error)))

    def _explain(self, error: Exception) -> str:
        if isinstance(error, OSError):
            return f"the quarantine's folder {self.folder} cannot be used: {error.strerror or error}"
        return str(error)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        """The folder, if it is to be trusted.

        Raises:
            OSError: it is not there, is not a folder but a link, or may not be entered.
            QuarantineError: others may write it.
        """
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            why = _distrust(os.fstat(handle))
            if why:
                raise QuarantineError(f"the quarantine's folder {self.folder} {why}, so it is ignored")
            yield handle
        finally:
            os.close(handle)

    def _read(self, folder: int, name: str) -> Entry | None:
        """The entry in a file, None if there is none.

        Raises:
            QuarantineError: it is not to be trusted, or holds no entry.
            OSError: it cannot be read.
        """
        where = f"{self.folder / name}"
        try:
            # Without O_NONBLOCK a FIFO would block.
            handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise QuarantineError(f"{where} is ignored: {error.strerror}") from None
        try:
            info = os.fstat(handle)
            why = _distrust(info)
            if not stat.S_ISREG(info.st_mode):
                why = "is not a regular file"
            elif info.st_size > MAX_FILE_BYTES:
                why = f"has {info.st_size} bytes"
            if why:
                raise QuarantineError(f"{where} {why}, so it is ignored")
            data = os.read(handle, MAX_FILE_BYTES)
        finally:
            os.close(handle)
        try:
            entry = Entry.model_validate_json(data)
        except ValueError:
            raise QuarantineError(f"{where} holds no entry, so it is ignored") from None
        if _name(entry.digest) != name:
            raise QuarantineError(f"{where} holds the entry of another digest, so it is ignored")
        return entry

    def _listed(self, folder: int) -> Iterator[tuple[str, float]]:
        """Names and times of the files that may be ours. Bounded: a folder may hold anything."""
        with os.scandir(folder) as found:
            for entry in itertools.islice(found, 4 * self._limit + 1000):
                if _NAME.fullmatch(entry.name) or _PARTIAL.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # another process was faster
                        yield entry.name, entry.stat(follow_symlinks=False).st_mtime

    def _prune(self, folder: int) -> None:
        """Remove what has expired, what dead writers left, and the oldest beyond the limit."""
        now, listed = time.time(), sorted(self._listed(folder), key=lambda each: -each[1])
        kept = 0
        for name, written in listed:
            whole = _NAME.fullmatch(name) is not None
            old = now - written > (self._keep.total_seconds() if whole else STALE_SECONDS)
            kept += whole and not old
            if old or (whole and kept > self._limit):
                with self._telling():
                    os.unlink(name, dir_fd=folder)


def _name(digest: str) -> str:
    name = f"{digest}.json"
    if not _NAME.fullmatch(name):
        raise QuarantineError(f"{digest[:80]!r} is no SHA-256")
    return name


def _distrust(info: os.stat_result) -> str:
    """Why a folder or file is not to be trusted, or "". Links are refused when it is opened."""
    if info.st_uid != os.geteuid():
        return f"belongs to user {info.st_uid}"
    if info.st_mode & _OTHERS_WRITE:
        return f"may be written by others (mode {stat.S_IMODE(info.st_mode):04o}; chmod go-w)"
    return ""


def _write(folder: int, name: str, data: bytes) -> None:
    partial = f".{name.removesuffix('.json')}.{uuid.uuid4().hex}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(partial, flags, 0o600, dir_fd=folder)
    try:
        try:
            while data:
                data = data[os.write(handle, data) :]
        finally:
            os.close(handle)
        os.rename(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            os.unlink(partial, dir_fd=folder)
        raise
