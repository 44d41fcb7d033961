"""Fault injection as a feature: who may arm a fault, what the kinds do, and that the same seed does the same."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually, leaves_nothing, light_policy

import sandbox
from sandbox import faults, monitor
from sandbox.cli import main
from sandbox.cli.faults import Planned, judge, schedule
from sandbox.errors import PolicyError, SandboxError
from sandbox.faults.kinds import CHILD, LATE
from sandbox.policy import load, shipped
from sandbox.results import Status

#: What must become of a kind at its default point, for a job that is well otherwise.
EXPECTED = {
    **dict.fromkeys(
        ["sigsegv", "sigbus", "sigfpe", "sigill", "sigabrt", "sigkill", "sigterm", "sigsys", "sigtrap"], "crashed"
    ),
    **dict.fromkeys(["exit", "sys_exit", "lost"], "crashed"),
    **dict.fromkeys(["raise", "interrupt", "eio", "read_only"], "compile_error"),
    **dict.fromkeys(["hang", "hang_gil", "busy_loop", "sigstop", "stalled"], "timeout"),
    **dict.fromkeys(["oom_slow", "oom_sudden"], "memory_limit"),
    **dict.fromkeys(["fork_bomb", "thread_bomb", "fd_exhaustion"], "violation"),
    **dict.fromkeys(["disk_hog", "stderr_flood", "oversized", "enospc"], "output_limit"),
    **dict.fromkeys(["garbage", "truncated", "garbled", "duplicated", "foreign"], "protocol_error"),
    "unserializable": "unserializable",
    **dict.fromkeys(
        ["leak_semaphore", "leak_shm", "leak_fd", "orphan", "tracker_death", "second_thread", "delayed", "clock_jump"],
        "ok",
    ),
    "clock_skip": "ok",  # nobody has looked for an hour: that time is not the job's
    **dict.fromkeys(["closed_stdio", "sigchld_reaper", "sigchld_ignored"], "ok"),
    "read_only_tmp": "sandbox_error",
    "fd_limit": None,  # `ok` or `sandbox_error`: how many descriptors are left depends on the seed
}


def work() -> int:
    """A job that writes a file, as every compiler does."""
    import pathlib

    pathlib.Path("output").write_text("42")
    return 42


def ends(box: sandbox.Sandbox) -> Any:
    return box.submit(sandbox.callable_job(work)).result(timeout=60)


@pytest.mark.parametrize("kind", faults.KINDS)
def test_every_kind(faulty: sandbox.Sandbox, kind: str) -> None:
    ends(faulty)  # a forkserver that a fault before this one has ended is there again
    replaced = kind == "second_thread"
    with leaves_nothing(faulty, replaced=replaced):
        with faults.inject(kind, into=faulty, times=1) as injection:
            result = ends(faulty)
        assert len(injection.given) == 1
        assert EXPECTED[kind] in (result.status.value, None), result
        if result.ok:
            assert result.value == 42
        assert ends(faulty).ok, "the next job is not touched by it"
        wall = min(faults.KINDS[kind].limits.get("wall_seconds", 600.0), faulty.policy.limits.wall_seconds)
        assert kind == "clock_skip" or result.usage.wall_seconds < wall + 1.0


#: One kind for each of the ways to break a process, at every point of it where the answer is the same for all.
@pytest.mark.parametrize("point", [point for point in CHILD if point != "child.run"])
@pytest.mark.parametrize("kind", ["sigkill", "hang_gil"])
def test_the_points_of_the_worker(faulty: sandbox.Sandbox, kind: str, point: str) -> None:
    with leaves_nothing(faulty), faults.inject(kind, point, into=faulty, times=1):
        result = ends(faulty)
        if point in LATE:
            assert result.ok
        elif point == "child.spawn":
            assert result.ok, "it starts no program"
        else:
            assert result.status is (Status.CRASHED if kind == "sigkill" else Status.TIMEOUT)


@pytest.mark.parametrize("kind", ["sigsegv", "sigstop", "raise"])
@pytest.mark.parametrize("point", ["keeper.confine", "keeper.wait", "keeper.clean"])
def test_the_points_of_the_keeper(faulty: sandbox.Sandbox, kind: str, point: str) -> None:
    """A keeper that dies early is our failure, later it may be the job's; after the reply it costs nothing."""
    with leaves_nothing(faulty), faults.inject(kind, point, into=faulty, times=1):
        result = ends(faulty)
    allowed = {
        "keeper.confine": {Status.SANDBOX_ERROR if kind != "sigstop" else Status.TIMEOUT},
        "keeper.wait": {Status.OK, Status.CRASHED},
        "keeper.clean": {Status.OK},
    }
    assert result.status in allowed[point], result


