"""`sandbox doctor`: what is really enforced on this host, found out by trying it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from sandbox.cli.output import (
    FAILED,
    OK,
    add_json,
    add_policy,
    console,
    only_ours_on_stdout,
    print_json,
    size,
    subcommand,
)
from sandbox.errors import SandboxError
from sandbox.limits import Confinement
from sandbox.memory import Memory
from sandbox.policy import Policy, load
from sandbox.results import Enforcement, JobResult, LeakReport, Mechanism, State, Status, printable

_HELP = """\
Tells what is really enforced on this host: it starts a forkserver, runs a small job in a confined child, and shows
that child's own report, beside the facts of the host that matter.

With --leaks it looks instead for what earlier runs of this user that were killed have left: scratch folders, processes,
shared memory, semaphores, half copies in the caches of Inductor and Triton. It looks in $TMPDIR, /proc, /dev/shm and
the caches, and removes nothing unless --remove is given. What a live run owns is never touched, nor is what only may be
ours: that is listed apart.

examples:
  sandbox doctor --policy production
  sandbox doctor --leaks --remove

exit codes: 0 the host gives what the policy requires; 1 it does not (one sentence for each thing that is missing);
2 no such policy, or no temporary folder. With --leaks: 0 nothing of ours is left; 1 something is, or could not be
removed
"""
#: Seconds for the forkserver without torch and the small job, together.
_CHILD_SECONDS = 60.0
#: Seconds for `g++ --version`.
_TOOL_SECONDS = 20.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "doctor", "what is really enforced on this host", _HELP)
    add_policy(parser)
    add_json(parser)
    parser.add_argument("--leaks", action="store_true", help="look for what runs that were killed have left behind")
    parser.add_argument("--remove", action="store_true", help="with --leaks: remove what is provably ours")
    parser.set_defaults(handler=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.remove and not arguments.leaks:
        raise SandboxError("--remove needs --leaks")
    if arguments.leaks:
        return _leaks(arguments.remove, arguments.json)
    from sandbox import enforce

    try:
        tempfile.gettempdir()
    except FileNotFoundError as problem:  # torch and dill look for it as soon as they are imported
        raise SandboxError(f"{problem.strerror}: set TMPDIR to a folder that can be written") from None
    policy = load(arguments.policy)
    with only_ours_on_stdout():
        host = host_facts()
        problems, warnings = _judge_host(host)
        mechanisms: dict[str, Mechanism] = {}
        try:
            mechanisms |= enforce.probe(policy.confinement).mechanisms
        except SandboxError as problem:
            problems.append(str(problem))
        result = _small_job(policy)
        # A child's own word counts more than that of the probe.
        mechanisms |= result.enforcement.mechanisms
        if not result.ok:
            problems.append(f"A small job in a child ended with {result.status.value}: {result.detail}")
    budget = budget_of(policy)
    problems += [budget["problem"]] if budget["problem"] else []
    missing, partial = judge(policy.confinement, Enforcement(mechanisms=mechanisms))
    problems += missing
    warnings += partial
    report = {
        "ok": not problems,
        "policy": policy.name,
        "enforcement": {name: mechanism.state.value for name, mechanism in sorted(mechanisms.items())},
        "reasons": {name: mechanism.reason for name, mechanism in sorted(mechanisms.items()) if mechanism.reason},
        "demands": policy.confinement.demands(),
        "host": host,
        "budget": budget,
        "child": {"status": result.status.value, "usage": result.usage.model_dump()},
        "problems": problems,
        "warnings": warnings,
    }
    if arguments.json:
        print_json(report)
    else:
        _print(report, result)
    return FAILED if problems else OK


def _leaks(remove: bool, as_json: bool) -> int:
    from sandbox import leftovers

    with only_ours_on_stdout():
        found = leftovers.find(_caches())
        rows = [
            {"kind": each.kind, "object": each.object, "proof": each.proof, "problem": each.remove() if remove else ""}
            for each in found
        ]
        perhaps = leftovers.unproven()
    remaining = [row for row in rows if not remove or row["problem"]]
    if as_json:
        print_json({"ok": not remaining, "removed": remove, "found": rows, "unproven": perhaps})
        return FAILED if remaining else OK
    for row in rows:
        done = "left alone" if not remove else f"not removed: {row['problem']}" if row["problem"] else "removed"
        print(printable(f"{row['kind']} {row['object']}: {done} ({row['proof']})"))
    for text in perhaps:
        print(f"perhaps ours, never touched: {text}")
    print(f"{len(rows)} left by runs that were killed, {len(rows) - len(remaining)} removed")
    return FAILED if remaining else OK


def _caches() -> set[Path]:
    """The folders that kernel files are copied into; with both variables set, torch need not be asked."""
    named = [os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")]
    if all(named):
        return {Path(name) for name in named if name}
    try:
        from sandbox.inductor.scheme import cache_folders
    except ImportError:
        return {Path(name) for name in named if name}  # without torch nothing was compiled into the others
    return set(cache_folders().values())


def judge(confinement: Confinement, enforcement: Enforcement) -> tuple[list[str], list[str]]:
    """Sentences about what is required and missing; and about what is required and there in part, or preferred and not
    there, or in part."""
    missing, partial = [], []
    for name, demand in confinement.demands().items():
        found = enforcement.mechanisms.get(name)
        if demand == "prefer" and found is not None and found.state in (State.UNAVAILABLE, State.PARTIAL):
            how = "is unavailable here" if found.state is State.UNAVAILABLE else "is enforced only in part"
            partial.append(f"The policy prefers {name}, which {how}: {_why(found)}.")
        if demand != "require":
            continue
        if found is None:
            missing.append(f"The policy requires {name}, and neither child nor probe told of it.")
        elif found.state in (State.UNAVAILABLE, State.OFF):
            missing.append(f"The policy requires {name}, which is {found.state.value} here: {_why(found)}.")
        elif found.state is State.PARTIAL:
            partial.append(f"The policy requires {name}, which is enforced only in part: {_why(found)}.")
    return missing, partial


def _why(mechanism: Mechanism) -> str:
    return mechanism.reason.rstrip(".") or "no reason was given"


def _small_job(policy: Policy) -> JobResult:
    """A child under the policy's limits. What is required is only preferred here, so that all of it is tried."""
    from sandbox import Sandbox, callable_job

    confinement = policy.confinement.softened()
    # Confinement does not depend on what the forkserver holds, and without torch it starts in 0.2 s. Whether there is
    # memory for it is told at once.
    light = policy.model_copy(
        update={
            "forkserver": policy.forkserver.model_copy(update={"import_torch": False, "preload": ()}),
            "memory": policy.memory.model_copy(update={"wait_seconds": 0.0}),
        }
    )
    with Sandbox(light) as runner:
        job = callable_job(os.getpid, limits=policy.limits, confinement=confinement, environment=runner.environment())
        try:
            return runner.submit(job, name="doctor").result(_CHILD_SECONDS)
        except FutureTimeoutError:
            detail = f"no answer in {_CHILD_SECONDS:.0f} s"
            leaks = LeakReport(job_id=job.spec.job_id)
            return JobResult(job_id=job.spec.job_id, status=Status.SANDBOX_ERROR, detail=detail, leaks=leaks)


