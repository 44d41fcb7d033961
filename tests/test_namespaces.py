"""What a job sees of the host, and what of it: its own process ids, its own folders, everything else read-only."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import eventually, family, light_policy

import sandbox
from sandbox.enforce import paths
from sandbox.jobs import Job
from sandbox.limits import MIB, Confinement, Limits
from sandbox.policy import ForkserverSettings
from sandbox.processes import descendants
from sandbox.results import JobResult, Status


def run(box: sandbox.Sandbox, function: Callable[[], object], **settings: object) -> JobResult:
    """One job, without what would deny the same by other means."""
    demands = {"pid_namespace": "require", "landlock": "off", "seccomp": "off", **settings.pop("confinement", {})}  # type: ignore[dict-item]
    confinement = Confinement(**demands)  # type: ignore[arg-type]
    job = sandbox.callable_job(function, confinement=confinement, **settings)  # type: ignore[arg-type]
    return box.submit(job).result(60)


def need(result: JobResult, *mechanisms: str) -> None:
    """Skip where this host does not have them whole."""
    states = result.enforcement.mechanisms
    for name in mechanisms:
        if states[name].state.value != "enforced":
            pytest.skip(f"{name} is {states[name].state.value} here: {states[name].reason}")


@pytest.fixture(scope="session", autouse=True)
def _has_pid_namespaces(light: sandbox.Sandbox) -> None:
    found = light.submit(sandbox.callable_job(abs, -1)).result(60).enforcement.mechanisms["pid_namespace"]
    if found.state.value == "unavailable":
        pytest.skip(f"no own process ids on this host: {found.reason}")


@pytest.mark.usefixtures("nothing_left")
def test_a_job_sees_and_signals_only_its_own_processes(light: sandbox.Sandbox) -> None:
    here = os.getpid()

    def look() -> object:
        import os

        def signal(pid: int, number: int) -> str:
            try:
                os.kill(pid, number)
                return "sent"
            except OSError as error:
                return type(error).__name__

        listed = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
        own = [os.getpid(), os.getppid(), int(os.readlink("/proc/self"))]
        # To pid 1 it can be sent, but does nothing there.
        return own, listed, [signal(here, 0), signal(1, 9), signal(1, 19)], os.listdir(f"/proc/{os.getpid()}/task")

    result = run(light, look)
    assert result.status is Status.OK, result
    need(result, "pid_namespace")
    assert result.value == ([2, 1, 2], [1, 2], ["ProcessLookupError", "sent", "sent"], ["2"])


@pytest.mark.usefixtures("nothing_left")
def test_orphans_are_collected_while_the_job_runs_and_their_time_counts(light: sandbox.Sandbox) -> None:
    def orphan() -> object:
        import os
        import time

        read, write = os.pipe()
        if os.fork() == 0:
            if os.fork() == 0:
                os.setsid()
                end = time.process_time() + 0.4
                while time.process_time() < end:
                    pass
                os.write(write, str(os.getpid()).encode())
            os._exit(0)
        os.wait()
        pid = int(os.read(read, 20))
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                os.kill(pid, 0)  # a zombie can still be signalled
            except ProcessLookupError:
                return "collected"
            time.sleep(0.01)
        return "a zombie"

    result = run(light, orphan)
    assert result.value == "collected", result
    assert result.usage.cpu_seconds >= 0.4
    assert not {"process", "orphan", "zombie"} & result.leaks.counts().keys()


@pytest.mark.usefixtures("nothing_left")
def test_survivors_are_listed_before_the_kernel_kills_them(light: sandbox.Sandbox) -> None:
    def leave() -> int:
        import os
        import time

        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                time.sleep(60)
        return 7

    result = run(light, leave)
    assert (result.status, result.value) == (Status.OK, 7)
    assert sum(result.leaks.counts().values()) == 3
    assert all(leak.reclaimed for leak in result.leaks.leaks)


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGTERM, signal.SIGKILL])
def test_a_worker_dies_of_its_own_signals(light: sandbox.Sandbox, number: signal.Signals) -> None:
    """Pid 1 would not: its signals of default action are ignored."""
    result = run(light, lambda: os.kill(os.getpid(), number))
    assert (result.status, result.signal) == (Status.CRASHED, number.name)


def test_all_of_a_job_dies_with_its_keeper(light: sandbox.Sandbox) -> None:
    template = light.forkserver_pid
    assert template is not None
    before = family(template)

    def stay() -> None:
        import os
        import time

        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                break
        time.sleep(60)

    job = light.submit(sandbox.callable_job(stay))
    # Keeper, init, worker, and three more.
    assert eventually(lambda: len(family(template) - before) >= 6, 30)
    keepers = [process for process in descendants(template) if process.ppid == template]
    for keeper in keepers:
        os.kill(keeper.pid, signal.SIGKILL)
    assert eventually(lambda: family(template) <= before, 10), "a process of the job lives"
    assert job.result(30).status is Status.CRASHED
    assert light.submit(sandbox.callable_job(abs, -3)).result(30).value == 3


@pytest.mark.usefixtures("nothing_left")
def test_only_the_scratch_folder_can_be_written(light: sandbox.Sandbox, tmp_path: Path) -> None:
    folders = [str(Path.home()), str(Path(__file__).parent), "/", "/etc", "/proc/sys/kernel", "/sys"]

    def write() -> object:
        import os
        import tempfile

        said = {}
        for folder in (*folders, ".", tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
            path = os.path.join(folder, "written-by-a-job")
            try:
                open(path, "w").close()
                os.unlink(path)
                said[folder] = "written"
            except OSError as error:
                said[folder] = error.strerror
        with open("/dev/null", "w") as null:
            null.write("devices can still be written")
        return said, tempfile.gettempdir(), os.getcwd()

    result = run(light, write)
    assert result.status is Status.OK, result
    need(result, "mount_namespace", "pid_namespace")
    said, temporary, cwd = result.value
    assert {said[folder] for folder in (".", temporary, "/tmp", "/var/tmp", "/dev/shm")} == {"written"}
    # In /proc nobody can make files; what root may change there it may not from here (see below).
    refusals = {said[folder] for folder in folders}
    assert refusals <= {"Read-only file system", "Permission denied", "No such file or directory"}, said
    assert said["/"] == "Read-only file system"
    assert temporary == f"{cwd}/tmp"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_left")
def test_temporary_folders_are_the_jobs_own_bounded_and_told(light: sandbox.Sandbox) -> None:
    name = f"sandbox-test-{os.getpid()}"
    (outside := Path("/tmp", f"{name}-outside")).touch()

    def use() -> object:
        import errno

        seen = os.listdir("/tmp")
        os.mkdir(f"/tmp/{name}")
        with open(f"/tmp/{name}/file", "w") as file:
            file.write("left")
        try:
            with open("/var/tmp/large", "wb") as file:
                for _ in range(100):
                    file.write(bytes(MIB))
            return seen, "no end"
        except OSError as error:
            return seen, errno.errorcode[error.errno or 0]

    try:
        result = run(light, use)
    finally:
        outside.unlink()
    assert result.status is Status.OK, result
    need(result, "mount_namespace")
    seen, end = result.value
    assert outside.name not in seen
    assert end == "ENOSPC"
    assert not Path("/tmp", name).exists()
    told = {leak.object for leak in result.leaks.leaks if leak.kind == "temp_file"}
    assert told == {f"/tmp/{name}/file", "/var/tmp/large"}


@pytest.mark.usefixtures("nothing_left")
def test_temporary_folders_that_are_too_deep_or_still_change_do_not_fail_the_keeper(light: sandbox.Sandbox) -> None:
    def deep_and_busy() -> None:
        import os

        for _ in range(2):
            if os.fork() == 0:
                os.chdir("/tmp")
                while True:
                    for number in range(200):
                        name = f"{os.getpid()}-{number}"
                        os.mkdir(name)
                        os.rmdir(name)
        os.chdir("/var/tmp")
        for _ in range(2500):
            os.mkdir("d")
            os.chdir("d")
        raise ValueError("the job's own error")

    result = run(light, deep_and_busy)
    need(result, "mount_namespace")
    # Not `crashed`, which it is where the keeper fails.
    assert result.status is Status.COMPILE_ERROR, result


@pytest.mark.usefixtures("nothing_left")
def test_scratch_folders_in_dev_shm_stay_in_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("/dev/shm", f"sandbox-test-{os.getpid()}")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    try:
        with sandbox.Sandbox(light_policy()) as box:
            result = run(box, lambda: (os.listdir("/dev/shm"), Path("file").write_text("x")))
            assert (result.status, result.value) == (Status.OK, ([folder.name], 1)), result
            need(result, "mount_namespace")
            assert not result.leaks.leaks
    finally:
        monkeypatch.undo()
        folder.rmdir()


@pytest.mark.usefixtures("nothing_left")
def test_other_jobs_cannot_be_seen(light: sandbox.Sandbox) -> None:
    def neighbours() -> list[str]:
        import os

        return [name for name in os.listdir("..") if name != os.path.basename(os.getcwd())]

    root = light._forkserver.root.path
    (other := root / "job-other").mkdir()
    try:
        result = run(light, neighbours)
    finally:
        other.rmdir()
    need(result, "mount_namespace")
    # The template's folder is shown, since it holds what the warm-up has built.
    assert [name.partition("-")[0] for name in result.value] == ["template"]


@pytest.mark.usefixtures("nothing_left")
def test_what_must_be_read_is_shown_where_it_lies_and_stays_as_it_is(light: sandbox.Sandbox, tmp_path: Path) -> None:
    (shown := tmp_path / "shown").mkdir()
    (shown / "code.py").write_text("answer = 42")
    (single := tmp_path / "single.h").write_text("#define ANSWER 42")
    (tmp_path / "secret").write_text("not shown")
    (link := tmp_path / "link").symlink_to(shown)
    in_tmp = any(str(tmp_path).startswith(place + "/") for place in ("/tmp", "/var/tmp"))

    def look() -> object:
        def read(path: str) -> str:
            try:
                with open(path) as file:
                    return file.read()
            except OSError as error:
                return str(error.strerror)

        try:
            with open(f"{shown}/code.py", "w") as file:
                written = file.write("answer = 0") > 0
        except OSError:
            written = False
        paths = (f"{shown}/code.py", f"{link}/code.py", str(single), f"{tmp_path}/secret")
        return [read(path) for path in paths], written

    result = run(light, look, confinement={"read": (str(shown), str(single), str(link))})
    assert result.status is Status.OK, result
    need(result, "mount_namespace")
    contents, written = result.value
    assert contents[:3] == ["answer = 42", "answer = 42", "#define ANSWER 42"]
    assert not written and (shown / "code.py").read_text() == "answer = 42"
    assert contents[3] == ("No such file or directory" if in_tmp else "not shown")


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], sandbox.Sandbox]]:
    """A sandbox in whose template a few lines have been run first, as on a host that refuses something."""
    opened: list[sandbox.Sandbox] = []

    def make(lines: str) -> sandbox.Sandbox:
        (tmp_path / "modules").mkdir()
        (tmp_path / "modules" / "another_host.py").write_text(lines)
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
        settings = ForkserverSettings(import_torch=False, preload=("faultpoints", "another_host"))
        opened.append(sandbox.Sandbox(light_policy(forkserver=settings)))
        return opened[0]

    yield make
    for box in opened:
        box.close()


REFUSE = """
import errno
from sandbox.enforce import libc
def refusing(name, number, when=lambda *arguments: True):
    true = getattr(libc, name)
    def replacement(*arguments, **settings):
        if when(*arguments):
            raise OSError(number, "refused by a test")
        return true(*arguments, **settings)
    setattr(libc, name, replacement)