@pytest.mark.parametrize("point", ["forkserver.before_fork", "forkserver.during_fork", "forkserver.after_fork"])
def test_the_points_of_the_forkserver(faulty: sandbox.Sandbox, point: str) -> None:
    ends(faulty)
    with leaves_nothing(faulty, replaced=True):
        with faults.inject("sigkill", point, into=faulty, times=1):
            assert ends(faulty).value == 42
        assert eventually(lambda: ends(faulty).ok)


def test_a_hanging_forkserver_is_replaced() -> None:
    settings = light_policy().forkserver.model_copy(update={"fork_timeout_seconds": 1.0})
    with sandbox.Sandbox(light_policy(allow_faults=True, forkserver=settings)) as box:
        with faults.inject("sigstop", "forkserver.during_fork", into=box, times=1):
            assert ends(box).value == 42
        assert box.stats().forkserver_restarts == 1


@pytest.mark.parametrize("kind", ["raise", "enospc", "eio", "read_only"])
@pytest.mark.parametrize("point", ["parent.run", "parent.folder", "parent.fork", "parent.watch", "parent.adopt"])
def test_the_points_of_the_parent(faulty: sandbox.Sandbox, kind: str, point: str) -> None:
    if point not in faults.KINDS[kind].points:
        with pytest.raises(PolicyError, match="cannot happen at"), faults.inject(kind, point, into=faulty):
            raise AssertionError("armed")
        return
    with leaves_nothing(faulty), faults.inject(kind, point, into=faulty, times=1):
        # This job hands back no files, so nothing is adopted.
        assert ends(faulty).status is (Status.OK if point == "parent.adopt" else Status.SANDBOX_ERROR)


@pytest.mark.parametrize("kind", ["truncated", "garbled", "duplicated", "foreign"])
@pytest.mark.parametrize("point", ["wire.request", "wire.started", "wire.ready", "wire.exited"])
def test_the_other_frames(faulty: sandbox.Sandbox, kind: str, point: str) -> None:
    """A broken frame is never taken for another one: the job fails, or the value is right."""
    with leaves_nothing(faulty), faults.inject(kind, point, into=faulty, times=1):
        result = ends(faulty)
    if point == "wire.exited" or (kind, point) == ("duplicated", "wire.request"):
        assert result.ok  # the reply is complete before the keeper reports; a worker reads one request only
    assert result.value == (42 if result.ok else None)
    assert result.status not in (Status.COMPILE_ERROR, Status.UNSERIALIZABLE)
    assert result.usage.wall_seconds < 30


def test_jobs_side_by_side_leave_the_host_as_it_was(faulty: sandbox.Sandbox) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE), time.time, monitor.time
    for kind in ("fd_limit", "clock_jump", "clock_skip"):
        with faults.inject(kind, "parent.run", into=faulty):
            jobs = [faulty.submit(sandbox.callable_job(work)) for _ in range(6)]
            for job in jobs:
                job.result(timeout=60)
        assert eventually(lambda: (resource.getrlimit(resource.RLIMIT_NOFILE), time.time, monitor.time) == before), kind
    assert ends(faulty).ok


