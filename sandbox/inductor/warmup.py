"""The template's warm-up: what every child would do first is done once, before the first fork.

    probe      which vector instructions compiler and processor know, several at a time
    build      one sample graph down to its library: it makes the precompiled header
    lower      more samples, whose kernels are generated but not built: lazy imports, tables and caches
    gpu        on a host with a GPU: one more graph down to its Triton kernels, and the samples once more, for a card
               that was recorded; no driver is asked
    rehearse   in a child that waits for a job: some of it once more, so that the pages are its own by then

`docs/ARCHITECTURE.md` tells how the samples were found.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from sandbox.gpus import Gpus, recorded
from sandbox.inductor import compat, counting, devices, samples, snapshot
from sandbox.inductor.compile import run

#: Probes and kernels side by side, a count at most.
MAX_THREADS: Final = 8
#: The card that graphs for a GPU are lowered for, whichever there are here: what is warmed up is Inductor and Triton.
CARD: Final = "cuda:90"
#: Payloads for :func:`rehearse`, and the GPUs that they are for; empty where the template was not warmed up.
_rehearsed: list[tuple[bytes, Gpus | None]] = []


def prepare(warm: bool, gpus_hidden: bool) -> None:
    """Import what compiles use, and :func:`warm_up` if ``warm``. For the template, before its first fork.

    Args:
        gpus_hidden: whether the service itself sees no GPU, whatever the host has: no child will compile for one.

    Raises:
        IncompatibleTorchError: this PyTorch lacks private names in use.
    """
    # What asks CUDA, even with the GPUs hidden, cannot be forked; some of Inductor's modules do when they are imported.
    with snapshot.absent():
        compat.check()  # imports all that a compile uses
    if warm:
        warm_up(devices.present() and not gpus_hidden)


def warm_up(gpu: bool = False) -> None:
    """Compile a few small graphs, so that no child repeats the probes, the header and the lazy imports.

    For the template, before its first fork: afterwards this process has the one thread that it had before.
    The folder of the precompiled header stays while this process lives; everything else is removed.

    Args:
        gpu: whether children will compile for GPUs.
    """
    _no_progress_thread()
    before = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    folder = tempfile.mkdtemp(prefix="sandbox-warm-up-")
    cores = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        with snapshot.absent():
            _probe(cores)
            run(samples.built(), {}, cores)
            _lower("cpu")
            _rehearsed[:] = [(samples.built(), None)]
        if gpu:
            _warm_gpu()
        counting.reset()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _forget_kernels()
        for entry in os.listdir(os.path.join(folder, "inductor")) if os.path.isdir(folder + "/inductor") else []:
            if entry != "precompiled_headers":
                shutil.rmtree(os.path.join(folder, "inductor", entry), ignore_errors=True)


def rehearse(wanted: Callable[[], bool]) -> None:
    """In a standby child: lower small graphs. A fork copies each page that it writes to for the first time, also
    those of objects that it only counts a reference to: this has it done before there is a job to wait for it.

    Args:
        wanted: asked before each graph whether there is still time.
    """
    before = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    folder = tempfile.mkdtemp(prefix="rehearsal-")
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        with _nothing_built(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for data, gpus in _rehearsed:
                if wanted():
                    with snapshot.of(gpus):
                        run(data, {}, 1)
    finally:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        _forget_kernels()
        counting.reset()
        shutil.rmtree(folder, ignore_errors=True)


def _no_progress_thread() -> None:
    """tqdm starts a thread that watches progress bars, which a process that forks must not have."""
    tqdm = getattr(torch.hub, "tqdm", None)
    if tqdm is not None and hasattr(tqdm, "monitor_interval"):
        tqdm.monitor_interval = 0


def _probe(cores: int) -> None:
    """Ask for each set of vector instructions that the processor has whether the compiler can use it.

    Inductor asks one after the other when it needs the answer, and remembers it; each takes a g++ of some seconds.
    """
    if platform.machine() != "x86_64" or not (compat.has("vec_isas") and compat.has("x86_flags")):
        return
    flags = compat.x86_flags()
    candidates = [isa for isa in compat.vec_isas if all(flag in flags for flag in str(isa).split())]
    os.makedirs(compat.runtime_cache_dir(), exist_ok=True)
    with ThreadPoolExecutor(cores, thread_name_prefix="probe") as pool:
        list(pool.map(bool, candidates))


def _lower(device: str) -> None:
    """Lower the other samples. One that a release of PyTorch cannot do leaves its part to the children."""
    with _nothing_built():
        for name, make in samples.lowered(device):
            try:
                run(make(), {}, 1)
            except Exception as error:  # noqa: BLE001 - slower is better than no forkserver
                warnings.warn(f"the sample graph {name!r} could not be lowered for {device}: {error}", stacklevel=2)


def _warm_gpu() -> None:
    gpus = recorded(CARD)
    if gpus is None:
        raise RuntimeError(f"no snapshot of a GPU was recorded for {CARD}")
    try:
        with snapshot.answering(gpus):
            sample = samples.built("cuda")
            run(sample, {}, 1)
            _lower("cuda")
    except Exception as error:  # noqa: BLE001 - no Triton, or another one: graphs for the CPU need none
        warnings.warn(f"nothing was warmed up for GPUs: {type(error).__name__}: {error}", stacklevel=2)
    else:
        _rehearsed.append((sample, gpus))


@contextlib.contextmanager
def _nothing_built() -> Iterator[None]:
    """Inside the block kernels are generated but not built."""

    def kernel(*_: Any) -> None:
        raise RuntimeError("a kernel of the warm-up was called")

    def built(*_: Any, **__: Any) -> Callable[..., None]:
        return kernel

    with (
        compat.replaced(compat.AsyncCompile, "cpp_pybinding", built),
        compat.replaced(compat.AsyncCompile, "triton", built),
    ):
        yield


def _forget_kernels() -> None:
    """Kernels of the warm-up are gone from disk; no child may find them in memory."""
    compat.codecache.PyCodeCache.cache_clear()
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache"):
        getattr(compat.codecache, name).cache_clear()
