"""The same guarantees for users who are not root: enforcement degrades by the policy's rules, and says so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import MARK, eventually, family, held

HERE = Path(__file__).parent
NOBODY = 65534

PROGRAM = """
import contextlib, json, os, sys, time
sys.path[:0] = {path!r}
from sandbox.enforce import libc
{drop}
import faultpoints, sandbox
from sandbox import faults
from conftest import light_policy
from sandbox.limits import MIB, Confinement, Limits
LIMITS = Limits(wall_seconds=30.0, memory_bytes=2048 * MIB, processes=50, open_files=256, disk_bytes=64 * MIB,
                stderr_bytes=MIB)
def leave():
    import _multiprocessing, ctypes
    kept = _multiprocessing.SemLock(1, 1, 1, f"/sandbox-test-unprivileged-{{os.getpid()}}", False)
    libc = ctypes.CDLL(None)
    # With a value set: of a set that was never touched the kernel does not say whose it is.
    libc.semctl(libc.semget(0, 1, 0o1600), 0, 16, 1)
    time.sleep(0.6)
answers = {{}}
with sandbox.Sandbox(light_policy(allow_faults=True, forkserver=light_policy().forkserver.model_copy(
        update={{"preload": {preload!r}}}))) as box:
    for fault in ("", "sigsegv", "sigstop", "oom_slow", "fork_bomb", "disk_hog", "orphan", "garbage"):
        job = sandbox.callable_job(faultpoints.build, limits=LIMITS)
        started = time.monotonic()
        with faults.inject(fault, "child.run", into=box) if fault else contextlib.nullcontext():
            result = box.submit(job).result(30)
        answers[fault] = [result.status.value, time.monotonic() - started]
    # Landlock would keep it out of a /dev/shm that is not its own.
    result = box.submit(sandbox.callable_job(leave, confinement=Confinement(landlock="off"))).result(30)
    answers["leave"] = [result.status.value, sorted(result.leaks.counts())]
    answers["states"] = result.enforcement.states()
    answers["who"] = [os.getuid(), open("/proc/self/status").read().split("CapEff:")[1].split()[0]]
