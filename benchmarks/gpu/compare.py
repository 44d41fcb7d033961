"""Five models on a GPU through `sandbox.install()`, side by side with Inductor's modes NORMAL and SUBPROCESS.

    python -m benchmarks.gpu.compare [--json FILE] [--models gpt2,vit-b16] [--layers 12] [--modes normal,sandbox]

Each mode is a process of its own with empty caches, which compiles a tiny function first, then each model for an
inference and a training step. With the sandbox it is checked that every graph was compiled in a child, none of the
kernels in the service, that no process but the service opened the GPU, that results are those of eager, that only
forkserver and standby children live on, and that nothing is left in /dev/shm. Exit code 1 otherwise.

Needs a CUDA GPU and transformers. `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
#: Of the largest value of a tensor: fp32 with TF32 off, sums in another order.
TOLERANCE: Final = 2e-2
MODES: Final = ("normal", "subprocess", "sandbox")
#: Shorter phases of a compile are left out of the report.
LEAST_SECONDS: Final = 0.05
#: Seconds between two looks at who has the GPU open.
LOOK_SECONDS: Final = 0.25


def worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """One process of one mode: compile everything, tell the times."""
    import torch

    from benchmarks.gpu import models

    torch.backends.cuda.matmul.allow_tf32 = False
    device: str = arguments.device
    report: dict[str, Any] = {"torch": torch.__version__, "rows": [], "service_kernels": count_kernels()}
    if device == "cuda":
        report["gpu"] = torch.cuda.get_device_name()
        (torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)).sum().item()  # context and libraries
    scheme = None
    if arguments.worker == "sandbox":
        import sandbox
        from sandbox.inductor.install import installed

        started = time.monotonic()
        sandbox.install(policy=arguments.policy)
        scheme = installed()
        if scheme is None:
            raise RuntimeError("not installed")
        scheme.sandbox.wait_ready()
        scheme.sandbox.settle(60.0)
        report["ready_seconds"] = time.monotonic() - started

    def timed(name: str, train: bool, module: Any, inputs: Any, run: Any) -> None:
        torch._dynamo.reset()
        before = phases()
        jobs = len(scheme.sandbox.stats().jobs) if scheme is not None else 0
        want = run(module, inputs, train)
        compiled = torch.compile(module)
        synchronize = torch.cuda.synchronize if device == "cuda" else torch.cpu.synchronize
        synchronize()
        started = time.monotonic()
        got = run(compiled, inputs, train)
        synchronize()
        seconds = time.monotonic() - started
        row = {"model": name, "train": train, "seconds": seconds, "difference": models.difference(got, want)}
        print(f"{arguments.worker}: {row}", file=sys.stderr, flush=True)
        row["phases"] = {
            phase: round(total - before.get(phase, 0.0), 3)
            for phase, total in phases().items()
            if total - before.get(phase, 0.0) > LEAST_SECONDS
        }
        if scheme is not None:
            row["jobs"] = [
                {"name": job.name, "step": job.step, "status": job.status, **job.usage.model_dump()}
                for job in scheme.sandbox.stats().jobs[jobs:]
            ]
        report["rows"].append(row)

    def tiny(x: Any) -> Any:
        return (x.sin() + 1).relu()

    timed("tiny", False, tiny, torch.ones(100, device=device), lambda function, x, train: [function(x)])
    for name, module, inputs in models.build(list(filter(None, arguments.models.split(","))), arguments.layers, device):
        for train in (False, True):
            timed(name, train, module, inputs, models.step)
        del module, inputs
    report["alive"] = [process["command"] for process in descendants(os.getpid())]
    report["gpu_apps"] = gpu_apps()
    report["service_kernels"] = list(report["service_kernels"])
    if scheme is not None:
        stats = scheme.sandbox.stats()
        report["stats"] = stats.model_dump(mode="json", exclude={"jobs"})
        report["failed_jobs"] = [(job.name, job.status, job.detail) for job in stats.jobs if job.status != "ok"]
        sandbox.uninstall()
    return report


def phases() -> dict[str, float]:
    """Seconds by phase so far, as Dynamo counts them in this process; phases hold each other."""
    from torch._dynamo.utils import compilation_time_metrics

    return {name: sum(each) for name, each in compilation_time_metrics.items()}


def count_kernels() -> list[str]:
    """A list to which each kernel's name comes that Triton compiles in this process from now on."""
    compiled: list[str] = []
    try:
        from triton.backends.nvidia.compiler import CUDABackend
    except ImportError:
        return compiled
    add_stages = CUDABackend.add_stages

    def noting(self: Any, *args: Any, **kwargs: Any) -> Any:
        compiled.append(str(len(compiled)))
        return add_stages(self, *args, **kwargs)

    CUDABackend.add_stages = noting
    return compiled


def descendants(pid: int) -> list[dict[str, Any]]:
    """Live processes below ``pid``: pid, command, and whether it has the GPU open."""
    import psutil

    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            command = " ".join(process.cmdline())[:80]
            links = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{process.pid}/fd")]
        except (psutil.Error, OSError):
            continue  # it has ended
        gpu = any(link.startswith("/dev/nvidia") for link in links)
        found.append({"pid": process.pid, "command": command, "gpu": gpu})
    return found


