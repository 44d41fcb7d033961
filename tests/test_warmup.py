"""The template's warm-up: every sample graph can be lowered, and nothing of it stays in the way of a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

#: In a process of its own: the answers of the probe, which are taken for granted here, stay in it.
PROGRAM = """
import os, warnings
import torch
from sandbox.inductor import compat, compile, samples, warmup

warnings.simplefilter("error", UserWarning)
warmup._no_progress_thread()
before_is_available = torch.cuda.is_available()
seen = []
def run(data, overrides, threads):
    value = compile.run(data, overrides, threads)
    seen.append(len(value["kernels"]))
    return value
warmup.run = run
with compat.inductor_config.patch({"cpp.vec_isa_ok": True}):
    warmup._lower("cpu")
assert len(seen) == len(list(samples.lowered())), seen
warmup._warm_gpu()
assert len(seen) == 2 * len(list(samples.lowered())) + 1, seen
assert torch.cuda.is_available() is before_is_available is False
assert not any(seen), f"kernels were built: {seen}"
assert len(os.listdir("/proc/self/task")) == 1, "a thread is left"

def files():
    return sorted(os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]))

before, known = files(), len(seen)
(_, gpus), = warmup._rehearsed
assert gpus is not None, "a graph for a GPU is not rehearsed"
warmup._rehearsed[:] = [(samples.built(), None), (samples.built(), None)]
answers = [True, False]
warmup.rehearse(lambda: answers.pop(0))
assert len(seen) == known + 1 and seen[-1] == 0, "one graph, while there was time, and nothing built"
assert files() == before, "a rehearsal leaves files that would pass for the job's"

samples.lowered = lambda device: [("broken", lambda: 1 / 0)]
try:
    warmup._lower("cpu")
except UserWarning as warning:
    print(warning)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_sample_is_lowered_and_no_thread_stays(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TMPDIR": str(tmp_path)}
    single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | single, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'broken' could not be lowered for cpu: division by zero" in done.stdout


@pytest.mark.parametrize(
    ("present", "hidden", "gpu"), [(False, False, False), (True, False, True), (True, True, False)]
)
def test_graphs_for_gpus_are_warmed_where_there_are_some(
    present: bool, hidden: bool, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandbox.inductor import warmup

    done: list[str] = []
    monkeypatch.setattr(warmup.devices, "present", lambda: present)
    for name in ("_probe", "_lower", "_warm_gpu", "run"):
        monkeypatch.setattr(warmup, name, lambda *_, name=name: done.append(name))
    monkeypatch.setattr(warmup.samples, "built", lambda: b"")
    warmup.prepare(True, hidden)
    assert done == ["_probe", "run", "_lower", *(["_warm_gpu"] if gpu else [])]