print(json.dumps(answers))
"""

STATUSES = {
    "": "ok",
    "sigsegv": "crashed",
    "sigstop": "timeout",
    "oom_slow": "memory_limit",
    "fork_bomb": "violation",
    "disk_hog": "output_limit",
    "orphan": "ok",
    "garbage": "protocol_error",
}


def interpreter_of_nobody() -> str | None:
    """An interpreter of this version that another user may run; ours may lie in a home folder."""
    for candidate in (sys.executable, shutil.which("python3.11", path="/usr/bin:/usr/local/bin"), "/usr/bin/python3"):
        if candidate is None:
            continue
        probe = subprocess.run(
            [candidate, "-c", "import sys; print(sys.version_info[:2])"], user=NOBODY, capture_output=True, text=True,
            check=False,
        ) if _may_run(candidate) else None  # fmt: skip
        if probe is not None and probe.stdout.strip() == str(sys.version_info[:2]):
            return candidate
    return None


def _may_run(path: str) -> bool:
    folder = Path(path).resolve().parent
    return all(os.stat(parent).st_mode & 0o001 for parent in (folder, *folder.parents))


def run(tmp_path: Path, drop: str, preload: tuple[str, ...], executable: str = sys.executable) -> dict[str, object]:
    search = [str(HERE), str(HERE.parent), MARK, *(entry for entry in sys.path if "site-packages" in entry)]
    program = PROGRAM.format(path=search, drop=textwrap.dedent(drop), preload=("faultpoints", *preload))
    folder = tmp_path / "their-tmp"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    before = held().posix, held().sysv, family(None)
    done = subprocess.run(
        [executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert {fault: answers[fault][0] for fault in STATUSES} == STATUSES  # type: ignore[index]
    assert answers["sigstop"][1] < 2.0 + 1.0  # type: ignore[index]
    assert answers["leave"][0] == "ok"  # type: ignore[index]
    assert not list(folder.iterdir()), "temporary files are left"
    assert eventually(lambda: (held().posix, held().sysv, family(None)) == before), (
        f"something is left: {held()} {family(None)}, before {before}"
    )
    return answers


@pytest.fixture
def no_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that makes every `unshare` fail, as in a pod without user namespaces."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "without_namespaces.py").write_text(
        "from sandbox.enforce import libc\n"
        "def refuse(flags):\n"
        "    raise PermissionError(1, 'Operation not permitted')\n"
        "libc.unshare = refuse\n"
    )
    return str(folder)


@pytest.mark.slow
def test_root_without_capabilities(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("this user has none to drop")
    answers = run(tmp_path, "libc.drop_capabilities()", ())
    assert answers["who"] == [0, "0" * 16]
    # User namespaces, where the host has them, take the place of the capabilities.
    assert answers["states"]["process_tree"] == "enforced"  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("namespaces", [True, False])
def test_another_user(tmp_path: Path, no_namespaces: str, namespaces: bool) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    executable = interpreter_of_nobody()
    if executable is None:
        pytest.skip(f"no Python {sys.version_info[0]}.{sys.version_info[1]} that another user may run")
    drop = f"""
    sys.path.insert(0, {no_namespaces!r})
    os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
    """
    answers = run(tmp_path, drop, () if namespaces else ("without_namespaces",), executable)
    assert answers["who"] == [NOBODY, "0" * 16]
    states = answers["states"]
    assert states["rlimits"] == states["no_new_privs"] == states["process_tree"] == "enforced"  # type: ignore[index]
    if not namespaces:
        assert states["mount_namespace"] == states["ipc_namespace"] == "unavailable"  # type: ignore[index]
        # What is held in the shared /dev/shm while the keeper looks is attributed all the same, and removed.
        assert answers["leave"][1] == ["posix_semaphore", "sysv_semaphore"]  # type: ignore[index]


DOCTOR = """
import os, sys
sys.path[:0] = {path!r}
if os.geteuid() == 0:
    os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
import escape_host
escape_host._refuse(landlock=True, seccomp=True)
from sandbox.cli import main
sys.exit(main(["doctor", "--policy", {policy!r}, "--json"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["strict", "default"])
def test_doctor_on_a_host_that_gives_nothing(tmp_path: Path, policy: str) -> None:
    """One sentence for each mechanism that the policy requires and the host has not; if it requires none, it works."""
    executable = interpreter_of_nobody() if os.geteuid() == 0 else sys.executable
    if executable is None:
        pytest.skip("no Python that another user may run")
    folder = tmp_path / "their-tmp"
    folder.mkdir()
    folder.chmod(0o777)
    for parent in folder.parents:
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    search = [str(HERE), str(HERE.parent), *(entry for entry in sys.path if "site-packages" in entry)]
    done = subprocess.run(
        [executable, "-c", DOCTOR.format(path=search, nobody=NOBODY, policy=policy)],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder), "HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=110, cwd=folder, check=False,
    )  # fmt: skip
    report = json.loads(done.stdout)
    missing = {"landlock", "seccomp", "ipc_namespace", "mount_namespace", "network_namespace", "pid_namespace"}
    assert {name for name in missing if report["enforcement"][name] == "unavailable"} == missing
    if policy == "default":
        assert done.returncode == 0 and report["ok"] and report["child"]["status"] == "ok", report["problems"]
        assert {name for name in missing if any(name in warning for warning in report["warnings"])} == missing
    else:
        assert done.returncode == 1 and not report["ok"]
        for name in missing:
            told = [problem for problem in report["problems"] if problem.startswith(f"The policy requires {name}")]
            assert len(told) == 1 and told[0].count(". ") == 0, (name, report["problems"])
