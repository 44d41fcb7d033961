"""A long-lived process that runs entries under one scheme: `python -m benchmarks.corpus.worker SETTINGS`.

SETTINGS is JSON: `scheme` (normal, sandbox; list tells the names), `catalogue` (a module), `policy`, `mode`, `cache`
(whether Inductor's caches are on), `cores` (numbers; none means all). Tasks come as lines of JSON on
stdin and are answered as lines of JSON on what was stdout; all that is printed goes to stderr. Folders and caches
come by the environment, as a user would set them.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

#: Characters of an error's text that are recorded, a count at most.
_TEXT = 400
#: Relative and absolute: a difference below it is told as `close`. It excuses nothing.
_CLOSE = (1e-4, 1e-5)


def main() -> int:
    """Answer tasks until stdin ends."""
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    if settings.get("cores"):
        os.sched_setaffinity(0, settings["cores"])
    catalogue = importlib.import_module(settings["catalogue"])
    if settings["scheme"] == "list":
        print(json.dumps({entry.name: entry.seconds for entry in catalogue.entries()}), file=answers, flush=True)
        return 0
    worker = Worker(settings, catalogue)
    print(json.dumps(worker.start()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line))), file=answers, flush=True)
    return 0


class Worker:
    """One scheme, ready to run entries."""

    def __init__(self, settings: dict[str, Any], catalogue: Any) -> None:
        self.settings = settings
        self.entries = {entry.name: entry for entry in catalogue.entries()}
        self.preload = tuple(getattr(catalogue, "PRELOAD", ()))
        self.scheme: Any = None
        self.graphs = 0
        """Graphs that Inductor has compiled without an exception, wherever."""

    def start(self) -> dict[str, Any]:
        """Import everything, start the sandbox, compile once: what a process pays once is paid here."""
        import torch

        from benchmarks.corpus.execution import execute
        from sandbox.inductor import compat

        started = time.perf_counter()
        for name in self.preload:
            importlib.import_module(name)
        if self.settings["scheme"] == "sandbox":
            self._install()
        inner = compat.replace_compile(lambda *args, **kwargs: self._counted(inner, *args, **kwargs))
        self._execute = execute
        with torch.no_grad():
            torch.compile(lambda x: (x + 1).cos().sum(dim=0))(torch.randn(10, 12))
        return {"ready": True, "seconds": time.perf_counter() - started, "torch": torch.__version__}

    def _install(self) -> None:
        from sandbox.inductor.install import install, installed
        from sandbox.policy import load

        policy = load(self.settings["policy"])
        known = policy.forkserver.preload
        forkserver = policy.forkserver.model_copy(update={"preload": (*known, *self.preload)})
        install(policy.model_copy(update={"forkserver": forkserver}), self.settings["mode"])
        self.scheme = installed()
        if self.settings["mode"] != "normal" and self.settings["mode"] != "serialize":
            self.scheme.sandbox.wait_ready()

    def _counted(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        self.graphs += 1
        return output

    def run(self, task: dict[str, Any]) -> dict[str, Any]:
        """One entry: `name`; `keep`, a file for the results; `against`, a file with those of another run, or null;
        `again`, whether to run it a second time, when all is in Inductor's caches."""
        from benchmarks.corpus.compare import difference, load, save

        entry = self.entries[task["name"]]
        _forget(self.settings.get("cache", False))
        record = self._once(entry)
        kept = record.pop("kept", None)
        if task.get("again") and kept is not None:
            _forget(keep_files=True)
            again = self._once(entry)
            record["hit"] = {name: again[name] for name in ("state", "seconds", "graphs") if name in again}
            if (found := again.pop("kept", None)) is not None:
                record["hit"]["difference"] = difference(found, kept, entry.tolerance)
        if kept is not None:
            save(kept, Path(task["keep"]))
            if task.get("against") and os.path.exists(task["against"]):
                other = load(Path(task["against"]))
                record["difference"] = difference(kept, other)
                record["close"] = not record["difference"] or not difference(
                    kept, other, entry.tolerance or (1e-4, 1e-5)
                )
        return record

    def _once(self, entry: Any) -> dict[str, Any]:
        from benchmarks.corpus.entry import Skip

        before, graphs = self._stats(), self.graphs
        record: dict[str, Any]
        try:
            run = self._execute(entry)
            record = {"state": "ok", "seconds": run.seconds, "kept": run.kept}
        except Skip as reason:
            return {"state": "skipped", "error": str(reason)}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            traceback.print_exc()
            record = {"state": "raised", "error": _told(error), "eager_error": self._in_eager(entry)}
        record["graphs"] = self.graphs - graphs
        return record | self._since(before)

    def _in_eager(self, entry: Any) -> str:
        """How the entry fails when nothing is compiled; empty if it does not."""
        if not entry.compiles:
            return ""
        try:
            self._execute(entry, compiled=False)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
            return _told(error)
        return ""

    def _stats(self) -> Any:
        return self.scheme.sandbox.stats() if self.scheme is not None else None

    def _since(self, before: Any) -> dict[str, Any]:
        """What the sandbox has counted since then."""
        after = self._stats()
        if after is None:
            return {}
        told: dict[str, Any] = {
            name: getattr(after, name) - getattr(before, name)
            for name in ("in_child", "in_process", "eager", "raised", "children_started")
        }
        for name in ("in_process_reasons", "outcomes", "fallbacks", "leaks", "swallowed"):
            found = dict(Counter(getattr(after, name)) - Counter(getattr(before, name)))
            if found:
                told[name] = found
        rows = after.jobs[-told["children_started"] :] if told["children_started"] else ()
        failed = [f"{row.name}: {row.step}: {row.status}: {row.detail[:_TEXT]}" for row in rows if row.status != "ok"]
        return {**told, "failed_jobs": failed} if failed else told


def _forget(keep_files: bool) -> None:
    """Neither this process nor, unless ``keep_files``, its cache folder knows any kernel: what one entry has built is
    not to be had for nothing by the next one, which often needs the same kernels, nor loaded as if from memory."""
    from sandbox.inductor import compat

    for name in ("PyCodeCache", "CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache"):
        getattr(compat.codecache, name).cache_clear()
    if not keep_files:
        for folder in Path(compat.runtime_cache_dir()).iterdir():
            if folder.is_dir() and folder.name not in ("locks", "precompiled_headers"):
                shutil.rmtree(folder, ignore_errors=True)


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:_TEXT]}"


if __name__ == "__main__":
    sys.exit(main())