def test_what_a_leaking_job_leaves_is_told(faulty: sandbox.Sandbox) -> None:
    for kind, left in (
        ("leak_semaphore", {"posix_semaphore", "sysv_semaphore"}),
        ("leak_shm", {"shared_memory"}),
        ("leak_fd", {"fd"}),
        ("orphan", {"orphan"}),
        ("tracker_death", {"tracked_resource"}),
    ):
        with faults.inject(kind, into=faulty, times=1):
            found = set(ends(faulty).leaks.counts())
        assert left & found, (kind, found)


# Who may arm a fault.


@pytest.mark.parametrize("name", shipped())
def test_no_shipped_policy_allows_faults(name: str) -> None:
    policy = load(name)
    assert not policy.allow_faults
    with sandbox.Sandbox(policy) as box:
        with pytest.raises(PolicyError, match="allow_faults = false"), faults.inject("sigsegv", into=box):
            raise AssertionError("armed")
        with pytest.raises(PolicyError, match="allow_faults = false"), faults.inject(faults.Plan(seed=1), into=box):
            raise AssertionError("armed")


def test_the_template_of_a_policy_without_faults_has_no_points(light: sandbox.Sandbox) -> None:
    """Even a fork request that names a fault has none: what would read it is not there."""
    forkserver = light._forkserver
    ask = forkserver._ask

    def with_a_fault(request: dict[str, Any], *args: Any) -> dict[str, Any]:
        return ask({**request, "fault": {"kind": "sigsegv", "point": "child.run", "seed": 0}}, *args)

    forkserver._ask = with_a_fault  # type: ignore[method-assign]
    try:
        assert ends(light).ok
    finally:
        forkserver._ask = ask  # type: ignore[method-assign]
    loaded = light.submit(sandbox.callable_job(lambda: "sandbox.faults.inside" in __import__("sys").modules)).result(30)
    assert loaded.value is False


