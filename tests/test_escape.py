"""Hostile programs in a real sandbox, at each level of privilege: what is denied, and what cannot be enforced there.

Each file of tests/testcases/escape is one attempt:

    NEEDS                what denies it: names of mechanisms, each of which is enough; none: it must fail everywhere
    PRIVILEGED = True    only root can do it at all, or only others; without confinement it proves nothing
    attempt(at)          runs in the job; `at` are the decoys (escape_host.Decoys). An OSError: it was refused
    proof(at, seen)      runs in the service: did it get out? By default: it did if `attempt` returned

An attempt that gets out fails the test, unless the job's own report, which is what `sandbox doctor` prints, says of
every mechanism in NEEDS that it is not fully enforced there. One level runs the programs without confinement: those
that are denied there as well would prove nothing elsewhere.

    pytest tests/test_escape.py            # ends with the table
    pytest tests/test_escape.py -k bare    # one level
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import MARK, eventually, family, held
from test_unprivileged import NOBODY, interpreter_of_nobody

from sandbox.limits import Confinement

HERE = Path(__file__).parent
PROGRAMS = sorted(path.stem for path in (HERE / "testcases" / "escape").glob("*.py"))
#: Level: what it is, and whether it is another user's where the tests run as root.
LEVELS = {
    "off": ("no confinement but the watchdog and the keeper, as whoever runs the tests", False),
    "as-i-am": ("whoever runs the tests", False),
    "user": ("another user, with user namespaces where the host has them; attacks from standby children", True),
    "no-namespaces": ("another user, without user namespaces and cgroups", True),
    "bare": ("another user, without user namespaces, cgroups and Landlock", True),
}
#: Errors that mean that this kernel does not have what is attacked.
NOT_HERE = {"ENOSYS", "EAFNOSUPPORT", "EPROTONOSUPPORT", "ENODEV"}
SECONDS = 200


@dataclass(frozen=True)
class Program:
    """What a file says of itself."""

    says: str
    needs: tuple[str, ...]
    privileged: bool


@functools.cache
def program(name: str) -> Program:
    tree = ast.parse((HERE / "testcases" / "escape" / f"{name}.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id in ("NEEDS", "PRIVILEGED")
    }
    return Program(ast.get_docstring(tree) or "", values["NEEDS"], values.get("PRIVILEGED", False))


class Levels:
    """The findings per level, made when they are first asked for, and the table at the end of the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.reports: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def report(self, level: str) -> dict[str, Any]:
        if not any(level in known for known in (self.reports, self.skipped, self.failed)):
            try:
                self.reports[level] = self._run(level)
            except pytest.skip.Exception as reason:
                self.skipped[level] = str(reason)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                self.failed[level] = str(error)[-4000:]
        if level in self.failed:
            pytest.fail(f"this level could not be run: {self.failed[level]}", pytrace=False)
        if level in self.skipped:
            pytest.skip(self.skipped[level])
        return self.reports[level]

    def _run(self, level: str) -> dict[str, Any]:
        other = LEVELS[level][1] and os.geteuid() == 0
        executable: str | None = sys.executable
        if other:
            executable = interpreter_of_nobody()
            if executable is None:
                version = f"{sys.version_info[0]}.{sys.version_info[1]}"
                pytest.skip(f"no Python {version} that another user may run, and no way to be that user otherwise")
        elif level == "user":
            pytest.skip("not root: `as-i-am` is this level")
        folder = self._folder / level
        (folder / "tmp").mkdir(parents=True)
        for each in (folder, folder / "tmp"):
            each.chmod(0o777)
        (folder / "root-secret").write_text("only root may read this")
        (folder / "root-secret").chmod(0o600)
        if os.geteuid() == 0:
            shutil.copy("/bin/cat", folder / "suid-cat")
            (folder / "suid-cat").chmod(0o4755)
        search = [str(HERE), str(HERE.parent), MARK, *(entry for entry in sys.path if "site-packages" in entry)]
        environment = {
            "PATH": os.environ["PATH"],
            "TMPDIR": str(folder / "tmp"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(search),
            "ESCAPE_DECOY": uuid.uuid4().hex,
        }
        assert executable is not None
        before = held().posix, held().sysv, family(None)
        done = subprocess.run(
            [executable, str(HERE / "escape_host.py"), level, str(folder), str(NOBODY if other else -1)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            cwd=folder,
            start_new_session=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        assert eventually(lambda: (held().posix, held().sysv, family(None)) == before), "something is left"
        report["left"] = os.listdir(folder / "tmp")
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Called by pytest: the table."""
        write = terminalreporter.write_line
        terminalreporter.section("escape attempts")
        for line in table(self.reports):
            write(line)
        for level, reason in self.skipped.items():
            write(f"{level}: not run: {reason}")


def gap(name: str, report: dict[str, Any]) -> list[str]:
    """For an attempt that got out: each mechanism that would have denied it, with what the job's report says of it.

    Empty if there is none, or if one is said to be enforced or is not told of: then it had no business to get out.
    """
    told = []
    for needed in program(name).needs:
        state, reason = report["mechanisms"].get(needed, ("enforced", ""))
        if state == "enforced":
            return []
        told.append(f"{needed} is {state}" + (f" ({reason})" if reason else ""))
    return told


def verdict(name: str, report: dict[str, Any], level: str = "") -> str:
    """One cell of the table."""
    found = report["programs"].get(name)
    if found is None:
        return ""
    if not found["succeeded"]:
        how = found["how"]
        return "-" if how.startswith("absent") else "in vain" if how == "ok" else how
    if level == "off":
        return "gets out"
    return "open" if gap(name, report) else "ESCAPED"


LEGEND = """
A name of an error or a status: denied, with this answer. `in vain`: the call was answered, and nothing came of it.
`-`: there is nothing of the kind to attack. `open`: not enforceable at this level, for want of every mechanism in the
last column; the job's report, which `sandbox doctor` prints, says why. `gets out`: without confinement it succeeds.
"""


def table(reports: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Lines: program by level, the legend, and for each level the counts and what its host does not have."""
    if not reports:
        return
    width = max(map(len, PROGRAMS))
    yield f"{'attempt':{width}}  " + " ".join(f"{level:14}" for level in reports) + " denied by"
    for name in PROGRAMS:
        cells = (verdict(name, report, level)[:14] for level, report in reports.items())
        needs = ", ".join(program(name).needs) or "the service's own checks"
        yield f"{name:{width}}  " + " ".join(f"{cell:14}" for cell in cells) + f" {needs}"
    yield from LEGEND.splitlines()
    for level, report in reports.items():
        if level == "off":
            continue
        cells = [verdict(name, report) for name in PROGRAMS if name in report["programs"]]
        denied = sum(cell not in ("open", "ESCAPED", "-") for cell in cells)
        yield (
            f"{level} ({LEVELS[level][0]}): {denied} denied, {cells.count('open')} not enforceable, "
            f"{cells.count('ESCAPED')} escaped, {cells.count('-')} with nothing to attack"
        )
        for mechanism, (state, reason) in sorted(report["mechanisms"].items()):
            if state != "enforced":
                yield f"    {mechanism}: {state}" + (f", {reason}" if reason else "")


def place_for_decoys() -> Path:
    """A folder that others may enter and that is not below /tmp, which a job may have of its own: there a secret would
    be hidden by its place. Only where there is none: /tmp."""
    for folder in (Path.home(), Path("/srv"), Path("/opt"), Path("/var/lib")):
        path = folder.resolve()
        if (
            os.access(path, os.W_OK)
            and not str(path).startswith(("/tmp", "/var/tmp", "/dev"))
            and all(parent.stat().st_mode & 0o001 for parent in (path, *path.parents))
        ):
            return path
    return Path("/tmp")


@pytest.fixture(scope="module")
def levels(request: pytest.FixtureRequest) -> Iterator[Levels]:
    with tempfile.TemporaryDirectory(prefix="escape-", dir=place_for_decoys()) as folder:
        os.chmod(folder, 0o711)
        made = Levels(Path(folder))
        request.config.pluginmanager.register(made, "escape-table")
        yield made


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("level", LEVELS)
def test_the_service_is_unharmed(levels: Levels, level: str) -> None:
    report = levels.report(level)
    if level == "off":
        return
    assert report["well"], "the template died, or a job after all these fails"
    assert report["sibling"] == "ok", "a job beside the hostile ones was disturbed"
    assert report["left"] == []
    if level == ("user" if os.geteuid() == 0 else "as-i-am"):
        # All but those with limits of their own, which get a fresh child.
        assert report["from_standby"] > len(report["programs"]) / 2, "the attacks were to come from standby children"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    ("level", "name"),
    [
        (level, name)
        for level in LEVELS
        for name in PROGRAMS
        if level != "off" and (level != "bare" or "landlock" in program(name).needs)
    ],
)
def test_attempt(levels: Levels, level: str, name: str) -> None:
    report = levels.report(level)
    found = report["programs"][name]
    if found["succeeded"]:
        assert gap(name, report), f"{program(name).says}\nIt got out: {found}\nReported: {report['mechanisms']}"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("name", [name for name in PROGRAMS if program(name).needs and not program(name).privileged])
def test_an_attempt_can_succeed(levels: Levels, name: str) -> None:
    """Without confinement. Those that only root can make, and those that attack our own logic, have no such proof."""
    found = levels.report("off")["programs"][name]
    if found["how"].startswith("absent") or found["how"] in NOT_HERE:
        pytest.skip(f"not on this host: {found['how']}")
    assert found["succeeded"], f"it is denied without us: {found}"


def test_each_program_says_what_it_tries() -> None:
    assert len(PROGRAMS) >= 40
    for name in PROGRAMS:
        assert program(name).says.endswith("."), name
        assert set(program(name).needs) <= set(Confinement().demands()), f"{name} names a mechanism that is none"
