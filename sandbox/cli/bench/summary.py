"""What `sandbox bench` makes of its samples: medians, spreads, ratios, and which bar was met."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from sandbox.cli.output import MODES

#: Inductor's own modes, and ours after them. What a measure compares besides has names of its own.
INDUCTOR: Final = ("inductor-normal", "inductor-subprocess")
NORMAL: Final = INDUCTOR[0]
OURS: Final = tuple(mode for mode in MODES if mode != "normal")
SCHEMES: Final = (*INDUCTOR, *OURS)


@dataclass(frozen=True)
class Bar:
    """What a row is to reach: its median, or the ratio of its median to that of the scheme ``of``."""

    measure: str
    cache: str
    scheme: str
    figure: str
    limit: float
    of: str = ""
    at_least: bool = False
    """Whether more is better."""


BARS: Final = (
    Bar("first", "off", "subprocess", "seconds", 0.6, of=NORMAL),
    Bar("steady", "off", "subprocess", "seconds", 1.15, of=NORMAL),
    Bar("steady", "on", "subprocess", "seconds", 1.15, of=NORMAL),
    Bar("jobs", "", "fresh", "ms", 20.0),
    Bar("jobs", "", "standby", "ms", 5.0),
    Bar("async", "", "async", "ms to the first answer", 1.15, of="eager"),
    Bar("async", "", "async", "ms to the first answer", 1.15, of="aot_eager"),
    Bar("async", "", "async, long request", "ms to the first answer", 1.15, of="eager, long request"),
    Bar("async", "", "two compiles", "share of throughput", 0.8, at_least=True),
    Bar("crash", "", "after a crash", "seconds", 1.2, of="steady"),
    Bar("idle", "", "forkserver", "wake-ups per second", 0.0),
)


@dataclass
class Answer:
    """What one process has measured."""

    scheme: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(
        self, measure: str, cache: str, figure: str, values: Iterable[float], *, scheme: str = "", **notes: int
    ) -> None:
        """Note ``values`` of one figure; ``notes`` are counts that belong to them."""
        self.samples.append({
            "measure": measure, "cache": cache, "scheme": scheme or self.scheme, "figure": figure,
            "values": list(values), "notes": notes,
        })  # fmt: skip

    def check(self, where: str, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Compare results with eager's; one that differs is a problem, and fails the command."""
        from sandbox.cli.bench.graphs import same

        for number, (found, expected) in enumerate(pairs):
            if not same(found, expected):
                self.wrong(f"{where}: the result of graph {number} differs from eager")

    def wrong(self, text: str) -> None:
        """Something is not as it must be."""
        self.problems.append(text)


_Key = tuple[str, str, str, str]


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each measure, cache, scheme and figure: median and spread over all samples, and the bars on it."""
    pooled: dict[_Key, list[float]] = {}
    rounds: dict[_Key, dict[int, float]] = {}
    notes: dict[_Key, list[dict[str, int]]] = {}
    for run in runs:
        for sample in run.get("samples", ()):
            key = (sample["measure"], sample["cache"], sample["scheme"], sample["figure"])
            if sample["values"]:
                pooled.setdefault(key, []).extend(sample["values"])
                rounds.setdefault(key, {})[run["round"]] = statistics.median(sample["values"])
                notes.setdefault(key, []).append(sample["notes"])
    rows = []
    for key, values in pooled.items():
        measure, cache, scheme, figure = key
        row: dict[str, Any] = {
            "measure": measure, "cache": cache, "scheme": scheme, "figure": figure, "samples": len(values),
            "median": statistics.median(values), "min": min(values), "max": max(values),
            "notes": {name: statistics.median(note.get(name, 0) for note in notes[key]) for name in notes[key][0]},
        }  # fmt: skip
        base = (measure, cache, NORMAL, figure)
        if base in pooled:
            row["of_normal"] = row["median"] / statistics.median(pooled[base])
            row["by_round"] = sorted(
                rounds[key][each] / rounds[base][each] for each in rounds[key].keys() & rounds[base]
            )
        row["bars"] = [_judged(bar, row["median"], pooled) for bar in BARS if _is_of(bar, key)]
        rows.append(row)
    return rows


def _is_of(bar: Bar, key: _Key) -> bool:
    return (bar.measure, bar.cache, bar.scheme, bar.figure) == key


def _judged(bar: Bar, median: float, pooled: dict[_Key, list[float]]) -> dict[str, Any]:
    """The bar with what was reached; `met` is None where there is nothing to compare with."""
    told: dict[str, Any] = {"limit": bar.limit, "of": bar.of, "at_least": bar.at_least, "reached": median, "met": None}
    if bar.of:
        base = pooled.get((bar.measure, bar.cache, bar.of, bar.figure))
        if not base or not statistics.median(base):
            return {**told, "reached": None}
        told["reached"] = median / statistics.median(base)
    met = told["reached"] >= bar.limit if bar.at_least else told["reached"] <= bar.limit
    return {**told, "met": met}


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Where a row stands in tables and plots: by measure, cache and figure, schemes as in ``SCHEMES``."""
    scheme = row["scheme"]
    rank = SCHEMES.index(scheme) if scheme in SCHEMES else -1
    return row["measure"], row["cache"], row["figure"], rank


def words(bar: dict[str, Any]) -> str:
    """A judged bar for people."""
    relation = "at least" if bar["at_least"] else "at most"
    of = f" of {bar['of']}" if bar["of"] else ""
    if bar["met"] is None:
        return f"{relation} {bar['limit']:g}{of}: nothing to compare with"
    return f"{relation} {bar['limit']:g}{of}: {bar['reached']:.2f}, {'met' if bar['met'] else 'NOT MET'}"


def number(value: float) -> str:
    """Three digits, or all of those before the point: `0.0412`, `1.5`, `1552`."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
