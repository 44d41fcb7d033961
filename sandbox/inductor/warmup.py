"""The template's warm-up: what every child would do first is done once, before the first fork.

    probe      which vector instructions compiler and processor know, several at a time
    build      one sample graph down to its library: it makes the precompiled header
    lower      more samples, whose kernels are generated but not built: lazy imports, tables and caches
    rehearse   in a child that waits for a job: some of it once more, so that the pages are its own by then

`docs/ARCHITECTURE.md` tells how the samples were found.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import torch

from sandbox.inductor import compat, counting, devices, samples
from sandbox.inductor.compile import private_folders, run, settings, threads

#: Probes and kernels side by side, a count at most.
MAX_THREADS: Final = 8
#: Payloads for :func:`rehearse`; empty where the template was not warmed up.
_rehearsed: list[bytes] = []


def warm_up(gpus_hidden: bool = False) -> None:
    """Compile a few small graphs, so that no child repeats the probes, the header and the lazy imports.

    For the template, before its first fork: afterwards this process has the one thread that it had before.
    The folder of the precompiled header stays while this process lives; everything else is removed.

    Args:
        gpus_hidden: whether the service itself sees no GPU, whatever the host has: no child will use one.
    """
    _no_progress_thread()
    before = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    folder = tempfile.mkdtemp(prefix="sandbox-warm-up-")
    cores = min(len(os.sched_getaffinity(0)), MAX_THREADS)
    try:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor")
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        if devices.present() and not gpus_hidden:
            # Lowering asks CUDA here and there, even with the GPUs hidden, and what has asked cannot be forked.
            try:
                _warm_compiler()
            except Exception as error:  # noqa: BLE001 - graphs for the GPU need no C++ compiler
                warnings.warn(f"the C++ compiler could not be warmed up: {error}", stacklevel=2)
        else:
            _probe(cores)
            run(samples.built(), {}, cores)
            _lower()
            _rehearsed[:] = [samples.built()]
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
            for data in _rehearsed:
                if wanted():
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


def _lower() -> None:
    """Lower the other samples. One that a release of PyTorch cannot do leaves its part to the children."""
    with _nothing_built():
        for name, make in samples.lowered():
            try:
                run(make(), {}, 1)
            except Exception as error:  # noqa: BLE001 - slower is better than no forkserver
                warnings.warn(f"the sample graph {name!r} could not be lowered: {error}", stacklevel=2)


@contextlib.contextmanager
def _nothing_built() -> Iterator[None]:
    """Inside the block C++ kernels are generated but not built."""

    def kernel(*_: Any) -> None:
        raise RuntimeError("a kernel of the warm-up was called")

    with compat.replaced(compat.AsyncCompile, "cpp_pybinding", lambda *_: kernel):
        yield


def _forget_kernels() -> None:
    """Kernels of the warm-up are gone from disk; no child may find them in memory."""
    compat.codecache.PyCodeCache.cache_clear()
    for name in ("CppCodeCache", "CppPythonBindingsCodeCache", "CppWrapperCodeCache"):
        getattr(compat.codecache, name).cache_clear()


def _warm_compiler() -> None:
    """Build one C++ kernel: the vector-ISA probe and the precompiled header are what costs most by far."""
    source = """
        #include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(const float* in_ptr0, float* out_ptr0) { out_ptr0[0] = in_ptr0[0]; }
    """
    with private_folders(), threads(1), compat.inductor_config.patch(settings({}, 1)):
        os.makedirs(compat.runtime_cache_dir(), exist_ok=True)
        built = compat.AsyncCompile().cpp_pybinding(["const float*", "float*"], textwrap.dedent(source))
        getattr(built, "result", lambda: None)()
