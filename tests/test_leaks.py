"""Every kind of leak, made by a real job and found; and none in a job that leaves nothing."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import eventually, light_policy

import sandbox
from sandbox import executor, ledger, monitor
from sandbox.limits import Confinement
from sandbox.results import JobResult, Leak, Status

#: A job that leaves one thing of each kind that a worker tells of itself, and what its description holds.
OWN = {
    "fd": ("kept = open(os.devnull)", "-> /dev/null"),
    "socket": ("kept = socket.socket(socket.AF_UNIX)", "-> socket:["),
    "pipe": ("kept = os.pipe()", "-> pipe:["),
    "eventfd": ("kept = os.eventfd(0)", "-> anon_inode:[eventfd"),
    "epoll": ("kept = select.epoll()", "-> anon_inode:[eventpoll"),
    "timerfd": ("kept = libc.timerfd_create(1, 0)", "-> anon_inode:[timerfd"),
    "signalfd": ("kept = libc.signalfd(-1, ctypes.byref(ctypes.c_uint64(512)), 0)", "-> anon_inode:[signalfd"),
    "inotify": ("kept = libc.inotify_init1(0)", "-> anon_inode:inotify"),
    "memfd": ("kept = os.memfd_create('left')", "-> /memfd:left"),
    "pidfd": ("kept = os.pidfd_open(os.getpid())", "pidfd"),
    "thread": ("threading.Thread(target=time.sleep, args=(60,), name='left', daemon=True).start()", "'left'"),
    "zombie": ("os.fork() or os._exit(0); wait_for_zombie()", "pid "),
    "deleted_map": (
        "file = open('tmp/left', 'w+b'); file.write(bytes(4096)); file.flush(); os.unlink(file.name); "
        "kept = mmap.mmap(file.fileno(), 4096); file.close()",
        "tmp/left",
    ),
    "tracked_resource": ("resource_tracker.register('/left', 'semaphore')", "semaphore /left"),
}
#: The same for what the keeper tells.
KEPT = {
    "temp_file": ("kept = tempfile.mkstemp(prefix='left')", "/left"),
    "posix_semaphore": ("kept = SemLock(1, 1, 1, '/sandbox-test-left', False)", "/dev/shm/sem.sandbox-test-left"),
    "shared_memory": (
        "kept = _posixshmem.shm_open('/sandbox-test-left', 66, mode=0o600)",
        "/dev/shm/sandbox-test-left",
    ),
    "sysv_semaphore": ("semctl(libc.semget(0, 1, 0o1600))", "SysV semaphore set"),
    "message_queue": ("send(libc.msgget(0, 0o1600))", "SysV message queue"),
    "orphan": ("os.fork() or time.sleep(60)", "pid "),
}
PRELUDE = """
import ctypes, mmap, os, select, socket, tempfile, threading, time
import _posixshmem, _multiprocessing
from multiprocessing import resource_tracker
SemLock = _multiprocessing.SemLock
shm_open = _posixshmem.shm_open
libc = ctypes.CDLL(None)
def wait_for_zombie():
    while not any(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "Z"
                  for pid in open(f"/proc/self/task/{os.readlink('/proc/self')}/children").read().split()):
        time.sleep(0.001)
def semctl(number): libc.semctl(number, 0, 16, 1)
def send(number):
    message = (ctypes.c_char * 32)()
    message[0] = 1
    libc.msgsnd(number, message, 8, 0)
"""


#: Without what forbids a job to make a socket or a memfd at all.
OPEN = Confinement(landlock="off", seccomp="off")


def job(code: str) -> None:
    """Run ``code`` with its names kept alive to the end of the process."""
    import sys
    import types

    module = types.ModuleType("left_by_the_job")
    sys.modules["left_by_the_job"] = module
    exec(compile(code, "<job>", "exec"), vars(module))


def run(box: sandbox.Sandbox, code: str, prelude: str = PRELUDE) -> JobResult:
    done = box.submit(sandbox.callable_job(job, prelude + textwrap.dedent(code), confinement=OPEN)).result(30)
    assert done.status is Status.OK, done
    return done


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", OWN)
def test_what_a_worker_leaves_open_is_told(light: sandbox.Sandbox, kind: str) -> None:
    code, text = OWN[kind]
    done = run(light, code)
    told = [leak for leak in done.leaks.leaks if leak.kind == kind]
    assert told and all(leak.owner == "child" and leak.reclaimed for leak in told)
    assert text in told[0].object
    assert len(told) == (2 if kind == "pipe" else 1)
    # `mmap` keeps a descriptor of its own; a tracker is a process at the other end of a pipe.
    more = {"deleted_map": {"fd"}, "tracked_resource": {"pipe", "orphan"}}.get(kind, set())
    assert set(done.leaks.counts()) <= {kind} | more, done.leaks
    if kind == "thread":
        assert told[0].stack and "threading.py" in told[0].stack[-1]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("kind", KEPT)
def test_what_outlives_a_worker_is_told_and_removed(light: sandbox.Sandbox, kind: str) -> None:
    code, text = KEPT[kind]
    done = run(light, code)
    told = [leak for leak in done.leaks.leaks if leak.kind == kind]
    assert len(told) == 1 and told[0].reclaimed and told[0].owner == "child"
    assert text in told[0].object


@pytest.mark.usefixtures("nothing_left")
def test_a_process_whose_parent_lives_is_no_orphan(light: sandbox.Sandbox) -> None:
    done = run(
        light,
        """
        read, write = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                os.write(write, b"x")
            time.sleep(60)
        os.read(read, 1)
        os.close(read), os.close(write)
        """,
    )
    assert done.leaks.counts() == {"orphan": 1, "process": 1}


CLEAN = """
import subprocess, sys, multiprocessing.shared_memory as shm
from concurrent.futures import ThreadPoolExecutor
with open("tmp/file", "w+b") as file:
    file.write(bytes(4096)); file.flush()
    with mmap.mmap(file.fileno(), 4096) as mapped:
        os.unlink("tmp/file")