def test_no_environment_variable_arms_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package reads none; and what is armed in this process is what `inject` has armed."""
    for path in Path(faults.__file__).parent.glob("*.py"):
        code = path.read_text().replace('os.environ["TMPDIR"]', "").replace('os.environ.pop("TMPDIR")', "")
        code = code.replace('os.environ.get("TMPDIR")', "")  # which a host state sets
        assert "environ[" not in code and "environ." not in code and "getenv" not in code, path
    for name in ("SANDBOX_FAULTS", "SANDBOX_FAULT", "SANDBOX_TEST_FAULT", "SANDBOX_ALLOW_FAULTS"):
        monkeypatch.setenv(name, "sigsegv")
    with sandbox.Sandbox(light_policy()) as box:
        assert not box.policy.allow_faults
        assert ends(box).ok


def test_bad_input_is_told(faulty: sandbox.Sandbox) -> None:
    for what, at, words in (
        ("sigseg", None, "no kind of fault 'sigseg': allowed are sigsegv"),
        ("sigsegv", "child.walk", "no injection point 'child.walk': allowed are host"),
        ("sigsegv", "wire.reply", "sigsegv cannot happen at wire.reply: allowed are child.run"),
        (faults.Plan(1, kinds=("x",)), None, "no kind of fault 'x'"),
        (faults.Plan(1, points=("x",)), None, "no injection point 'x'"),
        (faults.Plan(1, points=("host", "child.run")), None, "a state of the host is injected by the name"),
        (faults.Plan(1, kinds=("clock_jump",)), None, "no kind of the plan can happen at one of its points"),
    ):
        with pytest.raises(PolicyError, match=words), faults.inject(what, at, into=faulty):  # type: ignore[arg-type]
            raise AssertionError("armed")
    with pytest.raises(SandboxError, match="no sandbox to inject into"), faults.inject("sigsegv"):
        raise AssertionError("armed")


def test_nothing_stays_replaced(faulty: sandbox.Sandbox, light: sandbox.Sandbox) -> None:
    from sandbox import artifacts, executor, monitor, scratch
    from sandbox.forkserver import Forkserver

    def functions() -> list[Any]:
        return [executor.run, scratch.Root.folder, Forkserver.fork, Forkserver._ask, monitor._watch, artifacts.adopt,
                monitor.encode_frame, monitor.time, os.open]  # fmt: skip

    before = functions()
    with pytest.raises(ZeroDivisionError), faults.inject("sigsegv", into=faulty):
        assert functions() != before
        assert ends(light).ok, "the fault of one sandbox hit another"
        with faults.inject("hang", into=faulty):
            pass
        assert ends(faulty).status is Status.CRASHED
        raise ZeroDivisionError
    assert functions() == before
    assert ends(faulty).ok


def test_the_newest_of_several_comes_first_and_leaves_the_rest_to_the_others(faulty: sandbox.Sandbox) -> None:
    with faults.inject("exit", into=faulty, times=1) as older, faults.inject("raise", into=faulty, times=1) as newer:
        assert [ends(faulty).status.value for _ in range(3)] == ["compile_error", "crashed", "ok"]
    assert len(older.given) == len(newer.given) == 1


# The same seed does the same.


def test_a_plan_is_reproducible(faulty: sandbox.Sandbox) -> None:
    plan = faults.Plan(seed=7, kinds=("sigsegv", "exit", "raise", "garbled", "oom_sudden"), rate=0.6)

    def run() -> tuple[list[str], list[str]]:
        with faults.inject(plan, into=faulty) as injection:
            statuses = [ends(faulty).status.value for _ in range(12)]
        return statuses, [str(shot) for shot in injection.given]

    first, second = run(), run()
    assert first == second
    assert 0 < len(first[1]) < 12 and len(set(first[0])) > 2
    sequences = [[plan.shot(n) for plan in [faults.Plan(seed)] for n in range(1000)] for seed in (1, 1, 2)]
    assert sequences[0] == sequences[1] != sequences[2]
    assert {shot.point for shot in sequences[0] if shot} == set(faults.Plan(1).points)


@pytest.fixture(autouse=True)
def _alive(faulty: sandbox.Sandbox) -> Iterator[None]:
    """A test begins with a template that lives."""
    faulty.wait_ready()
    yield


# In the tests of users.

USERS_TEST = """
import pytest
import sandbox
from sandbox.policy import ForkserverSettings, Policy

@pytest.fixture(scope="module")
def box():
    policy = Policy(allow_faults={allowed}, forkserver=ForkserverSettings(import_torch=False))
    with sandbox.Sandbox(policy) as box:
        yield box

def status(box):
    return box.submit(sandbox.callable_job(lambda: 1)).result(60).status.value

def test_a_crash(box, sandbox_faults):
    injection = sandbox_faults("sigsegv", into=box, times=1)
    assert [status(box), status(box)] == ["crashed", "ok"]
    assert [str(shot) for shot in injection.given] == ["sigsegv at child.run"]
    sandbox_faults("exit", into=box)

def test_the_next_one_has_no_fault(box):
    assert status(box) == "ok"
