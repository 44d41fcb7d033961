"""The memory of graphs that have killed a child: they are not compiled again, in no process.

What is remembered outlives the process in a store of files: :mod:`sandbox.quarantine_files`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final, Protocol

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from sandbox.results import KILLERS, Status, printable

#: Entries that are kept, a count; beyond it the one that was asked for longest ago is forgotten.
MAX_ENTRIES: Final = 10_000
#: An entry from further in the future than this was written by a clock that went wrong: it counts as expired.
MAX_AHEAD: Final = timedelta(days=1)

Word = Annotated[str, Field(max_length=256)]


class Entry(BaseModel):
    """One graph that has killed a child."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    digest: Annotated[str, Field(min_length=1, max_length=256)]
    """Names the graph and what it was compiled for."""
    status: Status
    """How the newest child that it killed ended."""
    job_id: Word
    """The job of that child, for the logs."""
    since: AwareDatetime
    """When the first child ended."""
    time: AwareDatetime
    """When the newest child ended."""
    kills: Annotated[int, Field(ge=1)] = 1
    """Children that it has killed since then, a count. Of two processes that count at once the last one wins."""
    graph: Word = ""
    """What reports call the graph."""
    detail: Annotated[str, Field(max_length=2000)] = ""
    """The newest job's one line for people."""
    made_for: Annotated[dict[Word, Word], Field(max_length=16)] = {}
    """What the graph was compiled with and for, all of it part of the digest."""

    @field_validator("status")
    @classmethod
    def _a_killer(cls, status: Status) -> Status:
        if status not in KILLERS:
            raise ValueError(f"no reason for quarantine; allowed: {', '.join(sorted(KILLERS))}")
        return status

    def fresh(self, keep: timedelta, now: datetime) -> bool:
        """Whether it is younger than ``keep`` at ``now``."""
        return now - keep < self.time <= now + MAX_AHEAD


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

    def forget(self, digest: str) -> bool:
        """Forget one entry; returns whether there was one."""
        return self._entries.pop(digest, None) is not None

    def clear(self) -> None:
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


class Quarantine:
    """Which graphs have killed a child. Thread-safe.

    What becomes of such a graph is the policy's word: :func:`sandbox.fallback.decide_quarantined`.
    """

    def __init__(
        self,
        store: Store | None = None,
        keep: timedelta = timedelta(days=3650),
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """
        Args:
            store: where the entries are. Default: in memory.
            keep: how long an entry counts after the newest kill. Default: ten years.
            now: the clock.
        """
        self._lock = threading.Lock()
        self._store: Store = MemoryStore() if store is None else store
        self._keep = keep
        self._now = now

    def add(
        self,
        digest: str,
        status: Status,
        job_id: str,
        graph: str = "",
        detail: str = "",
        made_for: Mapping[str, str] | None = None,
        kills: int = 1,
    ) -> Entry:
        """Remember that ``kills`` children of ``digest`` ended, the last one with ``status``; returns the new entry.

        Raises:
            ValueError: ``status`` is not one of `KILLERS`, or the digest is empty.
        """
        with self._lock:
            before, time = self._load(digest), self._now()
            entry = Entry(
                digest=digest,
                status=status,
                job_id=job_id,
                since=before.since if before else time,
                time=time,
                kills=(before.kills if before else 0) + kills,
                graph=printable(graph, 256),
                detail=printable(detail)[:2000],
                made_for=dict(made_for or {}),
            )
            self._store.save(entry)
            return entry

    def get(self, digest: str) -> Entry | None:
        """The entry of ``digest``, or None if no child of it is known to have been killed lately."""
        with self._lock:
            return self._load(digest)

    def clear(self) -> None:
        """Forget all, for example after an update of the compiler."""
        with self._lock:
            self._store.clear()

    def __len__(self) -> int:
        with self._lock:
            return len(self._store)

    def _load(self, digest: str) -> Entry | None:
        entry = self._store.load(digest)
        return entry if entry is not None and entry.fresh(self._keep, self._now()) else None