def budget_of(policy: Policy, memory: Memory | None = None) -> dict[str, Any]:
    """What jobs of the policy may take now, in bytes, which bound says so, and how many of them fit side by side."""
    from sandbox.executor import usable_cores

    bounds = (memory or Memory()).bounds()
    tightest = min(bounds, key=lambda bound: bound.bytes, default=None)
    settings, limit, slots = policy.memory, policy.limits.memory_bytes, policy.parallel_jobs or usable_cores()
    left = limit * slots if tightest is None else max(0, tightest.bytes - settings.reserve_bytes)
    least = min(limit, settings.min_bytes)
    # The last one may get less than its limit.
    fit = left // limit + (left % limit >= least)
    problem = ""
    if tightest is not None and not fit:
        problem = (
            f"No job of this policy would be started now: it needs {least} bytes of memory, and {tightest.source} has "
            f"{tightest.bytes} free, of which memory.reserve_bytes keeps {settings.reserve_bytes}."
        )
    return {
        "free_bytes": tightest.bytes if tightest is not None else None,
        "bound": tightest.source if tightest is not None else "unknown: every job gets its limit",
        "bounds": {bound.source: bound.bytes for bound in bounds},
        "reserve_bytes": settings.reserve_bytes,
        "job_bytes": min(limit, left),
        "job_limit_bytes": limit,
        "jobs_that_fit": min(fit, slots),
        "parallel_jobs": slots,
        "problem": problem,
    }


