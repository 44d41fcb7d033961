"""`sandbox bench`: Inductor's own modes and ours, side by side, and what the sandbox itself costs.

__init__   the command: what runs, in which order, each measurement in a process of its own
worker     that process: compiles (graphs)     costs (jobs, crash, idle)     serving (async)
summary    samples to rows: medians, ratios, bars
plot       rows to an SVG
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sandbox.cli import bench_corpus
from sandbox.cli.bench.plot import svg
from sandbox.cli.bench.summary import INDUCTOR, OURS, SCHEMES, number, order, summarise, words
from sandbox.cli.output import FAILED, OK, add_json, add_policy, console, print_json, subcommand, write_whole
from sandbox.errors import SandboxError
from sandbox.policy import load

_HELP = """\
Measures Inductor's NORMAL mode, its SUBPROCESS mode, and each mode of the sandbox, in one run.

  first    the first compile of a process; the sandbox's forkserver is ready by then, and its start is told apart
  steady   six small graphs (seven with the backward one), one after the other, after that first one
  jobs     fixed cost of a job: an empty function, fully confined, from submit to reply, fresh and from standby
  async    time to the first answer, and eager's throughput on one core while two graphs are compiled on another
  crash    a compile right after a child has crashed
  idle     memory and wake-ups of a forkserver and its standby children at rest

Each measurement is a process of its own with its own empty TMPDIR and TORCHINDUCTOR_CACHE_DIR, so that nothing is
inherited (Inductor keeps the precompiled C++ header under TMPDIR). Importing torch and Inductor is not counted, in
any scheme. The order is random in each round. Every result is compared with eager. Caches: `off`
(force_disable_caches), `on` (all graphs miss and are stored), `hits` (a new process with the folders of `on`).
The bars say what was wanted; the exit code depends on right results only, not on speed.

examples:
  sandbox bench --out bench.json               # all of it, in about 20 minutes; also writes bench.svg
  sandbox bench --repeats 1 --measure jobs,idle
  sandbox bench --mode inductor-normal,subprocess --measure first,steady --cache off

exit codes: 0 measured; 1 a result differs from eager, or a measurement failed; 2 bad input
"""
MEASURES: Final = ("first", "steady", "jobs", "async", "crash", "idle")
CACHES: Final = ("off", "on")
#: Seconds for one measurement. Inductor's SUBPROCESS mode has no time-out of its own.
_WORKER_SECONDS: Final = 600.0
#: Variables that would change what is measured.
_FOREIGN: Final = (
    "TORCHINDUCTOR_FX_COMPILE_MODE",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
    "TORCH_COMPILE_SANDBOX",
    "TORCH_COMPILE_SANDBOX_MODE",
    "TRITON_CACHE_DIR",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "bench", "side by side with Inductor's own modes", _HELP)
    add_policy(parser)
    add_json(parser)
    parser.add_argument("--measure", metavar="NAME,…", default=",".join(MEASURES), help="default: all of the above")
    parser.add_argument(
        "--mode", metavar="NAME,…", default=",".join(SCHEMES),
        help=f"schemes of `first` and `steady`; default: all of {', '.join(SCHEMES)}",
    )  # fmt: skip
    parser.add_argument("--cache", metavar="NAME,…", default=",".join(CACHES), help="in `steady`; default: off,on")
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="rounds; default 3; `idle` runs once")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random order; default 0")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the JSON document there, and FILE.svg")
    parser.set_defaults(handler=_bench)
    bench_corpus.add(parser)


def _bench(arguments: argparse.Namespace) -> int:
    load(arguments.policy)
    if arguments.repeats < 1:
        raise SandboxError(f"--repeats {arguments.repeats}: must be at least 1")
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise SandboxError(f"--out {arguments.out}: there is no such folder")
    measures = _chosen("--measure", arguments.measure, MEASURES)
    schemes = _chosen("--mode", arguments.mode, SCHEMES)
    caches = _chosen("--cache", arguments.cache, CACHES)
    host = _host()
    tasks = plan(measures, schemes, caches, arguments.repeats, arguments.seed, arguments.policy)
    runs = list(_runs(tasks))
    document: dict[str, Any] = {
        "ok": bool(runs) and not any(problems(run) for run in runs),
        "host": {**host, "load_after": os.getloadavg(), "seconds": time.time() - host["started"]},
        "summary": sorted(summarise(runs), key=order),
        "runs": runs,
    }
    if arguments.out is not None:
        write_whole(arguments.out, json.dumps(document, indent=2) + "\n")
        write_whole(arguments.out.with_suffix(".svg"), svg(document["summary"], _where(host)))
    if arguments.json:
        print_json(document)
    else:
        _print(document)
    for run in runs:
        for problem in problems(run):
            print(f"sandbox: {run['name']}: {problem}", file=sys.stderr)
    return OK if document["ok"] else FAILED


def _chosen(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in ``text``, in the order of ``known``.

    Raises:
        SandboxError: one is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in known]:
        raise SandboxError(f"{option} {unknown[0]}: allowed are {', '.join(known)}")
    if not names:
        raise SandboxError(f"{option}: names none of {', '.join(known)}")
    return tuple(name for name in known if name in names)


def plan(
    measures: tuple[str, ...], schemes: tuple[str, ...], caches: tuple[str, ...], repeats: int, seed: int, policy: str
) -> list[dict[str, Any]]:
    """All measurements, in an order that is random in each round. A process of compiles does `first` and `steady`."""
    shuffled = random.Random(seed)
    tasks = []
    for round_ in range(repeats):
        block: list[dict[str, Any]] = []
        compiled = [name for name in ("first", "steady") if name in measures]
        if compiled:
            for scheme in schemes:
                block.append({"kind": "compiles", "scheme": scheme, "measures": compiled, "caches": list(caches)})
        if "jobs" in measures:
            block.append({"kind": "jobs"})
        if "async" in measures and "async" in OURS:
            block.append({"kind": "async"})
        if "crash" in measures:
            block.append({"kind": "crash"})
        if "idle" in measures and round_ == 0:
            block.append({"kind": "idle"})
        shuffled.shuffle(block)
        tasks += [{**task, "round": round_, "policy": policy, "seed": seed + round_} for task in block]
    return tasks


def _runs(tasks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from rich.progress import Progress

    with Progress(console=console(stderr=True)) as progress:
        row = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(row, description=f"round {task['round'] + 1}: {_name(task)}")
            with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as folder:
                yield run_one(task, Path(folder))
                if "on" in task.get("caches", ()) and "steady" in task["measures"]:
                    # Once more, in a new process: now every graph is in the cache.
                    yield run_one({**task, "caches": ["hits"]}, Path(folder))
            progress.advance(row)


def _name(task: dict[str, Any]) -> str:
    if task["kind"] != "compiles":
        return str(task["kind"])
    return f"{' and '.join(task['measures'])}, caches {' and '.join(task['caches'])}, {task['scheme']}"


def run_one(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One measurement in a fresh process whose temporary files and caches lie in ``folder``."""
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    # torch keeps the precompiled header under TMPDIR, not in its cache folder. Both are shared by `on` and `hits` only.
    environment["TMPDIR"] = str(temporary)
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    if task.get("scheme") == INDUCTOR[1]:
        environment["TORCHINDUCTOR_FX_COMPILE_MODE"] = "SUBPROCESS"
    out = folder / "answer.json"
    out.unlink(missing_ok=True)
    run: dict[str, Any] = {"name": _name(task), "round": task["round"], "load": os.getloadavg()[0]}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sandbox.cli.bench.worker", json.dumps({**task, "out": str(out)})],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_WORKER_SECONDS, check=False, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            run["error"] = f"exit status {done.returncode}: {done.stdout[-2000:]}"
        else:
            run |= json.loads(out.read_text())
    except subprocess.TimeoutExpired:
        run["error"] = f"no answer in {_WORKER_SECONDS:.0f} s"
    return {**run, "process_seconds": time.perf_counter() - started}


