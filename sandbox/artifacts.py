"""Kernel files on their way from a job's scratch folder into the user's cache.

The worker writes a manifest of the files in its private cache folder. The parent checks each file against it and
moves it into the cache only after every process of the job is dead, so nothing can change between check and move.
Each file appears under its final name in one step, and a file that is there already is kept: names are hashes of
contents, and another process may have it mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path

from sandbox.errors import WireError
from sandbox.limits import Limits
from sandbox.results import Artifact

#: Folder of the artifacts in a job's scratch folder.
FOLDER = "artifacts"
#: Files that compilers leave in their cache folders and that mean nothing elsewhere.
_SKIPPED_SUFFIXES = (".lock", ".tmp", ".log")
_SKIPPED_FOLDERS = frozenset({"locks", "tmp"})
_CHUNK = 1 << 20


def manifest(folder: Path) -> tuple[Artifact, ...]:
    """The regular files under ``folder``, with sizes in bytes and digests. Links and odd names are left out."""
    found = []
    for directory, names, files in os.walk(folder):
        names[:] = [name for name in names if name not in _SKIPPED_FOLDERS and not name.startswith("tmp.")]
        for name in files:
            path = Path(directory) / name
            status = path.lstat()
            if name.endswith(_SKIPPED_SUFFIXES) or not stat.S_ISREG(status.st_mode):
                continue
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            found.append(Artifact(path=path.relative_to(folder).as_posix(), size=status.st_size, sha256=sha256))
    return tuple(found)


def adopt(artifacts: tuple[Artifact, ...], source: Path, targets: dict[str, Path], limits: Limits) -> int:
    """Check every artifact under ``source``, then move all of them into ``targets``.

    Args:
        artifacts: the worker's manifest; it is not trusted.
        source: the job's artifact folder. All processes of the job must be dead.
        targets: folder in the user's cache for the first part of each path, `inductor` and `triton`.
        limits: `artifact_bytes` bounds the sum.

    Returns:
        The bytes that were adopted.

    Raises:
        WireError: a file is missing, a link, a hard link, not a regular file, of another owner, of another size
            or digest, or outside the folder. Nothing is adopted then.
        OSError: the cache cannot be written.
    """
    total = sum(artifact.size for artifact in artifacts)
    if total > limits.artifact_bytes:
        raise WireError(f"artifacts of {total} bytes, limits.artifact_bytes allows {limits.artifact_bytes}")
    for artifact in artifacts:
        _check(artifact, source)
    for artifact in artifacts:
        kind, _, rest = artifact.path.partition("/")
        target = targets[kind] / rest
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.name.startswith("__grp__") and target.suffix == ".json":
            _relocate_group(source / artifact.path, target.parent)
        _move(source / artifact.path, target)
    return total


def _check(artifact: Artifact, source: Path) -> None:
    parts = artifact.path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise WireError(f"artifact {artifact.path!r} leaves the job's folder")
    folder_fd = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            next_fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
            os.close(folder_fd)
            folder_fd = next_fd
        # O_NONBLOCK: a FIFO must not hold us up.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file_fd = os.open(parts[-1], flags, dir_fd=folder_fd)
    except OSError as error:
        raise WireError(f"artifact {artifact.path!r} cannot be opened: {error.strerror}") from None
    finally:
        os.close(folder_fd)
    with open(file_fd, "rb") as file:
        status = os.fstat(file_fd)
        if not stat.S_ISREG(status.st_mode):
            raise WireError(f"artifact {artifact.path!r} is not a regular file")
        if status.st_nlink != 1:
            raise WireError(f"artifact {artifact.path!r} has {status.st_nlink} names")
        if status.st_uid != os.geteuid():
            raise WireError(f"artifact {artifact.path!r} belongs to uid {status.st_uid}")
        if status.st_size != artifact.size:
            raise WireError(f"artifact {artifact.path!r} has {status.st_size} bytes, its manifest says {artifact.size}")
        if hashlib.file_digest(file, "sha256").hexdigest() != artifact.sha256:
            raise WireError(f"artifact {artifact.path!r} differs from its digest")


def _move(source: Path, target: Path) -> None:
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != 18:  # EXDEV: the scratch folder is on another file system than the cache
            raise
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with source.open("rb") as reader, partial.open("wb") as writer:
                while chunk := reader.read(_CHUNK):
                    writer.write(chunk)
            partial.chmod(stat.S_IMODE(source.stat().st_mode))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _relocate_group(path: Path, folder: Path) -> None:
    """Triton's group file lists the files of one kernel by absolute path: make them those in the user's cache.

    Source: `FileCacheManager.put_group` in triton/runtime/cache.py (3.6, 3.7).
    """
    try:
        group = json.loads(path.read_text())
        children = {str(name): str(folder / Path(child).name) for name, child in group["child_paths"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WireError(f"artifact {path.name!r} is not a Triton group file: {error}") from None
    path.write_text(json.dumps({"child_paths": children}))
