"""Landlock for real: a worker tries to read, write, connect and signal where it may not, and works where it may."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from confined import need_root, run_script

from sandbox.enforce import landlock

try:
    ABI = landlock.abi()
except OSError as error:
    pytest.skip(f"this kernel has no Landlock: {error}", allow_module_level=True)

#: What a script has besides the prelude: `attempt` tells the error of a call by name, or "done".
ATTEMPT = """
def attempt(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]

def confined(confinement=Confinement(), **place):
    return states(confine_worker(confinement, Limits(), place=Place(**place)))
"""


def run(body: str, *arguments: str) -> Any:
    import textwrap

    return run_script(ATTEMPT + textwrap.dedent(body), *arguments)


def test_files_outside_are_out_of_reach_and_the_scratch_folder_is_not(tmp_path: Path) -> None:
    scratch, outside = tmp_path / "scratch", tmp_path / "outside"
    for folder in (scratch, outside):
        (folder / "sub").mkdir(parents=True)
        (folder / "file").write_text("secret")
    (scratch / "link").symlink_to(outside / "file")
    inside, denied = run(
        """
        scratch, outside = sys.argv[1:]
        def job():
            confined(scratch=scratch)
            os.chdir(scratch)
            inside = {
                "read": attempt(open, "file"), "write": attempt(open, "new", "w"), "mkdir": attempt(os.mkdir, "d"),
                "rename to another folder": attempt(os.rename, "file", "sub/file"),
                "hard link in another folder": attempt(os.link, "sub/file", "d/linked"),
                "rename over": attempt(os.replace, "sub/file", "new"), "symlink": attempt(os.symlink, "x", "y"),
                "truncate": attempt(os.truncate, "new", 0), "fifo": attempt(os.mkfifo, "fifo"),
                "unlink": attempt(os.unlink, "new"), "list": attempt(os.listdir, "."),
                "rmdir": attempt(os.rmdir, "sub"),
            }
            open("script", "w").write("#!/bin/sh\\n"); os.chmod("script", 0o700)
            denied = {
                "read": attempt(open, outside + "/file"), "list": attempt(os.listdir, outside),
                "write": attempt(open, outside + "/new", "w"), "append": attempt(open, outside + "/file", "a"),
                "unlink": attempt(os.unlink, outside + "/file"), "mkdir": attempt(os.mkdir, outside + "/d"),
                "through a link": attempt(open, "link"), "shadow": attempt(open, "/etc/shadow"),
                "hard link in": attempt(os.link, outside + "/file", "stolen"),
                "rename in": attempt(os.rename, outside + "/file", "stolen"),
                "rename out": attempt(os.rename, "script", outside + "/script"),
                "tmp": attempt(open, "/tmp/sandbox-test-landlock", "w"), "home": attempt(os.listdir, "/root"),
                "start what was written": attempt(os.execv, "script", ["script"]),
                "a device of the host": attempt(open, "/dev/kmsg"),
                "/dev/shm of the host": attempt(os.listdir, "/dev/shm"),
                "through /proc": attempt(open, f"/proc/self/root{outside}/file"),
                "sysctl": attempt(open, "/proc/sys/kernel/core_pattern", "w"),
            }
            return [inside, denied]
        print(json.dumps(in_child(job)[0]))
        """,
        str(scratch),
        str(outside),
    )
    assert set(inside.values()) == {"done"}, inside
    assert set(denied.values()) <= {"EACCES", "EXDEV", "EPERM", "ENOENT"}, denied
    assert denied["shadow"] == denied["read"] == denied["through a link"] == denied["through /proc"] == "EACCES"
    assert (outside / "file").read_text() == "secret" and sorted(os.listdir(outside)) == ["file", "sub"]


def test_what_a_compiler_needs_is_there(tmp_path: Path) -> None:
    answer = run(
        """
        import ctypes.util
        def job():
            reached = confined(scratch=sys.argv[1])
            os.chdir(sys.argv[1])
            done = subprocess.run("echo hello > /dev/null && ls /usr/include | wc -l", shell=True, capture_output=True)
            assert done.returncode == 0 and not done.stderr, done
            own = subprocess.run([sys.executable, "-c", "import hashlib, ssl, pwd; print(pwd.getpwuid(0).pw_name)"],
                                 capture_output=True, text=True)
            assert own.stdout == "root\\n", own
            thread = threading.Thread(target=lambda: None); thread.start(); thread.join()
            child = subprocess.Popen(["sleep", "60"]); child.kill()         # a signal within the job
            fds = os.listdir("/proc/self/fd")
            return [reached["landlock"], child.wait(), os.cpu_count(), len(os.urandom(8)), len(fds) > 2]
        print(json.dumps(in_child(job)[0]))
        """,
        str(tmp_path),
    )
    assert answer[0] == ["enforced", ""] or ABI < 6
    assert answer[1:] == [-9, os.cpu_count(), 8, True]


def test_paths_of_the_policy_can_be_read(tmp_path: Path) -> None:
    for name in ("named", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    assert run(
        """
        def job():
            confined(Confinement(read=(sys.argv[1] + "/named",)))
            return [attempt(open, f"{sys.argv[1]}/{name}") for name in ("named/file", "other/file")] + [
                attempt(open, f"{sys.argv[1]}/named/file", "w")]
        print(json.dumps(in_child(job)[0]))
        """,
        str(tmp_path),
    ) == ["done", "EACCES", "EACCES"]


def test_signals_and_sockets_do_not_leave_the_job() -> None:
    name = f"sandbox-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        signal_, environ, connect, bind, local, killed = run(
            """
            def job():
                confined(Confinement(seccomp="off"))
                tcp, server = socket.socket(), socket.socket()
                unix = socket.socket(socket.AF_UNIX)
                return [attempt(os.kill, os.getppid(), 0), attempt(open, f"/proc/{os.getppid()}/environ"),
                        attempt(tcp.connect, ("127.0.0.1", int(sys.argv[1]))), attempt(server.bind, ("127.0.0.1", 0)),
                        attempt(unix.connect, "\\0" + sys.argv[2])]
            answer, _ = in_child(job)
            pid = os.fork()
            if pid == 0:
                confined()
                signal.pause()
            os.kill(pid, signal.SIGKILL)                # the keeper can still kill
            print(json.dumps([*answer, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]))
            """,
            str(tcp.getsockname()[1]),
            name,
        )
    assert environ == "EACCES"
    assert signal_ == local == "EPERM" or ABI < 6
    assert connect == bind == "EACCES" or ABI < 4
    assert killed == -9


@pytest.mark.parametrize("own", [True, False])
def test_dev_shm_only_if_it_is_the_jobs_own(own: bool) -> None:
    answer = run(
        """
        import _multiprocessing
        def job():
            confined(own_shm=sys.argv[1] == "True")
            name = f"/sandbox-test-landlock-{os.getpid()}"
            return [attempt(_multiprocessing.SemLock, 1, 1, 1, name, True), attempt(os.listdir, "/dev/shm")]
        print(json.dumps(in_child(job)[0]))
        """,
        str(own),
    )
    assert answer == (["done", "done"] if own else ["EACCES", "EACCES"])


@pytest.mark.parametrize("version", range(1, 12))
def test_an_older_or_newer_kernel_is_told(version: int, tmp_path: Path) -> None:
    """The version that the kernel tells is made smaller: what it does not know is not asked for."""
    state, reason, moved = run(
        f"""
        kernel = landlock.abi()
        landlock.abi = lambda: min({version}, kernel)
        def job():
            state, reason = confined(scratch=sys.argv[1])["landlock"]
            os.mkdir(sys.argv[1] + "/a")
            open(sys.argv[1] + "/file", "w").close()
            return [state, reason, attempt(os.rename, sys.argv[1] + "/file", sys.argv[1] + "/a/file")]
        print(json.dumps(in_child(job)[0]))
        """,
        str(tmp_path),
    )
    assert moved == "done"
    if version == 1:
        assert state == "unavailable" and "renaming between folders" in reason
    elif min(version, ABI) < 6:
        assert state == "partial" and f"Landlock {min(version, ABI)}" in reason and "signals reach outside" in reason
        assert ("TCP is not denied" in reason) == (min(version, ABI) < 4)
    else:
        assert (state, reason) == ("enforced", "")


@pytest.mark.parametrize(("number", "words"), [("ENOSYS", "this kernel does not have it"), ("EOPNOTSUPP", "at boot")])
def test_without_landlock_the_policy_decides(number: str, words: str) -> None:
    state, raised, readable = run(
        f"""
        call = libc.syscall
        def absent(number, *arguments):
            if number in (444, 445, 446):
                raise OSError(errno.{number}, "not here")
            return call(number, *arguments)
        libc.syscall = absent
        def job():
            state = confined()["landlock"]
            try:
                confined(Confinement(landlock="require"))
            except EnforcementError as error:
                return [state, str(error), attempt(os.listdir, "/dev/shm")]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert state[0] == "unavailable" and words in state[1]
    assert "required by the policy" in raised and "landlock" in raised
    assert readable == "done"


def test_without_the_right_to_it_the_kernel_says_so() -> None:
    need_root()
    state, reason = run(
        """
        def job():
            become_nobody()
            return confined(Confinement(no_new_privs="off"))["landlock"]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert state == "unavailable" and "not permitted" in reason
