"""What real crashes leave, found and removed; and a live run of the same user, which is not touched."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import HERE, MARK, eventually, light_policy

import sandbox
from sandbox import artifacts, leftovers, processes, reclaim, scratch
from sandbox.cli import main
from sandbox.enforce import cgroups

#: A host with one job under way that holds a semaphore, SysV memory, and a program that it has started.
HOST = """
import os, sys
sys.path[:0] = {path!r}
import sandbox
from conftest import light_policy
from sandbox.limits import Confinement
def work(name):
    import ctypes, _multiprocessing, subprocess, time
    kept = _multiprocessing.SemLock(1, 1, 1, "/" + name, False)
    segment = ctypes.CDLL(None).shmget(0, 4096, 0o1600)
    other = subprocess.Popen(["sleep", "120"])
    print("working", segment, flush=True)
    time.sleep(120)
shared = Confinement(mount_namespace="off", ipc_namespace="off", pid_namespace="off", landlock="off", seccomp="off")
with sandbox.Sandbox(light_policy(confinement=shared)) as box:
    box.wait_ready()
    future = box.submit(sandbox.callable_job(work, {name!r}))
    print(box.forkserver_pid, box._forkserver.root.path, flush=True)
    future.result()
"""


@dataclass(frozen=True)
class Crashed:
    """A run of which host, template and keeper were killed at once."""

    root: Path
    semaphore: Path


def _live(root: Path) -> list[int]:
    """Live processes with their home or temporary folder in ``root``."""
    found = []
    for pid in processes.numbers_in("/proc"):
        stat = processes.read_stat(pid)
        with contextlib.suppress(PermissionError):
            environment = processes.read_file(f"/proc/{pid}/environ") or b""
            if stat is not None and not stat.dead and str(root).encode() in environment:
                found.append(pid)
    return found


def _recorded(root: Path) -> dict[str, list[object]]:
    for path in root.glob("job-*.held"):
        return dict(json.loads(path.read_text()))
    return {"none": []}


@pytest.fixture
def crashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crashed]:
    """Its temporary folder is that of this process, too, as for two runs of one service."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    semaphore = Path(f"/dev/shm/sem.{name}")
    search = [str(HERE), str(HERE.parent), MARK, *(entry for entry in sys.path if "site-packages" in entry)]
    program = textwrap.dedent(HOST).format(path=search, name=name)
    host = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert host.stdout is not None
        template, root = host.stdout.readline().split()
        # The keeper has looked at the job, and has recorded what it holds.
        assert eventually(lambda: all(_recorded(Path(root)).values()), 30)
        below = processes.descendants(int(template))
        keepers = [process.pid for process in below if process.ppid == int(template)]
        assert len(keepers) == 1 and len(below) >= 3
        for pid in (host.pid, int(template), *keepers):
            os.kill(pid, signal.SIGSTOP)  # so that none sees another die
        for pid in (host.pid, int(template), *keepers):
            os.kill(pid, signal.SIGKILL)
        host.wait(30)
        yield Crashed(Path(root), semaphore)
    finally:
        host.kill()
        host.wait(30)
        host.stdout.close()  # type: ignore[union-attr]
        for pid in _live(Path(root)):
            os.kill(pid, signal.SIGKILL)
        semaphore.unlink(missing_ok=True)
        cgroups.sweep(cgroups.group_names(Path(root)))
        scratch.remove(Path(root))


def _doctor(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, object]]:
    status = main(["doctor", "--leaks", "--json", *options])
    return status, json.loads(capsys.readouterr().out)