"""


def where(box: sandbox.Sandbox) -> JobResult:
    def look() -> object:
        import os

        from sandbox import ledger

        kept = os.open("/dev/null", os.O_RDONLY)
        here = ledger.take(ipc=False)
        mine = os.path.exists(f"/proc/{os.getpid()}/cwd") and os.path.samefile(f"/proc/{os.getpid()}/cwd", ".")
        return mine, kept in here.fds, os.path.isdir("/tmp/.seen-from-a-job"), os.statvfs("/").f_flag & os.ST_RDONLY

    seen = Path("/tmp/.seen-from-a-job")
    seen.mkdir(exist_ok=True)
    try:
        return run(box, look)
    finally:
        seen.rmdir()


def test_where_proc_cannot_be_mounted_the_ledger_still_finds_itself(patched: Callable[[str], sandbox.Sandbox]) -> None:
    """A container whose /proc is masked."""
    box = patched(REFUSE + "refusing('mount', errno.EPERM, lambda *a: a[2] == 'proc')")
    result = where(box)
    assert result.status is Status.OK, result
    found = result.enforcement.mechanisms["pid_namespace"]
    assert found.state.value == "partial" and "/proc shows the processes of the host" in found.reason
    _, knows_its_descriptors, _, _ = result.value
    assert knows_its_descriptors


def test_a_kernel_before_5_12(patched: Callable[[str], sandbox.Sandbox]) -> None:
    result = where(patched(REFUSE + "refusing('set_read_only', errno.ENOSYS)"))
    assert result.status is Status.OK, result
    found = result.enforcement.mechanisms["mount_namespace"]
    assert found.state.value == "partial" and "Linux 5.12" in found.reason
    assert result.value[2:] == (False, 0), "the temporary folders are its own all the same"


def test_where_a_folder_cannot_be_shown_again_none_is_hidden(patched: Callable[[str], sandbox.Sandbox]) -> None:
    box = patched(REFUSE + "refusing('mount', errno.EACCES, lambda *a: str(a[1]).startswith('/var/tmp'))")
    result = where(box)
    assert result.status is Status.OK, result
    found = result.enforcement.mechanisms["mount_namespace"]
    assert found.state.value == "partial" and "no own temporary folders" in found.reason
    assert result.value[2] is True
    assert result.value[3], "the rest is read-only all the same"


def test_where_only_dev_shm_can_be_mounted_jobs_run(patched: Callable[[str], sandbox.Sandbox]) -> None:
    result = where(patched(REFUSE + "refusing('mount', errno.EACCES, lambda *a: a[1] not in ('/', '/dev/shm'))"))
    assert result.status is Status.OK, result
    found = result.enforcement.mechanisms["mount_namespace"]
    assert found.state.value == "partial" and "the rest is not read-only" in found.reason


def test_a_kernel_that_does_not_say_how_many_capabilities_it_has(patched: Callable[[str], sandbox.Sandbox]) -> None:
    """gVisor's /proc has no cap_last_cap."""
    box = patched(
        "import builtins\n"
        "real = open\n"
        "def refusing(path, *rest, **named):\n"
        "    if str(path).startswith('/proc/sys/'):\n"
        "        raise FileNotFoundError(2, 'No such file or directory')\n"
        "    return real(path, *rest, **named)\n"
        "builtins.open = refusing\n"
    )
    result = box.submit(sandbox.callable_job(os.getpid)).result(60)
    assert result.status is Status.OK, result
    assert result.enforcement.states()["capabilities"] == "enforced"


