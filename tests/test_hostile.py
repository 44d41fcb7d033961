"""Jobs that attack the parent's own logic: found by an adversary's review, each kept as a test."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from conftest import HERE, MARK, eventually, family, held
from pydantic import ValidationError

import sandbox
from sandbox.envelopes import MAX_FAULTS, Reply, parse_envelope
from sandbox.errors import JobError, WireError
from sandbox.jobs import parse_spec
from sandbox.limits import MIB, Confinement, Limits
from sandbox.results import JobResult, Status

pytestmark = pytest.mark.usefixtures("nothing_left")

#: These jobs get as far as they do only on a host that has none of what denies it: the parent must cope all the same.
BARE = Confinement(landlock="off", seccomp="off", capabilities="off")
#: Nor process ids of their own, so that a job can reach its keeper.
SHARED_PIDS = BARE.model_copy(update={"pid_namespace": "off"})
#: What the hostile jobs share. `s` is the worker's own socket, `keeper` the process above it.
TOOLS = """
import hashlib, json, os, signal, socket, stat, struct, sys, time
keeper = os.getppid()
def channel():
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode): return int(name)
        except OSError: pass
s = channel()
job_id = os.path.basename(os.getcwd()).rpartition("-")[0]
def frame(envelope, payload=b""):
    head = json.dumps(envelope).encode()
    digest = hashlib.sha256(head + payload).digest()
    return struct.pack("!4sIQ32s", b"SBX1", len(head), len(payload), digest) + head + payload
started = frame({"kind": "started", "job_id": job_id, "enforcement": {"mechanisms": {}}})
def orphan():
    if os.fork(): return False
    os.setsid()
    return True
"""


def attack(light: sandbox.Sandbox, body: str, confinement: Confinement = BARE, **limits: object) -> JobResult:
    source = TOOLS + textwrap.dedent(body)

    def run() -> object:
        names: dict[str, object] = {}
        exec(source, names)
        return names.get("answer", 42)

    settings = {"wall_seconds": 3.0, "memory_bytes": 512 * MIB, **limits}
    job = sandbox.callable_job(run, confinement=confinement, limits=Limits(**settings))  # type: ignore[arg-type]
    begin = time.monotonic()
    result = light.submit(job).result(timeout=20)
    wall = float(settings["wall_seconds"])  # type: ignore[arg-type]
    assert time.monotonic() - begin < wall + 4.5, "an answer long after the deadline"
    return result


def test_a_survivor_that_floods_the_channel_after_killing_the_keeper(light: sandbox.Sandbox) -> None:
    result = attack(
        light,
        """
        if orphan():
            time.sleep(0.3)
            os.kill(keeper, 9)
            while True:
                try: os.write(s, started * 2000)
                except OSError: os._exit(0)
        time.sleep(60)
        """,
        SHARED_PIDS,
    )
    assert result.status in (Status.CRASHED, Status.PROTOCOL_ERROR)


@pytest.mark.skipif(os.geteuid() != 0, reason="pidfd_getfd of another process needs ptrace rights")
def test_a_forged_report_from_a_stopped_keeper(light: sandbox.Sandbox, tmp_path: Path) -> None:
    """The job takes a copy of the keeper's socket, stops the keeper, and reports its own end."""
    before = family(light.forkserver_pid)
    result = attack(
        light,
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.pidfd_open(keeper)
        os.kill(keeper, signal.SIGSTOP)
        path = "artifacts/inductor/aa/k.so"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "w+"); file.write("GOOD"); file.flush()
        digest = hashlib.sha256(b"GOOD").hexdigest()
        import pickle
        reply = frame({"kind": "reply", "job_id": job_id, "status": "ok",
                       "artifacts": [{"path": "inductor/aa/k.so", "size": 4, "sha256": digest}]}, pickle.dumps(42, 5))
        exited = frame({"kind": "exited", "job_id": job_id, "exit_code": 0})
        os.write(s, reply)
        for number in range(3, 64):
            got = libc.syscall(438, handle, number, 0)
            if got >= 0:
                try: os.write(got, exited)
                except OSError: pass
        time.sleep(1)
        file.seek(0); file.write("EVIL"); file.flush()
        time.sleep(60)
        """,
        SHARED_PIDS,
    )
    assert eventually(lambda: family(light.forkserver_pid) <= before), "the keeper or the job lives"
    if result.status is Status.OK:
        kernel = light._own_cache / "inductor" / "aa" / "k.so"
        assert kernel.read_text() == "GOOD"
        kernel.unlink()


def test_processes_that_hop_from_pid_to_pid_do_not_outlive_the_keeper(light: sandbox.Sandbox) -> None:
    compiler = subprocess.run(["which", "gcc"], capture_output=True, text=True, check=False).stdout.strip()
    result = attack(
        light,
        f"""
        import subprocess
        open("hop.c", "w").write('''
        #include <unistd.h>
        #include <signal.h>
        #include <stdlib.h>
        #include <time.h>
        int main(int c, char **v) {{
            time_t end = time(0) + 20; int n = 0;
            while (time(0) < end) {{ if (fork()) _exit(0); setsid(); if (++n == 50) kill(atoi(v[1]), 9); }}
        }}
        ''')
        subprocess.run([{compiler!r}, "-o", "hop", "hop.c"], check=True)
        for _ in range(8):
            subprocess.Popen(["./hop", str(keeper)])
        time.sleep(60)
        """,
        SHARED_PIDS,
        wall_seconds=8.0,
    )
    # They may be too many before one of them has killed the keeper.
    assert result.status in (Status.CRASHED, Status.VIOLATION)

    def hoppers() -> list[int]:
        return [p.pid for p in psutil.process_iter() if p.name() == "hop" and p.status() != "zombie"]

    assert eventually(lambda: not hoppers(), 4), hoppers()


def test_a_stopped_keeper_does_not_outlive_a_killed_parent() -> None:
    before = held(), family(None)
    program = """
        import os, signal, time, sandbox
        from sandbox.policy import ForkserverSettings, Policy
        box = sandbox.Sandbox(Policy(forkserver=ForkserverSettings(import_torch=False)))
        def stop():
            import os, signal, time
            os.kill(os.getppid(), signal.SIGSTOP)
            print("stopped", flush=True)
            open(os.environ["MARK"], "w").close()
            time.sleep(300)
        mechanisms = ("landlock", "seccomp", "capabilities", "pid_namespace", "mount_namespace")
        shared = sandbox.Confinement(**dict.fromkeys(mechanisms, "off"))
        job = sandbox.callable_job(stop, environment={"MARK": os.environ["MARK"]}, confinement=shared)
        box.submit(job)
        while not os.path.exists(os.environ["MARK"]): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MARK": f"{folder}/mark"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], env=environment, timeout=30, check=False
        )
        assert done.returncode == -signal.SIGKILL
    assert eventually(lambda: family(None) <= before[1], 5), "a keeper or worker lives"
    assert eventually(lambda: not held().more_than(before[0]), 5)


