"""Kernel files on their way into the user's cache: what is refused, and that nothing appears then."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pydantic_core
import pytest
from pydantic import ValidationError

from sandbox import artifacts
from sandbox.errors import WireError
from sandbox.limits import KIB, Limits
from sandbox.results import Artifact

GOOD = "inductor/ab/cabc.so"
GROUP = "triton/KEY/__grp__add.json"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job's artifact folder with a kernel and a Triton group."""
    folder = tmp_path / "scratch" / artifacts.FOLDER
    for path, text in {
        GOOD: "a kernel",
        "inductor/ab/cabc.py": "source",
        "triton/KEY/add.cubin": "binary",
        "triton/KEY/add.json": "{}",
        GROUP: json.dumps(
            {"child_paths": {name: f"/scratch/of/the/job/KEY/{name}" for name in ("add.cubin", "add.json")}}
        ),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> dict[str, Path]:
    return {kind: tmp_path / "cache" / kind for kind in ("inductor", "triton")}


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_files_arrive_whole_with_modes_of_ours_and_the_group_relocated(job: Path, cache: dict[str, Path]) -> None:
    os.chmod(job / GOOD, 0o6777)
    files = artifacts.manifest(job)
    assert {file.path for file in files} == everything(job)
    total = artifacts.adopt(files, job, cache, Limits())
    assert total == sum(file.size for file in files)
    assert everything(cache["inductor"].parent) == {file.path for file in files}
    kernel = cache["inductor"] / "ab" / "cabc.so"
    assert kernel.read_text() == "a kernel"
    assert stat.S_IMODE(kernel.stat().st_mode) == 0o700
    assert kernel.stat().st_ino != (job / GOOD).stat().st_ino, "the job may hold the inode open"
    group = json.loads((cache["triton"] / "KEY" / "__grp__add.json").read_text())
    assert group == {"child_paths": {n: str(cache["triton"] / "KEY" / n) for n in ("add.cubin", "add.json")}}


def test_a_file_that_is_there_is_kept(job: Path, cache: dict[str, Path]) -> None:
    there = cache["inductor"] / "ab" / "cabc.so"
    there.parent.mkdir(parents=True)
    there.write_text("another process has this mapped")
    artifacts.adopt(artifacts.manifest(job), job, cache, Limits())
    assert there.read_text() == "another process has this mapped"


def test_the_entry_that_a_job_was_to_make_replaces_what_is_there(job: Path, cache: dict[str, Path]) -> None:
    entry = cache["triton"] / "KEY"
    entry.mkdir(parents=True)
    (entry / "add.cubin").write_text("planted")
    (entry / "__grp__add.json").write_text("")
    files = tuple(file for file in artifacts.manifest(job) if file.path.startswith("triton/"))
    artifacts.adopt(files, job, cache, Limits(), replace=True)
    assert (entry / "add.cubin").read_text() == "binary"
    assert "add.cubin" in json.loads((entry / "__grp__add.json").read_text())["child_paths"]


def test_what_the_service_would_have_to_parse_or_keep_is_bounded(
    job: Path, cache: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (job / "triton/KEY/add.json").write_text("[" + "[]," * artifacts.MAX_JSON)
    with pytest.raises(WireError, match="65536 are the most"):
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits())
    monkeypatch.setattr(artifacts, "MAX_LAUNCH", 100_000)
    with pytest.raises(artifacts.ArtifactsTooLarge, match="for one kernel; 100000 are the most"):
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits(), replace=True)
    assert not everything(cache["inductor"].parent)


def test_what_stands_in_the_way_of_a_file(job: Path, cache: dict[str, Path]) -> None:
    target = cache["inductor"] / "ab" / "cabc.so"
    target.parent.mkdir(parents=True)
    target.symlink_to("/nonexistent/cabc.so")
    artifacts.adopt(artifacts.manifest(job), job, cache, Limits())
    assert target.read_text() == "a kernel" and not target.is_symlink()
    target.unlink()
    target.mkdir()
    with pytest.raises(WireError, match="a folder has its name"):
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits())


def test_a_name_that_stands_in_the_way_of_another_is_the_jobs_fault(job: Path, tmp_path: Path) -> None:
    """As an error of the cache it would count for the circuit breaker, which would then open for all."""
    (tmp_path / "a").write_text("of an earlier job")
    for name in ("a/b", "a/b/c"):
        artifact = Artifact(path=f"debug/{name}", size=0, sha256="0" * 64)
        with pytest.raises(WireError, match="a file is where its folder would be"):
            artifacts.adopt((artifact,), job, {"debug": tmp_path}, Limits())


