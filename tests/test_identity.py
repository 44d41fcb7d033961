"""Who a worker is: without capabilities, and another user where the policy names one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from confined import need_root, run_script
from conftest import MARK, eventually, family, light_policy
from test_unprivileged import NOBODY, interpreter_of_nobody

import sandbox
from sandbox import artifacts
from sandbox.errors import EnforcementError, WireError
from sandbox.limits import Confinement, Limits

HERE = Path(__file__).parent


@pytest.mark.parametrize("no_new_privs", ["require", "off"])
def test_a_worker_of_root_has_no_capability_and_gets_none_back(no_new_privs: str) -> None:
    need_root()
    state, sets, again, denied = run_script(
        f"""
        def job():
            confinement = Confinement(no_new_privs="{no_new_privs}", landlock="off", seccomp="off")
            state = states(confine_worker(confinement, Limits()))["capabilities"]
            sets = [status(name) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
            try:
                libc.prctl(libc.PR_CAP_AMBIENT, 2)
            except OSError:
                pass
            look = "print(open('/proc/self/status').read().split('CapEff:')[1].split()[0])"
            again = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True).stdout.strip()
            denied = []
            for call in (lambda: os.chown("/", 0, 0) or os.setuid(1), lambda: os.mknod("/tmp/sandbox-x", 0o20600, 259),
                         lambda: os.setgroups([1]), lambda: os.nice(-5)):
                try:
                    call()
                except OSError as error:
                    denied.append(errno.errorcode[error.errno])
            return [state, sets, again, denied]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert state == ["enforced", ""]
    assert set(sets) == {"0" * 16}
    assert again == "0" * 16, "an exec as root brings them back"
    assert denied == ["EPERM", "EPERM", "EPERM", "EACCES"] or denied == ["EPERM"] * 4


def test_without_the_right_to_empty_the_bounding_set() -> None:
    """Another user in a user namespace's stead: what is left could come back by a set-uid program alone."""
    need_root()
    with_, without = run_script(
        """
        def look(no_new_privs):
            def job():
                become_nobody()
                off = Confinement(no_new_privs=no_new_privs, landlock="off", seccomp="off")
                return [*states(confine_worker(off, Limits()))["capabilities"], int(status("CapBnd"), 16) != 0]
            return in_child(job)[0]
        print(json.dumps([look("require"), look("off")]))
        """
    )
    assert with_ == ["enforced", "", True]
    assert without[0] == "partial" and "set-uid" in without[1]


def test_a_kernel_that_keeps_them_is_told() -> None:
    state, raised = run_script(
        """
        libc.drop_capabilities = lambda: None
        privileges._capabilities = lambda: {"CapEff": 5, "CapBnd": 0}
        def job():
            state = states(confine_worker(Confinement(), Limits()))["capabilities"]
            try:
                confine_worker(Confinement(capabilities="require"), Limits())
            except EnforcementError as error:
                return [state, str(error)]
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert state[0] == "unavailable" and "CapEff" in state[1]
    assert "required by the policy" in raised and "capabilities" in raised


@pytest.mark.parametrize(
    ("name", "words"),
    [("no-such-user-here", "no such user"), ("root", "that is root"), ("0", "that is root")],
)
def test_a_user_who_cannot_be_had_is_refused_before_anything_starts(name: str, words: str) -> None:
    before = family(None)
    with pytest.raises(EnforcementError, match=words):
        sandbox.Sandbox(light_policy(confinement=Confinement(run_as=name)))
    assert family(None) == before


def test_a_service_without_the_right_is_refused_with_what_it_lacks() -> None:
    need_root()
    said = run_script(
        """
        from sandbox.enforce import identity
        def job():
            become_nobody()
            try:
                identity.user_of(Confinement(run_as="daemon"))
            except EnforcementError as error:
                return str(error)
        print(json.dumps(in_child(job)[0]))
        """
    )
    assert "may not become another user; it lacks CAP_CHOWN" in said and "CAP_SETUID" in said


def test_a_user_who_cannot_read_the_code_is_told_which(tmp_path: Path) -> None:
    need_root()
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    (closed / "torch.py").write_text("")
    said = run_script(
        """
        sys.path.insert(0, sys.argv[1]); import torch
        from sandbox.enforce import identity
        access = os.access
        os.access = lambda path, mode: True if "home" not in path or path.startswith("/root") else access(path, mode)
        def job():
            try:
                confine_worker(Confinement(run_as="65534"), Limits())
            except EnforcementError as error:
                return str(error)
        print(json.dumps(in_child(job)[0]))
        """,
        str(closed),
    )
    assert f"cannot read {closed}/torch.py" in said and "Install Python and the packages elsewhere" in said


PROGRAM = """
import json, os, pathlib, sys
sys.path[:0] = {path!r}
import sandbox
from conftest import light_policy
from sandbox.limits import Confinement, Limits, MIB
def who():
    folder = "artifacts/inductor/ab"
    os.makedirs(folder)
    open(folder + "/kernel.so", "w").write("kernel")
    own = os.stat("."), os.stat(folder + "/kernel.so")
    return [os.getresuid(), os.getresgid(), os.getgroups(), [each.st_uid for each in own],
            os.listdir("/proc/self/fd") != [], open("/proc/self/status").read().split("CapEff:")[1].split()[0]]
def tell(function, *arguments):
    try:
        function(*arguments)
        return "done"
    except OSError as error:
        return error.errno
def reach(service):
    import signal
    return [tell(os.kill, service, 0), tell(open, f"/proc/{{service}}/environ"), tell(os.listdir, "..")]
def hog():
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1024)) * 8192)
bare = Confinement(run_as={user!r}, landlock="off", seccomp="off", pid_namespace="off", mount_namespace="off")
policy = light_policy(confinement=Confinement(run_as={user!r}))
with sandbox.Sandbox(policy, cache={{"inductor": pathlib.Path("cache")}}) as box:
    first = box.submit(sandbox.callable_job(who)).result(60)
    second = box.submit(sandbox.callable_job(reach, os.getpid(), confinement=bare)).result(60)
    third = box.submit(sandbox.callable_job(hog, limits=Limits(memory_bytes=128 * MIB))).result(60)
    root = box._forkserver.root.path