"""


@pytest.mark.parametrize("allowed", [True, False])
def test_the_plug_in(tmp_path: Path, allowed: bool) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["sandbox.faults.pytest"]\n')
    (tmp_path / "test_users.py").write_text(USERS_TEST.format(allowed=allowed))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    if allowed:
        assert "2 passed" in done.stdout, done.stdout
    else:
        assert "1 failed, 1 passed" in done.stdout and "allow_faults = false" in done.stdout, done.stdout
    without = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert "fixture 'sandbox_faults' not found" in without.stdout, "it is loaded by itself"


# The campaign.


def campaign(*words: str, seconds: float = 110) -> tuple[dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "sandbox", "faults", "--json", *words], capture_output=True, text=True, timeout=seconds
    )
    document = json.loads(done.stdout) if done.stdout else {}
    assert done.returncode == (1 if document.get("problems") else 0 if document else 2), done.stderr
    return document, done.stderr


def test_a_campaign_with_jobs_without_torch_twice_with_the_same_seed() -> None:
    words = ("--light", "--count", "60", "--seed", "5", "--hosts", "2")
    first, second = campaign(*words)[0], campaign(*words)[0]
    for document in (first, second):
        assert ours(document["problems"]) == []
        assert document["host_deaths"] == [] and document["worst_late_seconds"] < 1.0
        assert sum(row["faults"] for row in document["table"].values()) == 60
        # If the faults had been given and not happened, this would have shown nothing.
        table = document["table"]
        died = [table[kind]["children"] for kind in table if kind.startswith("sig") and not kind.startswith("sigchld")]
        assert sum(row.get("crashed", 0) for row in died) > 0
        assert any("protocol_error" in row["children"] for row in table.values())
    assert first["table"] == second["table"]
    assert first["digest"] == second["digest"]


def ours(problems: list[str]) -> list[str]:
    """Without what other programs of this machine have made in /dev/shm and SysV meanwhile, which a campaign tells."""
    return [problem for problem in problems if not problem.startswith(("/dev/shm", "SysV"))]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_campaign_with_real_compiles() -> None:
    kinds = "sigsegv,sigkill,raise,exit,oom_sudden,garbled,duplicated,truncated,foreign,unserializable,enospc,leak_shm"
    document = campaign("--count", "16", "--seed", "2", "--hosts", "1", "--kinds", kinds, seconds=290)[0]
    assert ours(document["problems"]) == []
    answers = [name for row in document["table"].values() for name in row["answers"]]
    assert set(answers) == {"in_child", "eager"}
    assert all(row["wrong"] == 0 for row in document["table"].values())


def test_a_schedule_follows_from_the_seed() -> None:
    one, again, other = (schedule(seed, 2000, tuple(faults.KINDS)) for seed in (1, 1, 2))
    assert one == again != other
    assert {shot[1] for shot in one} == set(faults.KINDS)
    assert {shot[2] for shot in one} == set(faults.POINTS)


def test_what_the_command_calls_a_problem() -> None:
    shots: list[Planned] = [(n, "sigsegv", "child.run", 0, 1) for n in range(8)]
    fine = {"statuses": ["crashed"], "steps": ["first"], "answer": "eager", "seconds": 1.0, "besides": 0.2, "late": 0.9,
            "leaks": [], "given": 1, "right": True, "error": "", "details": []}  # fmt: skip
    answers = {0: fine, 1: {**fine, "late": 1.1}, 2: {**fine, "leaks": ["fd 7"]}, 3: {**fine, "right": False},
               4: {**fine, "error": "OSError: x"}, 6: {**fine, "given": 0}, 7: {**fine, "besides": 21.0}}  # fmt: skip
    problems = judge(shots, answers)
    assert len(problems) == 7
    for number, words in (
        (1, "past the deadline"),
        (2, "holds fd 7"),
        (3, "a wrong"),
        (4, "OSError"),
        (5, "no answer"),
        (6, "no job had it"),
        (7, "21.0 s besides its jobs"),
    ):
        assert any(problem.startswith(f"fault {number},") and words in problem for problem in problems)


def test_bad_input_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--kinds", "sigsegv,x"], "no kind of fault 'x'"), (["--count", "0"], "at least 1")):
        with pytest.raises(SystemExit) as caught:
            main(["faults", *words])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert main(["faults", "--list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(faults.KINDS)


@pytest.mark.timeout(250)
def test_the_forkserver_is_killed_at_random_moments_and_every_job_is_answered() -> None:
    """`sandbox faults --forkserver-kills 200 --light` does it 200 times, without --light with real compiles."""
    document = campaign("--forkserver-kills", "60", "--light", seconds=240)[0]
    assert ours(document["problems"]) == []
    assert document["kills"] == 60 and document["restarts"] >= 50
    assert document["jobs"] == sum(document["statuses"].values())
    assert set(document["statuses"]) <= {"ok", "sandbox_error"}, "sandbox_error: it died three times under the job"
    assert document["statuses"]["ok"] > document["jobs"] * 0.5
