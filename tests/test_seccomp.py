"""The system call filter for real: what is forbidden ends the job and is told by name, what is habit gets an error."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from confined import run_script
from conftest import light_policy

import sandbox
from sandbox.enforce import seccomp
from sandbox.limits import Confinement
from sandbox.results import JobResult, Status

if seccomp.machine() is None:
    pytest.skip("no table of calls for this machine", allow_module_level=True)


def column() -> int:
    here = seccomp.machine()
    assert here is not None
    return here.column


def call(number: int, *arguments: int) -> tuple[int, int]:
    """In a job: a raw system call. Returns what it returns, and the error number."""
    library = ctypes.CDLL(None, use_errno=True)
    result = library.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
    return result, ctypes.get_errno() if result < 0 else 0


def in_a_grandchild(source: str) -> int:
    return subprocess.run([sys.executable, "-c", source], check=False).returncode


def in_a_daemon(source: str) -> None:
    subprocess.Popen([sys.executable, "-c", source], start_new_session=True)
    signal.pause()


def after_the_reply() -> int:
    """A process that breaks the rule once the worker is as good as gone; the worker waits for it at exit only."""
    import time

    if os.fork() == 0:
        while os.getppid() != 1 and time.monotonic() < 1e9:
            call(_NUMBER["ptrace"], 0, 0, 0, 0)
    time.sleep(30)
    return 1


def pairs_and_threads() -> list[Any]:
    import threading

    one, two = socket.socketpair()
    one.send(b"x")
    threading.Thread(target=one.close).start()
    read = two.recv(1)
    two.close()
    code = subprocess.run(["/bin/sh", "-c", "true | true"], check=False).returncode
    return [read, code, os.cpu_count() is not None]


def habits() -> dict[str, str]:
    """What libraries do without needing it: all of it is answered by an error."""
    import errno
    import pwd

    def attempt(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
            return "done"
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    return {
        "user": pwd.getpwuid(0).pw_name,
        "unix": attempt(socket.socket, socket.AF_UNIX),
        "netlink": attempt(socket.socket, socket.AF_NETLINK, socket.SOCK_RAW),
        "interfaces": attempt(socket.if_nameindex),
        "datagrams": attempt(socket.socketpair, socket.AF_UNIX, socket.SOCK_DGRAM),
        "memfd": attempt(os.memfd_create, "x"),
        "clone3": errno.errorcode[call(435, 0, 0)[1]],
        "limits": attempt(lambda: __import__("resource").prlimit(os.getppid(), 7, (1, 1))),
        "own limits": attempt(lambda: __import__("resource").prlimit(0, 7)),
        "passing": attempt(lambda: socket.send_fds(socket.socketpair()[0], [b"x"], [0])),
    }


_NUMBER = {name: numbers[0] for name, numbers in seccomp._FORBIDDEN.items()}
if os.uname().machine == "aarch64":
    _NUMBER = {name: numbers[1] for name, numbers in seccomp._FORBIDDEN.items()}
FORBIDDEN = sorted(name for name, number in _NUMBER.items() if number >= 0)


def run(box: sandbox.Sandbox, function: Any, *arguments: Any, **options: Any) -> JobResult:
    environment = {"PATH": os.environ["PATH"]}
    return box.submit(sandbox.callable_job(function, *arguments, environment=environment, **options)).result(60)


@pytest.fixture(scope="module")
def box() -> Any:
    settings = light_policy().forkserver.model_copy(update={"preload": ("test_seccomp",)})
    with sandbox.Sandbox(light_policy(forkserver=settings)) as one:
        result = run(one, os.getpid)
        state = result.enforcement.mechanisms["seccomp"]
        if state.state != "enforced":
            pytest.skip(f"not on this host: {state}")
        yield one


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_call_ends_the_job_and_is_told_by_name(box: sandbox.Sandbox, name: str) -> None:
    result = run(box, call, _NUMBER[name], -1, -1, -1, -1, -1)
    assert (result.status, result.detail) == (Status.VIOLATION, f"made a forbidden system call: {name}")
    assert not result.leaks.leaks


NAMESPACE = {"unshare": (272, 97), "clone": (56, 220)}


@pytest.mark.parametrize(
    ("said", "function", "arguments"),
    [
        ("socket(AF_INET)", socket.socket, (socket.AF_INET,)),
        ("socket(AF_INET6)", socket.socket, (socket.AF_INET6, socket.SOCK_DGRAM)),
        ("socket(AF_PACKET)", socket.socket, (socket.AF_PACKET, socket.SOCK_RAW)),
        ("socket(AF_VSOCK)", socket.socket, (getattr(socket, "AF_VSOCK", 40),)),
        ("socket(99)", socket.socket, (99,)),
        ("unshare(CLONE_NEW*)", call, (NAMESPACE["unshare"][column()], 0x10000000)),
        ("unshare(CLONE_NEW*)", call, (NAMESPACE["unshare"][column()], 0x80)),
        ("clone(CLONE_NEW*)", call, (NAMESPACE["clone"][column()], 0x10000000 | signal.SIGCHLD)),
        ("ptrace", in_a_grandchild, (f"import ctypes; ctypes.CDLL(None).syscall({_NUMBER['ptrace']}, 0, 0, 0, 0)",)),
        ("socket(AF_INET)", in_a_daemon, ("import socket; socket.socket()",)),
        ("ptrace", after_the_reply, ()),
    ],
)
def test_also_by_arguments_and_in_any_process_of_the_tree(
    box: sandbox.Sandbox, said: str, function: Any, arguments: tuple[Any, ...]
) -> None:
    result = run(box, function, *arguments)
    assert (result.status, result.detail) == (Status.VIOLATION, f"made a forbidden system call: {said}")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="only x86-64 has other doors to the same kernel")
def test_the_other_doors_of_x86_are_shut(box: sandbox.Sandbox) -> None:
    result = run(box, call, 0x40000000 | 39)  # getpid of x32
    assert result.detail == "made a forbidden system call: system call 39 of an x32 program"
    # int 0x80 with eax = 20, getpid of i386.
    code = bytes([0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])
    result = run(box, machine_code, code)
    assert result.detail == "made a forbidden system call: system call 20 of a 32-bit program"


def machine_code(code: bytes) -> int:
    import mmap

    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return int(ctypes.CFUNCTYPE(ctypes.c_int)(address)())


def test_what_is_habit_gets_an_error_and_the_job_goes_on(box: sandbox.Sandbox) -> None:
    assert run(box, habits).value == {
        "user": "root",
        "unix": "EACCES",
        "netlink": "EACCES",
        "interfaces": "EACCES",
        "datagrams": "EACCES",
        "memfd": "EPERM",
        "clone3": "ENOSYS",
        "limits": "EPERM",
        "own limits": "done",
        "passing": "EPERM",
    }


def test_what_is_needed_goes_on(box: sandbox.Sandbox) -> None:
    assert run(box, pairs_and_threads).value == [b"x", 0, True]


def test_the_job_holds_no_listener(box: sandbox.Sandbox) -> None:
    links = run(box, descriptors).value
    assert links and not [link for link in links if "seccomp" in link]


def descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue  # the listing's own
    return found


def test_switched_off_nothing_is_filtered(box: sandbox.Sandbox) -> None:
    off = Confinement(seccomp="off", landlock="off")
    result = run(box, call, _NUMBER["kcmp"], os.getpid(), os.getpid(), 0, 0, 0, confinement=off)
    assert result.status is Status.OK and result.enforcement.states()["seccomp"] == "off"


@pytest.mark.parametrize(("number", "state"), [("EBUSY", "partial"), ("EINVAL", "partial"), ("ENOSYS", "unavailable")])
def test_without_a_listener_a_forbidden_call_still_kills(number: str, state: str) -> None:
    """EBUSY: the container's own filter has the only listener there can be."""
    reached, code, raised = run_script(
        f"""
        call = libc.syscall
        def refused(number, *arguments):
            if number == seccomp.machine().seccomp and (arguments[1] & 8 or "{number}" == "ENOSYS"):
                raise OSError(errno.{number}, "refused")
            return call(number, *arguments)
        libc.syscall = refused
        def job():
            reached = states(confine_worker(Confinement(), Limits()))["seccomp"]
            os.write(write, json.dumps(reached).encode())
            socket.socket()
        read, write = os.pipe()
        _, code = in_child(job)
        def strict():
            try:
                confine_worker(Confinement(seccomp="require"), Limits())
            except EnforcementError as error:
                return str(error)
        print(json.dumps([json.loads(os.read(read, 4096)), code, in_child(strict)[0]]))
        """
    )
    assert reached[0] == state
    if state == "partial":
        assert "told without its name" in reached[1] and code == -signal.SIGSYS and raised is None
    else:
        assert "does not have it" in reached[1] and code == 0 and "seccomp" in raised


