"""The counts of several sandboxes of one process as one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sandbox.report import MAX_ROWS, Stats

#: From the weakest to the strongest, as reports rank them.
_STATES = ("unavailable", "partial", "off", "enforced")


def total(parts: Sequence[Stats]) -> Stats:
    """The sum of ``parts``: counts are added, names joined, and of each mechanism the weakest state is told."""
    if len(parts) < 2:
        return parts[0] if parts else Stats()
    found: dict[str, Any] = {}
    for name, field in Stats.model_fields.items():
        values = [getattr(part, name) for part in parts]
        if name == "enforcement":
            found[name] = {key: min(states, key=_STATES.index) for key, states in _by_key(values).items()}
        elif name in ("jobs", "leaked"):
            found[name] = tuple(row for rows in values for row in rows)[-MAX_ROWS:]
        elif name == "forkserver_seconds":
            found[name] = max(values)
        elif field.annotation is str:
            found[name] = ", ".join(dict.fromkeys(value for value in values if value))
        elif field.annotation is int:
            found[name] = sum(values)
        else:
            found[name] = dict(sum((Counter(value) for value in values), Counter()))
    return Stats(**found)


def _by_key(tables: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for table in tables:
        for key, state in table.items():
            found.setdefault(key, []).append(state)
    return found
