"""The executor and the forkserver: what a host does to them, and what they leave."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import eventually, family, held, light_policy

import sandbox
from sandbox.errors import ForkserverError, JobError, PolicyError, SandboxError
from sandbox.limits import MIB, Confinement, Limits
from sandbox.policy import ForkserverSettings
from sandbox.results import State, Status


def double(number: int) -> int:
    return 2 * number


def where() -> dict[str, object]:
    return {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "group": os.getpgid(0),
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd")),
        "core": __import__("resource").getrlimit(__import__("resource").RLIMIT_CORE),
        "no_new_privs": "NoNewPrivs:\t1" in Path("/proc/self/status").read_text(),
        "main": sys.modules["__main__"].__name__,
        "threads": len(os.listdir("/proc/self/task")),
    }


def sleep_long() -> None:
    time.sleep(600)


def result(light: sandbox.Sandbox, function: object, *args: object, **kwargs: object) -> sandbox.JobResult:
    return light.submit(sandbox.callable_job(function, *args, **kwargs)).result(timeout=60)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_left")
def test_a_job_returns_its_value(light: sandbox.Sandbox) -> None:
    done = result(light, double, 21)
    assert done.status is Status.OK and done.value == 42 and done.exit_code == 0
    assert done.usage.wall_seconds > 0 and done.usage.start_seconds > 0
    assert done.enforcement.mechanisms["rlimits"].state is State.ENFORCED


def test_a_worker_has_only_what_is_its_own(light: sandbox.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET_TOKEN", "do not tell")
    read, write = os.pipe()
    try:
        seen = result(light, where).value
    finally:
        os.close(read)
        os.close(write)
    scratch = Path(seen["cwd"])
    assert "A_SECRET_TOKEN" not in seen["environment"]
    assert seen["environment"]["TMPDIR"] == str(scratch / "tmp")
    assert seen["environment"]["HOME"] == str(scratch / "home")
    assert seen["group"] == seen["pid"] != os.getpgid(0)
    assert max(seen["core"]) <= 1  # 1: see sandbox/enforce/rlimits.py
    assert seen["no_new_privs"]
    assert seen["threads"] == 1
    # 0, 1, 2, the job's socket, and the listing itself; the reserve of the worker besides.
    assert len(seen["fds"]) <= 5 + 8
    assert eventually(lambda: not scratch.exists()), "the scratch folder outlived the job"


def test_jobs_run_side_by_side_and_killing_one_touches_no_other(light: sandbox.Sandbox) -> None:
    victim_job = sandbox.callable_job(sleep_long)
    with sandbox.Sandbox(light_policy(parallel_jobs=4)) as four:
        four.wait_ready()
        victim = four.submit(victim_job)
        others = [four.submit(sandbox.callable_job(double, n)) for n in range(8)]
        assert [other.result(60).value for other in others] == [2 * n for n in range(8)]
        assert not victim.done()
        assert four.cancel(victim_job.spec.job_id, "enough")
        assert victim.result(5).status is Status.CANCELLED
        assert victim.result().detail == "enough"
        assert not four.cancel(victim_job.spec.job_id)


def test_jobs_share_the_cores_for_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.executor.usable_cores", lambda: 6)
    with sandbox.Sandbox(light_policy(parallel_jobs=3)) as box:
        shares = []
        jobs = [sandbox.callable_job(sleep_long) for _ in range(4)]
        for job in jobs:
            shares.append(box.kernel_threads("cpu"))
            box.submit(job)
        assert shares == [6, 3, 2, 2], "the fourth waits until one of the others has ended"
    with sandbox.Sandbox(light_policy(kernel_threads=5)) as box:
        box.submit(sandbox.callable_job(sleep_long))
        assert box.kernel_threads("cpu") == box.kernel_threads("cuda:90") == 5, (
            "what the policy names is taken as it is"
        )


def test_a_graph_for_a_gpu_has_more_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.executor.usable_cores", lambda: 64)
    with sandbox.Sandbox(light_policy()) as box:
        assert (box.kernel_threads("cpu"), box.kernel_threads("cuda:90")) == (8, 16)


def test_a_waiting_job_can_be_cancelled() -> None:
    with sandbox.Sandbox(light_policy(parallel_jobs=1)) as one:
        first = one.submit(sandbox.callable_job(sleep_long))
        waiting = sandbox.callable_job(double, 1)
        second = one.submit(waiting)
        assert one.cancel(waiting.spec.job_id, "not needed")
        assert second.result(0.5).detail == "not needed"
        assert not first.done()
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 5
        assert first.result(5).status is Status.CANCELLED
        with pytest.raises(SandboxError, match="closed"):
            one.submit(sandbox.callable_job(double, 1))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP, signal.SIGTERM])
def test_a_forkserver_that_dies_is_replaced_and_the_job_answered(number: signal.Signals) -> None:
    settings = ForkserverSettings(import_torch=False, fork_timeout_seconds=1.0)
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        one.wait_ready()
        before = one.forkserver_pid
        assert before is not None
        in_flight = one.submit(sandbox.callable_job(time.sleep, 0.5))
        assert eventually(lambda: one.stats().children_started == 1)
        os.kill(before, number)
        assert result(one, double, 4).value == 8
        assert in_flight.result(30).status is Status.OK, "a job in flight was lost with the forkserver"
        # A standby child answers without the forkserver; that it hangs is seen when the next one is to be made. It has
        # not lived long: the next is started when a job asks for it.
        assert eventually(lambda: one.forkserver_pid != before, 30)
        assert result(one, double, 5).value == 10
        assert one.forkserver_pid not in (before, None)
        assert one.stats().forkserver_restarts >= 1
        assert eventually(lambda: not psutil.pid_exists(before))


def test_a_shortage_of_the_host_does_not_end_the_forkserver(
    light: sandbox.Sandbox, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = socket.send_fds, [OSError(errno.ETOOMANYREFS, "Too many references")]

    def short(*arguments: object) -> object:
        if left:
            raise left.pop()
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "send_fds", short)
    result = light.submit(sandbox.callable_job(double, 21)).result(30)
    assert result.value == 42 and not left


def test_a_forkserver_that_cannot_start_says_why() -> None:
    settings = ForkserverSettings(import_torch=False, preload=("no_such_module_anywhere",))
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        with pytest.raises(ForkserverError, match="no_such_module_anywhere"):
            one.wait_ready()
        failed = result(one, double, 1)
        assert failed.status is Status.SANDBOX_ERROR
        assert "no_such_module_anywhere" in failed.detail


def test_a_preload_that_starts_a_thread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "starts_a_thread.py").write_text(
        "import threading\nevent = threading.Event()\nthreading.Thread(target=event.wait, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ForkserverSettings(import_torch=False, preload=("starts_a_thread",))
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        with pytest.raises(ForkserverError, match="2 OS threads"):
            one.wait_ready()


def test_a_job_that_waits_for_the_forkserver_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ForkserverSettings(import_torch=False, preload=("slow_to_import",))
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        job = sandbox.callable_job(double, 1)
        future = one.submit(job)
        assert eventually(lambda: one.forkserver_pid is not None)
        assert one.cancel(job.spec.job_id)
        assert future.result(1).status is Status.CANCELLED
        pid = one.forkserver_pid
        started = time.monotonic()
        one.close()
        assert time.monotonic() - started < 6
        assert pid is not None and eventually(lambda: not psutil.pid_exists(pid))


def test_closing_while_it_starts_leaves_no_template() -> None:
    before = family(None)
    for _ in range(10):
        one = sandbox.Sandbox(light_policy())
        one.start()
        one.close()
        assert not one._forkserver.root.path.exists()
    assert eventually(lambda: family(None) == before)


def test_a_search_path_of_path_objects_and_a_start_that_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nonexistent")])
    with sandbox.Sandbox(light_policy()) as one:
        assert result(one, double, 3).value == 6
    with sandbox.Sandbox(light_policy()) as two:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert not two._forkserver._gpus_hidden()
        monkeypatch.setattr(sys, "executable", None)
        with pytest.raises(ForkserverError):
            two.wait_ready(5)
        assert two._forkserver._gpus_hidden(), "what was warmed up for GPUs may be what has failed"
        monkeypatch.undo()
        assert result(two, double, 3).value == 6
        assert two.stats().forkserver_restarts == 0


def test_a_host_without_threads_to_spare_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with sandbox.Sandbox(light_policy(parallel_jobs=1)) as one:
        one.wait_ready()
        with monkeypatch.context() as patched:

            def refuse(self: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(SandboxError, match="no thread can be started"):
                one.submit(sandbox.callable_job(double, 1))
        assert result(one, double, 5).value == 10


def test_a_job_can_be_submitted_once(light: sandbox.Sandbox) -> None:
    job = sandbox.callable_job(time.sleep, 0.3)
    first = light.submit(job)
    with pytest.raises(SandboxError, match="running already"):
        light.submit(job)
    assert first.result(10).status is Status.OK


def test_the_wall_time_of_a_job_does_not_hold_what_the_forkserver_took() -> None:
    settings = ForkserverSettings(import_torch=False, fork_timeout_seconds=5.0)
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        one.wait_ready()
        pid = one.forkserver_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        future = one.submit(sandbox.callable_job(double, 2, limits=Limits(wall_seconds=1.0)))
        with pytest.raises(TimeoutError):
            future.result(1.5)
        os.kill(pid, signal.SIGCONT)
        assert future.result(20).status is Status.OK


def test_bad_input_is_refused_before_anything_starts() -> None:
    with pytest.raises(PolicyError, match="no policy 'nonsense'"):
        sandbox.Sandbox("nonsense")
    with pytest.raises(JobError, match="cannot be sent"):
        sandbox.callable_job(double, (number for number in range(3)))


def test_a_required_mechanism_that_is_missing_refuses_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_namespaces.py").write_text(
        "from sandbox.enforce import libc\n"
        "def refuse(flags):\n"
        "    raise PermissionError(1, 'Operation not permitted')\n"
        "libc.unshare = refuse\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = ForkserverSettings(import_torch=False, preload=("no_namespaces",))
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        done = result(one, double, 2)
        assert done.status is Status.OK
        assert done.enforcement.states()["mount_namespace"] == "unavailable"
        assert done.enforcement.mechanisms["mount_namespace"].reason
        strict = result(one, double, 2, confinement=Confinement(mount_namespace="require"))
        assert strict.status is Status.SANDBOX_ERROR
        assert "mount_namespace" in strict.detail


@pytest.mark.usefixtures("nothing_left")
def test_cpu_limit(light: sandbox.Sandbox) -> None:
    def burn() -> None:
        while True:
            pass

    done = result(light, burn, limits=Limits(cpu_seconds=0.5, wall_seconds=30.0))
    assert done.status is Status.CPU_LIMIT
    assert done.usage.wall_seconds < 3


@pytest.mark.usefixtures("nothing_left")
def test_memory_of_the_whole_tree_counts(light: sandbox.Sandbox) -> None:
    """No single process is over the limit; together they are."""

    def several() -> None:
        import os
        import time

        for _ in range(6):
            if os.fork() == 0:
                kept = bytearray(os.urandom(4096)) * (15 * 1024)  # 60 MB
                time.sleep(60)
                os._exit(len(kept) & 0)
        time.sleep(60)

    done = result(light, several, limits=Limits(memory_bytes=256 * MIB, wall_seconds=20.0))
    assert done.status is Status.MEMORY_LIMIT, done
    assert done.usage.peak_memory_bytes >= 256 * MIB


@pytest.mark.usefixtures("nothing_left")
def test_an_oversized_reply_is_an_output_limit(light: sandbox.Sandbox) -> None:
    done = result(light, bytes, 8 * MIB, limits=Limits(reply_bytes=MIB))
    assert done.status is Status.OUTPUT_LIMIT
    assert "reply_bytes" in done.detail


@pytest.mark.usefixtures("nothing_left")
def test_what_a_job_leaves_in_the_kernel_is_told_and_removed(light: sandbox.Sandbox) -> None:
    def leave() -> None:
        import _multiprocessing
        import ctypes
        import tempfile
        from multiprocessing import shared_memory

        _multiprocessing.SemLock(1, 1, 1, "/sandbox-test-left", False)
        shared_memory.SharedMemory("sandbox-test-left", create=True, size=4096)
        ctypes.CDLL(None).semget(0, 1, 0o1600)
        tempfile.mkstemp()
        os.open(os.devnull, os.O_RDONLY)

    done = result(light, leave)
    assert done.status is Status.OK, done
    counts = done.leaks.counts()
    for kind in ("posix_semaphore", "shared_memory", "sysv_semaphore", "temp_file", "fd"):
        assert counts.get(kind, 0) >= 1, (kind, done.leaks)
    assert not [leak for leak in done.leaks.leaks if not leak.reclaimed and leak.kind != "fd"]


@pytest.mark.usefixtures("nothing_left")
def test_stderr_is_kept_bounded(light: sandbox.Sandbox) -> None:
    def shout() -> None:
        import sys

        for number in range(20_000):
            print(f"line {number}", file=sys.stderr)

    done = result(light, shout, limits=Limits(stderr_tail_bytes=2048))
    assert done.status is Status.OK
    assert len(done.stderr_tail) <= 2048
    assert "line 19999" in done.stderr_tail
    assert done.usage.stderr_bytes > 200_000


@pytest.mark.slow
@pytest.mark.usefixtures("nothing_left")
def test_five_hundred_jobs_leave_the_counts_as_they_were(light: sandbox.Sandbox) -> None:
    result(light, double, 0)
    template = light.forkserver_pid
    assert template is not None
    assert eventually(lambda: threading.active_count() == threads_idle())

    def now() -> tuple[object, ...]:
        mine, its = held(), held(template)
        # Of the template's children how many: the standby child is another one by then.
        kept = dataclasses.replace(its, children=frozenset())
        return mine, kept, len(its.children), threading.active_count(), psutil.Process(template).num_threads()

    assert eventually(lambda: len(held(template).children) == light.standbys, 20)
    before = now()
    values = [light.submit(sandbox.callable_job(double, n)) for n in range(500)]
    assert [value.result(120).value for value in values] == [2 * n for n in range(500)]

    assert eventually(lambda: now() == before), (now(), before)


def threads_idle() -> int:
    """Threads of this process without those of running jobs."""
    return sum(1 for thread in threading.enumerate() if thread.name != "sandbox-job")


HOST = """
import os, sys, time
import sandbox
from sandbox.policy import ForkserverSettings, Limits, Policy
print("RUN", flush=True)   # printed once, or the host's __main__ ran again
limits = Limits(memory_bytes=1 << 28)  # ten of them find memory at once
policy = Policy(parallel_jobs=10, limits=limits, forkserver=ForkserverSettings(import_torch=False))
box = sandbox.Sandbox(policy)
def work(n):
    import _multiprocessing, os, subprocess, time
    _multiprocessing.SemLock(1, 1, 1, f"/sandbox-test-host-{os.getpid()}-{n}", False)
    subprocess.Popen(["sleep", "300"], start_new_session=True)
    time.sleep(300)
