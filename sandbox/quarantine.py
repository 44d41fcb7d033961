"""The memory of graphs that have killed a child: they are not compiled again, in no process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Final, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from sandbox.results import KILLERS, Status

#: Entries that are kept, a count; beyond it the one that was asked for longest ago is forgotten.
MAX_ENTRIES: Final = 10_000


class Entry(BaseModel):
    """One graph that has killed a child."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    digest: Annotated[str, Field(min_length=1, max_length=256)]
    """Names the graph and what it was compiled for."""
    status: Status
    """How the newest child that it killed ended."""
    job_id: str
    """The job of that child, for the logs."""
    since: AwareDatetime
    """When the first child ended."""
    time: AwareDatetime
    """When the newest child ended."""
    kills: Annotated[int, Field(ge=1)] = 1
    """Children that it has killed since then, a count."""

    @field_validator("status")
    @classmethod
    def _a_killer(cls, status: Status) -> Status:
        if status not in KILLERS:
            raise ValueError(f"no reason for quarantine; allowed: {', '.join(sorted(KILLERS))}")
        return status


class Store(Protocol):
    """What :class:`Quarantine` keeps its entries in; a store in files has the same three methods."""

    def load(self, digest: str) -> Entry | None:
        """The entry of ``digest``; it now counts as the one that was asked for last."""

    def save(self, entry: Entry) -> None:
        """Keep ``entry`` in place of the one with the same digest."""

    def clear(self) -> None:
        """Forget all."""

    def __len__(self) -> int: ...


class MemoryStore:
    """Entries in memory, at most ``limit``. Not thread-safe: :class:`Quarantine` holds the lock."""

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def load(self, digest: str) -> Entry | None:
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
        return entry

    def save(self, entry: Entry) -> None:
        self._entries[entry.digest] = entry
        self._entries.move_to_end(entry.digest)
        while len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class Quarantine:
    """Which graphs have killed a child. Thread-safe.

    What becomes of such a graph is the policy's word: :func:`sandbox.fallback.decide_quarantined`.
    """

    def __init__(self, store: Store | None = None, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._lock = threading.Lock()
        self._store: Store = MemoryStore() if store is None else store
        self._now = now

    def add(self, digest: str, status: Status, job_id: str) -> Entry:
        """Remember that a child of ``digest`` ended with ``status``; returns the new entry.

        Raises:
            ValueError: ``status`` is not one of `KILLERS`, or the digest is empty.
        """
        with self._lock:
            before, time = self._store.load(digest), self._now()
            entry = Entry(
                digest=digest,
                status=status,
                job_id=job_id,
                since=before.since if before else time,
                time=time,
                kills=before.kills + 1 if before else 1,
            )
            self._store.save(entry)
            return entry

    def get(self, digest: str) -> Entry | None:
        """The entry of ``digest``, or None if no child of it is known to have been killed."""
        with self._lock:
            return self._store.load(digest)

    def clear(self) -> None:
        """Forget all, for example after an update of the compiler."""
        with self._lock:
            self._store.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._store)
