"""The wheel: what travels in it, and that it works where nothing but the wheel is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import sandbox
from sandbox.policy import shipped

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(version("setuptools").partition(".")[0]) < 77, reason="needs setuptools 77: pip install -e .[test]"
    ),
]


def execute(*command: str | Path, cwd: Path) -> str:
    """Run a command to its end; returns its stdout. What it says on stderr is in the failure."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline from a copy, since setuptools leaves folders in the source tree and takes stale ones along."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("sandbox", "policies"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    execute(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sandbox").rglob("*.py")}
    policies = {f"sandbox/policies/{path.name}" for path in (ROOT / "policies").glob("*.toml")}
    assert len(policies) >= 4
    assert {name for name in names if ".dist-info/" not in name} == sources | policies | {"sandbox/py.typed"}
    assert "[console_scripts]\nsandbox = sandbox.cli:main" in entry_points
    assert "[torch_dynamo_backends]\nsandbox = sandbox.inductor.backend:sandbox" in entry_points
    assert f"{info}/licenses/LICENSE" in names
    assert f"\nVersion: {sandbox.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata


def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "venv"
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--python", python)
    execute(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    packages = Path(
        execute(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    # The dependencies come from here; by a plain line of a .pth file, so that no editable install of ours comes along.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = execute(python, "-c", "import sandbox.policy; print(sandbox.policy.__file__)", cwd=tmp_path).strip()
    assert Path(where) == packages / "sandbox" / "policy.py"
    command = place / "bin" / "sandbox"
    assert execute(command, "--version", cwd=tmp_path).strip() == f"sandbox {sandbox.__version__}"
    for name in shipped():
        shown = json.loads(execute(command, "policy", "show", name, "--json", cwd=tmp_path))
        assert shown["name"] == name
    # The processes of a job start from the installed package, too.
    code = (
        "import os, sandbox; from sandbox.policy import ForkserverSettings\n"
        "policy = sandbox.Policy(forkserver=ForkserverSettings(import_torch=False))\n"
        "with sandbox.Sandbox(policy) as runner:\n"
        "    print(runner.submit(sandbox.callable_job(sum, (1, 2))).result().value)\n"
    )
    assert execute(python, "-c", code, cwd=tmp_path).strip() == "3"
