"""`sandbox demo`: real models through torch.compile, every graph in a child, every result compared with eager."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sandbox.cli.output import (
    FAILED,
    OK,
    add_json,
    add_mode,
    add_policy,
    checked_mode,
    console,
    only_ours_on_stdout,
    print_json,
    size,
    subcommand,
)
from sandbox.errors import SandboxError
from sandbox.policy import Policy, load
from sandbox.report import JobRow, Stats

if TYPE_CHECKING:
    from sandbox.cli.check import Comparison

_HELP = """\
Compiles real models through torch.compile, each for inference and for a training step, every graph in a confined
child of a warm forkserver, and compares each result with eager: a Llama, a GPT-2, a convolutional net, a model with
dropout, one with torch.cond, and a Triton kernel to cubin (no GPU needed). Nothing is downloaded.

It uses the normal Inductor cache: what is found there starts no child, so a second run has less to do.

examples:
  sandbox demo
  sandbox demo --only conv --only triton
  sandbox demo --all --json > demo.json       # also BigBird and Reformer

exit codes: 0 all results equal eager, every graph compiled in a child, nothing left behind; 1 not so, the output says
what; 2 bad input
"""
#: What `--only` takes; told here so that a wrong one is refused before torch is imported; a test compares.
NAMES: Final = ("llama", "gpt2", "conv", "dropout", "cond", "triton", "bigbird", "reformer")
_NEED_TRANSFORMERS: Final = {"llama", "gpt2", "bigbird", "reformer"}
#: Seconds for the Triton job, which waits for the forkserver's start.
_TRITON_SECONDS: Final = 300.0

#: One model in one phase, run and compared.
Check: TypeAlias = "Callable[[], list[Comparison]]"


@dataclass
class Outcome:
    """What became of one model in one phase."""

    model: str
    phase: str
    equal: bool = False
    max_difference: float = 0.0
    seconds: float = 0.0
    children: int = 0
    cache_hits: int = 0
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def label(self) -> str:
        """For tables."""
        return f"{self.model} {self.phase}"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subcommand(commands, "demo", "real models, every graph compiled in a child, compared with eager", _HELP)
    add_policy(parser)
    add_mode(parser)
    add_json(parser)
    parser.add_argument("--all", action="store_true", help="also BigBird and Reformer, whose graphs are many")
    parser.add_argument(
        "--only", metavar="NAME", action="append", choices=NAMES, help=f"only this one; repeatable: {', '.join(NAMES)}"
    )
    parser.set_defaults(handler=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    policy, mode = load(arguments.policy), checked_mode(arguments.mode)
    wanted = set(arguments.only or NAMES if arguments.all or arguments.only else NAMES[:6])
    if wanted & _NEED_TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        raise SandboxError(
            "the demo's language models need transformers: pip install 'torch-compile-sandbox[demo]', "
            "or choose others, for example --only conv"
        )
    started = time.monotonic()
    with only_ours_on_stdout():
        outcomes, stats, labels = _work(policy, mode, wanted)
    problems = judge(outcomes, stats)
    document = {
        **stats.model_dump(mode="json", exclude={"jobs"}),
        "cache_hits": sum(outcome.cache_hits for outcome in outcomes),
        "seconds": round(time.monotonic() - started, 3),
        "results": [asdict(outcome) for outcome in outcomes],
        "jobs": [{**row.model_dump(mode="json"), "of": labels.get(row.job_id, "")} for row in stats.jobs],
        "problems": problems,
        "ok": not problems,
    }
    if arguments.json:
        print_json(document)
    else:
        _print(outcomes, stats, labels, document)
    return FAILED if problems else OK


def judge(outcomes: list[Outcome], stats: Stats) -> list[str]:
    """One sentence for each thing that is not as it must be."""
    problems = []
    for outcome in outcomes:
        if outcome.error:
            problems.append(f"{outcome.label}: {outcome.error}")
        elif not outcome.equal:
            faults = (
                f"{entry['compared_with']}: {entry['detail']}" for entry in outcome.comparisons if entry["detail"]
            )
            told = "; ".join(faults)
            problems.append(f"{outcome.label}: the result differs ({told}; at most {outcome.max_difference:.3g})")
        elif stats.mode == "subprocess" and not outcome.children and not outcome.cache_hits:
            problems.append(f"{outcome.label}: nothing was compiled in a child, and nothing came from the cache")
    # Graphs found in Inductor's cache never reach the sandbox; all that do must go to a child.
    if stats.mode == "subprocess" and stats.graphs != stats.in_child:
        problems.append(
            f"of {stats.graphs} graphs only {stats.in_child} were compiled in a child: {stats.in_process} in this "
            f"process ({', '.join(stats.in_process_reasons) or 'no reason'}), {stats.eager} run uncompiled, "
            f"{stats.raised} raised"
        )
    if stats.leaks:
        problems.append("left behind: " + ", ".join(f"{count} {kind}" for kind, count in sorted(stats.leaks.items())))
    return problems


def _work(policy: Policy, mode: str, wanted: set[str]) -> tuple[list[Outcome], Stats, dict[str, str]]:
    """Run all; returns the outcomes, the counts, and which model a job was for."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console(stderr=True)) as progress:
        task = progress.add_task("importing torch", total=None)
        from sandbox.inductor.install import install, installed, uninstall

        install(policy, mode)
        scheme = installed()
        if scheme is None:
            raise SandboxError("the sandbox was uninstalled")
        runner = scheme.sandbox
        try:
            plan = _plan(wanted, lambda: _triton(runner))
            progress.update(task, total=len(plan))
            outcomes: list[Outcome] = []
            labels: dict[str, str] = {}
            for outcome, action in plan:
                progress.update(task, description=f"{outcome.label} ({len(labels)} children so far)")
                _try(outcome, action)
                new = [row for row in runner.stats().jobs if row.job_id not in labels]
                labels.update((row.job_id, outcome.label) for row in new)
                outcome.children = len(new)
                outcomes.append(outcome)
                _tell(progress.console.print, outcome)
                progress.advance(task)
        finally:
            uninstall()
    return outcomes, runner.stats(), labels