def test_without_process_ids_of_its_own_a_job_has_its_own_folders(light: sandbox.Sandbox) -> None:
    result = run(light, os.getpid, confinement={"pid_namespace": "off"})
    assert result.value > 2
    assert result.enforcement.states()["pid_namespace"] == "off"
    need(result, "mount_namespace")

    def write() -> str:
        try:
            open("/written-by-a-job", "w").close()
            return "written"
        except OSError as error:
            return str(error.strerror)

    assert run(light, write, confinement={"pid_namespace": "off"}).value == "Read-only file system"


def test_in_a_user_namespace_it_is_the_same_and_no_capability_is_left(
    patched: Callable[[str], sandbox.Sandbox],
) -> None:
    box = patched("from sandbox.enforce import namespaces\nnamespaces.is_privileged = lambda: False\n")

    def look() -> object:
        import os

        with open("/proc/self/status") as status:
            capabilities = status.read().split("CapEff:")[1].split()[0]
        return capabilities, os.getpid(), os.statvfs("/").f_flag & os.ST_RDONLY, os.statvfs(".").f_flag & os.ST_RDONLY

    result = run(box, look)
    if "no user namespace" in result.enforcement.mechanisms["pid_namespace"].reason:
        pytest.skip("no user namespaces on this host")
    assert result.status is Status.OK, result
    assert int(result.value[0], 16) == 0
    if result.enforcement.states()["mount_namespace"] == "enforced":
        assert result.value[1:] == (2, os.ST_RDONLY, 0)


