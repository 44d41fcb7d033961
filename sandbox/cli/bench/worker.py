"""One measurement of `sandbox bench`, in a process of its own: `python -m sandbox.cli.bench.worker JSON`.

The JSON names `kind` (a function below), `policy`, `seed`, `out` (the file for the answer), and what that kind takes.
Folders, caches and Inductor's own mode are set by the environment, as a user would.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sandbox.cli.bench import compiles, costs, serving
from sandbox.cli.bench.summary import Answer

KINDS: Final[dict[str, Callable[[dict[str, Any]], Answer]]] = {
    "compiles": compiles.measure,
    "jobs": costs.jobs,
    "crash": costs.crashes,
    "idle": costs.idle,
    "async": serving.measure,
}


def main() -> int:
    """Measure once and write the answer."""
    task = json.loads(sys.argv[1])
    answer = KINDS[task["kind"]](task)
    Path(task["out"]).write_text(json.dumps(dataclasses.asdict(answer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
