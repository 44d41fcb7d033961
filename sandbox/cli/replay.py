"""`sandbox replay`: a crash capsule, run again in a child."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sandbox import capsule
from sandbox.cli.output import FAILED, OK, add_json, add_policy, console, print_json, size, subcommand, user_errors
from sandbox.executor import Sandbox
from sandbox.policy import CapsuleSettings, load
from sandbox.results import JobResult, Status, printable

_HELP = """\
Runs the job of a crash capsule again, in a child, and compares how it ends with how it ended.

Confined as the policy says, with the capsule's limits or the policy's, whichever is less. A capsule from elsewhere
may hold anything: it is validated, its payload is unpickled in the child only, and what the job makes is thrown away.

example:
  sandbox replay ~/.cache/torch-compile-sandbox/capsules/20260131T235959Z-job-0123456789ab

exit codes: 0 the job ended as recorded: same status and, if it crashed, same signal or exit code; 1 it ended otherwise;
2 not a capsule, or no policy.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "replay", "a crash capsule, run again in a child", _HELP)
    parser.add_argument("capsule", metavar="CAPSULE", type=Path, help="the folder")
    add_policy(parser)
    add_json(parser)
    parser.set_defaults(handler=_replay)


def _replay(arguments: argparse.Namespace) -> int:
    with user_errors():
        # A replay that fails, as it should, leaves no capsule of its own.
        policy = load(arguments.policy).model_copy(update={"capsule": CapsuleSettings(keep=0)})
        found = capsule.read(arguments.capsule, policy.limits.payload_bytes)
        job = found.job(policy)
        with Sandbox(policy) as sandbox:
            now = sandbox.submit(job, name=f"replay of {found.spec.job_id}").result()
    reproduced = same(found.outcome, now)
    document = {
        "reproduced": reproduced,
        "kind": job.spec.kind,
        "recorded": {**_facts(found.outcome), "versions": found.about.versions, "policy": found.about.policy},
        "now": {**_facts(now), "versions": capsule.versions(), "policy": policy.name},
        "stack": capsule.stacks(now.stderr_tail),
    }
    if arguments.json:
        print_json(document)
    else:
        _show(document)
    return OK if reproduced else FAILED


def same(recorded: JobResult, now: JobResult) -> bool:
    """Whether a job ended as it did before. Of one that we killed, the signal is our own doing."""
    if recorded.status is not now.status:
        return False
    return now.status is not Status.CRASHED or (recorded.signal, recorded.exit_code) == (now.signal, now.exit_code)


def _facts(result: JobResult) -> dict[str, Any]:
    return {
        "status": result.status.value,
        "detail": printable(result.detail),
        "signal": printable(result.signal) if result.signal else None,
        "exit_code": result.exit_code,
        "wall_seconds": result.usage.wall_seconds,
        "cpu_seconds": result.usage.cpu_seconds,
        "peak_memory_bytes": result.usage.peak_memory_bytes,
        "enforcement": {printable(name, 100): state for name, state in result.enforcement.states().items()},
    }


def _show(document: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    recorded, now = document["recorded"], document["now"]
    table = Table("", "recorded", "now")
    for name in ("status", "detail", "signal", "exit_code", "policy"):
        table.add_row(
            name, *(Text(printable(str(side[name] if side[name] is not None else ""))) for side in (recorded, now))
        )
    table.add_row("wall time", *(f"{side['wall_seconds']:.2f} s" for side in (recorded, now)))
    table.add_row("peak memory", *(size(side["peak_memory_bytes"]) for side in (recorded, now)))
    for name in sorted(set(recorded["versions"]) | set(now["versions"])):
        values = [printable(side["versions"].get(name, "")) for side in (recorded, now)]
        table.add_row(printable(name), *map(Text, values))
    out = console()
    out.print(table)
    for line in document["stack"].splitlines()[:60]:
        out.print(Text(printable(line)))
    out.print("reproduced: it ended as recorded" if document["reproduced"] else "not reproduced: it ended otherwise")