"""


def run_host(body: str, *, stdin: bool = False, **kwargs: object) -> subprocess.CompletedProcess[str]:
    program = HOST + textwrap.dedent(body)
    command = (
        [sys.executable, "-X", "dev", "-W", "error", "-"] if stdin else [sys.executable, "-X", "dev", "-c", program]
    )
    return subprocess.run(
        command, input=program if stdin else None, capture_output=True, text=True, timeout=60, **kwargs
    )  # type: ignore[call-overload,no-any-return]


def test_from_a_program_on_stdin_without_a_main_guard() -> None:
    done = run_host("print(box.submit(sandbox.callable_job(lambda: 7)).result().value)", stdin=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["RUN", "7"]
    assert done.stderr == ""


def test_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "host.py"
    script.write_text(HOST + "def f(): return 7\nprint(box.submit(sandbox.callable_job(f)).result().value)\n")
    done = subprocess.run(
        [sys.executable, "-X", "dev", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["RUN", "7"], "")


def test_from_a_thread_that_ends_and_in_a_host_of_many_threads() -> None:
    """The forkserver must not die with the thread that happened to start it."""
    body = """
    import threading
    stop = threading.Event()
    crowd = [threading.Thread(target=stop.wait) for _ in range(50)]
    for t in crowd: t.start()
    starter = threading.Thread(target=box.wait_ready); starter.start(); starter.join()
    pid = box.forkserver_pid
    print(box.submit(sandbox.callable_job(lambda: 7)).result().value, box.forkserver_pid == pid)
    stop.set()
    """
    done = run_host(body)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["RUN", "7", "True"], "")


@pytest.mark.parametrize("closed", [(0,), (0, 1), (2,), (0, 1, 2)])
def test_a_host_that_has_closed_its_standard_streams(tmp_path: Path, closed: tuple[int, ...]) -> None:
    answer = tmp_path / "answer"
    body = f"""
    for fd in {closed!r}: os.close(fd)
    box2 = sandbox.Sandbox(policy)
    value = box2.submit(sandbox.callable_job(lambda: 7)).result().value
    with open({str(answer)!r}, "w") as file: file.write(str(value))
    os._exit(0)
    """
    assert run_host(body).returncode == 0
    assert answer.read_text() == "7"


def test_a_host_that_forks_gets_a_sandbox_of_its_own() -> None:
    body = """
    box.wait_ready()
    pid = os.fork()
    if pid == 0:
        try:
            box.submit(sandbox.callable_job(lambda: 7))
        except sandbox.SandboxError as error:
            assert "forked" in str(error)
            with sandbox.Sandbox(policy) as own:
                os._exit(own.submit(sandbox.callable_job(lambda: 7)).result().value)
        os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), box.submit(sandbox.callable_job(lambda: 8)).result().value)
    """
    done = run_host(body)
    assert (done.returncode, done.stdout.split()) == (0, ["RUN", "7", "8"]), done.stderr


def test_nothing_is_left_when_the_host_exits_with_jobs_in_flight() -> None:
    before = held()
    done = run_host("futures = [box.submit(sandbox.callable_job(work, n)) for n in range(10)]\nbox.wait_ready()")
    assert done.returncode == 0, done.stderr
    assert "resource_tracker" not in done.stderr and done.stderr == ""
    assert eventually(lambda: not held().more_than(before), 5), held().more_than(before)
    assert not left_of_host()


@pytest.mark.slow
def test_nothing_is_left_when_the_host_is_killed_in_the_middle_of_ten_jobs() -> None:
    before = held()
    program = HOST + textwrap.dedent(
        """
        futures = [box.submit(sandbox.callable_job(work, n)) for n in range(10)]
        time.sleep(300)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout is not None and host.stdout.readline() == "RUN\n"
        tree = psutil.Process(host.pid)

        def sleepers() -> int:
            return sum(1 for p in tree.children(recursive=True) if p.status() != "zombie" and p.name() == "sleep")

        assert eventually(lambda: sleepers() == 10, 20), "the ten jobs did not start"
        family = tree.children(recursive=True)
        host.send_signal(signal.SIGKILL)
        host.wait()
        killed = time.monotonic()
        _gone, alive = psutil.wait_procs(family, timeout=5)
        assert not alive
    assert eventually(lambda: not held().more_than(before), 5 - (time.monotonic() - killed)), held().more_than(before)
    assert not left_of_host()


def left_of_host() -> list[str]:
    return [name for name in os.listdir("/dev/shm") if "sandbox-test-host" in name]


def test_without_a_temporary_folder_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/self")  # where nobody can make a folder
    with pytest.raises(ForkserverError, match="the temporary folder cannot be written"):
        sandbox.Sandbox(light_policy())
