"""What a compiler has to read: found, complete enough, and not more than that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.enforce import paths


def covered(path: str | Path, among: tuple[str, ...]) -> bool:
    """Whether a file, by its real path, lies at or below one of them."""
    real = Path(path).resolve()
    return any(real.is_relative_to(each) for each in among)


def fresh(source: str, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(paths.__file__).parents[2]), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_interpreter_code_and_toolchain_are_there() -> None:
    found = paths.needed(os.environ, gpu=False).read
    assert (covered(sys.executable, found) and sys.executable in found) or covered(sys.prefix, found)
    assert covered(os.__file__, found) and covered(pytest.__file__, found) and covered(paths.__file__, found)
    compiler = shutil.which("g++")
    assert compiler is None or covered(compiler, found)
    assert "/proc" in found and covered("/usr/include", found)
    assert "/dev/null" in paths.needed(os.environ, gpu=False).devices


def test_nothing_that_is_not_the_compilers_is_there() -> None:
    """A home folder, a temporary folder or `/` on a search path is not taken as a whole."""
    code = "import os; from sandbox.enforce import paths; print(*paths.needed(os.environ, gpu=True).read, sep='\\n')"
    everything = os.pathsep.join(("/", "/etc", "/tmp", "/root", os.path.expanduser("~"), "/var", "/home", "."))
    found = fresh(
        code, PATH=everything + os.pathsep + os.environ["PATH"], CPATH=everything, LIBRARY_PATH="/tmp/../etc",
        PYTHONPATH=os.pathsep.join((str(Path(paths.__file__).parents[2]), everything)),
    ).split()  # fmt: skip
    assert not {"/", "/etc", "/tmp", "/root", "/var", "/home", "/dev", os.path.expanduser("~")} & set(found)
    for secret in ("/etc/shadow", "/etc/ssl/private", "/etc/ssh", "/root/.ssh/id_ed25519", "/run/secrets", "/dev/shm"):
        assert not covered(secret, tuple(found)), secret
    assert all(os.path.isabs(path) and os.path.exists(path) for path in found)


def test_links_are_told_with_what_they_lead_to(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    found = paths.needed({"CPATH": f"{tmp_path}/link:{tmp_path}/absent"}, gpu=False).read
    assert {f"{tmp_path}/link", str((tmp_path / "real").resolve())} <= set(found)
    assert f"{tmp_path}/absent" not in found


def test_a_compiler_brings_the_folders_beside_it(tmp_path: Path) -> None:
    for part in ("bin", "lib", "libexec", "x86_64-linux-gnu", "share", "private"):
        (tmp_path / "gcc" / part).mkdir(parents=True)
    (tmp_path / "gcc/bin/g++-99").write_text("#!/bin/sh\n")
    (tmp_path / "gcc/bin/g++-99").chmod(0o755)
    (tmp_path / "cxx").symlink_to("gcc/bin/g++-99")
    found = paths.needed({"CXX": f"ccache {tmp_path}/cxx -O2", "PATH": "/usr/bin"}, gpu=False).read
    for part in ("bin", "lib", "libexec", "x86_64-linux-gnu"):
        assert covered(tmp_path / "gcc" / part, found), part
    assert not covered(tmp_path / "gcc/private", found)


def test_extra_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    assert str(inner) in paths.needed({}, gpu=False, extra=(str(inner),)).read
    both = paths.needed({}, gpu=False, extra=(str(inner), f"{tmp_path}/")).read
    assert str(tmp_path) in both and str(inner) not in both, "none lies below another"
    assert f"{tmp_path}/absent" not in paths.needed({}, gpu=False, extra=(f"{tmp_path}/absent",)).read


def test_an_editable_package_is_found_by_what_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "editable_for_test").mkdir()
    (tmp_path / "editable_for_test/__init__.py").write_text("")
    source = (
        "import sys; sys.path.insert(0, sys.argv[1]); import editable_for_test; del sys.path[0]\n"
        "from sandbox.enforce import paths\n"
        "print(sys.argv[1] + '/editable_for_test' in paths.needed({}, gpu=False).read)"
    )
    assert fresh(source, str(tmp_path)).strip() == "True"