def problems(run: dict[str, Any]) -> list[str]:
    """Why a measurement does not count: it failed, or a result was wrong."""
    return [run["error"]] if "error" in run else list(run["problems"])


def _host() -> dict[str, Any]:
    """Where it was measured, as plain data; imports no torch, so that the machine stays as it is."""
    import importlib.metadata

    from sandbox.executor import usable_cores

    return {
        "machine": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "compiler": shutil.which(os.environ.get("CXX") or "g++"),
        "cores": usable_cores(),
        "load_before": os.getloadavg(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "started": time.time(),
    }


def _where(host: dict[str, Any]) -> str:
    return f"{host['time'][:10]}, {host['cores']} cores, torch {host['torch']}, Python {host['python']}"


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    table = Table(
        "measure", "caches", "scheme", "figure", "median", "min to max", "of NORMAL", "by round", "notes", "n"
    )
    before = None
    for row in document["summary"]:
        if before not in (None, (row["measure"], row["cache"], row["figure"])):
            table.add_section()
        before = (row["measure"], row["cache"], row["figure"])
        by_round = row.get("by_round", [])
        table.add_row(
            row["measure"], row["cache"], row["scheme"], row["figure"],
            number(row["median"]), f"{number(row['min'])} to {number(row['max'])}",
            f"{row['of_normal']:.2f}" if "of_normal" in row else "",
            f"{by_round[0]:.2f} to {by_round[-1]:.2f}" if by_round else "",
            ", ".join(f"{count:g} {name}" for name, count in row["notes"].items()), str(row["samples"]),
        )  # fmt: skip
    out.print(table)
    lines = [
        f"{row['measure']}{row['cache'] and ', caches '}{row['cache']}, {row['scheme']}, {row['figure']}: {words(bar)}"
        for row in document["summary"]
        for bar in row["bars"]
    ]
    ready = [run["facts"]["ready_seconds"] for run in document["runs"] if run.get("facts", {}).get("ready_seconds")]
    if ready:
        lines.append(f"Not counted: the forkserver was ready {min(ready):.1f} to {max(ready):.1f} s after install().")
    loads = [run["load"] for run in document["runs"]]
    host = document["host"]
    lines.append(
        f"{_where(host)}; {host['seconds'] / 60:.0f} min; load average over one minute before "
        f"{host['load_before'][0]:.2f}, during {min(loads):.2f} to {max(loads):.2f}"
    )
    for line in lines:
        out.print(line, highlight=False, soft_wrap=True)
