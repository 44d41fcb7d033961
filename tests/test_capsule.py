"""Crash capsules: what a failed job leaves, what is never in it, and that one from elsewhere can do no harm."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faultpoints
import pytest
from conftest import eventually, light_policy
from test_cli import call

import sandbox
from sandbox import capsule, faults, jobs
from sandbox.cli.replay import same
from sandbox.errors import CapsuleError, PolicyError
from sandbox.limits import MIB, Confinement, Limits
from sandbox.policy import CapsuleSettings, Policy, load, parse
from sandbox.results import KILLERS, JobResult, LeakReport, Status, Usage

LIMITS = Limits(wall_seconds=1.5, memory_bytes=512 * MIB, processes=50)
#: For `sandbox replay`: no torch, so that it starts at once.
LIGHT = "[forkserver]\nimport_torch = false\n[limits]\nwall_seconds = 5.0\n"


def leaving(folder: Path, **changes: Any) -> Policy:
    return light_policy(allow_faults=True, capsule=CapsuleSettings(folder=str(folder), **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "capsules"


@pytest.fixture
def box(folder: Path) -> Iterator[sandbox.Sandbox]:
    with sandbox.Sandbox(leaving(folder)) as one:
        yield one


def run(box: sandbox.Sandbox, fault: str = "", at: str = "child.run", **more: str) -> JobResult:
    environment = {**box.environment(), **more}
    job = sandbox.callable_job(faultpoints.build, limits=LIMITS, environment=environment)
    with faults.inject(fault, at, into=box) if fault else contextlib.nullcontext():
        return box.submit(job).result(60)


def written(result: JobResult) -> Path:
    assert result.capsule, f"{result.status} leaves none"
    assert eventually(Path(result.capsule).is_dir, 30), "the capsule was not written"
    return Path(result.capsule)


def crash(box: sandbox.Sandbox, function: Callable[[], Any] | None = None, **more: Any) -> Path:
    def segfault() -> None:  # here, so that it travels by value: a replay cannot import this module
        ctypes.string_at(0)

    function = function or segfault
    return written(box.submit(sandbox.callable_job(function, limits=LIMITS, **more)).result(60))


# What is left.


def test_a_crash_leaves_all_that_is_needed_to_see_it_again(box: sandbox.Sandbox, folder: Path) -> None:
    result = run(box, "sigsegv")
    left = written(result)
    assert left.parent == folder
    assert sorted(os.listdir(left)) == [
        "capsule.json", "outcome.json", "payload.bin", "spec.json", "stack.txt", "stderr.txt",
    ]  # fmt: skip
    for path in (left, folder):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in left.iterdir())
    found = capsule.read(left, MIB)
    assert found.outcome == result.model_copy(update={"stderr_tail": "", "capsule": ""})
    assert found.outcome.enforcement.states()["process_tree"] == "enforced"
    assert found.spec.limits == LIMITS
    assert found.spec.job_id == result.job_id
    assert (left / "stderr.txt").read_text() == result.stderr_tail
    stack = (left / "stack.txt").read_text()
    assert stack.startswith("Fatal Python error: Segmentation fault") and "faults/kinds.py" in stack
    assert {"torch", "triton", "python", "kernel", "torch-compile-sandbox"} <= set(found.about.versions)
    assert box.stats().jobs[-1].capsule == str(left)


def test_a_hang_leaves_the_stack_of_what_hung(box: sandbox.Sandbox) -> None:
    result = run(box, "busy_loop")
    assert result.status is Status.TIMEOUT
    assert "in _busy" in (written(result) / "stack.txt").read_text()


def test_a_hang_that_holds_the_gil_does_too(box: sandbox.Sandbox) -> None:
    def hold() -> None:
        ctypes.PyDLL(None).sleep(60)

    left = crash(box, hold)
    assert capsule.read(left, MIB).outcome.status is Status.TIMEOUT
    assert "in hold" in (left / "stack.txt").read_text()


def test_a_worker_that_is_stopped_or_ignores_the_question_is_killed_all_the_same(box: sandbox.Sandbox) -> None:
    def deaf() -> None:
        import signal

        signal.signal(signal.SIGQUIT, signal.SIG_IGN)
        time.sleep(60)

    def frail() -> None:
        import signal

        signal.signal(signal.SIGQUIT, signal.SIG_DFL)
        time.sleep(60)

    started = time.monotonic()
    assert run(box, "sigstop").status is Status.TIMEOUT
    for function in (deaf, frail):
        assert capsule.read(crash(box, function), MIB).outcome.status is Status.TIMEOUT
    assert time.monotonic() - started < 3 * (LIMITS.wall_seconds + 10)


@pytest.mark.parametrize("fault", ["", "raise"])
def test_what_went_well_or_is_the_programs_error_leaves_none(box: sandbox.Sandbox, folder: Path, fault: str) -> None:
    assert run(box, fault).capsule == ""
    assert not folder.exists()


def test_the_policy_chooses(folder: Path) -> None:
    with sandbox.Sandbox(leaving(folder, statuses=(Status.COMPILE_ERROR,))) as box:
        assert run(box, "sigsegv").capsule == ""
        found = capsule.read(written(run(box, "raise")), MIB)
    assert found.outcome.failure is not None and found.outcome.failure.message == "injected"


def test_production_leaves_none_unless_asked_to() -> None:
    assert [load(name).capsule.keep for name in ("default", "ci", "production", "strict")] == [20, 20, 0, 0]
    assert {*KILLERS, Status.PROTOCOL_ERROR} == set(CapsuleSettings().statuses)
    with pytest.raises(PolicyError, match="only failures leave a capsule"):
        parse('[capsule]\nstatuses = ["ok"]')
    with pytest.raises(PolicyError, match=r"capsule\.folder"):
        parse('[capsule]\nfolder = "here"')


def test_the_default_folder_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert capsule.folder_of(CapsuleSettings()) == Path("/elsewhere/torch-compile-sandbox/capsules")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/someone")
    assert capsule.folder_of(CapsuleSettings()) == Path("/home/someone/.cache/torch-compile-sandbox/capsules")
    assert capsule.folder_of(CapsuleSettings(folder="~/here")) == Path("/home/someone/here")


# What is never in it.


def test_no_secret_is_in_any_file(box: sandbox.Sandbox) -> None:
    def tell() -> None:
        import os
        import sys

        print(f"my token is {os.environ['SANDBOX_TEST_API_TOKEN']}", file=sys.stderr, flush=True)
        print(f"from {os.environ['SANDBOX_TEST_INDEX']}", file=sys.stderr, flush=True)
        os.abort()

    environment = {
        **box.environment(),
        "SANDBOX_TEST_API_TOKEN": "hunter2hunter2",
        "SANDBOX_TEST_INDEX": "https://me:swordfish@example.org/simple",
        "SANDBOX_TEST_PASSWORD": "tiny",
    }
    left = crash(box, tell, environment=environment)
    text = b"".join(path.read_bytes() for path in left.iterdir())
    assert b"hunter2" not in text and b"swordfish" not in text
    assert "my token is <removed>" in (left / "stderr.txt").read_text()
    recorded = json.loads((left / "spec.json").read_text())["environment"]
    assert recorded["SANDBOX_TEST_API_TOKEN"] == recorded["SANDBOX_TEST_PASSWORD"] == "<removed>"
    assert recorded["SANDBOX_TEST_INDEX"] == "https://<removed>@example.org/simple"
    assert recorded["PATH"] == os.environ["PATH"]
    job = capsule.read(left, MIB).job(light_policy())
    assert "SANDBOX_TEST_API_TOKEN" not in job.spec.environment, "a mark is no value"


def test_a_payload_that_is_too_large_is_left_out_and_the_capsule_says_so(folder: Path) -> None:
    with sandbox.Sandbox(leaving(folder, max_bytes=MIB)) as box:
        job = sandbox.callable_job(lambda data: os._exit(3), bytes(2 * MIB), limits=LIMITS)
        left = written(box.submit(job).result(60))
    assert not (left / "payload.bin").exists()
    with pytest.raises(CapsuleError, match=r"holds no payload.*bytes, capsule.max_bytes = 1048576"):
        capsule.read(left, 10 * MIB)


# How it is written.


def test_the_oldest_are_removed_and_what_is_not_ours_stays(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    for name in (
        "20200101T000000Z-job-000000000001",
        "20990101T000000Z-job-000000000002",
        "notes",
        ".half-1-x",
        ".half-2-y",
    ):
        (folder / name).mkdir()
    os.utime(folder / ".half-1-x", (0, 0))
    with sandbox.Sandbox(leaving(folder, keep=2)) as box:
        newest = written(run(box, "sigsegv"))
    assert {path.name for path in folder.iterdir()} == {
        "notes", ".half-2-y", newest.name, "20990101T000000Z-job-000000000002"
    }  # fmt: skip


def test_many_at_once_are_each_whole(folder: Path) -> None:
    job = sandbox.callable_job(os.getpid)
    about = capsule.About(created=datetime.now(UTC), policy="p", name="n", step="first", versions={})
    result = JobResult(job_id=job.spec.job_id, status=Status.CRASHED, leaks=LeakReport(job_id=job.spec.job_id))
    problems: list[BaseException] = []

    def writer(number: int) -> None:
        for round_ in range(20):
            place = folder / f"20260101T0000{round_:02}Z-job-{number:012}"
            try:
                capsule.write(place, job.spec, job.payload, result, about, CapsuleSettings(keep=5))
            except BaseException as error:
                problems.append(error)

    threads = [threading.Thread(target=writer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    names = os.listdir(folder)
    assert len(names) == 5 and all(name.startswith("20260101T000019Z") or "18Z" in name for name in names)
    for name in names:
        assert capsule.read(folder / name, MIB).payload == job.payload


@pytest.mark.parametrize("obstacle", ["file", "link", "shared", "full"])
def test_a_folder_that_cannot_take_it_costs_the_capsule_only(
    folder: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if obstacle == "file":
        folder.write_text("")
    elif obstacle == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif obstacle == "shared":
        folder.mkdir()
        folder.chmod(0o777)
    else:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(capsule.os, "rename", full)
    told: list[str] = []
    monkeypatch.setattr(capsule.log, "warning", lambda text, *values: told.append(text % values))
    with sandbox.Sandbox(leaving(folder)) as box:
        for _ in range(2):
            assert run(box, "sigsegv").status is Status.CRASHED
        assert eventually(lambda: sum(box.stats().swallowed.values()) == 2, 30), box.stats().swallowed
    assert len(told) == 1 and "a crash capsule cannot be written" in told[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_dir() and "job-" in path.name]


def test_a_disk_that_hangs_delays_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        hanging.set()
        go_on.wait(60)

    monkeypatch.setattr(capsule, "write", hang)
    with sandbox.Sandbox(leaving(folder)) as box:
        try:
            for _ in range(capsule.BACKLOG + 3):
                assert run(box, "sigsegv").status is Status.CRASHED
            assert hanging.is_set()
            assert eventually(lambda: box.stats().swallowed == {"CapsuleError": 2}), box.stats().swallowed
        finally:
            go_on.set()


def test_closing_waits_for_what_is_being_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, written = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        time.sleep(0.3)
        written.set()

    monkeypatch.setattr(capsule, "write", slow)
    with sandbox.Sandbox(leaving(folder)) as box:
        assert run(box, "sigsegv").status is Status.CRASHED
        assert begun.wait(30)
    assert written.is_set()


def test_without_a_thread_for_it_the_capsule_is_lost_and_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems: list[BaseException] = []
    writer = capsule.Writer(leaving(folder), problems.append)
    job = sandbox.callable_job(os.getpid)
    result = JobResult(job_id=job.spec.job_id, status=Status.CRASHED, leaks=LeakReport(job_id=job.spec.job_id))
    result = result.model_copy(update={"capsule": str(writer.place(result))})

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        writer.leave(job, result, "n", "first")
    assert [str(problem) for problem in problems] == ["can't start new thread"]
    writer.leave(job, result, "n", "first")
    writer.close(30)
    assert os.listdir(folder) == [Path(result.capsule).name] and len(problems) == 1


# From elsewhere.


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with sandbox.Sandbox(leaving(tmp_path_factory.mktemp("crashed") / "capsules")) as box:
        return crash(box)


@pytest.fixture
def copied(crashed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crashed, tmp_path / "capsule"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _deep(path: Path) -> None:
    path.write_text("[" * 100_000 + "]" * 100_000)


def _giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.rename(path.with_name("real"))
    path.symlink_to("real")


def _hard_link(path: Path) -> None:
    os.link(path, path.parent.parent / "another-name")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _gone(path: Path) -> None:
    path.unlink()


def _binary(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


def _foreign(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)


HARM = [_deep, _giant, _fifo, _link, _hard_link, _folder, _device, _gone, _binary, _foreign]


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["capsule.json", "spec.json", "outcome.json", "payload.bin"])
def test_a_file_that_is_not_what_it_should_be_is_refused(copied: Path, name: str, harm: Callable[[Path], None]) -> None:
    harm(copied / name)
    with pytest.raises(CapsuleError) as caught:
        capsule.read(copied, MIB)
    assert len(str(caught.value)) < 5000


def test_the_folder_itself(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(copied)
    for wrong in (tmp_path / "link", tmp_path / "link/", tmp_path / "absent", copied / "spec.json"):
        with pytest.raises(CapsuleError, match="not a capsule"):
            capsule.read(wrong, MIB)
    _foreign(copied)
    with pytest.raises(CapsuleError, match="belongs to another user"):
        capsule.read(copied, MIB)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("spec.json", {"job_id": "../../../etc/passwd"}, "job_id"),
        ("spec.json", {"job_id": "job-\n12345678"}, "job_id"),
        ("spec.json", {"payload_sha256": "0" * 64}, "SHA-256"),
        ("spec.json", {"payload_bytes": 5}, "more than 5 bytes"),
        ("spec.json", {"payload_bytes": 1 << 60}, "the spec says"),
        ("spec.json", {"kind": "shell"}, "kind"),
        ("spec.json", {"scratch": "/etc"}, "scratch"),
        ("spec.json", {"environment": {"A=B": "x"}}, "environment"),
        ("outcome.json", {"status": "ok"}, "a job that failed"),
        ("outcome.json", {"status": "fine"}, "status"),
        ("outcome.json", {"usage": {"peak_memory_bytes": 10**400}}, "peak_memory_bytes"),
        ("capsule.json", {"schema_version": 2}, "schema_version"),
        ("capsule.json", {"versions": {"torch": "9" * 1000}}, "versions"),
    ],
)
def test_a_word_that_is_not_allowed_is_refused(copied: Path, name: str, values: dict[str, Any], told: str) -> None:
    change(copied / name, **values)
    with pytest.raises(CapsuleError, match=told):
        capsule.read(copied, MIB)


def test_a_capsule_cannot_ask_for_more_than_the_policy_gives(copied: Path) -> None:
    change(
        copied / "spec.json",
        limits={"wall_seconds": 86_400.0, "memory_bytes": 1 << 50, "processes": 10, "payload_bytes": 1 << 40},
        confinement={name: "off" for name, demand in Confinement() if demand in ("prefer", "require")},
        environment={"LD_PRELOAD": "/tmp/evil.so", "PATH": "/bin", "PYTHONPATH": "/tmp"},
        gpu=True,
        result_globals=["os:system"],
    )
    policy = light_policy(gpu=False, limits=Limits(memory_bytes=1 << 29, cores=2.0))
    spec = capsule.read(copied, MIB).job(policy).spec
    assert isinstance(spec, jobs.CallableSpec)
    assert spec.limits == policy.limits.model_copy(update={"processes": 10})
    assert spec.confinement == policy.confinement
    assert spec.environment == {"PATH": "/bin"}
    assert spec.gpu is False and spec.result_globals == ()
    assert spec.job_id != capsule.read(copied, MIB).spec.job_id


def test_reading_unpickles_nothing(copied: Path) -> None:
    evil = b"cos\n_exit\n(I0\ntR."
    (copied / "payload.bin").write_bytes(evil)
    change(copied / "spec.json", payload_bytes=len(evil), payload_sha256=jobs.digest(evil))
    with sandbox.Sandbox(light_policy()) as box:
        result = box.submit(capsule.read(copied, MIB).job(box.policy)).result(60)
    assert (result.status, result.exit_code) == (Status.CRASHED, 0)  # it ended a child


# sandbox replay


def replay(tmp_path: Path, left: Path, *words: str) -> tuple[int, str, str]:
    (tmp_path / "light.toml").write_text(LIGHT)
    done = call("replay", str(left), "--policy", "light.toml", *words, cwd=tmp_path)
    return done.returncode, done.stdout, done.stderr


def test_a_segfault_segfaults_again(copied: Path, tmp_path: Path) -> None:
    before = sorted(os.listdir(copied))
    code, out, errors = replay(tmp_path, copied, "--json")
    assert (code, errors) == (0, "")
    document = json.loads(out)
    assert document["reproduced"] is True
    assert document["recorded"]["signal"] == document["now"]["signal"] == "SIGSEGV"
    assert "Segmentation fault" in document["stack"]
    assert sorted(os.listdir(copied)) == before
    assert not list((tmp_path / "tmp").iterdir()), "a replay leaves nothing"
    code, out, _ = replay(tmp_path, copied)
    assert code == 0 and "reproduced: it ended as recorded" in out


def test_what_does_not_happen_again_is_told(tmp_path: Path, folder: Path) -> None:
    """The fault was in the environment of the template, which the replay does not have."""
    with sandbox.Sandbox(leaving(folder)) as box:
        left = written(run(box, "sigsegv", "child.send_reply"))
    (tmp_path / "modules").mkdir()
    code, out, errors = replay(tmp_path, left, "--json")
    assert (code, errors) == (1, "")
    assert json.loads(out)["now"]["status"] in ("ok", "unserializable")
    assert json.loads(out)["reproduced"] is False


def test_a_hostile_capsule_cannot_steer_the_terminal(copied: Path, tmp_path: Path) -> None:
    change(copied / "outcome.json", detail="\x1b[2J[red]gone[/red]", signal="\x1b]0;owned\x07")
    change(copied / "capsule.json", versions={"\x1b[31m": "\x1b[31m"}, policy="\x1b[31m")
    for words in ((), ("--json",)):
        code, out, errors = replay(tmp_path, copied, *words)
        assert code == 1, errors
        assert "\x1b" not in out + errors and "\x07" not in out + errors
        assert words or "[red]gone[/red]" in out


def test_bad_input_is_one_readable_line_and_status_2(copied: Path, tmp_path: Path) -> None:
    _fifo(copied / "payload.bin")
    code, out, errors = replay(tmp_path, copied)
    assert (code, out) == (2, "") and errors.startswith("sandbox: error: ") and errors.count("\n") == 1
    assert replay(tmp_path, tmp_path / "absent")[0] == 2


def test_what_counts_as_the_same() -> None:
    def result(status: Status, **fields: Any) -> JobResult:
        return JobResult(job_id="job-00000000", status=status, leaks=LeakReport(job_id="job-00000000"), **fields)

    crashed = result(Status.CRASHED, signal="SIGSEGV")
    assert same(crashed, result(Status.CRASHED, signal="SIGSEGV", usage=Usage(wall_seconds=9.0)))
    assert not same(crashed, result(Status.CRASHED, signal="SIGABRT"))
    assert not same(result(Status.CRASHED, exit_code=1), result(Status.CRASHED, exit_code=2))
    assert not same(crashed, result(Status.OK))
    # Of these the signal is the watchdog's, or an allocation failed before it looked.
    assert same(result(Status.MEMORY_LIMIT, signal="SIGKILL"), result(Status.MEMORY_LIMIT, exit_code=123))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_inductor_graph_that_was_killed_compiles_without_the_fault(tmp_path: Path, folder: Path) -> None:
    """A real graph, killed by a fault of the test's template, replayed in a template without it."""
    import torch

    policy = Policy(
        name="killing",
        allow_faults=True,
        forkserver=Policy().forkserver.model_copy(update={"warm_up": False}),
        capsule=CapsuleSettings(folder=str(folder)),
        ladder=Policy().ladder.model_copy(update={"crashed": ("raise",)}),
    )
    torch.compiler.reset()
    sandbox.install(policy)
    try:
        compiled = torch.compile(lambda x: torch.relu(x @ x).sum(0) * 3.25)
        with pytest.raises(Exception) as caught, faults.inject("sigsegv"):
            compiled(torch.randn(17, 17))
        rows = sandbox.stats().jobs
    finally:
        sandbox.uninstall()
        torch.compiler.reset()
    left = Path(rows[-1].capsule)
    assert eventually(left.is_dir, 30)
    assert f"to run it again: sandbox replay {left}" in str(caught.value)
    (tmp_path / "torch.toml").write_text("[forkserver]\nwarm_up = false\n")
    done = call("replay", str(left), "--policy", "torch.toml", "--json", cwd=tmp_path, seconds=240)
    assert done.returncode == 1, done.stderr
    document = json.loads(done.stdout)
    assert document["recorded"]["signal"] == "SIGSEGV"
    assert document["now"]["status"] == "ok", document
    assert not (tmp_path / "cache").exists(), "what a replay makes is thrown away"