def gpu_apps() -> str:
    """Which processes hold the GPU and how much of it, by nvidia-smi."""
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no nvidia-smi"
    return done.stdout.strip() or done.stderr.strip() or "none"


def run(mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One mode in a fresh process with empty caches, watched from outside.

    Raises:
        RuntimeError: it failed.
    """
    holders: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TMPDIR": folder,
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/cache",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
        if mode == "subprocess":
            environment["TORCHINDUCTOR_FX_COMPILE_MODE"] = "SUBPROCESS"
        before = set(os.listdir("/dev/shm"))
        command = [sys.executable, "-m", "benchmarks.gpu.compare", *sys.argv[1:], "--worker", mode]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK_SECONDS):
                holders.update(each["command"] for each in descendants(process.pid) if each["gpu"])

        watcher = threading.Thread(target=watch)
        watcher.start()
        output = process.communicate()[0]
        ended.set()
        watcher.join()
        lines = [line for line in output.splitlines() if line.startswith("REPORT ")]
        if process.returncode or not lines:
            raise RuntimeError(f"{mode}: the process ended with {process.returncode}\n{output}")
        left = sorted(set(os.listdir("/dev/shm")) - before)
    return {**json.loads(lines[-1].removeprefix("REPORT ")), "left": left, "holders": sorted(holders)}


def problems_of(report: dict[str, Any]) -> list[str]:
    """What is not as it must be, of the sandbox."""
    stats = report["stats"]
    found = []
    if stats["graphs"] != stats["in_child"]:
        found.append(f"{stats['graphs']} graphs, {stats['in_child']} in children: {stats['in_process_reasons']}")
    if report["service_kernels"]:
        found.append(f"{len(report['service_kernels'])} Triton kernels were compiled in the service")
    if stats["leaks"]:
        found.append(f"leaks: {stats['leaks']}")
    if report["left"]:
        found.append(f"left in /dev/shm: {report['left']}")
    if report["holders"]:
        found.append(f"had the GPU open besides the service: {report['holders']}")
    return found


def table(reports: dict[str, dict[str, Any]]) -> None:
    """Print seconds by model and mode, and the sandbox's ratio to the first."""
    modes = list(reports)
    print(f"{'model':14} {'step':10} " + " ".join(f"{mode + ' s':>13}" for mode in modes) + "   ratios to the first")
    totals = dict.fromkeys(modes, 0.0)
    for rows in zip(*(reports[mode]["rows"] for mode in modes), strict=True):
        seconds = [row["seconds"] for row in rows]
        if rows[0]["model"] != "tiny":
            totals = {mode: totals[mode] + one for mode, one in zip(modes, seconds, strict=True)}
        kind = "training" if rows[0]["train"] else "inference"
        ratios = " ".join(f"{one / seconds[0]:6.2f}" for one in seconds[1:])
        print(f"{rows[0]['model']:14} {kind:10} " + " ".join(f"{one:13.2f}" for one in seconds) + f"   {ratios}")
    if not totals[modes[0]]:
        return
    ratios = " ".join(f"{totals[mode] / totals[modes[0]]:6.2f}" for mode in modes[1:])
    print(f"{'the models':14} {'total':10} " + " ".join(f"{totals[mode]:13.2f}" for mode in modes) + f"   {ratios}")


def main() -> int:
    """Run the modes, print a table, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the reports here")
    parser.add_argument("--models", default="lennard-jones,gpt2,vit-b16,mixer-b16,bigbird", help="comma-separated")
    parser.add_argument("--layers", type=int, default=12, help="of each model")
    parser.add_argument("--modes", default="normal,subprocess,sandbox", help="comma-separated")
    parser.add_argument("--policy", default="default", help="name or file, for the mode sandbox")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print("REPORT " + json.dumps(worker(arguments)))
        return 0
    reports, problems = {}, []
    for mode in arguments.modes.split(","):
        report = reports[mode] = run(mode, arguments)
        for row in report["rows"]:
            if row["difference"] > TOLERANCE:
                problems.append(f"{mode}: {row['model']} train={row['train']} differs by {row['difference']:.2e}")
        if mode == "sandbox":
            problems += problems_of(report)
        if arguments.json:
            arguments.json.write_text(json.dumps({"reports": reports, "problems": problems}, indent=1))
    first = next(iter(reports.values()))
    print(f"torch {first['torch']}, {first.get('gpu', arguments.device)}, {len(os.sched_getaffinity(0))} cores")
    table(reports)
    for mode, report in reports.items():
        left = report["left"] or "nothing"
        print(f"{mode}: alive at the end: {len(report['alive'])} processes; left in /dev/shm: {left}")
        print(f"{mode}: on the GPU: {report['gpu_apps']}; opened by others than the service: {report['holders']}")
    if "sandbox" in reports:
        stats = reports["sandbox"]["stats"]
        print(f"forkserver and standby ready in {reports['sandbox']['ready_seconds']:.1f} s")
        print(f"graphs {stats['graphs']}, in children {stats['in_child']}, {stats['children_started']} children")
        print(f"alive: {reports['sandbox']['alive']}")
        for job in reports["sandbox"]["failed_jobs"]:
            print(f"not ok: {job}")
    print("\n".join(problems) or "all graphs in children, equal to eager, nothing left")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