def host_facts() -> dict[str, Any]:
    """What matters of the host, as plain data."""
    import psutil

    from sandbox.executor import usable_cores

    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return {
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "root": os.geteuid() == 0,
        "user_namespaces": _user_namespaces(),
        "cgroup": "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1 or none",
        "cores": usable_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "memory_available_bytes": psutil.virtual_memory().available,
        "dev_shm_bytes": shm.total if shm else 0,
        "dev_shm_free_bytes": shm.free if shm else 0,
        "compiler": _compiler(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "private_names_of_torch": _private_names(),
    }


def _judge_host(host: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Problems and warnings that follow from the host's facts."""
    problems, warnings = [], []
    if host["private_names_of_torch"] != "all found":
        problems.append(str(host["private_names_of_torch"]))
    if not host["compiler"]:
        warnings.append("There is no C++ compiler (set CXX, or install g++): torch.compile needs one for CPU graphs.")
    if host["triton"] is None:
        warnings.append("Triton is not installed: no GPU kernels can be compiled.")
    return problems, warnings


def _user_namespaces() -> str:
    try:
        allowed = int(Path("/proc/sys/user/max_user_namespaces").read_text())
    except (OSError, ValueError):
        return "unknown"
    return f"{allowed} allowed"


def _compiler() -> str | None:
    """First line of the C++ compiler's version, or None."""
    name = os.environ.get("CXX") or "g++"
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=_TOOL_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0] or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _private_names() -> str:
    """Whether this PyTorch has all private names that the package builds on. Imports torch."""
    from sandbox.inductor import compat

    try:
        compat.check()
    except SandboxError as problem:
        return str(problem)
    except ImportError as problem:
        return f"PyTorch cannot be imported: {problem}"
    return "all found"


def _print(report: dict[str, Any], result: JobResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    facts = Table("host", "", title="This host", title_justify="left")
    for name, value in report["host"].items():
        shown = size(value) if name.endswith("_bytes") else "none" if value is None else str(value)
        facts.add_row(name.removesuffix("_bytes").replace("_", " "), shown)
    out.print(facts)
    colour = {"enforced": "green", "partial": "yellow", "unavailable": "red", "off": "dim"}
    table = Table("mechanism", "policy", "state", "why", title="What confines a child", title_justify="left")
    for name, demand in report["demands"].items():
        state = report["enforcement"].get(name, "unavailable")
        table.add_row(name, demand, f"[{colour[state]}]{state}[/]", report["reasons"].get(name, ""))
    out.print(table)
    budget = report["budget"]
    table = Table("memory for jobs", "", title="The memory budget", title_justify="left")
    for source, free in budget["bounds"].items():
        table.add_row(escape(f"free of {source}"), size(free))
    table.add_row("the bound that applies", escape(budget["bound"]))
    table.add_row("kept for the service", size(budget["reserve_bytes"]))
    table.add_row("a job gets now", f"{size(budget['job_bytes'])} of {size(budget['job_limit_bytes'])}")
    table.add_row("jobs that fit side by side", f"{budget['jobs_that_fit']} of {budget['parallel_jobs']}")
    out.print(table)
    usage = result.usage
    out.print(
        f"A small job in a child: {result.status.value}, {usage.wall_seconds * 1000:.0f} ms, "
        f"of which {usage.start_seconds * 1000:.0f} ms until it ran."
    )
    sys.stdout.flush()
    for warning in report["warnings"]:
        print(f"sandbox: warning: {warning}", file=sys.stderr)
    for problem in report["problems"]:
        print(f"sandbox: {problem}", file=sys.stderr)
    if report["ok"]:
        out.print(f"This host gives all that the policy {report['policy']!r} requires.")
