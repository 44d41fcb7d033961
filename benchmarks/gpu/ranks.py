"""A server starts: it holds CUDA and runs threads, its ranks do too, and each installs the sandbox and compiles.

    python -m benchmarks.gpu.ranks [--ranks 4] [--mode sandbox|normal] [--json FILE]

The ranks share the GPUs of this machine. All are in one gloo group; ranks on different GPUs are in NCCL groups (two
GPUs, four ranks: {0, 1} and {2, 3}). Each compiles: a tensor-parallel MLP with functional collectives, DTensor, a DDP
training step, and a GPT-2 of two layers for inference. Results are compared with eager's. Exit code 1 if something
differs, a graph was not compiled in a child, something is left, or a rank has not ended within `--seconds`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.multiprocessing

from benchmarks.gpu import models
from benchmarks.gpu.compare import TOLERANCE, count_kernels, descendants

Cases = dict[str, Callable[[], float]]


class Perceptron(torch.nn.Module):  # type: ignore[misc]
    """A class of its own: under DDP, Dynamo passes over the frames of `torch.nn`'s."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(32, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(x)))
        return result


def busy(device: torch.device, ended: threading.Event) -> list[threading.Thread]:
    """Threads as a server has them: some compute, one uses the GPU."""

    def compute() -> None:
        while not ended.wait(0.01):
            sum(range(1000))

    def on_device() -> None:
        x = torch.ones(64, device=device)
        while not ended.wait(0.01):
            (x * 2).sum().item()

    threads = [threading.Thread(target=each, daemon=True) for each in (compute, compute, on_device)]
    for thread in threads:
        thread.start()
    return threads


def cases(rank: int, device: torch.device, group: Any, mesh_ranks: list[int]) -> Cases:
    """What a rank compiles: a name, and a function that returns the largest difference from eager."""
    size = len(mesh_ranks)

    def compared(function: Callable[..., Any], *inputs: Any) -> float:
        want = function(*inputs)
        got = torch.compile(function)(*inputs)
        return models.difference([got], [want])

    def functional() -> float:
        torch.manual_seed(rank)
        up, down = torch.randn(64, 32, device=device), torch.randn(32, 64, device=device)

        def mlp(x: torch.Tensor) -> torch.Tensor:
            return collectives.all_reduce((x @ up).relu() @ down, "sum", group) * 0.5

        return compared(mlp, torch.ones(8, 64, device=device))

    def gathered() -> float:
        def both(x: torch.Tensor) -> torch.Tensor:
            every = collectives.all_gather_tensor(x.sin(), 0, group)
            return collectives.reduce_scatter_tensor(every * 2, "sum", 0, group)

        return compared(both, torch.full((4, 8), float(rank), device=device))

    def dtensor() -> float:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Shard, distribute_tensor

        mesh = DeviceMesh.from_group(group, device.type, mesh_ranks)
        torch.manual_seed(0)
        weight = distribute_tensor(torch.randn(16 * size, 8, device=device), mesh, [Shard(0)])

        def function(x: torch.Tensor) -> torch.Tensor:
            return ((weight * 2).relu() + x).sum(0).full_tensor()

        local = distribute_tensor(torch.ones(16 * size, 8, device=device), mesh, [Shard(0)])
        return compared(function, local)

    def ddp() -> float:
        torch.manual_seed(0)
        module = Perceptron().to(device)
        ids = [device.index] if device.type == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel(module, device_ids=ids, process_group=group)
        inputs = torch.randn(16, 32, device=device)
        want = models.step(parallel, inputs, True)
        return models.difference(models.step(torch.compile(parallel), inputs, True), want)

    def gpt2() -> float:
        ((_, module, tokens),) = models.build(["gpt2"], 2, str(device))
        want = models.step(module, tokens, False)
        return models.difference(models.step(torch.compile(module), tokens, False), want)

    return {"collectives": functional, "gather and scatter": gathered, "DTensor": dtensor, "DDP": ddp, "gpt2": gpt2}