def test_what_a_crash_has_left_is_found_and_removed_and_a_live_run_is_not_touched(
    crashed: Crashed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setattr(leftovers, "sweep", lambda: None)  # a new sandbox would tidy up first
    half = scratch.LockedFolder(tmp_path, artifacts.MAKING)
    with sandbox.Sandbox(light_policy()) as alive:
        alive.wait_ready()
        os.makedirs(tmp_path / "cache")
        making = scratch.LockedFolder(tmp_path / "cache", artifacts.MAKING)
        dead = tmp_path / "cache" / f"{artifacts.MAKING}dead"
        dead.mkdir()
        (dead / "lock").touch()
        (dead / "0").write_text("half a kernel")
        status, report = _doctor(capsys)
        assert status == 1 and report["ok"] is False
        kinds = [row["kind"] for row in report["found"]]  # type: ignore[attr-defined,index]
        # A cgroup only where one is delegated.
        assert set(kinds) - {"cgroup"} == {"process", "shared_object", "adoption", "scratch_root"}
        told = json.dumps(report["found"])
        assert str(crashed.semaphore) in told and "SysV shared memory" in told and str(crashed.root) in told
        assert str(alive._forkserver.root.path) not in told and str(making.path) not in told
        assert f"pid {alive.forkserver_pid} " not in told
        assert crashed.root.exists() and crashed.semaphore.exists() and dead.exists(), "only told"
        assert _live(crashed.root), "the program that the job has started lives"

        status, report = _doctor(capsys, "--remove")
        assert status == 0 and report["ok"] is True, report
        assert not crashed.root.exists() and not crashed.semaphore.exists() and not dead.exists()
        assert not _live(crashed.root)
        assert alive._forkserver.root.path.exists() and making.path.exists()
        assert alive.submit(sandbox.callable_job(os.getpid)).result(30).ok
        assert alive._forkserver.restarts == 0

        status, report = _doctor(capsys)
        assert (status, report["found"]) == (0, [])
        making.remove()
    half.remove()


def test_for_people_each_line_says_what_why_and_what_became_of_it(
    crashed: Crashed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    assert main(["doctor", "--leaks"]) == 1
    out = capsys.readouterr().out
    assert f"scratch_root {crashed.root}: left alone (the lock of its process is held by nobody)" in out
    assert ", 0 removed" in out
    assert main(["doctor", "--leaks", "--remove"]) == 0
    out = capsys.readouterr().out
    assert f"shared_object {crashed.semaphore}: removed (recorded by a keeper in " in out


def test_the_next_run_tidies_up_by_itself(crashed: Crashed) -> None:
    with sandbox.Sandbox(light_policy()):
        assert not crashed.root.exists() and not crashed.semaphore.exists()
        assert not _live(crashed.root)


def test_what_a_live_process_uses_is_not_removed(crashed: Crashed) -> None:
    for pid in _live(crashed.root):
        os.kill(pid, signal.SIGKILL)
    with crashed.semaphore.open():
        found = [each for each in leftovers.find() if each.object == str(crashed.semaphore)]
        assert [each.remove() for each in found] == ["a live process holds it"]
        assert crashed.semaphore.exists()
        (root,) = [each for each in leftovers.find() if each.kind == "scratch_root"]
        assert root.remove() == "it holds the only proof of objects that are still used"
        assert crashed.root.exists()
    assert [each.remove() for each in found] == [""]
    assert not crashed.semaphore.exists()


def test_what_is_not_proven_is_told_and_never_touched(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    name = Path(f"/dev/shm/sandbox-test-{uuid.uuid4().hex[:8]}")
    name.write_text("whose?")
    try:
        assert any(str(name) in text for text in leftovers.unproven())
        with name.open():
            assert not any(str(name) in text for text in leftovers.unproven())
        assert not any(str(name) in each.object for each in leftovers.find((tmp_path,)))
        assert name.exists()
    finally:
        name.unlink()


def test_a_record_that_makes_no_sense_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "job.held"
    for text in ("", "{", "[]", '{"posix": 3, "sysv": []}', '{"posix": [["x", 1]], "sysv": []}'):
        path.write_text(text)
        assert reclaim.recorded(path) == ()


def test_remove_needs_leaks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--remove"])
    assert raised.value.code == 2
    assert "--remove needs --leaks" in capsys.readouterr().err


def test_a_killed_keeper_leaves_nothing_in_shared_namespaces() -> None:
    from sandbox.limits import Confinement

    def work(name: str) -> None:
        import _multiprocessing  # type: ignore[import-not-found]
        import time

        kept = _multiprocessing.SemLock(1, 1, 1, f"/{name}", False)
        time.sleep(60)
        del kept

    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    shared = Confinement(mount_namespace="off", ipc_namespace="off", pid_namespace="off", landlock="off", seccomp="off")
    with sandbox.Sandbox(light_policy(confinement=shared)) as box:
        box.wait_ready()
        future = box.submit(sandbox.callable_job(work, name))
        root = box._forkserver.root.path
        assert eventually(lambda: any(True for _ in root.glob("job-*.held")), 30)
        template = box.forkserver_pid
        assert template is not None
        (keeper,) = [each for each in processes.descendants(template) if each.ppid == template]
        os.kill(keeper.pid, signal.SIGKILL)
        done = future.result(30)
        assert done.status is sandbox.Status.CRASHED
        assert done.leaks.counts() == {"posix_semaphore": 1} and done.leaks.leaks[0].reclaimed
        assert not os.path.exists(f"/dev/shm/sem.{name}") and not list(root.glob("*.held"))
