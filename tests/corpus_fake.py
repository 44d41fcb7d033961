"""A worker of the corpus without torch: how it answers is in the entry's name. For tests/test_corpus.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("plain/a", "plain/b", "crash/sandbox", "crash/both", "hang/normal", "differs/always", "lost/graph")


def answer(scheme: str, name: str) -> dict[str, Any]:
    """The record of one run."""
    if name == "crash/both" or name == f"crash/{scheme}":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == f"hang/{scheme}":
        print("about to hang", file=sys.stderr, flush=True)
        time.sleep(600)
    ours = scheme == "sandbox"
    child = {"in_child": 0 if name == "lost/graph" else 1, "in_process": 0, "eager": int(name == "lost/graph")}
    return {"state": "ok", "seconds": 2.0 if ours else 1.0, "graphs": 1, **(child if ours else {})}


def main() -> None:
    """Speaks as `benchmarks.corpus.worker` does."""
    settings = json.loads(sys.argv[1])
    if settings["scheme"] == "list":
        print(json.dumps({name: 1.0 if name.startswith("hang") else 60.0 for name in NAMES}))
        return
    if settings["catalogue"] == "broken":
        sys.exit("no such catalogue")
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        record = answer(settings["scheme"], task["name"])
        # "results": the same under both schemes, but for one entry; each equals itself.
        results = settings["scheme"] if task["name"] == "differs/always" else "equal"
        Path(task["keep"]).write_text(results)
        if task["against"] and os.path.exists(task["against"]):
            record["difference"] = "" if Path(task["against"]).read_text() == results else "1 of 4 bytes differ"
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
