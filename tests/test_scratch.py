"""Scratch folders and their removal, whatever a job has made of them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

from sandbox import leftovers, reclaim, scratch
from sandbox.enforce import cgroups


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


def test_removal_of_folders_that_have_the_name_of_a_moved_one(tmp_path: Path) -> None:
    """A folder in the way under a name that is known beforehand once kept all that lay deeper."""
    folder = tmp_path / "job"
    for number in range(3):
        (folder / f".moved-{number}" / "x" / "y").mkdir(parents=True)
    (folder / "a" / "b" / "c").mkdir(parents=True)
    assert scratch.remove(folder) == ()
    assert not folder.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs another user")
def test_what_another_user_has_put_among_the_roots_is_not_taken_for_one(tmp_path: Path) -> None:
    """Its lock would be waited for, 45 s, where there is a lease on it; a link may lead to a folder of ours."""
    for above in (tmp_path, *tmp_path.parents):
        if above.stat().st_uid == os.geteuid() and not above.stat().st_mode & 0o001:
            above.chmod(above.stat().st_mode | 0o011)
    tmp_path.chmod(0o1777)
    ours = tmp_path / "something else"
    ours.mkdir()
    (ours / "lock").touch()
    (ours / f"data{reclaim.RECORD_SUFFIX}").write_text("{}")
    program = f"""
        import fcntl, os, signal, sys
        os.setgid(65534); os.setuid(65534)
        os.chdir({str(tmp_path)!r})
        os.symlink("something else", "sandbox-0-*")
        os.mkdir("sandbox-0-aaaaaaaa")
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        lock = os.open("sandbox-0-aaaaaaaa/lock", os.O_RDWR | os.O_CREAT)
        fcntl.fcntl(lock, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        print("ready", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        for name in ("sandbox-0-*", "sandbox-0-aaaaaaaa"):
            begin = time.monotonic()
            with scratch.abandoned(tmp_path / name) as taken:
                assert not taken
            assert time.monotonic() - begin < 10
        assert cgroups.group_names(tmp_path / "sandbox-0-*") == "sandbox-0-[*].*"
        other.communicate()