@pytest.mark.parametrize(
    "mechanisms",
    ['{"mount_namespace": {"state": "enforced"}}', '{f"m{i}": {"state": "enforced"} for i in range(30000)}'],
)
def test_a_worker_cannot_report_what_it_did_not_enforce(light: sandbox.Sandbox, mechanisms: str) -> None:
    result = attack(
        light,
        f"""
        for _ in range(20):
            os.write(s, frame({{"kind": "started", "job_id": job_id, "enforcement": {{"mechanisms": {mechanisms}}}}}))
        """,
    )
    assert result.status is Status.PROTOCOL_ERROR
    assert set(light.stats().enforcement) <= set(Confinement().demands())


def test_a_tree_too_deep_to_recurse_is_removed_and_costs_nothing(light: sandbox.Sandbox) -> None:
    result = attack(
        light,
        """
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        """,
    )
    assert result.status in (Status.OK, Status.OUTPUT_LIMIT), result


def test_names_that_are_not_text_do_not_make_the_job_fail(light: sandbox.Sandbox) -> None:
    result = attack(
        light,
        """
        open(b"tmp/\\xff", "w").close()
        leaked = open(b"\\xfe", "w")
        os.dup(leaked.fileno())
        os.makedirs("artifacts/inductor/ab", exist_ok=True)
        open("artifacts/inductor/ab/a b.py", "w").close()
        open("artifacts/loose", "w").close()
        """,
    )
    assert result.status is Status.OK
    assert result.leaks.counts()["temp_file"] == 1 and result.leaks.counts()["fd"] >= 1