def work(rank: int, arguments: argparse.Namespace, folder: str) -> None:
    """One rank. Its report goes to a file."""
    faulthandler.dump_traceback_later(arguments.seconds - 10, exit=True)
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    device = torch.device("cuda", rank % gpus) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/cache-{rank}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.ranks)
    width = max(1, min(gpus or arguments.ranks, arguments.ranks))
    groups = [list(range(first, min(first + width, arguments.ranks))) for first in range(0, arguments.ranks, width)]
    made = [dist.new_group(ranks, backend="nccl" if gpus else "gloo") for ranks in groups]
    group, ranks = next((one, ranks) for one, ranks in zip(made, groups, strict=True) if rank in ranks)
    ended = threading.Event()
    threads = busy(device, ended)
    (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).sum().item()
    dist.all_reduce(torch.ones(1, device=device), group=group)  # NCCL's own threads and memory
    kernels, report = count_kernels(), {"rank": rank, "threads": 0}
    started = time.monotonic()
    if arguments.mode == "sandbox":
        import sandbox

        sandbox.install()
    report["threads"] = len(os.listdir("/proc/self/task"))
    rows = {}
    compiled = torch._dynamo.utils.counters["stats"]
    for name, function in cases(rank, device, group, ranks).items():
        torch._dynamo.reset()
        begun = time.monotonic()
        difference, seconds = function(), round(time.monotonic() - begun, 2)
        rows[name] = {"difference": difference, "seconds": seconds, "graphs": compiled["unique_graphs"]}
    report |= {"rows": rows, "seconds": time.monotonic() - started, "kernels": len(kernels)}
    dist.barrier()
    report["below"] = descendants(os.getpid())
    if arguments.mode == "sandbox":
        stats = sandbox.stats()
        report["stats"] = stats.model_dump(mode="json", exclude={"jobs"})
        report["failed"] = [(job.name, job.status, job.detail[:300]) for job in stats.jobs if job.status != "ok"]
        sandbox.uninstall()
    ended.set()
    for thread in threads:
        thread.join()
    dist.barrier()
    dist.destroy_process_group()
    report["after"] = descendants(os.getpid())
    Path(folder, f"report-{rank}").write_text(json.dumps(report))
    faulthandler.cancel_dump_traceback_later()


def main() -> int:
    """Start the ranks, print what became of each, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mode", choices=["sandbox", "normal"], default="sandbox")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=240.0, help="that a rank may take")
    parser.add_argument("--json", type=Path, help="write the reports here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    ended = threading.Event()
    threads = busy(device, ended)
    before = set(os.listdir("/dev/shm"))
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(work, (arguments, folder), nprocs=arguments.ranks, join=False)
        deadline = time.monotonic() + arguments.seconds
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() > deadline:
                    problems.append("a rank has not ended in time")
                    break
        except Exception as error:  # noqa: BLE001 - told below
            problems.append(f"a rank failed: {error}"[-3000:])
        for process in context.processes:
            process.kill()
            process.join()
        reports = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("report-*"))]
    ended.set()
    for thread in threads:
        thread.join()
    for report in reports:
        rank, stats = report["rank"], report.get("stats", {})
        print(f"rank {rank}: {report['threads']} threads when it installed; {report['seconds']:.1f} s in all")
        for name, row in report["rows"].items():
            print(f"  {name:20} {row['seconds']:6.2f} s, differs by {row['difference']:.1e}")
            if row["difference"] > TOLERANCE or not row["graphs"]:
                problems.append(f"rank {rank}: {name} differs by {row['difference']:.1e}, {row['graphs']} graphs")
        if stats:
            print(f"  graphs {stats['graphs']}, in children {stats['in_child']}, leaks {stats['leaks'] or 'none'}")
            if stats["graphs"] != stats["in_child"] or stats["leaks"] or report["kernels"] or report["after"]:
                why = f"{stats['in_process_reasons']} {stats['leaks']} {report['kernels']} kernels, {report['after']}"
                problems.append(f"rank {rank}: {why} {report['failed']}")
            if any(each["gpu"] for each in report["below"]):
                problems.append(f"rank {rank}: a child has the GPU open")
    if left := sorted(set(os.listdir("/dev/shm")) - before):
        problems.append(f"left in /dev/shm: {left}")
    if len(reports) < arguments.ranks:
        problems.append(f"{arguments.ranks - len(reports)} ranks have not reported")
    if arguments.json:
        arguments.json.write_text(json.dumps({"reports": reports, "problems": problems}, indent=1))
    print("\n".join(problems) or f"{len(reports)} ranks: all as it must be")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
