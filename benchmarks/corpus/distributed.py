"""Functional collectives, DTensor, DDP and FSDP over gloo in two processes: NORMAL and the sandbox, side by side.

python -m benchmarks.corpus.distributed

Each process has a sandbox of its own. Prints a line for each case; ends with 1 if a result differs, or a graph that
NORMAL compiles was not compiled in a child.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

WORLD = 2
#: How long a process waits for the other, which may still compile, in seconds.
PATIENCE = 600
Compile = Callable[..., Any]


def cases(rank: int) -> dict[str, Callable[[Compile], Any]]:
    """What is compiled, by name."""
    import torch.distributed._functional_collectives as collectives
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    everywhere = [Replicate()]
    torch.manual_seed(0)
    x, weight = torch.randn(4, 4), torch.randn(4, 4)
    shards, copies = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh, everywhere)

    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4))

    def reduce(x: torch.Tensor) -> Any:
        summed = collectives.all_reduce(x.sin(), "sum", dist.group.WORLD)
        gathered = collectives.all_gather_tensor(summed * 2, 0, dist.group.WORLD)
        return summed + 1, gathered, collectives.reduce_scatter_tensor(gathered, "sum", 0, dist.group.WORLD)

    def overlapped(compile: Compile) -> Any:
        with torch._inductor.config.patch(reorder_for_compute_comm_overlap=True):
            return compile(reduce)(x + rank)

    def redistributed(x: torch.Tensor) -> torch.Tensor:
        made = DTensor.from_local(x.sin(), mesh, [Shard(0)], run_check=False)
        return made.redistribute(mesh, everywhere).to_local() + 1

    def training(compile: Compile) -> Any:
        one, two = (value.detach().clone().requires_grad_() for value in (shards, copies))
        compile(lambda x, w: (x @ w).sin().sum())(one, two).redistribute(mesh, everywhere).to_local().backward()
        return one.grad, two.grad

    def step(model: Any) -> Any:
        model(x + rank).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    return {
        "functional_collectives": lambda compile: compile(reduce)(x + rank),
        "collectives_overlapped": overlapped,
        "dtensor": lambda compile: compile(lambda x, w: torch.relu(x @ w).sum(0))(shards, copies),
        "dtensor_redistribute": lambda compile: compile(redistributed)(x),
        "dtensor_training": training,
        "data_parallel": lambda compile: step(torch.nn.parallel.DistributedDataParallel(compile(model()))),
        "fully_sharded": lambda compile: step(fully_shard(torch.nn.Sequential(*map(compile, model())), mesh=mesh)),
    }


def plain(value: Any) -> Any:
    """A tensor of this process, whatever it is wrapped in."""
    value = value.to_local() if hasattr(value, "to_local") else value
    return (value.wait() if hasattr(value, "wait") else value).detach()


def work(rank: int) -> int:
    """One process. Returns how many cases failed."""
    import sandbox
    from sandbox.inductor.install import installed

    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    sandbox.install()
    scheme = installed()
    if scheme is None:
        raise RuntimeError("the sandbox is not installed")
    failed = 0
    caches_off = (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    )
    with caches_off[0], caches_off[1]:
        for name, run in cases(rank).items():
            results, counts = [], []
            for mode in ("normal", "subprocess"):
                torch._dynamo.reset()
                scheme.mode = mode
                before = scheme.sandbox.stats()
                results.append([plain(leaf) for leaf in pytree.tree_leaves(run(torch.compile))])
                after = scheme.sandbox.stats()
                counts.append((after.graphs - before.graphs, after.in_child - before.in_child))
            equal = all(torch.equal(one, two) for one, two in zip(*results, strict=True))
            good = equal and counts[0][0] == counts[1][0] == counts[1][1] > 0
            failed += not good
            words = "" if good else f" {'equal' if equal else 'DIFFERENT'} {sandbox.stats().in_process_reasons}"
            print(f"{rank} {name}: {counts[1][1]} of {counts[0][0]} graphs in a child{words}", flush=True)
    sandbox.uninstall()
    dist.destroy_process_group()
    return failed


def main() -> int:
    """Start both processes and wait for them."""
    if len(sys.argv) > 1:
        return 1 if work(int(sys.argv[1])) else 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.corpus.distributed", str(rank)],
            env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(WORLD)
    ]
    return max(process.wait() for process in processes)


if __name__ == "__main__":
    sys.exit(main())