with ThreadPoolExecutor(4) as pool:
    list(pool.map(str, range(100)))
subprocess.run([sys.executable, "-c", "pass"], check=True)
one, two = socket.socketpair()
one.close(), two.close()
for fd in (*os.pipe(), os.eventfd(0), os.memfd_create("x"), os.pidfd_open(os.getpid())):
    os.close(fd)
with select.epoll() as poll:
    pass
semaphore = SemLock(1, 1, 1, "/sandbox-test-clean", True)
"""


@pytest.mark.usefixtures("nothing_left")
def test_a_job_that_cleans_up_is_told_of_nothing(light: sandbox.Sandbox) -> None:
    for _ in range(5):
        assert run(light, CLEAN).leaks.leaks == ()
    with sandbox.Sandbox(light_policy(trace_leaks=True)) as tracing:
        assert run(tracing, CLEAN).leaks.leaks == ()


@pytest.mark.usefixtures("nothing_left")
def test_with_trace_leaks_each_leak_tells_where_it_was_made(light: sandbox.Sandbox) -> None:
    names = {
        "fd": "kept1 = open(os.devnull)",
        "socket": "kept2 = socket.socket(socket.AF_UNIX)",
        "pipe": "kept3 = os.pipe()",
        "eventfd": "kept4 = os.eventfd(0)",
        "memfd": "kept5 = os.memfd_create('left')",
        "thread": KEPT_THREAD,
        "temp_file": "kept6 = tempfile.mkstemp()",
        "posix_semaphore": "kept7 = _multiprocessing.SemLock(1, 1, 1, '/sandbox-test-left', False)",
        "shared_memory": "kept8 = _posixshmem.shm_open('/sandbox-test-left', 66, mode=0o600)",
    }
    code = "".join(
        f"def make_{name}():\n    global {made.split()[0]}\n    {made}\nmake_{name}()\n" for name, made in names.items()
    )
    with sandbox.Sandbox(light_policy(trace_leaks=True)) as tracing:
        done = run(tracing, code)
    for kind in names:
        stacks = [leak.stack for leak in done.leaks.leaks if leak.kind == kind]
        assert stacks and all(stacks), (kind, done.leaks)
        assert any(f" make_{kind}'" in str(stack) for stack in stacks), stacks
        assert not any("origins.py" in line for stack in stacks for line in stack)
    untraced = run(light, code)
    assert all(not leak.stack for leak in untraced.leaks.leaks if leak.kind != "thread")


KEPT_THREAD = "kept0 = threading.Thread(target=time.sleep, args=(60,), daemon=True); kept0.start()"


def test_the_service_does_not_import_multiprocessing() -> None:
    code = "import sandbox.executor, sys; sys.exit('multiprocessing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_descriptors_of_a_gpu_are_told_apart() -> None:
    kinds = {
        "/dev/nvidia0": "gpu_handle",
        "/dev/nvidiactl": "gpu_handle",
        "/dev/nvidia-uvm": "cuda_context",
        "/dev/null": "fd",
        "/tmp/socket:": "fd",
    }
    assert {target: ledger.fd_kind(target) for target in kinds} == kinds


def test_a_report_names_kind_object_job_and_owner_of_each_leak() -> None:
    with sandbox.Sandbox(light_policy()) as box:
        done = run(box, "kept = os.pipe()")
        stats = box.stats()
    assert stats.leaks == {"pipe": 2}
    assert [(row.job_id, row.kind, row.owner, row.reclaimed) for row in stats.leaked] == 2 * [
        (done.job_id, "pipe", "child", True)
    ]
    assert {row.object for row in stats.leaked} == {leak.object for leak in done.leaks.leaks}


def test_the_service_and_the_template_are_told_of_nothing_after_many_jobs() -> None:
    with sandbox.Sandbox(light_policy()) as box:
        for _ in range(10):
            run(box, "pass")
        box._forkserver.inspect()
        assert box._forkserver.leaks() == ()


def test_what_the_sandbox_itself_leaves_open_in_the_service_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    left = []

    @contextlib.contextmanager
    def forgetful(_cancel: monitor.Cancel) -> Iterator[int]:
        read, write = os.pipe()
        left.append(read)
        yield read
        os.close(write)

    with sandbox.Sandbox(light_policy()) as box:
        box.wait_ready()
        assert run(box, "pass").leaks.leaks == ()
        host = os.open(os.devnull, os.O_RDONLY)  # the host's own descriptors are none of our business
        assert box._forkserver.leaks() == ()
        original = monitor.Cancel.listening
        monkeypatch.setattr(monitor.Cancel, "listening", forgetful)
        done = run(box, "pass")
        monkeypatch.setattr(monitor.Cancel, "listening", original)
        told = [leak for leak in box._forkserver.leaks() if leak.owner == "parent"]
        os.close(host)
        assert [leak.object for leak in told] == [
            f"fd {left[0]} -> {os.readlink(f'/proc/self/fd/{left[0]}')} of {done.job_id}"
        ]
        assert told[0].kind == "pipe" and not told[0].reclaimed
        assert box.stats().leaks == {"pipe": 1}
        os.close(left[0])


def test_a_thread_of_ours_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there, go = threading.Event(), threading.Event()

    def settle(*_: object) -> None:
        there.set()
        go.wait(60)

    monkeypatch.setattr(executor, "CLOSE_SECONDS", 0.1)
    box = sandbox.Sandbox(light_policy())
    box.wait_ready()
    monkeypatch.setattr(box, "_settle", settle)
    box.submit(sandbox.callable_job(os.getpid))
    assert there.wait(30)
    monkeypatch.setattr(box, "_tasks", {})
    box.close()
    told = box._forkserver.leaks()
    go.set()
    assert [(leak.kind, leak.owner, leak.reclaimed) for leak in told] == [("thread", "parent", False)]
    assert "sandbox-job" in told[0].object
    assert any("executor.py" in line for line in told[0].stack)
    assert box.stats().leaks == {"thread": 1}


def test_what_the_template_has_kept_open_is_told_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "leaky_module.py").write_text(
        "import os, threading\n"
        "from sandbox import template\n"
        "fork = template._fork\n"
        "def leaky(*arguments):\n"
        "    globals()['kept'] = os.eventfd(0)\n"
        "    return fork(*arguments)\n"
        "template._fork = leaky\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = light_policy().forkserver.model_copy(update={"preload": ("leaky_module",)})
    with sandbox.Sandbox(light_policy(forkserver=settings)) as box:
        run(box, "pass")
        box._forkserver.inspect()
        told = [leak for leak in box._forkserver.leaks() if leak.owner == "forkserver"]
        assert len(told) == 1 and told[0].kind == "eventfd" and not told[0].reclaimed
        assert str(box.forkserver_pid) in told[0].object
        assert box.stats().leaks == {"eventfd": 1}
        assert box.stats().leaked[0].job_id == ""


def test_an_upgrade_of_packages_under_a_template_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """All at once hundreds of files that it has mapped have no name any more: more than one message can tell."""
    (tmp_path / "many_libraries.py").write_text(
        "import mmap\n"
        f"kept, folder = [], {str(tmp_path)!r}\n"
        "for number in range(400):\n"
        "    name = f'a-library-with-a-name-that-is-as-long-as-those-in-site-packages-often-are-{number}'\n"
        "    with open(f'{folder}/{name}.so', 'w+b') as file:\n"
        "        file.truncate(mmap.PAGESIZE)\n"
        "        kept.append(mmap.mmap(file.fileno(), 0))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = light_policy().forkserver.model_copy(update={"preload": ("many_libraries",)})
    with sandbox.Sandbox(light_policy(forkserver=settings)) as box:
        run(box, "pass")
        for file in tmp_path.glob("*.so"):
            file.unlink()
        for _ in range(3):
            run(box, "pass")
        assert box.stats().forkserver_restarts == 0
        assert box._forkserver.leaks()


def test_a_child_cannot_steer_a_terminal_by_its_leaks(light: sandbox.Sandbox) -> None:
    done = run(light, "kept = open('tmp/\\x1b[31m', 'w'); os.unlink(kept.name)")
    told: list[Leak] = list(done.leaks.leaks)
    assert told and all(leak.object.isprintable() for leak in told)
    assert eventually(lambda: not os.path.exists("/dev/shm/sandbox-test-left"))
