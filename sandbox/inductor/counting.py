"""What one compile adds to Inductor's metrics and Dynamo's counters."""

from __future__ import annotations

from typing import Any

from sandbox.errors import WireError
from sandbox.inductor import compat


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
    groups = data["counters"]
    if not isinstance(groups, dict) or not isinstance(data["loops"], list):
        raise WireError("the reply's counters are malformed")
    for table in (data["metrics"], *groups.values()):
        if not isinstance(table, dict) or not all(type(n) is int and isinstance(k, str) for k, n in table.items()):
            raise WireError("a count of the reply is not a number")
    pairs = data["loops"]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(type(n) is int for n in pair) for pair in pairs):
        raise WireError("the reply's loop counts are malformed")


def apply(data: Any) -> None:
    """Add a child's counts to this process's own.

    Raises:
        WireError: when ``data`` is malformed; nothing has been added then.
    """
    check(data)
    known = _metrics()
    for name, added in data["metrics"].items():
        if name in known:
            setattr(compat.metrics, name, known[name] + added)
    for group, table in data["counters"].items():
        for name, added in table.items():
            compat.counters[group][name] += added
    for inner, local in data["loops"]:
        compat.metrics.cpp_outer_loop_fused_inner_counts.append(compat.metrics.CppOuterLoopFusedCount(inner, local))


def reset() -> None:
    """Forget all counts; the template does so after its warm-up."""
    compat.metrics.reset()
    compat.counters.clear()
