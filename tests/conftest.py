"""Fixtures: sandboxes with a light and with the full template, and the check that nothing is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sandbox
from sandbox import executor, ledger
from sandbox.limits import Limits
from sandbox.policy import BreakerSettings, CapsuleSettings, ForkserverSettings, Policy

HERE = Path(__file__).parent
# The template imports `faultpoints` from here; it takes over this process's search path.
sys.path.insert(0, str(HERE))
#: A mark on the search path: it stands in the command line of every template that these tests or the hosts that they
#: start bring to life, and of their forks. That is how `family` knows them.
MARK = f"/nonexistent/sandbox-tests-{os.getpid()}"
sys.path.append(MARK)
os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{MARK}"


@dataclass(frozen=True)
class Held:
    """What this process and the host hold that a job could leave behind."""

    fds: int
    posix: frozenset[str]
    sysv: frozenset[tuple[str, int]]
    children: frozenset[int]
    temporary: frozenset[str]

    def more_than(self, before: Held) -> dict[str, object]:
        """What was not there before. What was on its way to be closed then, may be gone by now."""
        names = ("posix", "sysv", "children", "temporary")
        more: dict[str, object] = {
            name: found for name in names if (found := getattr(self, name) - getattr(before, name))
        }
        return more | ({"fds": self.fds - before.fds} if self.fds > before.fds else {})


def held(pid: int | None = None) -> Held:
    """Counts and names, for a comparison before and after. Waits for what no answer waits for, standby children too."""
    for box in list(executor._OPEN):
        if not box.foreign:
            box.settle(20.0)
    now = ledger.take(pid)
    return Held(
        fds=len(now.fds),
        posix=frozenset(now.posix),
        sysv=frozenset((kind, number) for kind, number in now.sysv),
        children=frozenset(process.pid for process in now.processes.values()),
        # `torchinductor_USER` is Inductor's own: it keeps precompiled headers there when it compiles in-process.
        temporary=frozenset(n for n in os.listdir(tempfile.gettempdir()) if not n.startswith("torchinductor_")),
    )


def family(template: int | None) -> set[int]:
    """Live processes anywhere on this host that were forked from a template of these tests: they have its command
    line, which holds the search path and so the mark."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != template:
            try:
                line = Path(f"/proc/{name}/cmdline").read_bytes()
                state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"sandbox.template" in line and MARK.encode() in line and state != "Z":
                found.add(int(name))
    return found


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether ``condition`` becomes true within ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every temporary file of the tests, and Inductor's cache, in a folder of this run."""
    folder = tmp_path_factory.mktemp("tmp")
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "HOME")}
    os.environ.update(TMPDIR=str(folder), TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"))
    tempfile.tempdir = None
    yield
    tempfile.tempdir = None
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session", autouse=True)
def cache_homes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's own quarantine and capsules are not touched; those of fixtures above a test are the run's."""
    before = os.environ.get("XDG_CACHE_HOME")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    yield folder
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(autouse=True)
def _own_quarantine(cache_homes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graphs of one test have done to children decides nothing in the next one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_homes / uuid.uuid4().hex))


def light_policy(**changes: object) -> Policy:
    """A policy whose template has no torch: it starts in 0.2 s, for tests of the process machinery."""
    settings: dict[str, object] = {
        "forkserver": ForkserverSettings(import_torch=False, preload=("faultpoints",), standby=0),
        "capsule": CapsuleSettings(keep=0),
        # Small, so that many jobs of it find memory side by side.
        "limits": Limits(memory_bytes=1 << 29),
        **changes,
    }
    return Policy(name="light", environment=("PATH", "LANG", "SANDBOX_TEST_*"), **settings)


@pytest.fixture(scope="session")
def light() -> Iterator[sandbox.Sandbox]:
    """A sandbox without torch."""
    with sandbox.Sandbox(light_policy()) as one:
        one.wait_ready()
        yield one


@pytest.fixture(scope="session")
def faulty() -> Iterator[sandbox.Sandbox]:
    """A sandbox without torch whose policy allows faults."""
    # Without a circuit breaker, which would keep later faults from ever reaching a child.
    with sandbox.Sandbox(light_policy(allow_faults=True, breaker=BreakerSettings(failures=0))) as one:
        one.wait_ready()
        yield one


@pytest.fixture
def nothing_left(light: sandbox.Sandbox) -> Iterator[None]:
    """Fails the test if it leaves a descriptor, semaphore, segment, process or temporary file behind."""
    with leaves_nothing(light):
        yield


@contextlib.contextmanager
def leaves_nothing(light: sandbox.Sandbox, replaced: bool = False) -> Iterator[None]:
    """Fails if the block leaves a descriptor, semaphore, segment, process or temporary file behind. ``replaced``:
    the template dies in it; the new one holds what a fresh one does."""
    assert light.settle(30.0)  # what the job before it has left to be done
    template = light.forkserver_pid
    here, there = held(), held(template)
    root = light._forkserver.root.path
    processes = family(template)
    yield
    assert light.settle(30.0), "something is still to be done for jobs that were answered"
    now = light.forkserver_pid
    assert (now == template) is not replaced, "the template died" if not replaced else "the template lives"
    if replaced:
        here = dataclasses.replace(here, children=here.children - {template} | {now})
        processes = processes - {now}
    assert eventually(lambda: not [name for name in os.listdir(root) if name.startswith("job-")]), (
        "a scratch folder outlived its job"
    )
    assert eventually(lambda: family(now) <= processes), "a process of the job lives"

    # A keeper reports before it ends, so its end may be seen a few milliseconds later.
    assert eventually(lambda: not held().more_than(here) and not held(now).more_than(there)), (
        f"something is left: {held().more_than(here)}; of the template: {held(now).more_than(there)}"
    )
