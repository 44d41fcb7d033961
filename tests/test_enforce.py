"""Confinement for real: each test confines a throw-away interpreter or a fork of one, and then tries to break out."""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from pathlib import Path

import pytest
from confined import need_root, run_script

from sandbox import enforce
from sandbox.enforce import libc, namespaces
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement
from sandbox.results import Mechanism, State

NAMESPACES = ("ipc_namespace", "mount_namespace", "network_namespace", "pid_namespace")


def test_memory_beyond_the_limit_fails_whatever_the_template_holds() -> None:
    within, beyond, tool = run_script(
        """
        ballast = bytearray(256 << 20)              # the template's: it does not count
        def job():
            confine_worker(Confinement(), Limits(memory_bytes=64 * MIB))
            within = len(bytearray(32 << 20))
            try:
                bytearray(96 << 20)
                beyond = "allocated"
            except MemoryError:
                beyond = "MemoryError"
            tool = subprocess.run([sys.executable, "-c", "bytearray(1 << 30)"], capture_output=True, text=True)
            return [within, beyond, tool.stderr.strip()]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert within == 32 << 20
    assert beyond == "MemoryError"
    assert tool.endswith("MemoryError"), "the limit holds in the tools of the job as well"


@pytest.mark.parametrize("caught", [False, True])
def test_cpu_time_ends_with_a_telling_signal_and_surely(caught: bool) -> None:
    _, code = run_script(
        f"""
        def job():
            confine_worker(Confinement(), Limits(cpu_seconds=0.5))
            if {caught}:
                signal.signal(signal.SIGXCPU, signal.SIG_IGN)
            while True:
                pass
        print(json.dumps(in_child(job)))
        """
    )
    assert -code == (signal.SIGKILL if caught else signal.SIGXCPU)


def test_files_their_size_and_queues_are_limited(tmp_path: Path) -> None:
    opened, queue, core, code = run_script(
        """
        def job():
            confine_worker(Confinement(), Limits(open_files=32, disk_bytes=MIB))
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as error:
                opened = [error.errno == errno.EMFILE, max(held)]
            for fd in held:
                os.close(fd)
            attributes = (ctypes.c_long * 8)(0, 1, 8)
            library = ctypes.CDLL(None, use_errno=True)
            queue = library.mq_open(b"/sandbox-test", os.O_CREAT | os.O_RDWR, 0o600, attributes)
            return [opened, queue, resource.getrlimit(resource.RLIMIT_CORE)]
        def writer():
            place = Place(scratch=os.path.dirname(sys.argv[1]))
            confine_worker(Confinement(), Limits(disk_bytes=MIB), place=place)
            with open(sys.argv[1], "wb") as file:
                file.write(b"x" * (MIB + 1))
        answer, _ = in_child(job)
        _, code = in_child(writer)
        print(json.dumps([*answer, code]))
        """,
        str(tmp_path / "file"),
    )
    assert opened == [True, 31]
    assert queue == -1
    assert core in ([1, 1], [0, 0])
    assert -code == signal.SIGXFSZ, "not an OSError that a cache would swallow"
    assert (tmp_path / "file").stat().st_size == 1 << 20


def test_a_lower_limit_of_the_host_is_partial_and_told() -> None:
    mechanism, limits = run_script(
        """
        def job():
            resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
            reached = confine_worker(Confinement(), Limits(open_files=1000))
            return [states(reached)["rlimits"], resource.getrlimit(resource.RLIMIT_NOFILE)]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert mechanism == ["partial", "RLIMIT_NOFILE is 64, the host's hard limit, not 1000"]
    assert limits == [64, 64]


def test_memory_that_is_lowered_later_is_what_a_fresh_child_would_have() -> None:
    ends = run_script(
        """
        def job():
            ceiling = rlimits.data_bytes() + (6 << 30)
            resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))
            confine_worker(Confinement(), Limits(memory_bytes=8 << 30))
            found = []
            for granted in (4 << 30, 1 << 30, 2 << 30):  # it is never raised
                rlimits.lower_memory(granted)
                soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
                found.append([(soft - rlimits.data_bytes()) >> 20, soft == hard])
            return found
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert [equal for _, equal in ends] == [True] * 3
    assert abs(ends[0][0] - 4096) < 64 and abs(ends[1][0] - 1024) < 64 and ends[2][0] <= 1024 + 64


def test_rlimits_that_all_fail_are_unavailable() -> None:
    result = run_script(
        """
        def refused(which, limits):
            raise OSError(errno.EPERM, "Operation not permitted")
        resource.setrlimit = refused
        def job():
            preferred = states(confine_worker(Confinement(rlimits="prefer"), Limits()))["rlimits"]
            try:
                confine_worker(Confinement(), Limits())
                return [preferred, "accepted"]
            except EnforcementError as error:
                return [preferred, str(error)]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert result[0][0] == "unavailable"
    assert "rlimits: RLIMIT_DATA could not be set" in result[1]


def test_what_a_worker_is_after_confinement() -> None:
    before, after, off = run_script(
        """
        def look():
            mask = os.umask(0o022)
            os.umask(mask)
            return {
                "no_new_privs": status("NoNewPrivs"),
                "umask": mask,
                "oom": open("/proc/self/oom_score_adj").read().strip(),
                "parent_death": libc.prctl_read(libc.PR_GET_PDEATHSIG),
                "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            }
        def job():
            reached = confine_worker(Confinement(), Limits(open_files=77))
            return [states(reached), look()]
        def nothing():
            off = Confinement(**dict.fromkeys(Confinement().demands(), "off"))
            reached = confine_worker(off, Limits(open_files=77))
            return [states(reached), look()]
        print(json.dumps([look(), in_child(job)[0], in_child(nothing)[0]]))
        """
    )
    states, look = after
    assert states.pop("rlimits")[0] == states.pop("no_new_privs")[0] == states.pop("capabilities")[0] == "enforced"
    assert set(states) == {"landlock", "seccomp"}
    assert look == {
        "no_new_privs": "1",
        "umask": 0o077,
        "oom": "1000",
        "parent_death": signal.SIGKILL,
        "files": 77,
    }
    states, look = off
    assert {state for state, _ in states.values()} == {"off"}
    assert (look["no_new_privs"], look["files"]) == (before["no_new_privs"], before["files"])


def test_a_worker_dies_with_its_keeper_even_if_that_is_dead_already() -> None:
    assert run_script(
        """
        privileges.become_subreaper()
        def wait_for(pid):
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        read, write = os.pipe()
        gate_read, gate_write = os.pipe()

        def keeper(worker):
            pid = os.fork()
            if pid:
                return pid
            me = os.getpid()
            inner = os.fork()
            if inner == 0:
                worker(me)
                os._exit(0)
            os.write(write, inner.to_bytes(4, "little"))
            signal.alarm(60)
            signal.pause()

        def lives(me):
            confine_worker(Confinement(), Limits(), keeper_pid=me)
            os.write(write, b"up..")
            signal.alarm(60)
            signal.pause()

        first = keeper(lives)
        words = [os.read(read, 4), os.read(read, 4)]
        worker = int.from_bytes(next(w for w in words if w != b"up.."), "little")
        os.kill(first, signal.SIGKILL)
        codes = [wait_for(first), wait_for(worker)]

        def late(me):
            os.read(gate_read, 1)                # until its keeper is dead and reaped
            confine_worker(Confinement(), Limits(), keeper_pid=me)
            os._exit(5)

        second = keeper(late)
        worker = int.from_bytes(os.read(read, 4), "little")
        os.kill(second, signal.SIGKILL)
        codes.append(wait_for(second))
        os.write(gate_write, b"x")
        codes.append(wait_for(worker))
        print(json.dumps(codes))
        """
    ) == [-signal.SIGKILL] * 4  # fmt: skip


TRY_NAMESPACES = """
listener = socket.create_server(("127.0.0.1", 0))
pair = socket.socketpair()
name = sys.argv[1]
open(f"/dev/shm/{name}-outside", "w").close()
def keeper():
    if os.environ.get("AS_NOBODY"):
        become_nobody()
    begin = time.perf_counter()
    reached = keeper_states(Confinement(), shm_bytes=1 << 20)
    milliseconds = (time.perf_counter() - begin) * 1e3
    try:
        socket.create_connection(listener.getsockname(), timeout=5).close()
        network = "connected"
    except OSError as error:
        network = errno.errorcode[error.errno]
    names = os.listdir("/dev/shm")
    try:
        with open(f"/dev/shm/{name}", "wb") as file:
            file.write(bytes(2 << 20))
        size = "written"
    except OSError as error:
        size = errno.errorcode[error.errno]
    ctypes.CDLL(None).semget(0x5A4D0001, 1, 0o1600)
    pair[1].send(b"still connected")
    grandchild = in_child(lambda: [os.getuid(), states(confine_worker(Confinement(), Limits()))])
    return {
        "states": states(reached), "network": network, "names": names, "size": size, "uid": os.getuid(),
        "capabilities": status("CapEff"), "subreaper": libc.prctl_read(libc.PR_GET_CHILD_SUBREAPER),
        "grandchild": grandchild, "milliseconds": milliseconds,
        "readable": meter.can_read_exactly(os.getpid()),
    }
try:
    result, code = in_child(keeper)
    result["shm"] = sorted(n for n in os.listdir("/dev/shm") if name in n)
    result["semaphores"] = ctypes.CDLL(None).semget(0x5A4D0001, 1, 0)
    result["said"] = pair[0].recv(100).decode()
    with open("/proc/self/mounts") as mounts:
        result["mounted"] = sum(line.split()[1] == "/dev/shm" for line in mounts)
    print(json.dumps(result))
finally:
    os.unlink(f"/dev/shm/{name}-outside")
"""


@pytest.mark.parametrize("nobody", [False, True])
def test_namespaces_keep_the_job_to_itself(nobody: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if nobody:
        need_root()
        monkeypatch.setenv("AS_NOBODY", "1")
    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    mounted = sum(line.split()[1] == "/dev/shm" for line in Path("/proc/self/mounts").read_text().splitlines())
    result = run_script(TRY_NAMESPACES, name)
    assert result["uid"] == (65534 if nobody else os.getuid())
    assert result["subreaper"] == 1
    assert result["readable"], "the watchdog can still measure the keeper"
    states = result["states"]
    assert states["process_tree"] == ["enforced", ""]
    if any(states[each][0] == "unavailable" for each in NAMESPACES):
        pytest.skip(f"not on this host: {states}")
    if nobody or os.getuid() != 0:
        assert int(result["capabilities"], 16) == 0, "the user namespace's capabilities are given up again"
    assert result["network"] == "ENETUNREACH"
    assert result["names"] == []
    assert result["size"] == "ENOSPC"
    assert result["said"] == "still connected"
    # Outside nothing shows.
    assert result["shm"] == [f"{name}-outside"]
    assert result["semaphores"] == -1
    assert result["mounted"] == mounted
    (uid, worker_states), code = result["grandchild"]
    assert (uid, code) == (result["uid"], 0)
    assert worker_states["no_new_privs"][0] == "enforced"
    assert worker_states["rlimits"][0] in ("enforced", "partial")


def test_the_watchdog_can_measure_a_confined_worker_of_another_namespace() -> None:
    need_root()
    exact = run_script(
        """
        become_nobody()
        read, write = os.pipe()
        keeper = os.fork()
        if keeper == 0:
            keeper_states(Confinement(pid_namespace="off"))
            me = os.getpid()
            if os.fork() == 0:
                confine_worker(Confinement(), Limits(), me)
                block = bytearray(32 << 20)
                os.write(write, b"x")
            signal.alarm(60)
            signal.pause()
        os.read(read, 1)
        tree = processes.descendants(keeper)
        exact = [meter.can_read_exactly(p.pid) for p in tree]
        memory = meter.TreeMeter(keeper, 0).sample().memory_bytes
        killed = processes.kill_tree(keeper, include_root=True)
        os.waitpid(keeper, 0)
        print(json.dumps([exact, memory, killed]))
        """
    )
    assert exact[0] == [True]
    assert 32 << 20 <= exact[1] < 48 << 20
    assert exact[2] == 2


def test_each_refused_namespace_is_told_by_itself() -> None:
    result = run_script(
        """
        unshare = libc.unshare
        def only_mounts_refused(flags):
            if flags & libc.CLONE_NEWNS:
                raise OSError(errno.EPERM, "Operation not permitted")
            unshare(flags)
        def job():
            libc.unshare = only_mounts_refused
            reached = states(keeper_states(Confinement(network_namespace="off")))
            try:
                prepare_keeper(Confinement(mount_namespace="require"))
                raised = ""
            except EnforcementError as error:
                raised = str(error)
            return [reached, raised]
        print(json.dumps(in_child(job)[0]))
        """
    )
    reached, raised = result
    assert reached["network_namespace"] == ["off", ""]
    assert reached["mount_namespace"][0] == "unavailable"
    assert "not permitted" in reached["mount_namespace"][1].lower()
    assert "mount_namespace" in raised and "required by the policy" in raised


def test_without_user_namespaces_everything_else_goes_on() -> None:
    need_root()
    reached = run_script(
        """
        def job():
            become_nobody()
            # For real: the kernel gives no user namespace to a process of several threads.
            stop = threading.Event()
            threading.Thread(target=stop.wait, args=(60,), daemon=True).start()
            reached = states(keeper_states(Confinement()))
            reached["network_works"] = bool(socket.create_server(("127.0.0.1", 0)).getsockname()[1])
            return reached
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert reached.pop("network_works")
    assert reached.pop("process_tree")[0] == "enforced"
    assert set(reached) == set(NAMESPACES)
    for state, reason in reached.values():
        assert state == "unavailable"
        assert reason.startswith("no user namespace: unshare(0x10000000): Invalid argument")


def test_a_user_namespace_that_does_not_take_our_ids_is_not_entered() -> None:
    """It could not be left again, and the job would run as user 65534. Here: root's id, without CAP_SETFCAP."""
    need_root()
    reached, same, uid = run_script(
        """
        before = os.readlink("/proc/self/ns/user")
        def job():
            libc.drop_capabilities()
            reached = states(keeper_states(Confinement()))
            return [reached, os.readlink("/proc/self/ns/user") == before, os.getuid()]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert uid == 0
    # Before Linux 5.12 it takes root's id, too.
    assert same == all(reached[name][0] == "unavailable" for name in NAMESPACES)


def test_a_user_namespace_of_which_nothing_comes() -> None:
    """AppArmor lets an unprivileged process make a user namespace and then refuses all that it is good for."""
    reached = run_script(
        """
        namespaces.is_privileged = lambda: True       # so that all is tried without capabilities
        def job():
            if os.getuid() == 0:
                become_nobody()
            return states(keeper_states(Confinement()))
        print(json.dumps(in_child(job)[0]))
        """
    )
    for name in NAMESPACES:
        assert reached[name][0] == "unavailable"
        assert "Operation not permitted" in reached[name][1]


def test_probe_tells_all_and_changes_nothing_here() -> None:
    def own() -> list[str]:
        return [os.readlink(f"/proc/self/ns/{name}") for name in ("ipc", "mnt", "net", "user")]

    before = own()
    found = enforce.probe(Confinement(network_namespace="off", watchdog="require"))
    assert own() == before
    assert set(found.mechanisms) == set(Confinement().demands())
    assert found.mechanisms["network_namespace"].state is State.OFF
    assert found.mechanisms["rlimits"].state in (State.ENFORCED, State.PARTIAL)
    for name in ("no_new_privs", "process_tree", "watchdog"):
        assert found.mechanisms[name] == Mechanism(state=State.ENFORCED)


def test_probe_in_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = enforce.probe(Confinement()).states()
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert enforce.probe(Confinement()).states() == here


def test_probe_does_not_raise_for_what_is_required_and_absent() -> None:
    need_root()
    states = run_script(
        """
        # As the probe's own process, where a mount namespace cannot be had.
        import io
        from sandbox.enforce import __main__ as probe
        def refused(flags):
            raise OSError(errno.ENOSPC, "No space left on device")
        libc.unshare = refused
        asked = Confinement(mount_namespace="require", watchdog="off", rlimits="off").model_dump_json()
        sys.stdin = io.TextIOWrapper(io.BytesIO(asked.encode()))
        raise SystemExit(probe.main())
        """
    )["mechanisms"]
    assert states["mount_namespace"]["state"] == "unavailable"
    assert "max_*_namespaces" in states["mount_namespace"]["reason"]
    assert states["watchdog"]["state"] == states["rlimits"]["state"] == "off"


def test_a_failing_probe_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no luck >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(EnforcementError, match="ended with 3: no luck"):
        enforce.probe(Confinement())
    fake.write_text("#!/bin/sh\necho not json\n")
    with pytest.raises(EnforcementError, match="failed"):
        enforce.probe(Confinement())
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    begin = time.monotonic()
    with pytest.raises(EnforcementError, match="timed out"):
        enforce.probe(Confinement(), timeout_seconds=0.3)
    assert time.monotonic() - begin < 30
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    with pytest.raises(EnforcementError, match="No such file"):
        enforce.probe(Confinement())


def test_reasons_are_plain() -> None:
    assert "max_*_namespaces" in libc.reason(OSError(28, "No space left on device"))
    assert libc.reason(OSError(5, "Input/output error")) == "Input/output error"
    with pytest.raises(OSError, match="prctl"):
        libc.prctl(-1)


def test_nothing_wanted_nothing_done() -> None:
    off = Confinement(**dict.fromkeys(NAMESPACES, "off"))
    before = os.readlink("/proc/self/ns/user")
    assert namespaces.enter(off).states == dict.fromkeys(NAMESPACES, Mechanism(state=State.OFF))
    assert os.readlink("/proc/self/ns/user") == before
