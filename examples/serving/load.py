"""Loads the server over loopback while it compiles, and compares every answer with the uncompiled model's.

    python examples/serving/load.py --requests 5000            # compiles all the time
    python examples/serving/load.py --requests 5000 --faults   # the same, then again with compiles that fail

New lengths of text come as fast as the server compiles them, so that a compile is always going on. With --faults,
half of the children are broken (`sandbox.faults`), and the forkserver is killed now and then.
Exit status 1 if one request was not answered, or not rightly.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from model import MAX_LENGTH, as_tensor, build

import sandbox
from sandbox import faults
from sandbox.cli.policy import as_toml
from sandbox.policy import Policy
from sandbox.policy import load as load_policy

HERE = Path(__file__).resolve().parent
#: Clients side by side, each with a connection of its own.
CLIENTS = 8
#: Lengths that the server is offered ahead of what it has compiled.
AHEAD = 2
#: Seconds after which a run no longer waits for its children.
CHILDREN_SECONDS = 900.0
#: Where compiles are broken: in the child and on its way back. All kinds that have one of these points are used.
POINTS = ("child.unpickle", "child.run", "child.spawn", "child.send_reply", "child.leave", "wire.reply")
#: Seconds for the first compile, in which the forkserver warms up.
WARM_SECONDS = 300.0
#: Exit statuses of a server that was told to end; uvicorn ends itself by the signal that it got.
STOPPED = (0, -signal.SIGTERM)
#: Seconds after which a request counts as failed.
TIMEOUT = 30.0


def policy(broken: bool) -> Policy:
    """`production`; for faults with the permission to inject them."""
    given = load_policy("production")
    if not broken:
        return given
    return given.model_copy(update={"name": "production-with-faults", "allow_faults": True})


def serve(file: str, seed: int | None) -> None:
    """In the server's process: the server as it is, and perhaps faults in half of its compiles."""
    import server

    words = ["--port", "0", "--policy", file]
    if seed is None:
        server.main(words)
        return
    sandbox.install(file)  # the server's own call finds it installed
    with faults.inject(faults.Plan(seed=seed, points=POINTS, rate=0.5)):
        server.main(words)


@dataclass(frozen=True)
class Load:
    """What to do in one run."""

    requests: int
    """A count, at least; see ``children``."""
    rate: float = 40.0
    """Requests a second."""
    broken: bool = False
    """Whether compiles fail."""
    seed: int = 5
    children: int = 0
    """Requests go on until so many children have ended: on a slow machine a fixed number may see no compile at all."""
    kill_every: float = 10.0
    """Children between two kills of the forkserver, a mean: it needs some time to be warm again."""


