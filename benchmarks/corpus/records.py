"""What is known of each entry: a line of JSON per entry, on disk before the next one starts."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Records:
    """The lines of one run, beside those of other shards in the same folder. Thread-safe."""

    def __init__(self, folder: Path, cache: bool, shard: tuple[int, int] = (0, 1)) -> None:
        self.folder = folder
        self.cache = "on" if cache else "off"
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"cache-{self.cache}-{shard[0]}-of-{shard[1]}.jsonl"
        self._lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        """Write one line, and wait until the disk has it."""
        with self._lock, self._path.open("ab") as file:
            # A run that was killed may have left half a line: it must not swallow this one.
            torn = file.tell() > 0 and not _ends_whole(self._path)
            file.write(b"\n" * torn + json.dumps({**record, "cache": self.cache}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def known(self) -> dict[str, dict[str, Any]]:
        """The newest record of each entry, from all shards of this kind of run."""
        return {record["name"]: record for record in read(self.folder, self.cache)}


def read(folder: Path, cache: str) -> Iterator[dict[str, Any]]:
    """Every whole line, file by file, in the order in which they were written."""
    for path in sorted(folder.glob(f"cache-{cache}-*.jsonl"), key=lambda path: path.stat().st_mtime):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the last line of a run that was killed
            if isinstance(record, dict) and "name" in record:
                yield record


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