def _symlink(job: Path) -> None:
    (job / GOOD).unlink()
    (job / GOOD).symlink_to("/etc/passwd")


def _linked_folder(job: Path) -> None:
    os.rename(job / "inductor" / "ab", job / "elsewhere")
    (job / "inductor" / "ab").symlink_to(job / "elsewhere")


def _fifo(job: Path) -> None:
    (job / GOOD).unlink()
    os.mkfifo(job / GOOD)


def _group_of_a_stranger(job: Path) -> None:
    (job / GROUP).write_text(json.dumps({"child_paths": {"x": "/etc/passwd"}}))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (_symlink, "cannot be opened"),
        (_linked_folder, "cannot be opened"),
        (_fifo, "not a regular file"),
        (lambda job: (job / GOOD).unlink(), "cannot be opened"),
        (lambda job: os.link(job / GOOD, job / "second-name"), "2 names"),
        (lambda job: (job / GOOD).write_text("another"), "bytes of its manifest"),
        (lambda job: (job / GOOD).write_text("b kernel"), "differs from its digest"),
        (lambda job: os.truncate(job / GOOD, 1 << 40), "bytes of its manifest"),
        (lambda job: os.chown(job / GOOD, 12345, -1), "belongs to uid 12345"),
    ],
)
def test_what_changed_after_the_manifest_is_refused_and_nothing_appears(
    job: Path, cache: dict[str, Path], attack: Callable[[Path], object], message: str
) -> None:
    if "uid" in message and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    files = artifacts.manifest(job)
    attack(job)
    with pytest.raises(WireError, match=message):
        artifacts.adopt(files, job, cache, Limits())
    assert everything(cache["inductor"].parent) == set()


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", '{"child_paths": {"x": "/etc/passwd"}}', "x" * 100_000])
def test_a_hostile_group_file_is_refused(job: Path, cache: dict[str, Path], text: str) -> None:
    (job / GROUP).write_text(text)
    with pytest.raises(WireError, match=r"not a Triton group file|65536 are the most"):
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits())
    assert everything(cache["inductor"].parent) == set()


@pytest.mark.parametrize(
    "path",
    [
        *"inductor/../../etc/passwd /etc/passwd inductor//x.so other/ab/x.so inductor/ca inductor/ab/x.pkl".split(),
        *"inductor/ab/. inductor/ab/.. inductor/fxgraph/ab/KEY/evil inductor/aotautograd/x.py debug/../x".split(),
        "triton/KEY/../x",
        "inductor/ab/a b.py",
        "inductor/ab/x.so\n",
        "inductor/ab/cabc.0123.kernels.json",
    ],
)
def test_names_that_are_not_admitted(path: str) -> None:
    with pytest.raises(ValidationError):
        Artifact(path=path, size=0, sha256=hashlib.sha256().hexdigest())


def test_odd_names_are_left_out_of_the_manifest(job: Path) -> None:
    before = artifacts.manifest(job)
    for name in ("inductor/ab/a b.py", "loose", "inductor/ab/k.lock"):
        (job / name).write_text("odd")
    (job / "inductor" / "fxgraph").mkdir()
    (job / "inductor" / "fxgraph" / "state").write_text("pickled")
    with open(os.fsencode(job) + b"/inductor/ab/\xff.py", "w") as file:
        file.write("odd")
    assert artifacts.manifest(job) == before


def test_too_much_is_refused_as_such(job: Path, cache: dict[str, Path]) -> None:
    (job / GOOD).write_bytes(bytes(2 * KIB))
    with pytest.raises(artifacts.ArtifactsTooLarge, match="artifact_bytes"):
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits(artifact_bytes=KIB))
    assert everything(cache["inductor"].parent) == set()


def test_half_a_library_is_replaced_and_nothing_else(job: Path, cache: dict[str, Path]) -> None:
    library = Path(str(pydantic_core._pydantic_core.__file__)).read_bytes()
    (job / "inductor" / "ab" / "cabc.so").write_bytes(library)
    there = cache["inductor"] / "ab" / "cabc.so"
    there.parent.mkdir(parents=True)
    for half in (b"", library[:3], library[:63], library[: len(library) // 2], library[:-1]):
        there.write_bytes(half)
        assert not artifacts.is_whole(there)
        artifacts.adopt(artifacts.manifest(job), job, cache, Limits())
        assert there.read_bytes() == library
        assert artifacts.is_whole(there)
    assert not artifacts.is_whole(there.with_name("gone.so"))