print(json.dumps([[r.status.value, r.detail, r.value, r.leaks.counts()] for r in (first, second, third)]
                 + [os.stat("cache/ab/kernel.so").st_uid, root.exists(), first.enforcement.states()]))
"""


@pytest.mark.parametrize("user", ["nobody", "12345"])
def test_workers_of_another_user(user: str, tmp_path: Path) -> None:
    need_root()
    executable = interpreter_of_nobody()
    if executable is None:
        pytest.skip(f"no Python {sys.version_info[0]}.{sys.version_info[1]} that another user may run")
    search = [str(HERE), str(HERE.parent), MARK, *(entry for entry in sys.path if "site-packages" in entry)]
    folder = tmp_path / "tmp"
    folder.mkdir()
    for parent in (folder, *folder.parents):
        if parent.owner() == "root" and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    before = family(None)
    done = subprocess.run(
        [executable, "-c", textwrap.dedent(PROGRAM.format(path=search, user=user))],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=100, cwd=folder, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, third, owner, left, states = json.loads(done.stdout.splitlines()[-1])
    uid = NOBODY if user == "nobody" else 12345
    assert first[:2] == ["ok", ""], first
    assert first[2] == [[uid] * 3, [first[2][1][0]] * 3, [], [uid, uid], True, "0" * 16]
    assert states["capabilities"] == "enforced"
    assert second[0] == "ok" and second[2] == [1, 13, 13], second
    assert third[0] == "memory_limit", "what is another user's is measured and killed all the same"
    assert (owner, left) == (0, False), "the cache is the service's; the scratch root is gone"
    assert not first[3] and not second[3]
    assert [name for name in os.listdir(folder) if name != "cache"] == []
    assert eventually(lambda: family(None) == before)


def test_files_of_nobody_else_are_taken(tmp_path: Path) -> None:
    need_root()
    job, cache = tmp_path / "job", tmp_path / "cache"
    (job / "inductor/ab").mkdir(parents=True)
    (job / "inductor/ab/kernel.so").write_text("kernel")
    files = artifacts.manifest(job)
    with pytest.raises(WireError, match="belongs to uid 0"):
        artifacts.adopt(files, job, {"inductor": cache}, Limits(), owner=NOBODY)
    os.chown(job / "inductor/ab/kernel.so", NOBODY, NOBODY)
    with pytest.raises(WireError, match=f"belongs to uid {NOBODY}"):
        artifacts.adopt(files, job, {"inductor": cache}, Limits())
    assert not list(cache.rglob("*.so"))
    artifacts.adopt(files, job, {"inductor": cache}, Limits(), owner=NOBODY)
    assert (cache / "ab/kernel.so").stat().st_uid == 0
