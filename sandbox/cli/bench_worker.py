"""One measurement of `sandbox bench`, in a process of its own: `python -m sandbox.cli.bench_worker JSON`.

The JSON names `measure` (first, steady), `scheme` (normal, subprocess, sandbox), `policy`, and `out`, the file for
the answer. Folders, caches and Inductor's own mode are set by the environment, as a user would.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Final

#: Comparison with eager, fp32.
RTOL: Final = 1e-4
ATOL: Final = 1e-5


def main() -> int:
    """Measure once and write the answer."""
    task = json.loads(sys.argv[1])
    Path(task["out"]).write_text(json.dumps(measure(task)))
    return 0


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Times in seconds, by what they were spent on."""
    times: dict[str, float] = {}
    started = time.perf_counter()
    import torch

    times["import_torch"] = time.perf_counter() - started
    started = time.perf_counter()
    # Imported beforehand in all schemes: what is compared is compiling.
    import torch._dynamo
    import torch._inductor.compile_fx

    times["import_inductor"] = time.perf_counter() - started
    scheme = None
    if task["scheme"] == "sandbox":
        started = time.perf_counter()
        from sandbox.inductor.install import install, installed

        install(task["policy"])
        scheme = installed()
        times["install"] = time.perf_counter() - started
        if scheme is not None:
            scheme.sandbox.wait_ready()
        times["install_to_ready"] = time.perf_counter() - started
    from sandbox.cli.bench_graphs import FIRST, STEADY, WARM

    torch.manual_seed(0)
    graphs: dict[str, float] = {}
    equal = True
    if task["measure"] == "steady":
        equal &= _compile(WARM)[1]
    isolated = _isolated(scheme)
    for graph in STEADY if task["measure"] == "steady" else (FIRST,):
        graphs[graph.name], same = _compile(graph)
        equal &= same
    from sandbox.inductor import compat

    answer: dict[str, Any] = {
        "graphs": graphs,
        "total": sum(graphs.values()),
        "equal": equal,
        "isolated": _isolated(scheme) - isolated,
        "cache_hits": int(compat.counters["inductor"]["fxgraph_cache_hit"]),
        "times": times,
    }
    if scheme is not None:
        answer["stats"] = scheme.sandbox.stats().model_dump(mode="json")
    return answer


def _compile(graph: Any) -> tuple[float, bool]:
    """Seconds from `torch.compile` to the first result, and whether it equals eager."""
    import torch

    function, inputs = graph.make()
    expected = graph.call(function, inputs)
    started = time.perf_counter()
    found = graph.call(torch.compile(function), inputs)
    seconds = time.perf_counter() - started
    return seconds, len(found) == len(expected) and all(
        torch.allclose(a, b, rtol=RTOL, atol=ATOL) for a, b in zip(found, expected, strict=True)
    )


def _isolated(scheme: Any) -> int:
    """Graphs that were compiled in another process so far, a count."""
    if scheme is not None:
        return int(scheme.sandbox.stats().in_child)
    from torch._inductor.compile_fx import FxCompile

    # Inductor's SUBPROCESS counts what it really sent; what it cannot pickle it compiles in-process, silently.
    # Not by `compat`: this belongs to what is compared, and its absence must not stop the sandbox.
    kinds = FxCompile._compile_stats.items()
    return sum(int(stats.codegen_and_compile) for kind, stats in kinds if "Subprocess" in kind.__name__)


if __name__ == "__main__":
    sys.exit(main())
