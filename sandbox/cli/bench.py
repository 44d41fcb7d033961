"""`sandbox bench`: the same graphs under Inductor's NORMAL and SUBPROCESS modes and the sandbox, side by side."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sandbox.cli import bench_corpus
from sandbox.cli.output import FAILED, OK, add_json, add_policy, console, print_json, subcommand, write_whole
from sandbox.errors import SandboxError
from sandbox.policy import load

_HELP = """\
Compiles the same graphs under Inductor's NORMAL mode, under its SUBPROCESS mode, and in the sandbox, in one run.

  steady   six small graphs (seven with the backward one), one after the other, after one warm-up compile
  first    the first compile of a process; the sandbox's forkserver is ready by then, and its start is told apart

Each measurement is a fresh process with its own empty TMPDIR and TORCHINDUCTOR_CACHE_DIR, so that nothing is
inherited (Inductor keeps the precompiled C++ header under TMPDIR). Importing torch and Inductor is not counted, in
any scheme. The order is random in each round. Every result is compared with eager. Caches: `off`
(force_disable_caches), `on` (all graphs miss and are stored), `hits` (new processes with the folders of `on`).

examples:
  sandbox bench                                # takes many minutes; keep the machine quiet
  sandbox bench --repeats 1 --cache off        # a quick look
  sandbox bench --json --out bench.json

exit codes: 0 measured; 1 a result differs from eager, or a measurement failed; 2 bad input
"""
SCHEMES: Final = ("normal", "subprocess", "sandbox")
#: Seconds for one measurement. Inductor's SUBPROCESS mode has no time-out of its own.
_WORKER_SECONDS: Final = 300.0
#: Variables that would change what is measured.
_FOREIGN: Final = (
    "TORCHINDUCTOR_FX_COMPILE_MODE",
    "TORCH_COMPILE_SANDBOX",
    "TORCH_COMPILE_SANDBOX_MODE",
    "TRITON_CACHE_DIR",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "bench", "side by side with Inductor's own modes", _HELP)
    add_policy(parser)
    add_json(parser)
    parser.add_argument("--repeats", metavar="N", type=int, default=3, help="rounds; default 3")
    parser.add_argument(
        "--cache", choices=("off", "on", "both"), default="both", help="Inductor's caches in `steady`; default both"
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the random order; default 0")
    parser.add_argument("--out", metavar="FILE.json", type=Path, help="write the JSON document there, too")
    parser.set_defaults(handler=_bench)
    bench_corpus.add(parser)


def _bench(arguments: argparse.Namespace) -> int:
    load(arguments.policy)
    if arguments.repeats < 1:
        raise SandboxError(f"--repeats {arguments.repeats}: must be at least 1")
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise SandboxError(f"--out {arguments.out}: there is no such folder")
    kinds = [("first", "off")]
    kinds += [("steady", cache) for cache in ("off", "on") if arguments.cache in (cache, "both")]
    host = _host()
    runs = list(_runs(kinds, arguments))
    document: dict[str, Any] = {
        "ok": all(run.get("equal", False) for run in runs),
        "host": {**host, "load_after": os.getloadavg()},
        "summary": summarise(runs),
        "runs": runs,
    }
    text = json.dumps(document, indent=2)
    if arguments.out is not None:
        write_whole(arguments.out, text + "\n")
    if arguments.json:
        print_json(document)
    else:
        _print(document)
    return OK if document["ok"] else FAILED


def _runs(kinds: list[tuple[str, str]], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All measurements, in an order that is random in each round."""
    from rich.progress import Progress

    order = random.Random(arguments.seed)
    plan = []
    for round_ in range(arguments.repeats):
        block = [(measure, cache, scheme, round_) for measure, cache in kinds for scheme in SCHEMES]
        order.shuffle(block)
        plan += block
    with Progress(console=console(stderr=True)) as progress:
        task = progress.add_task("", total=len(plan))
        for measure, cache, scheme, round_ in plan:
            progress.update(task, description=f"round {round_ + 1}: {measure}, caches {cache}, {scheme}")
            with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as folder:
                yield _one(measure, cache, scheme, round_, Path(folder), arguments.policy)
                if cache == "on":
                    # Once more, in new processes: now every graph is in the cache. `first` comes before `steady`,
                    # whose warm-up pays what a process pays once.
                    for again in ("first", measure):
                        yield _one(again, "hits", scheme, round_, Path(folder), arguments.policy)
            progress.advance(task)