def test_a_second_listener_is_refused_by_the_kernel_and_degrades(box: sandbox.Sandbox) -> None:
    """For real: a filter with a listener is there already."""
    reached, code = run_script(
        """
        def job():
            here = seccomp.machine()
            libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
            outer = seccomp._load(here, seccomp.program(here.column, here.audit, 0x7FFF0000, True), 8)
            reached = states(confine_worker(Confinement(), Limits()))["seccomp"]
            os.write(write, json.dumps(reached).encode())
            socket.socket()
        read, write = os.pipe()
        _, code = in_child(job)
        print(json.dumps([json.loads(os.read(read, 4096)), code]))
        """
    )
    assert reached == ["partial", "a violation is told without its name: another filter has a listener"]
    assert code == -signal.SIGSYS


def test_on_an_unknown_machine_it_is_unavailable() -> None:
    state, reason = run_script(
        """
        seccomp.platform.machine = lambda: "riscv64"
        print(json.dumps(in_child(lambda: states(confine_worker(Confinement(), Limits()))["seccomp"])[0]))
        """
    )
    assert (state, reason) == ("unavailable", "there is no table of calls for riscv64")


HEADERS = {
    0: (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+) (\d+)"),
    1: (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR3?_?(?:264_)?(\w+) (\d+)"),
}


@pytest.mark.parametrize("column", [0, 1])
def test_the_tables_are_those_of_the_kernels_headers(column: int) -> None:
    path, pattern = HEADERS[column]
    if not path.is_file():
        pytest.skip(f"no {path}")
    real = {name: int(number) for name, number in re.findall(pattern, path.read_text())}
    refused = {name: numbers for name, (numbers, _) in seccomp._REFUSED.items()}
    refused |= {"memfd_create": seccomp._MEMFD[1], "socket": seccomp._SOCKET, "socketpair": seccomp._SOCKETPAIR}
    refused |= {"clone": seccomp._CLONE, "unshare": seccomp._UNSHARE, "prlimit64": seccomp._PRLIMIT}
    refused |= {"prctl": seccomp._PRCTL} | seccomp._PASSING
    compared = 0
    for name, numbers in (seccomp._FORBIDDEN | refused).items():
        if name in real:
            assert numbers[column] == real[name], name
            compared += 1
    assert compared > 40


def test_the_program_says_the_same_for_both_machines() -> None:
    """The filter of the other machine is run by a few lines here: what it answers to each call."""
    for machine in seccomp._MACHINES.values():
        code = seccomp.program(machine.column, machine.audit, seccomp._NOTIFY, False)

        def answer(number: int, first: int = 0, second: int = 0, audit: int = machine.audit, code: bytes = code) -> int:
            import struct

            data = struct.pack("<IIQ6Q", number, audit, 0, first, second, 0, 0, 0, 0)
            program = list(struct.iter_unpack("=HBBI", code))
            accumulator, at = 0, 0
            while True:
                operation, yes, no, value = program[at]
                if operation == 0x06:
                    return int(value)
                if operation == 0x20:
                    accumulator = struct.unpack_from("<I", data, value)[0]
                    at += 1
                elif operation == 0x54:
                    accumulator &= value
                    at += 1
                else:
                    test = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
                    at += 1 + (yes if test[operation] else no)

        for name, numbers in seccomp._FORBIDDEN.items():
            if numbers[machine.column] >= 0:
                assert answer(numbers[machine.column]) == seccomp._NOTIFY, name
        assert answer(0, audit=0x40000003) == seccomp._NOTIFY
        assert answer(seccomp._SOCKET[machine.column], socket.AF_INET) == seccomp._NOTIFY
        assert answer(seccomp._SOCKET[machine.column], socket.AF_UNIX) == 0x00050000 | 13
        pair, refused = seccomp._SOCKETPAIR[machine.column], 0x00050000 | 13
        assert answer(pair, socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) == seccomp._ALLOW
        assert answer(pair, socket.AF_UNIX, socket.SOCK_SEQPACKET) == seccomp._ALLOW
        assert answer(pair, socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) == refused
        assert answer(pair, socket.AF_UNIX, socket.SOCK_RAW) == refused, "which the kernel makes one of datagrams"
        assert answer(pair, socket.AF_INET, socket.SOCK_STREAM) == seccomp._NOTIFY
        assert answer(seccomp._PRCTL[machine.column], 4, 0) == 0x00050000 | 1
        assert answer(seccomp._PRCTL[machine.column], 4, 1) == seccomp._ALLOW
        assert answer(seccomp._PRCTL[machine.column], 38, 0) == seccomp._ALLOW
        assert answer(seccomp._CLONE[machine.column], 0x3D0F00) == seccomp._ALLOW  # what pthread_create asks for
        assert answer(seccomp._CLONE[machine.column], 0x10000011) == seccomp._NOTIFY
        assert answer(seccomp._PRLIMIT[machine.column], 0) == seccomp._ALLOW
        # A GPU job may make a memfd, and local sockets that need a connection, which it cannot make.
        of_gpu = seccomp.program(machine.column, machine.audit, seccomp._NOTIFY, True)
        made = seccomp._SOCKET[machine.column]
        for kind, wanted in ((1, seccomp._ALLOW), (5 | 0o2000000, seccomp._ALLOW), (2, 0x0005000D), (3, 0x0005000D)):
            assert answer(made, socket.AF_UNIX, code=of_gpu, second=kind) == wanted, kind
        assert answer(made, 16, code=of_gpu, second=3) == 0x0005000D
        assert answer(made, socket.AF_INET, code=of_gpu, second=1) == seccomp._NOTIFY
        assert answer(seccomp._MEMFD[1][machine.column], code=of_gpu) == seccomp._ALLOW
        assert answer(seccomp._REFUSED["connect"][0][machine.column], code=of_gpu) == 0x0005000D
        allowed = [number for number in range(500) if answer(number) == seccomp._ALLOW]
        assert len(allowed) > 400


def test_a_gpu_job_may_listen_locally_and_connect_to_nobody(tmp_path: Path) -> None:
    """CUDA makes such a socket. On a kernel before Landlock 9 only the filter keeps it from a daemon's."""
    with socket.socket(socket.AF_UNIX) as daemon:
        daemon.bind(str(tmp_path / "daemon"))
        daemon.listen()
        said = run_script(
            """
            def attempt(function, *arguments):
                try:
                    function(*arguments)
                    return "done"
                except OSError as error:
                    return errno.errorcode[error.errno]
            def job():
                confine_worker(Confinement(), Limits(), gpu=True)
                one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                two = socket.socket(socket.AF_UNIX)
                return [attempt(one.bind, f"\\0sandbox-test-{os.getpid()}"), attempt(one.listen),
                        attempt(two.connect, sys.argv[1]), attempt(socket.socket, socket.AF_UNIX, socket.SOCK_DGRAM),
                        attempt(os.memfd_create, "cuda")]
            print(json.dumps(in_child(job)[0]))
            """,
            str(tmp_path / "daemon"),
        )
    assert said == ["done", "done", "EACCES", "EACCES", "done"]
