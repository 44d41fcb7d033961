"""The pair of workers that one shard runs its entries on: one per scheme, never both at work."""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

SCHEMES: Final = ("normal", "sandbox")
#: Time for a worker to import torch, start its forkserver and compile once, in seconds.
START_SECONDS: Final = 400.0
#: Bytes of a worker's log that are recorded when it dies, a count.
_TAIL: Final = 1500
#: Variables that would change what is measured.
_FOREIGN: Final = (
    "TORCHINDUCTOR_FX_COMPILE_MODE", "TORCH_COMPILE_SANDBOX", "TORCH_COMPILE_SANDBOX_MODE", "TRITON_CACHE_DIR",
)  # fmt: skip


class WorkerDied(Exception):
    """A worker crashed or hung: ``state`` says which, the text what was seen."""

    def __init__(self, state: str, detail: str) -> None:
        super().__init__(detail)
        self.state = state


class CannotStart(Exception):
    """A worker does not get ready, twice in a row: no entry is to blame. The text has its last words."""


class Worker:
    """One process of ``command`` under one scheme, with folders of its own; started when it is first asked."""

    def __init__(self, command: Sequence[str], settings: dict[str, Any], folder: Path, cache: bool = False) -> None:
        self.command = [*command, json.dumps(settings)]
        self.folder = folder
        self.cache = cache
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def ask(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one task, from a worker that is started first if none lives.

        Raises:
            WorkerDied: it ended, or gave no answer in time; the next task gets a new one.
            CannotStart: there is none.
        """
        try:
            self.start()
        except WorkerDied:
            try:
                self.start()
            except WorkerDied as death:
                raise CannotStart(f"{' '.join(self.command)}: {death}") from None
        process = self._process
        if process is None or process.stdin is None:
            raise WorkerDied("crashed", "it was not started")
        try:
            process.stdin.write(json.dumps(task).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            raise self._dead() from None
        return self._answer(seconds)

    def start(self) -> None:
        """Start it and wait until it is ready, unless it is."""
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        self.starts += 1
        self._buffer = b""
        for name in ("tmp", "cache", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._answer(START_SECONDS)

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        # torch keeps the precompiled header under TMPDIR, not in its cache folder.
        environment["TMPDIR"] = str(self.folder / "tmp")
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / "cache")
        environment["XDG_CACHE_HOME"] = str(self.folder / "home")
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "0" if self.cache else "1"
        environment["PYTHONHASHSEED"] = "0"  # some of PyTorch's samples are drawn from a set
        environment["CUDA_VISIBLE_DEVICES"] = ""  # the corpus is for the CPU
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
        return environment

    def _answer(self, seconds: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdout is None:
            raise WorkerDied("crashed", "it was not started")
        deadline = time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.close()
                raise WorkerDied("hung", f"no answer in {seconds:.0f} s: {self._tail()}")
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                raise self._dead()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _dead(self) -> WorkerDied:
        code = self._process.wait() if self._process is not None else None
        self.close()
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        return WorkerDied("crashed", f"{name}: {self._tail()}")

    def _tail(self) -> str:
        try:
            return (self.folder / "log").read_bytes()[-_TAIL:].decode(errors="replace")
        except OSError:
            return ""

    def close(self) -> None:
        """End it and whatever it has started in its session. Without one: nothing."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # It ends by itself when its stdin does, and takes its forkserver along; one that hangs does not.
            process.wait(10 if process.poll() is None and not self._buffer else 0.1)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Lane:
    """Both workers, and one entry at a time on them."""

    def __init__(self, settings: dict[str, Any], *, cache: bool, seed: int) -> None:
        """``settings``: of the workers, see `worker`; and `worker`, the module to start."""
        self.folder = Path(tempfile.mkdtemp(prefix="corpus-"))
        self.cache = cache
        self.seed = seed
        command = [sys.executable, "-m", settings["worker"]]
        self.workers = {
            scheme: Worker(command, {**settings, "scheme": scheme, "cache": cache}, self.folder / scheme, cache)
            for scheme in SCHEMES
        }

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The record of one entry: under each scheme, in an order that name and seed decide."""
        order = list(SCHEMES)
        random.Random(f"{self.seed} {name}").shuffle(order)
        record: dict[str, Any] = {"name": name, "order": order, "load": round(os.getloadavg()[0], 2)}
        for scheme in SCHEMES:
            self._kept(scheme).unlink(missing_ok=True)
        for position, scheme in enumerate(order):
            against = self._kept(order[0]) if position else None
            record[scheme] = self._ask(scheme, name, seconds, against)
        if difference := record[order[1]].pop("difference", ""):
            record["difference"] = difference
            record["close"] = record[order[1]].get("close", False)
            # Is it ours, or does the program differ from itself?
            for scheme in SCHEMES:
                more = self._ask(scheme, name, seconds, self._kept(scheme), ".again")
                record[f"{scheme}_repeats"] = more["state"] != "ok" or not more.get("difference")
        record[order[1]].pop("close", None)
        for told in ("exception", "why"):
            if value := record[order[0]].pop(told, "") or record[order[1]].pop(told, ""):
                record[told] = value
            record[order[1]].pop(told, None)
        return record

    def _kept(self, scheme: str) -> Path:
        return self.folder / f"{scheme}.results"

    def _ask(self, scheme: str, name: str, seconds: float, against: Path | None, suffix: str = "") -> dict[str, Any]:
        keep = f"{self._kept(scheme)}{suffix}"
        task = {"name": name, "keep": keep, "against": str(against or ""), "again": self.cache and not suffix}
        try:
            return self.workers[scheme].ask(task, seconds)
        except WorkerDied as death:
            return {"state": death.state, "error": str(death)}

    def close(self) -> None:
        """End both workers and remove their folders."""
        for worker in self.workers.values():
            worker.close()
        shutil.rmtree(self.folder, ignore_errors=True)