def _plan(wanted: set[str], triton: Check) -> list[tuple[Outcome, Check]]:
    from functools import partial

    from sandbox.cli.check import check_inference, check_training
    from sandbox.cli.models import MODELS

    plan: list[tuple[Outcome, Check]] = []
    for model in MODELS:
        if model.name in wanted:
            plan.append((Outcome(model.name, "inference"), partial(check_inference, model)))
            if model.trains:
                plan.append((Outcome(model.name, "training"), partial(check_training, model)))
    if "triton" in wanted:
        # It needs no warm template of models: first or last is the same, and last keeps the order of the documents.
        plan.append((Outcome("triton", "to cubin"), triton))
    return plan


def _try(outcome: Outcome, action: Check) -> None:
    started, hits = time.monotonic(), _cache_hits()
    try:
        comparisons = action()
    except Exception as problem:  # noqa: BLE001 - one model that fails is a row of the table, not the end of the demo
        outcome.error = f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:300]}"
    else:
        outcome.comparisons = [asdict(comparison) for comparison in comparisons]
        outcome.equal = all(comparison.equal for comparison in comparisons)
        outcome.max_difference = max(comparison.max_difference for comparison in comparisons)
    outcome.seconds = round(time.monotonic() - started, 3)
    outcome.cache_hits = _cache_hits() - hits


def _cache_hits() -> int:
    """Graphs that Inductor found in its cache so far, a count."""
    from sandbox.inductor import compat

    return int(compat.counters["inductor"]["fxgraph_cache_hit"])


