"""The quarantine in files: seen by other processes, trusted only if it is ours, never in the way of a compile."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sandbox.cli import main
from sandbox.errors import QuarantineError
from sandbox.policy import QuarantineSettings
from sandbox.quarantine import Entry, MemoryStore, Quarantine
from sandbox.quarantine_files import MAX_FILE_BYTES, FileStore, folder_of, store_of
from sandbox.results import Status

DAYS = timedelta(days=30)


def key(name: object) -> str:
    return hashlib.sha256(str(name).encode()).hexdigest()


class Kept:
    """A store in a folder of its own, and what it has told."""

    def __init__(self, folder: Path, limit: int = 10_000) -> None:
        self.folder = folder
        self.told: list[str] = []
        self.store = FileStore(folder, DAYS, lambda error: self.told.append(str(error)), limit)
        self.quarantine = Quarantine(self.store, DAYS)

    def kill(self, name: object, status: Status = Status.CRASHED) -> Entry:
        return self.quarantine.add(key(name), status, "job-1", "graph", "died", {"torch": "2"})

    def path(self, name: object) -> Path:
        return self.folder / f"{key(name)}.json"


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    yield Kept(tmp_path / "quarantine")


def test_what_one_has_written_another_reads(kept: Kept) -> None:
    other = Kept(kept.folder)
    assert kept.quarantine.get(key("a")) is None
    first = kept.kill("a")
    assert other.quarantine.get(key("a")) == first
    assert other.kill("a", Status.TIMEOUT).kills == 2
    again = kept.quarantine.get(key("a"))
    assert again is not None and (again.kills, again.status, again.since) == (2, Status.TIMEOUT, first.since)
    assert len(kept.quarantine) == 1 and list(kept.store.entries()) == [again]
    assert kept.path("a").stat().st_mode & 0o777 == 0o600
    assert kept.folder.stat().st_mode & 0o777 == 0o700
    assert other.store.forget(key("a")) and not other.store.forget(key("a"))
    assert kept.quarantine.get(key("a")) is None
    assert kept.told == other.told == []


def test_a_missing_folder_is_an_empty_one(kept: Kept) -> None:
    assert kept.quarantine.get(key("a")) is None and len(kept.quarantine) == 0
    kept.quarantine.clear()
    assert not kept.folder.exists() and kept.told == []


def test_entries_expire_and_leave_the_folder(kept: Kept) -> None:
    now = datetime.now(UTC)
    old = Quarantine(kept.store, DAYS, now=lambda: now - DAYS - timedelta(seconds=1))
    old.add(key("old"), Status.CRASHED, "job-1")
    assert kept.quarantine.get(key("old")) is None
    assert kept.path("old").exists(), "expired by its own word, not by that of the file system"
    renewed = kept.kill("old")
    assert renewed.kills == 1, "an expired entry counts as none"
    ahead = Quarantine(kept.store, DAYS, now=lambda: now + timedelta(days=400))
    ahead.add(key("ahead"), Status.CRASHED, "job-1")
    assert kept.quarantine.get(key("ahead")) is None, "a clock that went wrong must not keep a graph out for ever"
    os.utime(kept.path("ahead"), (0, 0))
    partial = kept.folder / f".{key('p')}.{'0' * 32}"
    partial.write_text("half")
    fresh = kept.folder / f".{key('q')}.{'0' * 32}"
    fresh.write_text("half")
    os.utime(partial, (0, time.time() - 7200))
    kept.kill("new")
    assert not kept.path("ahead").exists() and not partial.exists() and fresh.exists()


def test_the_oldest_are_removed_beyond_the_limit(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "q", limit=5)
    for number in range(9):
        kept.kill(number)
        os.utime(kept.path(number), (0, time.time() - 100 + number))
    assert [number for number in range(9) if kept.quarantine.get(key(number))] == [4, 5, 6, 7, 8]
    assert len(kept.quarantine) == 5 and kept.told == []


WRITER = """
import sys
from datetime import timedelta
from pathlib import Path
from sandbox.quarantine import Quarantine
from sandbox.quarantine_files import FileStore
from sandbox.results import Status

def tell(error):
    raise error

folder, who = Path(sys.argv[1]), sys.argv[2]
quarantine = Quarantine(FileStore(folder, timedelta(days=30), tell), timedelta(days=30))
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    quarantine.add(f"{who}{number:063x}", Status.CRASHED, "job-" + who)
    entry = quarantine.add("f" * 64, Status.TIMEOUT, "job-" + who)
    assert quarantine.get("f" * 64) is not None
