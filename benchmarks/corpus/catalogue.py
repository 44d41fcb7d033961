"""All parts of the corpus in one list."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.corpus import models, modules, ops, special
from benchmarks.corpus.entry import Entry

#: See :data:`benchmarks.corpus.special.PRELOAD`.
PRELOAD = special.PRELOAD


def entries() -> Iterator[Entry]:
    """Every entry; names are unique."""
    yield from models.entries()
    yield from special.entries()
    yield from modules.entries()
    yield from ops.entries()