def _triton(runner: Any) -> list[Comparison]:
    """A Triton kernel to cubin, in a child. It cannot run without a GPU: its parts are looked at instead."""
    from sandbox.cli import models
    from sandbox.cli.check import Comparison
    from sandbox.triton.kernel import job

    policy: Policy = runner.policy
    work = job(
        models.TRITON_SOURCE,
        models.TRITON_FUNCTION,
        models.TRITON_SIGNATURE,
        constants=models.TRITON_CONSTANTS,
        target=models.TRITON_TARGET,
        limits=policy.limits,
        confinement=policy.confinement,
        environment=runner.environment(),
    )
    result = runner.submit(work, name=f"{models.TRITON_FUNCTION} for {models.TRITON_TARGET}").result(_TRITON_SECONDS)
    if not result.ok:
        raise SandboxError(f"{result.status.value}: {result.detail}")
    stages = result.value["stages"]
    faults = []
    if not bytes(stages.get("cubin", b"")).startswith(b"\x7fELF"):
        faults.append("the cubin is no ELF file")
    if ".target sm_90" not in stages.get("ptx", ""):
        faults.append("the PTX is not for sm_90")
    return [Comparison("a cubin (ELF) and PTX for sm_90", not faults, 0.0, "; ".join(faults))]


def _tell(write: Callable[..., None], outcome: Outcome) -> None:
    """One line as soon as a model is done."""
    word = "[red]failed[/]" if outcome.error else "[green]equal[/]" if outcome.equal else "[red]differs[/]"
    cached = f", {outcome.cache_hits} graphs from the cache" if outcome.cache_hits else ""
    write(f"{outcome.label}: {word}, {outcome.children} children{cached}, {outcome.seconds:.1f} s", highlight=False)


def _print(outcomes: list[Outcome], stats: Stats, labels: dict[str, str], document: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table(
        "model", "graph", "outcome", "wall s", "CPU s", "peak", "start ms", "queue ms", "leaks", "enforced",
        title="Jobs: one child each", title_justify="left",
    )  # fmt: skip
    for row in stats.jobs:
        usage = row.usage
        table.add_row(
            labels.get(row.job_id, ""), escape(row.name + ("" if row.step == "first" else f" ({row.step})")),
            f"[green]{row.status}[/]" if row.status == "ok" else f"[red]{row.status}[/]",
            f"{usage.wall_seconds:.2f}", f"{usage.cpu_seconds:.2f}", size(usage.peak_memory_bytes),
            f"{usage.start_seconds * 1000:.0f}", f"{usage.queue_seconds * 1000:.0f}", str(row.leaks), _enforced(row),
        )  # fmt: skip
    out.print(table)
    table = Table(
        "model", "result", "compared with", "largest difference", "from the cache",
        title="Results", title_justify="left",
    )  # fmt: skip
    for outcome in outcomes:
        table.add_row(
            outcome.label,
            "[red]failed[/]" if outcome.error else "[green]equal[/]" if outcome.equal else "[red]differs[/]",
            ", ".join(entry["compared_with"] for entry in outcome.comparisons),
            f"{outcome.max_difference:.2g}",
            str(outcome.cache_hits),
        )
    out.print(table)
    states: dict[str, list[str]] = {}
    for mechanism, state in stats.enforcement.items():
        states.setdefault(state, []).append(mechanism)
    for state, mechanisms in states.items():
        out.print(f"{state}: {', '.join(mechanisms)}", highlight=False)
    out.print(
        f"graphs {stats.graphs}, in_child {stats.in_child}, in_process {stats.in_process}, eager {stats.eager}, "
        f"leaks {sum(stats.leaks.values())}; {document['cache_hits']} graphs from the cache; "
        f"{stats.children_started} children started; forkserver ready in {stats.forkserver_seconds:.1f} s, "
        f"restarted {stats.forkserver_restarts} times; {document['seconds']:.0f} s in all",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    for problem in document["problems"]:
        out.print(f"[red]not ok[/]: {escape(problem)}", highlight=False, soft_wrap=True)
    if document["ok"]:
        out.print("[green]All as it must be.[/]")


def _enforced(row: JobRow) -> str:
    """`7 of 7`, or what is not enforced."""
    total = len(row.enforcement)
    lacking = [f"{name} {state}" for name, state in row.enforcement.items() if state != "enforced"]
    return f"{total - len(lacking)} of {total}" + (f" ({', '.join(lacking)})" if lacking else "")