print(entry.kills)
"""


def test_processes_that_write_at_once_lose_no_entry(kept: Kept) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(kept.folder), who],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        )
        for who in "abc"
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        out, _ = writer.communicate(timeout=60)
        assert writer.returncode == 0
        assert int(out) >= 1
    found = {entry.digest: entry for entry in kept.store.entries()}
    assert len(found) == 3 * 60 + 1 and kept.told == []
    assert 60 <= found["f" * 64].kills <= 180
    assert not [name for name in os.listdir(kept.folder) if name.startswith(".")]


def test_a_full_disk_costs_nothing_but_the_file(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.kill("before")

    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.quarantine_files.os.write", full)
        kept.kill("a")
        assert kept.kill("a").kills == 2, "it is counted in memory"
    assert kept.quarantine.get(key("a")) is not None and kept.quarantine.get(key("before")) is not None
    assert sorted(os.listdir(kept.folder)) == [kept.path("before").name], "no half file is left"
    assert len(kept.told) == 2 and "No space left on device" in kept.told[0] and "in memory only" in kept.told[0]
    assert Kept(kept.folder).quarantine.get(key("a")) is None
    assert kept.kill("a").kills == 3, "when there is space again, it is written"
    other = Kept(kept.folder).quarantine.get(key("a"))
    assert other is not None and other.kills == 3
    assert len(kept.told) == 2 and len(kept.quarantine) == 2


def test_a_limit_on_file_sizes_is_a_full_disk(kept: Kept) -> None:
    """The real thing: the kernel writes 100 bytes, then refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        kept.kill("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in kept.told[0]
    assert kept.quarantine.get(key("a")) is not None and os.listdir(kept.folder) == []


def test_a_folder_that_cannot_be_made_leaves_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "quarantine")
    kept.kill("a")
    assert kept.quarantine.get(key("a")) is not None
    assert kept.told and all("Not a directory" in told for told in kept.told)
    kept.quarantine.clear()
    assert kept.quarantine.get(key("a")) is None


def foreign(path: Path) -> None:
    os.chown(path, 12345, 12345)


def others_write(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o002)


def group_writes(path: Path) -> None:
    path.chmod(path.stat().st_mode | 0o020)