def test_a_scratch_folder_that_the_job_has_replaced(light: sandbox.Sandbox, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    result = attack(
        light,
        f"""
        here = os.getcwd()
        os.rename(here + "/tmp", here + "/tmp-moved")
        os.symlink({str(precious)!r}, here + "/tmp")
        """,
    )
    assert result.status is Status.OK
    assert (precious / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        # A compiler that crashes must not pass for a failure of ours, which may be repeated in the serving process.
        ("os.write(s, started[:20]); os.kill(os.getpid(), 11)", Status.PROTOCOL_ERROR),
        ('os.write(s, frame({"kind": "reply", "job_id": job_id, "status": "sandbox_error"})); os.kill(os.getpid(), 11)',
         Status.CRASHED),
        ("os._exit(120)", Status.CRASHED),
        ("os._exit(121)", Status.CRASHED),
        ("os._exit(122)", Status.CRASHED),
        ('os.write(s, frame({"kind": "reply", "job_id": "job-0123456789ab", "status": "ok"}))', Status.PROTOCOL_ERROR),
        ('os.write(s, frame({"kind": "exited", "job_id": job_id}))', Status.PROTOCOL_ERROR),
        ('f = frame({"kind": "reply", "job_id": job_id, "status": "ok"}, b"\\x80\\x05N."); os.write(s, f + f)',
         Status.PROTOCOL_ERROR),
        ('os.write(s, struct.pack("!4sIQ32s", b"SBX1", 10, 1 << 50, b"")); time.sleep(9)', Status.OUTPUT_LIMIT),
        ("import threading; threading.stack_size(65536)\n"
         "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
         Status.VIOLATION),
    ],
)  # fmt: skip
def test_what_a_job_claims_and_how_it_dies(light: sandbox.Sandbox, body: str, status: Status) -> None:
    result = attack(light, body, threads=200)
    if "started[:20]" in body:
        assert result.status in (Status.CRASHED, Status.PROTOCOL_ERROR)
    else:
        assert result.status is status, result


def test_a_detail_cannot_steer_a_terminal(light: sandbox.Sandbox) -> None:
    result = attack(light, r'raise RuntimeError("\x1b]0;owned\x07\x1b[2Jgone")')
    assert result.status is Status.COMPILE_ERROR
    assert result.detail.isprintable()


def test_a_log_of_the_template_that_is_not_a_file(light: sandbox.Sandbox) -> None:
    """A FIFO in its place must not hold up the next template."""
    with sandbox.Sandbox(light.policy) as one:
        one.wait_ready()
        pid = one.forkserver_pid
        assert pid is not None
        (folder,) = one._forkserver.root.path.glob("template-*")
        (folder / "log").unlink()
        os.mkfifo(folder / "log")
        os.kill(pid, signal.SIGKILL)
        assert one.submit(sandbox.callable_job(abs, -3)).result(20).value == 3


def test_struct_is_what_the_wire_uses() -> None:
    """The attacks above build frames by hand; this fails when the format has changed under them."""
    from sandbox.wire import _HEADER, MAGIC

    assert (_HEADER.size, MAGIC) == (struct.calcsize("!4sIQ32s"), b"SBX1")


def test_a_reply_with_numbers_that_cannot_be_printed(light: sandbox.Sandbox) -> None:
    """Their sum has more digits than Python turns into text. It is the job's failure, not one of the sandbox, after
    which a policy may compile in the service."""
    result = attack(
        light,
        """
        item = {"path": "inductor/aa/k.so", "size": 7, "sha256": "0" * 64}
        head = json.dumps({"kind": "reply", "job_id": job_id, "status": "ok", "artifacts": [item, item]}).encode()
        head = head.replace(b'"size": 7', b'"size": ' + b"9" * 4300)
        os.write(s, struct.pack("!4sIQ32s", b"SBX1", len(head), 0, hashlib.sha256(head).digest()) + head)
        os._exit(0)
        """,
    )
    assert result.status is Status.PROTOCOL_ERROR


