"""All parts of the corpus in one list."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.corpus import models, modules, ops, special
from benchmarks.corpus.entry import Entry

#: What registers the operators that the entries use, and children have to import.
PRELOAD = (*special.PRELOAD, *models.PRELOAD)


def entries() -> Iterator[Entry]:
    """Every entry; names are unique."""
    yield from models.entries()
    yield from special.entries()
    yield from modules.entries()
    yield from ops.entries()