def test_what_is_required_and_missing_starts_no_job(patched: Callable[[str], sandbox.Sandbox], tmp_path: Path) -> None:
    box = patched(REFUSE + "refusing('unshare', errno.EPERM, lambda flags: flags == libc.CLONE_NEWPID)")
    marker = tmp_path / "ran"
    result = run(box, marker.touch, confinement={"mount_namespace": "off"})
    assert result.status is Status.SANDBOX_ERROR
    assert "pid_namespace" in result.detail
    assert not marker.exists()


def test_a_first_process_that_fails_is_our_failure_and_ends(patched: Callable[[str], sandbox.Sandbox]) -> None:
    box = patched(
        "from sandbox.enforce import namespaces\n"
        "def fails(*arguments):\n"
        "    raise RuntimeError('a mount went wrong')\n"
        "namespaces.close_off = fails\n"
    )
    box.wait_ready()
    begin = time.monotonic()
    result = run(box, os.getpid)
    assert result.status is Status.SANDBOX_ERROR
    assert "a mount went wrong" in result.detail
    assert time.monotonic() - begin < 20
    assert eventually(lambda: not descendants(box.forkserver_pid or 0)), "it lives"


def test_a_forged_report_does_not_disturb_the_keeper(light: sandbox.Sandbox) -> None:
    """The job takes the socket of its init, where the kernel lets it, and talks to the keeper itself."""

    def forge() -> str:
        import ctypes
        import os

        libc = ctypes.CDLL(None)
        handle = os.pidfd_open(1)
        for number in range(3, 64):
            got = libc.syscall(438, handle, number, 0)
            if got >= 0:
                for words in (b"garbage", b"[]", b'{"status": "x"}', b'{"status": -1}', b'{"status": 99999999}'):
                    os.write(got, words)
        return "still here"

    result = run(light, forge)
    assert (result.status, result.value) == (Status.OK, "still here")


