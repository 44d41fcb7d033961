"""What is held, with real descriptors, semaphores, segments, files and processes."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import confined
import pytest
from conftest import held

from sandbox import ledger, processes, reclaim

ROOT = Path(__file__).parents[1]
PRELUDE = """
import ctypes, json, os, signal, sys, time
sys.path.insert(0, ROOT)
from _multiprocessing import SemLock
from sandbox import ledger, processes, reclaim
libc = ctypes.CDLL(None, use_errno=True)
IPC_CREAT, IPC_PRIVATE, GETPID = 0o1000, 0, 11

def semget(): return libc.semget(IPC_PRIVATE, 2, IPC_CREAT | 0o600)
def shmget(): return libc.shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0o600)
def msgget(): return libc.msgget(IPC_PRIVATE, IPC_CREAT | 0o600)
def semop(semid, number=0):
    class Buffer(ctypes.Structure):
        _fields_ = [("num", ctypes.c_ushort), ("op", ctypes.c_short), ("flags", ctypes.c_short)]
    assert libc.semop(semid, ctypes.byref(Buffer(number, 1, 0)), 1) == 0
def msgsnd(msqid):
    message = (ctypes.c_char * 32)()
    message[0] = 1                       # a message's type is a positive number
    assert libc.msgsnd(msqid, message, 8, 0) == 0
def remove(sems=(), shms=(), msgs=()):
    for i in sems: libc.semctl(i, 0, 0)
    for i in shms: libc.shmctl(i, 0, None)
    for i in msgs: libc.msgctl(i, 0, None)

def in_child(body):
    "Run body in a child until it has ended; returns its pid and the JSON of what body returns."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, json.dumps(body()).encode())
        finally:
            os._exit(0)
    os.close(write)
    answer = os.read(read, 65536)
    os.close(read)
    os.waitpid(pid, 0)
    return pid, json.loads(answer)

def reclaimed(before, after, **evidence):
    "What the keeper does: what lies in the kernel is reclaimed where it is proven to be the job's."
    held = [h for h in ledger.differences(before, after) if h.kind in ledger.KERNEL_LEAKS]
    return reclaim.reclaim(held, reclaim.Evidence(**evidence))

def told(leaks):
    return [[leak.kind, leak.object, leak.reclaimed] for leak in leaks]