@contextlib.contextmanager
def serving(load: Load) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The real server, as a process of its own with empty caches, on a port of its own."""
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        file = Path(folder, "policy.toml")
        file.write_text(as_toml(policy(load.broken)) + "\n", encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH")))),
            "TMPDIR": folder,
            "XDG_CACHE_HOME": str(Path(folder, "cache")),
            "TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "inductor")),
        }
        command = [sys.executable, str(HERE / "load.py"), "--serve", str(file)]
        command += ["--faults", "--seed", str(load.seed)] if load.broken else []
        log = Path(folder, "log")
        with log.open("w") as errors:
            server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not line.startswith("listening on "):
                server.wait(10)
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            yield int(line.rpartition(":")[2]), server
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            if server.stdout:
                server.stdout.close()


@dataclass
class Outcome:
    """What one run has shown. Times in seconds."""

    broken: bool
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    compiled: int = 0
    problems: list[str] = field(default_factory=list)
    killed: int = 0
    health: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    exit_status: int | None = None

    def percentile(self, share: float) -> float:
        """The latency that ``share`` of the requests did not exceed."""
        if not self.latencies:
            return float("nan")
        return sorted(self.latencies)[min(len(self.latencies) - 1, int(share * len(self.latencies)))]


class _Run:
    """One server under load."""

    def __init__(self, port: int, server: psutil.Process, outcome: Outcome, load: Load) -> None:
        self.port, self.server, self.outcome = port, server, outcome
        self.load = load
        self.random = random.Random(load.seed)
        self.lock = threading.Lock()
        self.sent = 0
        self.enough = load.children == 0
        self.coming = self.random.sample(range(1, MAX_LENGTH + 1), MAX_LENGTH)
        self.lengths = [self.coming.pop()]
        self.model = build()
        self.done = threading.Event()
        self.started = 0.0

    def run(self) -> None:
        self.wait_warm()
        clients = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        steering = threading.Thread(target=self.steer)
        self.started = time.monotonic()
        for thread in (*clients, steering):
            thread.start()
        for thread in clients:
            thread.join()
        self.outcome.seconds = time.monotonic() - self.started
        self.done.set()
        steering.join()
        self.outcome.health, self.outcome.metrics = self.get("/health"), self.get("/metrics")

    def wait_warm(self) -> None:
        """Until the first compile is done: the forkserver has warmed up. The server answers from the beginning."""
        deadline = time.monotonic() + WARM_SECONDS
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("POST", "/predict", json.dumps({"text": "x" * self.lengths[0]}))
        connection.getresponse().read()
        connection.close()
        while self.get("/health")["ready"] == 0:
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing was compiled in {WARM_SECONDS:g} s: {self.get('/metrics')}")
            time.sleep(0.1)

    def get(self, path: str) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        try:
            connection.request("GET", path)
            found: dict[str, Any] = json.loads(connection.getresponse().read())
            return found
        finally:
            connection.close()

    def steer(self) -> None:
        """A new length as soon as the server has few to compile; and now and then the end of the forkserver."""
        draw = random.Random(f"kill {self.load.seed}")
        next_kill = draw.expovariate(1 / self.load.kill_every)
        while not self.done.wait(0.2):
            try:
                health, ended = self.get("/health"), sum(self.get("/metrics")["outcomes"].values())
            except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
                self.problem(f"/health or /metrics: {error!r}")
                self.enough = True  # the run has failed; from a server that is dead, no more children are to be had
                continue
            if self.coming and health["waiting"] < AHEAD and health["ready"] + AHEAD >= len(self.lengths):
                with self.lock:
                    self.lengths.append(self.coming.pop())
            if self.load.broken and ended > next_kill and not self.done.wait(draw.random()):
                next_kill = ended + draw.expovariate(1 / self.load.kill_every)
                self.kill()
            self.enough = ended >= self.load.children or time.monotonic() > self.started + CHILDREN_SECONDS

    def kill(self) -> None:
        """End the forkserver, whatever it does."""
        for process in self.server.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any("sandbox.template" in word for word in process.cmdline()):
                    process.kill()
                    self.outcome.killed += 1

    def client(self) -> None:
        torch.set_num_threads(1)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        while True:
            with self.lock:
                if self.sent >= self.load.requests and self.enough:
                    break
                number, self.sent = self.sent, self.sent + 1
                newest = self.random.random() < 0.5
                length = self.lengths[-1] if newest else self.random.choice(self.lengths)
                text = "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz ", k=length))
            time.sleep(max(0.0, self.started + number / self.load.rate - time.monotonic()))
            begun = time.monotonic()
            try:
                connection.request("POST", "/predict", json.dumps({"text": text}))
                response = connection.getresponse()
                body = response.read()
            except (OSError, http.client.HTTPException) as error:
                self.problem(f"length {length}: {error!r}")
                connection.close()
                continue
            elapsed = time.monotonic() - begun
            if response.status != 200:
                self.problem(f"length {length}: status {response.status}: {body[:200]!r}")
                continue
            with torch.inference_mode():
                expected = self.model(as_tensor(text.encode()))[0]
            if wrong := differs(body, expected):
                self.problem(f"length {length}: {body[:500]!r} is wrong ({wrong}), {expected.tolist()} is right")
                continue
            with self.lock:
                self.outcome.latencies.append(elapsed)
                self.outcome.compiled += json.loads(body)["compiled"]
        connection.close()

    def problem(self, text: str) -> None:
        with self.lock:
            self.outcome.problems.append(text)


def differs(body: bytes, expected: torch.Tensor) -> str:
    """What is wrong with an answer, or "". One that is no answer at all must not end the client that got it."""
    try:
        answer = json.loads(body)
        scores, _ = torch.tensor(answer["scores"]), int(answer["compiled"])
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        return repr(error)
    close = scores.shape == expected.shape and torch.allclose(scores, expected, rtol=1e-4, atol=1e-5)
    return "" if close else "other scores"


def measure(load: Load) -> Outcome:
    """Start a server, load it, stop it."""
    outcome = Outcome(load.broken)
    with serving(load) as (port, server):
        _Run(port, psutil.Process(server.pid), outcome, load).run()
    outcome.exit_status = server.returncode
    return outcome


def table(outcomes: list[Outcome]) -> str:
    """For people, and for docs/benchmarks.md."""
    names = (
        "compiles, requests, failed or wrong, p50 ms, p99 ms, max ms, lengths compiled, answered by compiled code, "
        "children, how they ended, forkserver killed, uncompiled graphs, seconds"
    ).split(", ")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for each in outcomes:
        ended = Counter(each.metrics.get("outcomes", {}))
        cells = [
            "with faults" if each.broken else "without faults",
            len(each.latencies),
            len(each.problems),
            *(f"{each.percentile(share) * 1000:.1f}" for share in (0.5, 0.99, 1.0)),
            each.health["ready"],
            each.compiled,
            sum(ended.values()),
            ", ".join(f"{count} {status}" for status, count in ended.most_common()),
            each.killed,
            each.metrics.get("eager"),
            f"{each.seconds:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description="load examples/serving/server.py and check every answer")
    parser.add_argument("--requests", type=int, default=1000, help="requests in each run; default: 1000")
    parser.add_argument("--rate", type=float, default=Load.rate, help=f"requests a second; default: {Load.rate:g}")
    parser.add_argument("--faults", action="store_true", help="a second run in which compiles fail")
    parser.add_argument(
        "--children",
        type=int,
        default=40,
        help="go on until so many compiles have ended, at most 15 minutes; default: 40",
    )
    parser.add_argument("--seed", type=int, default=5, help="of lengths, texts and faults; default: 5")
    parser.add_argument("--serve", metavar="FILE", help=argparse.SUPPRESS)  # what this program starts
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.seed if arguments.faults else None)
        return 0
    outcomes = []
    for broken in (False, True) if arguments.faults else (False,):
        outcomes.append(measure(Load(arguments.requests, arguments.rate, broken, arguments.seed, arguments.children)))
        for problem in outcomes[-1].problems[:20]:
            print(problem, file=sys.stderr)
    print(table(outcomes))
    print(f"load of this machine over one minute: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}")
    return 1 if any(each.problems or each.exit_status not in STOPPED for each in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