def test_the_paths_of_a_checkout_in_tmp_are_needed() -> None:
    """What the keeper shows again is what `paths` says, so it must name this package."""
    needed = paths.needed(os.environ, gpu=False).read
    package = str(Path(sandbox.__file__).parent)
    assert any((package + "/").startswith(path + "/") for path in needed)


def test_limits_count_no_process_of_ours(light: sandbox.Sandbox) -> None:
    def wait() -> int:
        import time

        time.sleep(0.5)  # for several looks of the watchdog
        return 1

    result = run(light, wait, limits=Limits(processes=1, threads=1))
    assert result.status is Status.OK, result


@pytest.mark.parametrize(
    "off", [(), ("pid_namespace",), ("landlock",), ("landlock", "pid_namespace"), ("mount_namespace",)]
)
def test_a_gpu_job_can_name_its_threads_and_write_nothing_else_in_proc(
    light: sandbox.Sandbox, off: tuple[str, ...]
) -> None:
    """What CUDA needs to start; seen on a GPU, where it failed with error 304 before."""

    def look() -> dict[str, bool]:
        import os
        import threading

        paths = {
            "own thread": f"/proc/self/task/{threading.get_native_id()}/comm",
            "kernel": "/proc/sys/kernel/hostname",
            "service": f"/proc/{service}/comm",
        }
        found = {}
        for name, path in paths.items():
            try:
                os.close(os.open(path, os.O_WRONLY))
                found[name] = True
            except OSError:
                found[name] = False
        return found

    service = os.getpid()
    demands: dict[str, str] = dict.fromkeys(off, "off")
    result: dict[bool, JobResult] = {}
    for gpu in (False, True):
        job = sandbox.callable_job(look, confinement=Confinement(**demands))  # type: ignore[arg-type]
        spec = job.spec.model_copy(update={"gpu": gpu})
        result[gpu] = light.submit(Job(spec, job.payload)).result(60)
        need(result[gpu], *{"mount_namespace", "landlock"} - set(off))
    assert result[True].value == {"own thread": True, "kernel": False, "service": False}
    assert result[False].value == {"own thread": False, "kernel": False, "service": False}
    if "mount_namespace" in off:
        assert result[True].enforcement.mechanisms["pid_namespace"].state.value == "unavailable"
