"""What one compile adds to Inductor's metrics and Dynamo's counters."""

from __future__ import annotations

from typing import Any, Final

from sandbox.errors import WireError
from sandbox.inductor import compat
from sandbox.inductor.budget import shown

#: Groups of Dynamo's counters that Inductor counts in (2.11, 2.13).
_GROUPS: Final = frozenset({"inductor", "aten_mm_info"})
_MAX_NAMES: Final = 1000  # in one group
_MAX_NAME: Final = 300  # characters
#: What one compile can add to a count.
_MAX_ADDED: Final = 1 << 40


def _metrics() -> dict[str, int]:
    return {name: value for name, value in vars(compat.metrics).items() if type(value) is int and name[0] != "_"}


class Counts:
    """The counts at one moment; :meth:`deltas` says what was added since."""

    def __init__(self) -> None:
        self._metrics = _metrics()
        self._counters = {group: dict(counter) for group, counter in compat.counters.items()}
        self._loops = len(compat.metrics.cpp_outer_loop_fused_inner_counts)

    def deltas(self) -> dict[str, Any]:
        """`{metrics: {name: n}, counters: {group: {name: n}}, loops: [[inner, local], ...]}`, non-zero entries only."""
        counters: dict[str, dict[str, int]] = {}
        for group, counter in compat.counters.items():
            before = self._counters.get(group, {})
            added = {str(name): int(value - before.get(name, 0)) for name, value in counter.items()}
            counters[str(group)] = {name: value for name, value in added.items() if value}
        return {
            "metrics": {name: now - self._metrics.get(name, 0) for name, now in _metrics().items()},
            "counters": {group: added for group, added in counters.items() if added},
            "loops": [
                [int(item.inner_kernel_number), int(item.local_buffer_number)]
                for item in compat.metrics.cpp_outer_loop_fused_inner_counts[self._loops :]
            ],
        }


def check(data: Any) -> None:
    """Raise WireError unless ``data`` is what :meth:`Counts.deltas` returns."""
    if not isinstance(data, dict) or set(data) != {"metrics", "counters", "loops"}:
        raise WireError("the reply's counts are malformed")
    groups, pairs = data["counters"], data["loops"]
    if not isinstance(groups, dict) or len(groups) > _MAX_NAMES or not isinstance(pairs, list):
        raise WireError("the reply's counters are malformed")
    for table in (data["metrics"], *groups.values()):
        check_table(table)
    if len(pairs) > _MAX_NAMES or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_count(n) for n in pair) for pair in pairs
    ):
        raise WireError("the reply's loop counts are malformed")


def check_table(table: Any) -> dict[str, int]:
    """``table`` if it maps names to counts of one compile, else WireError."""
    if not isinstance(table, dict) or len(table) > _MAX_NAMES:
        raise WireError(f"counts of the reply are {shown(table)}, or too many")
    for name, added in table.items():
        if type(name) is not str or not _is_count(added):
            raise WireError("a count of the reply is not a number")
    return table


def _is_count(value: Any) -> bool:
    return type(value) is int and abs(value) <= _MAX_ADDED


def apply(data: Any) -> None:
    """Add a child's counts to this process's own. Groups that neither Inductor nor this process has are left out.

    Raises:
        WireError: when ``data`` is malformed; nothing has been added then.
    """
    check(data)
    known = _metrics()
    for name, added in data["metrics"].items():
        if name in known:
            setattr(compat.metrics, name, known[name] + added)
    groups = _GROUPS | set(compat.counters)
    for group, table in data["counters"].items():
        if group in groups:
            for name, added in table.items():
                compat.counters[group][name[:_MAX_NAME]] += added
    for inner, local in data["loops"]:
        compat.metrics.cpp_outer_loop_fused_inner_counts.append(compat.metrics.CppOuterLoopFusedCount(inner, local))


def reset() -> None:
    """Forget all counts; the template does so after its warm-up."""
    compat.metrics.reset()
    compat.counters.clear()