def linked(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def garbled(path: Path) -> None:
    path.write_bytes(b"\xff{]")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def deep(path: Path) -> None:
    path.write_text("[" * 50_000)


def giant(path: Path) -> None:
    os.truncate(path, 1 << 40)


def too_large(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * MAX_FILE_BYTES)


def other_digest(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": key("b")}))


def not_a_killer(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "ok"}))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
SPOILERS = [
    pytest.param(foreign, marks=AS_ROOT), others_write, group_writes, linked, garbled, empty, deep, giant, too_large,
    other_digest, not_a_killer, fifo, folder,
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_file_that_is_not_to_be_trusted_is_ignored_and_told(kept: Kept, spoil: object) -> None:
    kept.kill("a")
    kept.kill("other")
    spoil(kept.path("a"))  # type: ignore[operator]
    assert kept.quarantine.get(key("a")) is None
    assert len(kept.told) == 1 and "ignored" in kept.told[0] and kept.path("a").name in kept.told[0]
    assert [entry.digest for entry in kept.store.entries()] == [key("other")]
    assert len(kept.told) == 2
    # What cannot be replaced is kept in memory; all else is written anew.
    kept.kill("a")
    assert kept.quarantine.get(key("a")) is not None
    assert Kept(kept.folder).quarantine.get(key("a")) is None or spoil is not folder


@pytest.mark.parametrize("spoil", [pytest.param(foreign, marks=AS_ROOT), others_write, group_writes, linked])
def test_a_folder_that_is_not_to_be_trusted_is_not_used(kept: Kept, spoil: object) -> None:
    kept.kill("a")
    spoil(kept.folder)  # type: ignore[operator]
    assert kept.quarantine.get(key("a")) is None
    assert len(kept.told) == 1 and str(kept.folder) in kept.told[0]
    kept.kill("b")
    assert kept.quarantine.get(key("b")) is not None, "in memory"
    assert not kept.path("b").exists()
    assert list(kept.store.entries()) == []


def test_a_folder_full_of_other_things_is_read_in_part_only(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "q", limit=10)
    kept.folder.mkdir(mode=0o700)
    for number in range(3000):
        (kept.folder / f"{number}").touch()
    kept.kill("a")
    assert kept.quarantine.get(key("a")) is not None
    assert len(os.listdir(kept.folder)) == 3001, "what is not ours is not removed"


def test_where_the_policy_puts_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert folder_of(QuarantineSettings()) == Path("/cache/torch-compile-sandbox/quarantine")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folder_of(QuarantineSettings()) == Path("/home/somebody/.cache/torch-compile-sandbox/quarantine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder_of(QuarantineSettings()) == Path("/home/somebody/.cache/torch-compile-sandbox/quarantine")
    assert folder_of(QuarantineSettings(folder="~/q")) == Path("/home/somebody/q")
    with pytest.raises(QuarantineError, match="'q' is not absolute"):
        folder_of(QuarantineSettings(folder="q"))
    told: list[QuarantineError] = []
    assert isinstance(store_of(QuarantineSettings(folder="q"), told.append), MemoryStore) and len(told) == 1
    assert isinstance(store_of(QuarantineSettings(persist=False), told.append), MemoryStore) and len(told) == 1
    assert isinstance(store_of(QuarantineSettings(folder=str(tmp_path)), told.append), FileStore)


# The command.


@pytest.fixture
def filled(tmp_path: Path) -> tuple[Kept, str]:
    kept = Kept(tmp_path / "q")
    kept.kill("a")
    kept.kill("b", Status.MEMORY_LIMIT)
    Quarantine(kept.store, DAYS, now=lambda: datetime.now(UTC) - 2 * DAYS).add(key("old"), Status.TIMEOUT, "job-2")
    policy = tmp_path / "mine.toml"
    policy.write_text(f'[quarantine]\nfolder = "{kept.folder}"\n')
    return kept, f"--policy={policy}"


def test_the_command_lists_shows_and_clears(filled: tuple[Kept, str], capsys: pytest.CaptureFixture[str]) -> None:
    kept, policy = filled
    assert main(["quarantine", "list", policy]) == 0
    listed = capsys.readouterr().out
    assert key("a")[:12] in listed and "memory_limit" in listed and listed.count("expired") == 1
    assert main(["quarantine", "list", policy, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["expired"] for entry in document["entries"]] == [False, False, True]
    assert document["folder"] == str(kept.folder) and document["ignored"] == []
    assert main(["quarantine", "show", key("a")[:20], policy]) == 0
    shown = capsys.readouterr().out
    assert key("a") in shown and "died" in shown and "torch" in shown
    assert main(["quarantine", "show", key("b"), policy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "memory_limit"
    assert main(["quarantine", "clear", "--expired", policy]) == 0
    assert capsys.readouterr().out.startswith("1 cleared")
    assert main(["quarantine", "clear", key("a"), policy]) == 0
    assert capsys.readouterr().out.startswith("1 cleared")
    assert kept.quarantine.get(key("a")) is None and kept.quarantine.get(key("b")) is not None
    assert main(["quarantine", "show", key("a"), policy]) == 1
    assert "no entry begins with" in capsys.readouterr().err
    kept.path("broken").write_text("{")
    assert main(["quarantine", "list", policy, "--json"]) == 1
    said = capsys.readouterr()
    assert len(json.loads(said.out)["ignored"]) == 1 and "holds no entry" in said.err
    assert main(["quarantine", "clear", "--all", policy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cleared"] == [key("b")]
    assert os.listdir(kept.folder) == []
    assert main(["quarantine", "list", policy]) == 0
    assert "No graph is in quarantine" in capsys.readouterr().out


def test_words_of_strangers_steer_no_terminal(filled: tuple[Kept, str], capsys: pytest.CaptureFixture[str]) -> None:
    kept, policy = filled
    entry = json.loads(kept.path("a").read_text())
    entry.update(graph="\x1b[2J[red]x", job_id="\x1b]0;", made_for={"\x1b[1m": "\x1b[2m"}, detail="\r\x07")
    kept.path("a").write_text(json.dumps(entry))
    assert main(["quarantine", "list", policy]) == 0
    assert main(["quarantine", "show", key("a"), policy]) == 0
    out = capsys.readouterr().out
    assert "[red]x" in out and not set("\x1b\r\x07") & set(out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clear"], "one of the arguments"),
        (["clear", "--all", "--expired"], "not allowed with"),
        (["show", ""], "3 entries begin with ''"),
        (["list", "--policy=ci"], "quarantine.persist = false"),
    ],
)
def test_bad_input_is_told(
    filled: tuple[Kept, str], words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quarantine", words[0], filled[1], *words[1:]])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# With the compiler.

PROGRAM = """
import contextlib, json, logging, sys
import torch, sandbox
from sandbox import faults
from sandbox.policy import ForkserverSettings, Policy

logging.basicConfig(stream=sys.stderr, format="%(message)s")
policy = Policy(
    name="mine",
    allow_faults=True,
    forkserver=ForkserverSettings(warm_up=False),
)
sandbox.install(policy)
x = torch.ones(3)
with faults.inject(sys.argv[1]) if sys.argv[1] else contextlib.nullcontext():
    assert torch.equal(torch.compile(lambda x: x * 3 - 1)(x), x * 3 - 1)
stats = sandbox.stats()
print(json.dumps([stats.children_started, stats.eager, stats.in_child, stats.fallbacks.get("quarantined", 0)]))
sandbox.uninstall()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_graph_that_killed_a_child_gets_none_in_the_next_process(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(fault: str) -> tuple[list[int], str]:
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        }
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), fault],
            env=environment, capture_output=True, text=True, timeout=190,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    assert run("sigabrt")[0] == [3, 1, 0, 0]
    (file,) = (tmp_path / "cache" / "torch-compile-sandbox" / "quarantine").glob("*.json")
    assert json.loads(file.read_text())["kills"] == 3
    found, said = run("")
    assert found == [0, 1, 0, 1]
    assert "is in quarantine since" in said and "ended with crashed" in said