"""


run_script = functools.partial(confined.run_script, prelude=PRELUDE)


def test_nothing_happened() -> None:
    held()  # waits for what the jobs of other tests have left to be done
    before = ledger.take(ipc=False)
    assert ledger.compare(before, ledger.take(ipc=False), "parent") == ()
    assert before.fds and before.threads


def test_descriptors_threads_and_processes_are_told(tmp_path: Path) -> None:
    before = ledger.take(ipc=False)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(60,))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        thread.start()
        with socket.socket() as one, (tmp_path / "open").open("w") as two:
            after = ledger.take(ipc=False)
            leaks = ledger.compare(before, after, "parent")
            told = {leak.kind: leak.object for leak in leaks}
            assert set(told) == {"fd", "socket", "pipe", "thread", "process"}
            fds = [leak.object for leak in leaks if leak.kind == "fd"]
            assert f"fd {two.fileno()} -> {tmp_path / 'open'}" in fds
            assert told["socket"].startswith(f"fd {one.fileno()} -> socket:[")
            assert str(child.pid) in told["process"]
            assert str(thread.native_id) in told["thread"]
            assert not any(leak.reclaimed for leak in leaks)
            assert {leak.owner for leak in leaks} == {"parent"}
    finally:
        stop.set()
        thread.join(30)
        child.kill()
        child.wait(30)
        assert child.stdin is not None
        child.stdin.close()
    reclaimed = [leak for leak in reclaim.reclaim(ledger.differences(before, after), reclaim.Evidence())]
    assert [leak.reclaimed for leak in reclaimed if leak.kind == "process"] == [True], "it is dead by now"


def test_a_process_that_still_lives_is_not_called_reclaimed() -> None:
    before = ledger.take(ipc=False)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        held = [h for h in ledger.differences(before, ledger.take(ipc=False)) if h.kind == "process"]
        assert [leak.reclaimed for leak in reclaim.reclaim(held, reclaim.Evidence())] == [False]
    finally:
        child.kill()
        child.wait(30)
        assert child.stdin is not None
        child.stdin.close()


def test_a_descriptor_that_became_another_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with first.open("w") as file:
        before = ledger.take(ipc=False)
        with second.open("w") as other:
            os.dup2(other.fileno(), file.fileno())
        told = ledger.compare(before, ledger.take(ipc=False), "forkserver")
        assert [leak.object for leak in told] == [f"fd {file.fileno()} -> {second}"]


def test_another_process_and_one_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert 0 in ledger.take(child.pid, ipc=False).fds
    finally:
        child.kill()
        child.wait(30)
        assert child.stdin is not None
        child.stdin.close()
    gone = ledger.take(child.pid, ipc=False)
    assert not gone.fds and not gone.threads and not gone.processes
    assert reclaim.mapped_inodes([child.pid]) == set()


def test_temp_files_are_listed_to_a_cap(tmp_path: Path) -> None:
    before = ledger.take(folders=(tmp_path,), ipc=False)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "left").write_text("x")
    (tmp_path / "link").symlink_to("/etc")
    after = ledger.take(folders=(tmp_path,), ipc=False)
    held = [h for h in ledger.differences(before, after) if h.kind == "temp_file"]
    assert [h.text for h in held] == [str(tmp_path / "deep" / "er" / "left"), str(tmp_path / "link")]
    assert [leak.reclaimed for leak in reclaim.reclaim(held, reclaim.Evidence(own_folders=True))] == [True, True]
    assert [leak.reclaimed for leak in reclaim.reclaim(held, reclaim.Evidence())] == [False, False]
    for number in range(ledger.MAX_FILES + 5):
        (tmp_path / f"many{number}").touch()
    many = ledger.compare(before, ledger.take(folders=(tmp_path,), ipc=False), "child")
    assert len(many) == ledger.MAX_FILES + 1
    assert many[-1].object == f"{tmp_path}: 7 more files"


def test_posix_leaks_are_removed_only_with_proof() -> None:
    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    unproven, by_map, by_fd, left = run_script(
        """
        name = sys.argv[1]
        before = ledger.take()
        def leak(inodes_of):
            def body():
                semaphore = SemLock(1, 1, 1, "/" + name, False)
                fd = os.open(f"/dev/shm/{name}-memory", os.O_CREAT | os.O_RDWR, 0o600)
                os.write(fd, b"x")
                return sorted(reclaim.mapped_inodes([os.getpid()])) if inodes_of else []
            return in_child(body)
        pid, _ = leak(False)
        ours = lambda: [h for h in ledger.differences(before, ledger.take()) if name in h.text]
        unproven = told(reclaim.reclaim(ours(), reclaim.Evidence(pids=frozenset({pid}))))
        assert len(ours()) == 2
        for held in ours():
            os.unlink(held.text)
        pid, inodes = leak(True)
        assert len(inodes) == 2
        inodes = {tuple(inode) for inode in inodes}
        # Someone else has put a file of its own under the name meanwhile: it is not the job's, and stays.
        held = ours()
        os.unlink(f"/dev/shm/{name}-memory")
        other = os.open(f"/dev/shm/{name}-memory", os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        proven = told(reclaim.reclaim(held, reclaim.Evidence(inodes=frozenset(inodes))))
        left = told(ledger.compare(before, ledger.take(), "child"))
        os.unlink(f"/dev/shm/{name}-memory")
        by_kind = {kind: [text, reclaimed] for kind, text, reclaimed in proven}
        print(json.dumps([unproven, by_kind["posix_semaphore"], by_kind["shared_memory"],
                          [entry for entry in left if name in entry[1] and entry[0] != "fd"]]))
        """,
        name,
    )
    assert unproven == []
    assert by_map == [f"/dev/shm/sem.{name}", True]
    assert by_fd[0] == f"/dev/shm/{name}-memory"
    # An inode number of tmpfs is not used again at once: the replacement is told apart.
    assert by_fd[1] is False
    assert left == [["shared_memory", f"/dev/shm/{name}-memory", False]]


def test_shared_memory_of_multiprocessing() -> None:
    told, left = run_script(
        """
        from multiprocessing import resource_tracker, shared_memory
        before = ledger.take()
        def leak():
            memory = shared_memory.SharedMemory(create=True, size=4096)
            resource_tracker.unregister(memory._name, "shared_memory")   # else the tracker tidies up
            return [memory.name, sorted(reclaim.mapped_inodes([os.getpid()]))]
        pid, (name, inodes) = in_child(leak)
        after = ledger.take()
        leaks = reclaimed(before, after, pids=frozenset({pid}), inodes=frozenset(tuple(inode) for inode in inodes))
        print(json.dumps([[entry for entry in told(leaks)], os.path.exists(f"/dev/shm/{name}")]))
        """
    )
    assert len(told) == 1
    assert told[0][0] == "shared_memory" and told[0][2] is True
    assert left is False


def test_sysv_leaks_are_removed_only_with_proof() -> None:
    result = run_script(
        """
        before = ledger.take()
        def leak():
            sem, shm, msg = semget(), shmget(), msgget()
            semop(sem)
            msgsnd(msg)
            untouched = semget()              # the kernel keeps no creator of it
            return [sem, shm, msg, untouched]
        pid, (sem, shm, msg, untouched) = in_child(leak)
        foreign = shmget()                    # ours, not the job's
        shared = in_child(lambda: [i := semget(), semop(i)][0])
        semop(shared[1], 1)                   # a process outside the job uses it too
        attached_pid, attached = in_child(shmget)
        libc.shmat.restype = ctypes.c_void_p
        assert libc.shmat(attached, None, 0)  # and this one is mapped outside
        mine = {sem, shm, msg, untouched, foreign, shared[1], attached}
        after = ledger.take()
        leaks = reclaimed(before, after, pids=frozenset({pid, shared[0], attached_pid}))
        left = {(kind, number) for kind, number in ledger.take().sysv}
        print(json.dumps({
            "leaks": told(leaks),
            "removed": [("sem", sem) not in left, ("shm", shm) not in left, ("msg", msg) not in left],
            "kept": [("sem", untouched) in left, ("shm", foreign) in left, ("sem", shared[1]) in left,
                     ("shm", attached) in left],
            "ids": [sem, shm, msg],
            "unproven": len([h for h in ledger.differences(before, ledger.take())]),
        }))
        remove((untouched, shared[1]), (foreign, attached))
        """,
    )
    sem, shm, msg = result["ids"]
    assert sorted(result["leaks"]) == sorted(
        [
            ["sysv_semaphore", f"SysV semaphore set {sem}", True],
            ["shared_memory", f"SysV shared memory {shm}", True],
            ["message_queue", f"SysV message queue {msg}", True],
        ]
    )
    assert all(result["removed"])
    assert all(result["kept"])
    assert result["unproven"] >= 4


def test_in_its_own_namespaces_everything_is_the_jobs_and_ends_with_it() -> None:
    name = f"sandbox-test-{uuid.uuid4().hex[:8]}"
    result = run_script(
        """
        from sandbox.enforce import prepare_keeper
        from sandbox.limits import Confinement
        name = sys.argv[1]
        outside = ledger.take()
        def keeper():
            states = prepare_keeper(Confinement(pid_namespace="off")).states
            own = [states[n].state == "enforced" for n in ("mount_namespace", "ipc_namespace")]
            if not all(own):
                return {"reached": {n: s.reason for n, s in states.items()}}
            before = ledger.take()
            def job():
                SemLock(1, 1, 1, "/" + name, False)
                semget()
                return os.getpid()
            pid, _ = in_child(job)
            after = ledger.take()
            leaks = reclaimed(before, after, pids=frozenset({pid}), own_shm=True, own_ipc=True)
            return {"empty": not before.posix and not before.sysv, "leaks": told(leaks)}
        _, inner = in_child(keeper)
        ours = [h.text for h in ledger.differences(outside, ledger.take()) if name in h.text]
        print(json.dumps([inner, ours]))
        """,
        name,
    )
    inner, outside = result
    assert outside == []
    if "reached" in inner:
        pytest.skip(f"no namespaces here: {inner['reached']}")
    assert inner["empty"]
    assert inner["leaks"][0] == ["posix_semaphore", f"/dev/shm/sem.{name}", True]
    assert inner["leaks"][1][0] == "sysv_semaphore"
    assert len(inner["leaks"]) == 2


def test_memfd_is_no_leak_in_shm() -> None:
    before = reclaim.mapped_inodes([os.getpid()])  # tqdm's lock, for one, is a semaphore of this process
    fd = os.memfd_create("sandbox-test")
    try:
        assert reclaim.mapped_inodes([os.getpid()]) == before
        assert processes.read_stat(os.getpid()) is not None
    finally:
        os.close(fd)
