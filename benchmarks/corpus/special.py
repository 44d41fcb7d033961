"""Special cases: what PyTorch's own databases and the models do not reach."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.corpus.entry import Entry

#: Modules that the sandbox's forkserver imports for them (`forkserver.preload`): custom ops and lowerings.
PRELOAD: tuple[str, ...] = ()


def entries() -> Iterator[Entry]:
    """All of them."""
    yield from ()
