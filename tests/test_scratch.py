"""Scratch folders and their removal, whatever a job has made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from sandbox import leftovers, scratch


def test_removal_of_a_tree_deeper_than_any_recursion(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(3000):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    before = len(os.listdir("/proc/self/fd"))
    assert scratch.remove(folder) == ()
    assert not folder.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_removal_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    folder = tmp_path / "job"
    (folder / "inner").mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    (folder / "inner" / "link").symlink_to(outside)
    os.mkfifo(folder / "fifo")
    assert scratch.remove(folder) == ()
    assert (outside / "precious").read_text() == "kept"
    replaced = tmp_path / "replaced"
    replaced.symlink_to(outside)
    assert scratch.remove(replaced) == ()
    assert not replaced.is_symlink() and (outside / "precious").exists()


def test_removal_as_another_user_of_folders_without_permissions() -> None:
    program = """
        import os, sys, tempfile
        from pathlib import Path
        from sandbox import scratch
        os.setgid(65534); os.setuid(65534)
        folder = Path(tempfile.mkdtemp(dir="/tmp"))
        (folder / "a" / "b" / "c").mkdir(parents=True)
        (folder / "a" / "b" / "c" / "file").write_text("x")
        for name in ("a/b/c", "a/b", "a"): os.chmod(folder / name, 0)
        print(scratch.remove(folder), folder.exists())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout.split() == ["()", "False"], done.stderr


def test_roots_of_the_dead_are_swept_and_those_of_the_living_kept() -> None:
    living = scratch.Root()
    program = "import os; from sandbox import scratch; print(scratch.Root().path, flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    dead = Path(done.stdout.strip())
    assert dead.exists()
    stranger = Path(tempfile.mkdtemp(prefix=f"sandbox-{os.geteuid()}-"))  # no lock in it: not a root
    leftovers.sweep()
    another = scratch.Root()
    assert not dead.exists()
    assert living.path.exists() and stranger.exists()
    for root in (living, another):
        assert root.remove() == () and root.remove() == ()
        assert not root.path.exists()
    stranger.rmdir()
