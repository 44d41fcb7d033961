"""The kernel holds a job to its limits: with a cgroup that is really there, and no watchdog to help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually, light_policy

import sandbox
from sandbox.enforce import cgroups
from sandbox.enforce.cgroups import Group, NotDelegated, Place, find
from sandbox.limits import MIB, Confinement, Limits
from sandbox.policy import ForkserverSettings
from sandbox.processes import descendants
from sandbox.results import JobResult, State, Status

#: So that only the cgroup can be what stops a job.
ALONE = {"watchdog": "off", "rlimits": "off", "seccomp": "off"}
LIMITS = Limits(wall_seconds=60.0, memory_bytes=128 * MIB, threads=40, processes=1000)


@pytest.fixture
def places() -> tuple[Place, ...]:
    """Where this user may make cgroups; skips where that is nowhere."""
    try:
        found = find()
    except NotDelegated as problem:
        pytest.skip(f"no cgroup is delegated here: {problem}")
    if not all(any(name in place.controllers for place in found) for name in cgroups.NEEDED):
        pytest.skip(f"not both memory and pids are delegated here: {found}")
    return found


def run(box: sandbox.Sandbox, function: Callable[[], object], limits: Limits = LIMITS, **demands: str) -> JobResult:
    confinement = Confinement(**{"cgroup": "require", **ALONE, **demands})  # type: ignore[arg-type]
    return box.submit(sandbox.callable_job(function, limits=limits, confinement=confinement)).result(100)


def ours(places: tuple[Place, ...], names: str) -> list[str]:
    return [str(path) for place in places for path in Path(place.folder).glob(names)]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("process_ids", ["require", "off"])
def test_memory_beyond_the_limit_ends_the_job(
    light: sandbox.Sandbox, places: tuple[Place, ...], process_ids: str
) -> None:
    def hog() -> None:
        kept = []
        while True:
            kept.append(bytearray(os.urandom(4096)) * 256)

    result = run(light, hog, pid_namespace=process_ids)
    assert result.status is Status.MEMORY_LIMIT, result
    assert "cgroup" in result.detail and "limits.memory_bytes" in result.detail
    assert eventually(lambda: not ours(places, f"{light._forkserver.root.path.name}.*"))


@pytest.mark.usefixtures("nothing_left")
def test_memory_of_the_whole_tree_counts_and_nobody_waits_for_the_dead(
    light: sandbox.Sandbox, places: tuple[Place, ...]
) -> None:
    """No process is over the limit alone. In v1 the kernel kills one of them, and the others would sleep on."""

    def several() -> None:
        for _ in range(6):
            if os.fork() == 0:
                kept = bytearray(os.urandom(4096)) * (8 * 1024)
                time.sleep(90)
                os._exit(len(kept) & 0)
        time.sleep(90)

    result = run(light, several)
    assert result.status is Status.MEMORY_LIMIT, result
    assert result.usage.wall_seconds < LIMITS.wall_seconds


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", ["fork", "thread"])
def test_a_bomb_stops_at_the_limit(light: sandbox.Sandbox, places: tuple[Place, ...], kind: str) -> None:
    def bomb() -> None:
        import threading

        for _ in range(1000):
            if kind == "thread":
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            elif os.fork() == 0:
                time.sleep(60)
                os._exit(0)

    result = run(light, bomb)
    assert result.status is Status.VIOLATION, result
    assert "limits.threads" in result.detail


@pytest.mark.usefixtures("nothing_left")
def test_every_process_of_the_job_is_in_it_and_the_peak_is_told(
    light: sandbox.Sandbox, places: tuple[Place, ...]
) -> None:
    def look() -> tuple[str, str]:
        import subprocess

        kept = bytearray(os.urandom(4096)) * (8 * 1024)
        code = "print(open('/proc/self/cgroup').read())"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        del kept
        with open("/proc/self/cgroup") as file:
            return file.read(), other.stdout

    result = run(light, look)
    assert result.status is Status.OK, result
    name = f"{light._forkserver.root.path.name}.{result.job_id}"
    assert all(text.count(name) == len(places) for text in result.value), (places, result.value)
    assert result.enforcement.states()["cgroup"] == "enforced"
    if any((Path(place.folder) / "memory.max_usage_in_bytes").exists() for place in places):
        assert result.usage.peak_memory_bytes >= 32 * MIB


def test_settings_are_those_of_the_limits(places: tuple[Place, ...]) -> None:
    group = Group(name := f"sandbox-test-{os.getpid()}", places, Limits(memory_bytes=200 * MIB, threads=77, cores=0.5))
    try:
        for folder, place in group.folders:
            v2 = place.version == "v2"

            def read(file: str, folder: str = folder) -> str:
                return Path(folder, file).read_text().strip()

            if "memory" in place.controllers:
                assert int(read("memory.max" if v2 else "memory.limit_in_bytes")) == 200 * MIB
                assert not v2 or read("memory.oom.group") == "1"
            if "pids" in place.controllers:
                assert read("pids.max") == "78"
            if "cpu" in place.controllers:
                assert read("cpu.max" if v2 else "cpu.cfs_quota_us").split()[0] == "50000"
    finally:
        group.close()
        group.remove()
    assert eventually(lambda: not ours(places, name))


def test_left_overs_are_killed_and_removed(places: tuple[Place, ...]) -> None:
    group = Group(f"sandbox-test-{os.getpid()}.job-1", places, Limits())
    other = Group(f"sandbox-test-{os.getpid()}0.job-1", places, Limits())
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        group.join()
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read, 1)
        for folder, _ in group.folders:
            os.mkdir(f"{folder}/made-by-the-job")
        # The dead must be collected before their cgroup can go; a service has init for that.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        found = cgroups.sweep(cgroups.group_names(Path(f"/x/sandbox-test-{os.getpid()}")))
        assert found == len(places)
        assert eventually(lambda: not ours(places, f"sandbox-test-{os.getpid()}.*"))
        assert ours(places, f"sandbox-test-{os.getpid()}0.*"), "another root's stay"
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in (group, other):
            each.close()
            each.remove()
        os.close(read)
        os.close(write)


def test_what_a_killed_keeper_has_left_is_removed(light: sandbox.Sandbox, places: tuple[Place, ...]) -> None:
    names = f"{light._forkserver.root.path.name}.*"
    job = light.submit(sandbox.callable_job(time.sleep, 60, confinement=Confinement(cgroup="require")))

    def joined() -> bool:
        return sum(bool(Path(folder, "cgroup.procs").read_text()) for folder in ours(places, names)) == len(places)

    assert eventually(joined, 30)
    for process in descendants(light.forkserver_pid or 0):
        if process.ppid == light.forkserver_pid:
            os.kill(process.pid, signal.SIGKILL)
    assert job.result(30).status in (Status.CRASHED, Status.SANDBOX_ERROR)
    assert eventually(lambda: not ours(places, names))


def test_what_a_killed_service_has_left_is_removed(places: tuple[Place, ...]) -> None:
    program = """
        import sys, time
        import sandbox
        from sandbox.policy import ForkserverSettings, Policy
        box = sandbox.Sandbox(Policy(forkserver=ForkserverSettings(import_torch=False)))
        box.submit(sandbox.callable_job(time.sleep, 60))
        print(box._forkserver.root.path.name, flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as service:
        assert service.stdout is not None
        names = f"{service.stdout.readline().strip()}.*"
        try:
            assert eventually(lambda: len(ours(places, names)) == len(places), 30)
        finally:
            service.kill()
    assert eventually(lambda: not ours(places, names), 10)


@pytest.fixture
def cannot_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sandbox.Sandbox]:
    """A host that lets a cgroup be made but not be entered, as a v2 delegation that begins too low."""
    (tmp_path / "no_joining.py").write_text(
        "from sandbox.enforce.cgroups import Group\n"
        "def join(self):\n"
        "    raise PermissionError(13, 'Permission denied')\n"
        "Group.join = join\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    settings = ForkserverSettings(import_torch=False, preload=("faultpoints", "no_joining"), standby=0)
    with sandbox.Sandbox(light_policy(forkserver=settings)) as box:
        yield box


def test_one_that_cannot_be_joined_is_told(cannot_join: sandbox.Sandbox, places: tuple[Place, ...]) -> None:
    result = run(cannot_join, os.getpid, cgroup="prefer")
    assert result.status is Status.OK
    found = result.enforcement.mechanisms["cgroup"]
    assert found.state is State.UNAVAILABLE and "cannot be joined" in found.reason
    refused = run(cannot_join, os.getpid, cgroup="require")
    assert refused.status is Status.SANDBOX_ERROR and "cgroup" in refused.detail
    assert eventually(lambda: not ours(places, f"{cannot_join._forkserver.root.path.name}.*"))


def test_off_makes_none(light: sandbox.Sandbox) -> None:
    def own() -> str:
        with open("/proc/self/cgroup") as file:
            return file.read()

    result = run(light, own, cgroup="off")
    assert light._forkserver.root.path.name not in result.value
    assert result.enforcement.states()["cgroup"] == "off"


def test_a_parent_that_is_none_is_told(light: sandbox.Sandbox) -> None:
    result = run(light, os.getpid, cgroup="prefer", cgroup_parent="/tmp")
    assert "cgroup_parent = '/tmp' is no cgroup" in result.enforcement.mechanisms["cgroup"].reason
    assert result.status is Status.OK


# Where a place is looked for, on hosts that are not this one: files in a folder stand for the kernel's.


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A host of cgroup v2, mounted at the returned folder; this process is in the cgroup ``own``."""

    def make(own: str, root: str = "/") -> Path:
        files = {
            "/proc/self/cgroup": f"0::{own}\n",
            "/proc/self/mountinfo": f"24 1 0:22 / /proc rw - proc proc rw\n"
            f"31 23 0:28 {root} {tmp_path} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        }
        read = cgroups._read
        monkeypatch.setattr(cgroups, "_read", lambda path: files[path] if path in files else read(path))
        return tmp_path

    return make


def cgroup(folder: Path, enabled: str = "cpu memory pids", **limits: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "cgroup.controllers": "cpu io memory pids",
        "cgroup.subtree_control": enabled,
        "cgroup.procs": "",
        "memory.max": "max",
        "pids.max": "max",
        "cpu.max": "max 100000",
    }
    for name, text in {**files, **{name.replace("_", "."): text for name, text in limits.items()}}.items():
        (folder / name).write_text(text)


def busy(monkeypatch: pytest.MonkeyPatch, *folders: Path) -> None:
    """Cgroups that hold processes take no controllers for their children."""
    write = cgroups._write

    def refuse(path: str, text: str) -> None:
        if path.endswith("subtree_control") and Path(path).parent in folders:
            raise OSError(16, "Device or resource busy")
        write(path, text)

    monkeypatch.setattr(cgroups, "_write", refuse)


def test_the_nearest_cgroup_above_that_is_delegated(host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    top = host("/user/app/service")
    for name in ("", "user", "user/app"):
        cgroup(top / name)
    cgroup(top / "user/app/service", enabled="")
    busy(monkeypatch, top / "user/app/service")
    assert find() == (Place(str(top / "user/app"), frozenset({"memory", "pids", "cpu"}), "v2"),)


def test_only_the_controllers_that_a_job_needs_are_switched_on(
    host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    top = host("/")
    cgroup(top, enabled="memory")
    written: list[str] = []
    monkeypatch.setattr(cgroups, "_write", lambda _path, text: written.append(text))
    find()
    assert written == ["+pids"]
    written.clear()
    cgroups.enter(Confinement(), Limits(cores=1.0), f"sandbox-test-{os.getpid()}")
    assert written[:2] == ["+pids", "+cpu"]


def test_never_one_above_a_limit_of_our_own(host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    top = host("/pod/container")
    for name in ("", "pod"):
        cgroup(top / name)
    cgroup(top / "pod/container", enabled="", memory_max="8589934592")
    busy(monkeypatch, top / "pod/container")
    with pytest.raises(NotDelegated, match=r"container has a limit \(memory.max\) that a job above it would escape"):
        find()
    cgroup(top / "pod/container", enabled="", memory_high="8589934592")
    with pytest.raises(NotDelegated, match=r"container has a limit \(memory.high\)"):
        find()


def test_a_process_without_a_number_here_is_not_signalled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another PID namespace is listed as 0, which to `kill` is the own process group."""
    killed: list[int] = []
    monkeypatch.setattr("os.kill", lambda pid, _: killed.append(pid))
    monkeypatch.setattr(cgroups, "_KILL_SECONDS", 0.01)
    (tmp_path / "cgroup.procs").write_text("0\n4194999\n")
    cgroups._kill_all(str(tmp_path))
    assert set(killed) == {4194999}


def test_a_container_sees_its_own_cgroup_as_the_root(
    host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    top = host("/")
    cgroup(top, enabled="")
    busy(monkeypatch, top)
    with pytest.raises(NotDelegated, match="holds processes, so its children cannot be limited"):
        find()
    # Without a cgroup namespace of its own, the mount shows only a part of the hierarchy.
    host("/docker/0123", root="/docker/0123")
    cgroup(top)
    assert [place.folder for place in find()] == [str(top)]
    host("/elsewhere", root="/docker/0123")
    with pytest.raises(NotDelegated, match="no cgroup file system"):
        find()


def test_a_place_without_the_controllers(host: Callable[..., Path]) -> None:
    top = host("/own")
    cgroup(top)
    cgroup(top / "own")
    for folder in (top, top / "own"):
        (folder / "cgroup.controllers").write_text("cpu io")
    with pytest.raises(NotDelegated, match="own has no controller memory and pids"):
        find()


def test_a_host_of_both_versions_uses_each_for_what_it_has(
    host: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    v1 = tmp_path / "v1"
    (v1 / "memory/service").mkdir(parents=True)
    (v1 / "pids").mkdir()
    files = {
        "/proc/self/cgroup": "4:memory:/service\n8:pids:/\n1:name=systemd:/\n0::/\n",
        "/proc/self/mountinfo": f"35 31 0:32 / {v1}/memory rw - cgroup cgroup rw,memory\n"
        f"39 31 0:36 / {v1}/pids rw - cgroup cgroup rw,pids\n"
        f"40 31 0:37 / {v1}/systemd rw - cgroup cgroup rw,name=systemd\n"
        f"41 31 0:38 / {v1}/unified rw - cgroup2 cgroup2 rw\n",
    }
    (v1 / "unified").mkdir()
    (v1 / "unified/cgroup.controllers").write_text("")
    read = cgroups._read
    monkeypatch.setattr(cgroups, "_read", lambda path: files[path] if path in files else read(path))
    assert find() == (
        Place(f"{v1}/memory/service", frozenset({"memory"}), "v1"),
        Place(f"{v1}/pids", frozenset({"pids"}), "v1"),
    )
    assert find(f"{v1}/pids") == (Place(f"{v1}/pids", frozenset({"pids"}), "v1"),)


def test_who_only_looks_switches_nothing_on(host: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    top = host("/")
    cgroup(top, enabled="memory")
    written: list[str] = []
    monkeypatch.setattr(cgroups, "_write", lambda _path, text: written.append(text))
    assert cgroups.left("sandbox-*") == []
    cgroup(top, enabled="memory pids")
    (top / "sandbox-one").mkdir()
    assert cgroups.left("sandbox-*") == [str(top / "sandbox-one")]
    assert written == []
