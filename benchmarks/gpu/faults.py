"""Faults while GPT-2 is compiled for a GPU: each is answered, the answer equals eager's, and nothing is left.

    python -m benchmarks.gpu.faults [--layers 12] [--json FILE]

SIGSEGV, SIGSTOP, a memory hog, a ptxas that hangs, a killed forkserver. A row tells what became of the children, who
gave the answer, its difference from eager, the seconds, and what is left: processes but forkserver and standby
children, descriptors, names in /dev/shm, processes that have the GPU open. First, jobs that may use the GPU themselves
break it: an illegal access, a kernel that never ends, too much of its memory. Exit code 1 if a row is not as it must
be.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import torch

import sandbox
from benchmarks.gpu import models
from benchmarks.gpu.compare import TOLERANCE, descendants
from sandbox import faults
from sandbox.inductor.install import installed
from sandbox.inductor.scheme import Scheme
from sandbox.jobs import Job

#: Seconds that ends of children and new standby children get before what is left is counted.
SETTLE_SECONDS: Final = 60.0
#: Of each child: a compile of GPT-2 takes less by far.
WALL_SECONDS: Final = 15.0
#: CPU seconds that a child has used when it counts as in the middle of its compile.
BUSY_SECONDS: Final = 0.3


@contextlib.contextmanager
def killed_forkserver(scheme: Scheme) -> Iterator[None]:
    """Inside the block, the forkserver is killed as soon as one of its children is in the middle of a compile."""
    pid = scheme.sandbox.forkserver_pid
    if pid is None:
        raise RuntimeError("there is no forkserver")
    forkserver, done = psutil.Process(pid), threading.Event()
    begun = {child.pid: sum(child.cpu_times()[:2]) for child in forkserver.children(recursive=True)}

    def watch() -> None:
        while not done.wait(0.02):
            for child in forkserver.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if sum(child.cpu_times()[:2]) - begun.get(child.pid, 0.0) > BUSY_SECONDS:
                        forkserver.send_signal(signal.SIGKILL)
                        return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


@contextlib.contextmanager
def hanging_ptxas(folder: str) -> Iterator[None]:
    """Inside the block, Triton is told of a ptxas that tells its version and else never ends."""
    from triton.knobs import nvidia

    script = Path(folder, "ptxas")
    script.write_text(f'#!/bin/sh\ncase "$*" in *--version*) exec {nvidia.ptxas.path} --version;; esac\nsleep 3600\n')
    script.chmod(0o755)
    before = os.environ.get("TRITON_PTXAS_PATH")
    os.environ["TRITON_PTXAS_PATH"] = str(script)
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_PTXAS_PATH"]
        else:
            os.environ["TRITON_PTXAS_PATH"] = before


def _launched(body: str) -> None:
    """In a child that may use the GPU: one thread of a CUDA kernel, and the wait for it."""
    source = f'extern "C" __global__ void kernel(int* data) {{ {body} }}'
    kernel = torch.cuda._compile_kernel(source, "kernel")
    kernel(grid=(1, 1, 1), block=(1, 1, 1), args=[torch.zeros(1, dtype=torch.int32, device="cuda")])
    torch.cuda.synchronize()


def illegal_access() -> None:
    _launched("data[1ll << 40] = 1;")


def endless_kernel() -> None:
    _launched("while (*(volatile int*)data == 0) {}")


def gpu_memory_hog() -> None:
    held = []
    while True:
        held.append(torch.zeros(1 << 28, dtype=torch.uint8, device="cuda"))
        torch.cuda.synchronize()
        time.sleep(0.02)


#: Jobs that may use the GPU themselves, as those that tune do, and how each must end.
ON_THE_GPU: Final = {illegal_access: "compile_error", endless_kernel: "timeout", gpu_memory_hog: "memory_limit"}


def on_the_gpu(scheme: Scheme) -> list[dict[str, Any]]:
    """What such a job does costs only itself: this process computes on."""
    rows = []
    for function, status in ON_THE_GPU.items():
        job = sandbox.callable_job(function, limits=sandbox.Limits(wall_seconds=15.0, gpu_memory_bytes=4 << 30))
        job = Job(job.spec.model_copy(update={"gpu": True}), job.payload)
        result = scheme.sandbox.submit(job).result()
        right = float((torch.ones(1000, device="cuda") * 2).sum()) == 2000.0
        rows.append(
            {
                "case": function.__name__,
                "status": result.status.value,
                "expected": status,
                "detail": result.detail[:200],
                "gpu_memory": result.usage.peak_gpu_memory_bytes,
                "watched": str(result.enforcement.mechanisms.get("gpu_memory")),
                "seconds": round(result.usage.wall_seconds, 2),
                "leaks": result.leaks.counts(),
                "service_computes": right,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def held() -> dict[str, Any]:
    """What this process and the host hold: counts and names."""
    return {
        "fds": len(os.listdir("/proc/self/fd")),
        "shm": sorted(os.listdir("/dev/shm")),
        "processes": len(descendants(os.getpid())),
    }


def main() -> int:
    """Run the cases, print a row each, return the exit code."""
    with contextlib.ExitStack() as stack:
        return run(stack)


def run(stack: contextlib.ExitStack) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", default="", help="cases, by name, comma-separated")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp"))  # of a compiler, which jobs may read
    sandbox.install(
        policy=sandbox.Policy(
            name="gpu-faults",
            allow_faults=True,
            limits=sandbox.Limits(wall_seconds=WALL_SECONDS),
            confinement=sandbox.Confinement(read=(folder,)),
        )
    )
    scheme = installed()
    if scheme is None:
        raise RuntimeError("not installed")
    ((_, module, tokens),) = models.build(["gpt2"], arguments.layers, arguments.device)
    cases: dict[str, Any] = {
        "none": contextlib.nullcontext,
        "sigsegv once": lambda: faults.inject("sigsegv", at="child.run", times=1),
        "sigsegv always": lambda: faults.inject("sigsegv", at="child.run"),
        "sigstop once": lambda: faults.inject("sigstop", at="child.run", times=1),
        "memory hog once": lambda: faults.inject("oom_slow", at="child.run", times=1),
        "ptxas hangs": lambda: hanging_ptxas(folder),
        "forkserver killed": lambda: killed_forkserver(scheme),
    }
    rows, wrong = [], []
    if arguments.device == "cuda":
        for row in on_the_gpu(scheme):
            rows.append(row)
            if row["status"] != row["expected"] or row["leaks"] or not row["service_computes"]:
                wrong.append(row["case"])
    torch._inductor.config.force_disable_caches = True
    for number, (name, broken) in enumerate(cases.items()):
        if arguments.only and name not in arguments.only.split(","):
            continue
        scheme.sandbox.wait_ready()
        scheme.sandbox.settle(SETTLE_SECONDS)
        torch._dynamo.reset()
        inputs = tokens[:, : 128 + 8 * number].contiguous()  # a graph of its own: no quarantine knows it
        want = models.step(module, inputs, True)
        before, holds, started = scheme.sandbox.stats(), held(), time.monotonic()
        with broken():
            got = models.step(torch.compile(module), inputs, True)
        seconds = time.monotonic() - started
        after = scheme.sandbox.stats()
        scheme.sandbox.wait_ready()
        scheme.sandbox.settle(SETTLE_SECONDS)
        left = {key: [value, held()[key]] for key, value in holds.items() if held()[key] != value}
        row = {
            "case": name,
            "children": [job.status for job in after.jobs if job not in before.jobs],
            "in_child": after.in_child - before.in_child,
            "eager": after.eager - before.eager,
            "in_process": after.in_process - before.in_process,
            "restarts": after.forkserver_restarts - before.forkserver_restarts,
            "difference": models.difference(got, want),
            "seconds": round(seconds, 2),
            "left": left,
            "gpu_open": [each["command"] for each in descendants(os.getpid()) if each["gpu"]],
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        hit = not number or row["restarts"] or set(row["children"]) != {"ok"}
        if row["difference"] > TOLERANCE or left or row["gpu_open"] or row["in_process"] or not hit:
            wrong.append(name)
    sandbox.uninstall()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    print(f"{len(rows)} cases; not as they must be: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