def _one(measure: str, cache: str, scheme: str, round_: int, folder: Path, policy: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    # torch keeps the precompiled header under TMPDIR, not in its cache folder. Both are shared by `on` and `hits` only.
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    environment["TMPDIR"] = str(temporary)
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1" if cache == "off" else "0"
    if scheme == "subprocess":
        environment["TORCHINDUCTOR_FX_COMPILE_MODE"] = "SUBPROCESS"
    out = folder / f"answer-{measure}-{cache}.json"
    task = {"measure": measure, "scheme": scheme, "policy": policy, "out": str(out)}
    run: dict[str, Any] = {
        "measure": measure, "cache": cache, "scheme": scheme, "round": round_, "load": os.getloadavg()[0],
    }  # fmt: skip
    started = time.perf_counter()
    try:
        subprocess.run(
            [sys.executable, "-m", "sandbox.cli.bench_worker", json.dumps(task)],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=_WORKER_SECONDS, check=True, text=True,
        )  # fmt: skip
        run |= json.loads(out.read_text())
    except subprocess.CalledProcessError as problem:
        run |= {"equal": False, "error": f"exit status {problem.returncode}: {(problem.stdout or '')[-2000:]}"}
    except subprocess.TimeoutExpired:
        run |= {"equal": False, "error": f"no answer in {_WORKER_SECONDS:.0f} s"}
    return {**run, "process_seconds": time.perf_counter() - started}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and spread by measure, cache and scheme, and the ratio to NORMAL."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        if "error" not in run:
            groups.setdefault((run["measure"], run["cache"], run["scheme"]), []).append(run)
    rows = []
    for measure, cache, scheme in sorted(groups, key=lambda key: (*key[:2], SCHEMES.index(key[2]))):
        group = groups[measure, cache, scheme]
        totals = [run["total"] for run in group]
        row: dict[str, Any] = {
            "measure": measure,
            "cache": cache,
            "scheme": scheme,
            "runs": len(group),
            "median_seconds": statistics.median(totals),
            "min_seconds": min(totals),
            "max_seconds": max(totals),
            "isolated": statistics.median(run["isolated"] for run in group),
            "cache_hits": statistics.median(run["cache_hits"] for run in group),
            "graphs": {name: statistics.median(run["graphs"][name] for run in group) for name in group[0]["graphs"]},
            "times": {name: statistics.median(run["times"][name] for run in group) for name in group[0]["times"]},
        }
        normal = {run["round"]: run["total"] for run in groups.get((measure, cache, "normal"), [])}
        if normal:
            row["ratio_of_medians"] = row["median_seconds"] / statistics.median(normal.values())
            paired = [run["total"] / normal[run["round"]] for run in group if run["round"] in normal]
            row["ratios_by_round"] = sorted(paired)
        rows.append(row)
    return rows


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
    }


def _print(document: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    table = Table(
        "measure", "caches", "scheme", "median s", "min to max s", "of NORMAL", "by round", "isolated", "hits", "runs"
    )
    before = None
    for row in document["summary"]:
        if before not in (None, (row["measure"], row["cache"])):
            table.add_section()
        before = (row["measure"], row["cache"])
        by_round = row.get("ratios_by_round", [])
        table.add_row(
            row["measure"], row["cache"], row["scheme"],
            f"{row['median_seconds']:.3f}", f"{row['min_seconds']:.3f} to {row['max_seconds']:.3f}",
            f"{row['ratio_of_medians']:.2f}" if "ratio_of_medians" in row else "",
            f"{by_round[0]:.2f} to {by_round[-1]:.2f}" if by_round else "",
            f"{row['isolated']:.0f}", f"{row['cache_hits']:.0f}", str(row["runs"]),
        )  # fmt: skip
    out.print(table)
    for row in document["summary"]:
        if (row["measure"], row["cache"], row["scheme"]) == ("first", "off", "sandbox"):
            times = row["times"]
            out.print(
                f"Not counted above: importing and install() of the sandbox took {times['install']:.2f} s, and its "
                f"forkserver was ready after {times['install_to_ready']:.1f} s (in the background).",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
    host = document["host"]
    loads = [run["load"] for run in document["runs"]]
    out.print(
        f"{host['cores']} cores, torch {host['torch']}, Python {host['python']}; load average over one minute before "
        f"{host['load_before'][0]:.2f}, during {min(loads):.2f} to {max(loads):.2f}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for run in document["runs"]:
        if not run.get("equal", False):
            told = run.get("error", "the result differs from eager")
            print(f"sandbox: {run['measure']}, caches {run['cache']}, {run['scheme']}: {told}", file=sys.stderr)