@pytest.mark.parametrize(
    "text",
    [
        '"origins": {"a": [' + ",".join(["1"] * 1_000_000) + "]}",
        '"artifacts": [' + ",".join(["{}"] * 100_000) + "]",
        '"leaks": [' + ",".join(["{}"] * 10_000) + "]",
        ",".join(f'"{number:x}": 0' for number in range(300_000)),
    ],
    ids=["origins", "artifacts", "leaks", "keys"],
)
def test_an_envelope_of_nothing_but_faults_is_refused_in_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To list a million of them would take half a minute, in which no thread of the service runs."""
    listed = []

    def count(what: str, error: ValidationError) -> str:
        listed.append(error.error_count())
        return what

    monkeypatch.setattr("sandbox.envelopes.explain", count)
    head = f'{{"kind": "reply", "job_id": "job-0123456789ab", "status": "ok", {text}}}'.encode()
    with pytest.raises(WireError, match="reply"):
        parse_envelope(head, Reply)
    assert sum(listed) <= MAX_FAULTS


@pytest.mark.parametrize("last", ["answer = 42", "os.write(s, fine); ctypes.CDLL(None).ptrace(0, 0, 0, 0)"])
def test_temporary_folders_that_change_and_are_deep_hide_nothing(light: sandbox.Sandbox, last: str) -> None:
    """The keeper that lists them once failed on it, and told of no survivor and of no forbidden call."""
    result = attack(
        light,
        f"""
        import ctypes, pickle, shutil
        fine = frame({{"kind": "reply", "job_id": job_id, "status": "ok"}}, pickle.dumps(42, 5))
        here = os.getcwd()
        os.chdir("/tmp")
        for _ in range(1500):
            os.mkdir("d"); os.chdir("d")
        ready, told = os.pipe()
        for number in range(4):
            if orphan():
                while True:
                    os.makedirs(f"/tmp/{{number}}/a", exist_ok=True)
                    os.write(told, b".")
                    os.rename(f"/tmp/{{number}}", f"/tmp/x{{number}}")
                    shutil.rmtree(f"/tmp/x{{number}}")
        os.read(ready, 4)
        os.chdir(here)
        {last}
        """,
        Confinement(landlock="off"),
    )
    states = result.enforcement.states()
    if states["mount_namespace"] != "enforced" or states["pid_namespace"] != "enforced":
        pytest.skip(f"no temporary folders of its own here: {result.enforcement.mechanisms['mount_namespace'].reason}")
    if last == "answer = 42":
        assert result.ok and result.exit_code == 0, result
        assert result.leaks.counts()["orphan"] == 4
    elif states["seccomp"] == "enforced":
        assert result.status is Status.VIOLATION, result


@pytest.mark.parametrize("made", ["os.mkfifo", "os.makedirs", "deep"])
def test_something_else_in_the_place_of_the_keepers_record(light: sandbox.Sandbox, made: str) -> None:
    """A FIFO there held the service up for ever; a folder, or JSON too deep to read, was a failure of the sandbox."""
    result = attack(
        light,
        f"""
        def deep(path):
            with open(path, "w") as file: file.write("[" * 100_000)
        {made}(os.getcwd() + ".held")
        """,
        SHARED_PIDS.model_copy(update={"mount_namespace": "off", "ipc_namespace": "off"}),
    )
    assert result.ok, result
    assert not list(light._forkserver.root.path.glob("*.held"))


#: A host with every signal blocked in the thread that starts the template, in a folder that is deleted: then it stops
#: as a whole until the job is over and its deadline has passed.
HOST = """
import os, signal, subprocess, sys, tempfile, time
sys.path[:0] = ["", *{path!r}]
import sandbox
from conftest import light_policy
from sandbox.limits import Confinement, Limits
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
folder = tempfile.mkdtemp()
os.chdir(folder)
os.rmdir(folder)
bare = Confinement(pid_namespace="off", cgroup="off")
with sandbox.Sandbox(light_policy(confinement=bare)) as box:
    print(box.submit(sandbox.callable_job(os.abort)).result().status)
    def work():
        open("began", "w").close()
        time.sleep(0.2)
    future = box.submit(sandbox.callable_job(work, limits=Limits(memory_bytes=1 << 29, wall_seconds=3.0)))
    while not list(box._forkserver.root.path.glob("job-*/began")) and not future.done():
        time.sleep(0.001)
    # Until the deadline has passed.
    subprocess.Popen(["sh", "-c", f"sleep 3.2; kill -CONT {{os.getpid()}}"], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    print(future.result().status)
"""


def test_a_host_that_blocks_signals_has_no_working_folder_and_is_stopped() -> None:
    """Without SIGCHLD no keeper saw a worker's end: a crash was a timeout. With no working folder nothing started.
    What had been answered while the service was stopped was a timeout, too."""
    search = [str(HERE), str(HERE.parent), MARK, *(entry for entry in sys.path if "site-packages" in entry)]
    program = HOST.format(path=search)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["crashed", "ok"], done.stderr


def test_names_of_keys_neither_steer_a_terminal_nor_fill_a_log(light: sandbox.Sandbox) -> None:
    for key in ("\x1b[2Jforged\r\nline", "long" * 100_000):
        result = attack(
            light,
            f"""
            os.write(s, frame({{"kind": "reply", "job_id": job_id, "status": "ok", {key!r}: 1}}))
            os._exit(0)
            """,
        )
        assert result.status is Status.PROTOCOL_ERROR
        assert result.detail.isprintable() and len(result.detail) < 500, result.detail[:500]


def test_a_spec_of_nothing_but_faults_is_explained_in_a_page() -> None:
    keys = ",".join(f'"k{number}": 0' for number in range(5000))
    with pytest.raises(JobError) as caught:
        parse_spec(f'{{"kind": "callable", {keys}}}')
    lines = str(caught.value).splitlines()
    assert len(lines) == 101 and "5003 faults in all" in lines[-1]
