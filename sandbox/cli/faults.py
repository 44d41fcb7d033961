"""`sandbox faults`: a campaign of faults against real compiles, and the table of what became of them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from sandbox import ledger
from sandbox.cli.output import FAILED, OK, add_json, console, print_json, subcommand
from sandbox.errors import PolicyError
from sandbox.executor import usable_cores
from sandbox.faults.kinds import KINDS, LATE
from sandbox.policy import Policy, load

_HELP = """\
Compiles small real graphs through torch.compile, a new one for each fault, in host processes of its own; each child,
forkserver, frame or host has the fault that the seed says; each result is compared with eager. Then prints, for each
kind of fault, how the children ended and who gave the answer.

The policy is taken as it is, but faults are allowed, no capsules are left, and the circuit breaker is off. With --light
there is no torch: jobs are plain functions, and their status is the answer. That is for the sandbox's own machinery,
and fast.

examples:
  sandbox faults --count 2000 --seed 1        # most of an hour on two cores
  sandbox faults --light --count 500 --kinds sigsegv,hang_gil,garbled
  sandbox faults --forkserver-kills 20        # instead: the forkserver is killed at random moments under load
  sandbox faults --list                       # the kinds, and where each can happen

exit codes: 0 no host died, nothing hung past its deadline, nothing was left behind, no result was wrong; 1 not so, the
output says what; 2 bad input
"""
#: Seconds past its deadline that a job may live.
GRACE_SECONDS: Final = 1.0
#: Seconds without a word from a host until it counts as hung. A start with torch and its warm-up takes the longest.
SILENCE_SECONDS: Final = 300.0
#: Seconds that a compile may take besides its jobs: Dynamo, the ladder, the uncompiled graph. So a hang outside of a
#: job is seen, too, where no new forkserver has to be waited for.
BESIDES_SECONDS: Final = 20.0
#: One fault in this many is taken where it costs a new forkserver.
RARELY: Final = 5


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "faults", "inject faults into compiles and show what becomes of them", _HELP)
    for name, default, words in (
        ("--seed", 0, "the same seed gives the same faults"),
        ("--count", 100, "how many faults"),
        ("--hosts", 0, "host processes side by side; 0: one per core, at most 4"),
        ("--forkserver-kills", 0, "if not 0: no campaign; kill the forkserver so often, at random moments"),
    ):
        parser.add_argument(name, metavar="N", type=int, default=default, help=f"{words}; default: {default}")
    parser.add_argument("--kinds", metavar="A,B", default="", help="only these kinds; default: all")
    parser.add_argument(
        "--policy", metavar="P", default="production", help="a shipped policy or a TOML file; default: production"
    )
    parser.add_argument("--light", action="store_true", help="plain functions instead of compiles; needs no torch")
    parser.add_argument("--list", action="store_true", help="list kinds and points, and do nothing")
    add_json(parser)
    parser.set_defaults(handler=_faults)


def _faults(arguments: argparse.Namespace) -> int:
    if arguments.list:
        return _list(arguments.json)
    if arguments.count < 1 or arguments.forkserver_kills < 0 or arguments.hosts < 0:
        raise PolicyError("--count must be at least 1, --forkserver-kills and --hosts at least 0")
    names = tuple(name for name in arguments.kinds.split(",") if name) or tuple(KINDS)
    for name in names:
        if name not in KINDS:
            raise PolicyError(f"no kind of fault {name!r}: allowed are {', '.join(KINDS)}")
    policy = _policy(load(arguments.policy), arguments.light)
    if arguments.forkserver_kills:
        return _kills(policy, arguments)
    hosts = arguments.hosts or min(usable_cores(), 4)
    shots = schedule(arguments.seed, arguments.count, names)
    started = time.monotonic()
    with _ground() as ground:
        campaign = _Campaign(policy, arguments.light, shots, ground)
        campaign.run(hosts)
        campaign.problems += ground.left()
    document = {
        "seed": arguments.seed,
        "count": len(shots),
        "policy": policy.name,
        "light": arguments.light,
        "table": tabulate(shots, campaign.answers),
        "worst_late_seconds": round(max((answer["late"] for answer in campaign.answers.values()), default=0.0), 3),
        "host_deaths": campaign.deaths,
        "seconds": round(time.monotonic() - started, 1),
        "problems": campaign.problems + judge(shots, campaign.answers),
    }
    document["digest"] = hashlib.sha256(json.dumps(document["table"]).encode()).hexdigest()
    if arguments.json:
        print_json(document)
    else:
        _print(document)
    return FAILED if document["problems"] else OK


def _policy(policy: Policy, light: bool) -> Policy:
    """The policy, with faults allowed and nothing kept."""
    changes: dict[str, Any] = {
        "allow_faults": True,
        "capsule": policy.capsule.model_copy(update={"keep": 0}),
        # It would keep the faults after a series of the sandbox's own failures from ever reaching a child.
        "breaker": policy.breaker.model_copy(update={"failures": 0}),
    }
    # A job with a fault gets a fresh child in any case, and what the host holds is counted.
    forkserver: dict[str, object] = {"standby": 0, **({"import_torch": False} if light else {})}
    changes["forkserver"] = policy.forkserver.model_copy(update=forkserver)
    return policy.model_copy(update=changes)


Planned = tuple[int, str, str, int, int | None]
"""Number, kind, point, seed, and how many children have the fault (None: all of the graph's)."""


def schedule(seed: int, count: int, names: Sequence[str]) -> list[Planned]:
    """The faults of a campaign: a function of its arguments alone."""
    chance = random.Random(seed)
    places = sorted({point for name in names for point in KINDS[name].points})
    shots: list[Planned] = []
    while len(shots) < count:
        # By turns so that each kind, and each point, is met as often as any other.
        if len(shots) % 2:
            kind = KINDS[chance.choice(list(names))]
            point = chance.choice(kind.points)
        else:
            point = chance.choice(places)
            kind = KINDS[chance.choice([name for name in names if point in KINDS[name].points])]
        # A new forkserver takes far longer than all else: seldom, unless few kinds are asked for.
        costly = _costs_a_forkserver(point)
        if costly and len(names) > RARELY and chance.randrange(RARELY):
            continue
        once = costly or point in LATE or bool(chance.randrange(2))
        shots.append((len(shots), kind.name, point, chance.getrandbits(32), 1 if once else None))
    return shots


def _costs_a_forkserver(point: str) -> bool:
    return point == "host" or point.startswith("forkserver.")


class _Ground:
    """The folder and the names of this machine that the hosts of a campaign may leave something in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = ledger.take()
        for name in ("tmp", "cache", "home", "inductor"):
            (folder / name).mkdir()

    def environment(self) -> dict[str, str]:
        """What a host process gets: everything that it makes lies in the folder."""
        return {
            **os.environ,
            "TMPDIR": str(self.folder / "tmp"),
            "HOME": str(self.folder / "home"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path),
        }

    def left(self) -> list[str]:
        """What is left when all hosts have ended: processes, scratch folders, names in /dev/shm and SysV objects.

        What other programs of this machine have made meanwhile and still hold is told, too: nobody can say whose it is.
        """
        deadline = time.monotonic() + 10.0
        while True:
            found = [f"process {pid} lives" for pid in self._processes()]
            found += [f"{path} is left" for path in (self.folder / "tmp").glob("sandbox-*")]
            after = ledger.differences(self._before, ledger.take())
            found += [each.text for each in after if each.text.startswith(("/dev/shm", "SysV"))]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _processes(self) -> list[int]:
        mark = f"TMPDIR={self.folder}".encode()
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):  # gone, or of another user: not ours then
                    if mark in Path(f"/proc/{name}/environ").read_bytes():
                        found.append(int(name))
        return found


@contextlib.contextmanager
def _ground() -> Iterator[_Ground]:
    with tempfile.TemporaryDirectory(prefix="sandbox-faults-", ignore_cleanup_errors=True) as folder:
        yield _Ground(Path(folder))


class _Campaign:
    """Hosts side by side that work off the faults; a host that dies is replaced, and that is a problem."""

    def __init__(self, policy: Policy, light: bool, shots: list[Planned], ground: _Ground) -> None:
        self._policy, self._light, self._ground = policy, light, ground
        self._shots = shots
        self.answers: dict[int, dict[str, Any]] = {}
        self.deaths: list[str] = []
        self.problems: list[str] = []

    def run(self, hosts: int) -> None:
        threads = [threading.Thread(target=self._lane, args=(self._shots[at::hosts],)) for at in range(hosts)]
        for thread in threads:
            thread.start()
        with _progress(len(self._shots)) as advance:
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.2)
                advance(len(self.answers))

    def _lane(self, shots: list[Planned]) -> None:
        left = list(shots)
        while left:
            task = {"shots": left, "kills": 0, "seed": 0}
            for answer in _host(self._policy, self._light, task, self._ground):
                if "number" in answer:
                    self.answers[answer["number"]] = answer
                elif "died" in answer:
                    number, kind, point, *_ = left[0] if left else (-1, "", "")
                    problem = f"a host died ({answer['died']}) at fault {number}, {kind} at {point}"
                    self.deaths.append(problem)
                    self.problems.append(problem)
                    left = left[1:]
                left = [shot for shot in left if shot[0] not in self.answers]


def _host(policy: Policy, light: bool, task: dict[str, Any], ground: _Ground) -> Iterator[dict[str, Any]]:
    """One host process from start to end: its answers, then `died` if it did not end well."""
    with (ground.folder / f"host-{threading.get_ident()}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox.cli.faults_host"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=ground.environment(),
            text=True,
        )
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("pipes were asked for")
    lines: queue.Queue[str] = queue.Queue()
    answers = process.stdout

    def read() -> None:
        for line in answers:
            lines.put(line)
        lines.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it died at once: told below
            whole = {"policy": policy.model_dump_json(), "light": light, "parent": os.getpid(), **task}
            process.stdin.write(json.dumps(whole) + "\n")
            process.stdin.flush()
        while line := lines.get(timeout=SILENCE_SECONDS):
            yield json.loads(line)
        code = process.wait(SILENCE_SECONDS)
        if code:
            yield {"died": f"status {code}{_last_words(log.name)}"}
    except (queue.Empty, subprocess.TimeoutExpired):
        yield {"died": f"no word for {SILENCE_SECONDS:.0f} s{_last_words(log.name)}"}
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        reader.join()
        answers.close()


def _last_words(log: str) -> str:
    text = Path(log).read_text(errors="replace").strip()[-600:]
    return f": {text}" if text else ""


def tabulate(shots: list[Planned], answers: dict[int, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The table: for each kind how many faults, how the children that had it ended, and who gave the answer."""
    table: dict[str, dict[str, Any]] = {}
    for number, kind, _point, _seed, times in shots:
        answer = answers.get(number)
        if answer is None:
            continue
        row = table.setdefault(kind, {"faults": 0, "children": Counter(), "answers": Counter(), "leaks": 0, "wrong": 0})
        row["faults"] += 1
        row["children"].update(answer["statuses"][: times or None])
        row["answers"][answer["answer"]] += 1
        row["leaks"] += len(answer["leaks"])
        row["wrong"] += not answer["right"]
    return {
        kind: {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in row.items()
        }
        for kind, row in sorted(table.items())
    }


def judge(shots: list[Planned], answers: dict[int, dict[str, Any]]) -> list[str]:
    """One sentence for each thing that is not as it must be."""
    problems = []
    for number, kind, point, *_ in shots:
        answer = answers.get(number)
        what = f"fault {number}, {kind} at {point}"
        if answer is None:
            problems.append(f"{what}: no answer")
            continue
        if not answer["given"]:
            problems.append(f"{what}: no job had it")
        if not answer["right"]:
            problems.append(f"{what}: a wrong result")
        if answer["leaks"]:
            problems.append(f"{what}: the host holds {', '.join(answer['leaks'][:5])}")
        if answer["late"] > GRACE_SECONDS:
            problems.append(f"{what}: {answer['late']:.2f} s past the deadline")
        if answer["besides"] > BESIDES_SECONDS and not _costs_a_forkserver(point):
            problems.append(f"{what}: {answer['besides']:.1f} s besides its jobs")
        if answer["error"] and answer["answer"] != "raised":
            problems.append(f"{what}: {answer['error']}")
    return problems


def _kills(policy: Policy, arguments: argparse.Namespace) -> int:
    problems: list[str] = []
    document: dict[str, Any] = {}
    task = {"shots": [], "kills": arguments.forkserver_kills, "seed": arguments.seed}
    with _ground() as ground, _progress(arguments.forkserver_kills) as advance:
        for answer in _host(policy, arguments.light, task, ground):
            if "kill" in answer:
                advance(answer["kill"] + 1)
            elif "kills" in answer:
                document = answer
                problems += answer["wrong"]
            elif "died" in answer:
                problems.append(f"the host died: {answer['died']}")
        problems += ground.left()
    document = {**document, "problems": problems}
    if arguments.json:
        print_json(document)
    else:
        out = console()
        for name, value in document.items():
            if name not in ("problems", "wrong"):
                out.print(f"{name}: {value}", highlight=False)
        _print_problems(problems)
    return FAILED if problems else OK


def _list(as_json: bool) -> int:
    if as_json:
        print_json({kind.name: {"does": kind.does, "points": kind.points} for kind in KINDS.values()})
        return OK
    from rich.table import Table

    table = Table("kind", "what happens", "points (the first is the default)")
    for kind in KINDS.values():
        table.add_row(kind.name, kind.does, ", ".join(kind.points))
    console().print(table)
    return OK


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    table = Table("kind", "faults", "children that had it ended", "answers", "leaks", "wrong")
    for kind, row in document["table"].items():
        ended, answers = (", ".join(f"{n} {name}" for name, n in row[key].items()) for key in ("children", "answers"))
        table.add_row(kind, str(row["faults"]), ended, answers, str(row["leaks"]), str(row["wrong"]))
    out.print(table)
    out.print(
        f"{document['count']} faults, seed {document['seed']}, policy {document['policy']}; hosts that died: "
        f"{len(document['host_deaths'])}; latest end of a job {document['worst_late_seconds']:.2f} s after its "
        f"deadline; {document['seconds']:.0f} s; outcome table {document['digest'][:16]}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    _print_problems(document["problems"])


def _print_problems(problems: list[str]) -> None:
    from rich.markup import escape

    out = console()
    for problem in problems:
        out.print(f"[red]not ok[/]: {escape(problem)}", highlight=False, soft_wrap=True)
    if not problems:
        out.print("[green]All as it must be.[/]")


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from rich.progress import Progress

    with Progress(console=console(stderr=True), transient=True) as progress:
        bar = progress.add_task("faults", total=total)
        yield lambda done: progress.update(bar, completed=done)
