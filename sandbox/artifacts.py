"""Kernel files on their way from a job's scratch folder into the user's cache.

The worker writes a manifest of the files in its private cache folder. The parent takes the files over only after
every process of the job is dead, and it *copies* them: a moved file would be the same inode, which a survivor may
hold open. A copy is checked while it is made, in a folder of its own in the cache that is held by a lock, and appears
under its final name in one step. A file that is there already is kept, unless it is half a library: names are hashes of
contents, and another process may have it mapped.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from pathlib import Path

from pydantic import ValidationError

from sandbox.errors import WireError
from sandbox.limits import KIB, MIB, Limits
from sandbox.results import Artifact
from sandbox.scratch import LockedFolder

#: Folder of the artifacts in a job's scratch folder.
FOLDER = "artifacts"
#: Kinds of artifacts: the first part of each path.
KINDS = ("inductor", "triton", "aoti", "debug")
#: In each of the user's cache folders: how the names of folders begin that hold copies which are not whole yet.
MAKING = ".sandbox-adopting-"
#: What Triton keeps as JSON beside a kernel lists a dozen names, or as many facts; a larger one is not of Triton's. The
#: service parses it. Bytes.
MAX_JSON = 64 * KIB
#: All that a launched kernel hands back, in bytes: Triton keeps its text in memory as long as there is the kernel.
MAX_LAUNCH = 64 * MIB
#: Files of one job, a count at most: a graph has tens, and the reply's envelope has an end.
MAX_FILES = 20_000
_CHUNK = 1 << 20
_GROUP = "__grp__"


class ArtifactsTooLarge(WireError):
    """The artifacts are larger than `limits.artifact_bytes`: status `output_limit`."""


def manifest(folder: Path) -> tuple[Artifact, ...]:
    """The files under ``folder`` that may be handed back, with sizes in bytes and digests.

    Links, locks, and names that :data:`sandbox.results.ARTIFACT_PATH` does not admit are left out.
    """
    found: list[Artifact] = []
    for directory, names, files in os.walk(folder):
        names.sort()
        for name in sorted(files):
            path = Path(directory) / name
            try:
                status = path.lstat()
                if not stat.S_ISREG(status.st_mode) or name.endswith(".lock") or len(found) >= MAX_FILES:
                    continue
                with path.open("rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                found.append(Artifact(path=path.relative_to(folder).as_posix(), size=status.st_size, sha256=sha256))
            except (ValidationError, FileNotFoundError):
                continue  # a name that is not admitted, or a file that another process of the job removed
    return tuple(found)


def adopt(
    artifacts: tuple[Artifact, ...],
    source: Path,
    targets: dict[str, Path],
    limits: Limits,
    owner: int | None = None,
    *,
    replace: bool = False,
) -> int:
    """Check every artifact under ``source`` and copy it into ``targets``. All or nothing, as far as checks go.

    Args:
        artifacts: the worker's manifest; it is not trusted.
        source: the job's artifact folder. All processes of the job must be dead.
        targets: folder in the user's cache for each kind; kinds without one are left out.
        limits: `artifact_bytes` bounds the sum.
        owner: uid whose files they have to be; None means this process's.
        replace: they are the one entry that this job was to make: what is there of it already is of no use, or it would
            not have been made, and goes. Without it what is there stays.

    Returns:
        The bytes that were taken over.

    Raises:
        ArtifactsTooLarge: more than `artifact_bytes`.
        WireError: a file is missing, a link, a hard link, not a regular file, of another owner, of another size or
            digest, outside the folder, or has the name of a folder of the cache, or of a file for one of its own.
            Nothing appears in the cache then.
        OSError: the cache cannot be written.
    """
    total = sum(artifact.size for artifact in artifacts)
    if total > limits.artifact_bytes:
        raise ArtifactsTooLarge(f"artifacts of {total} bytes, limits.artifact_bytes allows {limits.artifact_bytes}")
    if replace and total > MAX_LAUNCH:
        raise ArtifactsTooLarge(f"artifacts of {total} bytes for one kernel; {MAX_LAUNCH} are the most")
    owner = os.geteuid() if owner is None else owner
    names = {artifact.path for artifact in artifacts}
    copies: list[tuple[Path, Path]] = []
    making: dict[str, LockedFolder] = {}
    try:
        for artifact in artifacts:
            kind, _, rest = artifact.path.partition("/")
            if kind not in targets:
                continue
            target = targets[kind] / rest
            if kind == "triton" and target.suffix == ".json" and artifact.size > MAX_JSON:
                raise WireError(f"artifact {artifact.path!r} has {artifact.size} bytes; {MAX_JSON} are the most")
            if not replace and _kept(target):
                continue
            # The job chooses the names below `debug`: one that cannot be made is its fault, not ours.
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError):
                raise WireError(f"artifact {artifact.path!r}: a file is where its folder would be") from None
            if target.is_dir():
                raise WireError(f"artifact {artifact.path!r}: a folder has its name")
            if kind not in making:
                making[kind] = LockedFolder(targets[kind], MAKING)
            copy = _copy(artifact, source, making[kind].path / str(len(copies)), owner)
            copies.append((copy, target))
            if kind == "triton" and target.name.startswith(_GROUP):
                _relocate_group(copy, artifact.path, target.parent, names)
        # The group last: with it the entry is there.
        for copy, target in sorted(copies, key=lambda pair: pair[1].name.startswith(_GROUP)):
            if replace:
                os.replace(copy, target)
            else:
                _place(copy, target)
    finally:
        for folder in making.values():
            folder.remove()
    return total


def _copy(artifact: Artifact, source: Path, copy: Path, owner: int) -> Path:
    """A checked copy under the name ``copy``, readable by its owner alone."""
    handle = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    sha256 = hashlib.sha256()
    size = 0
    with open(handle, "wb") as writer, open(_open(artifact, source), "rb") as reader:
        status = os.fstat(reader.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise WireError(f"artifact {artifact.path!r} is not a regular file")
        if status.st_nlink != 1:
            raise WireError(f"artifact {artifact.path!r} has {status.st_nlink} names")
        if status.st_uid != owner:
            raise WireError(f"artifact {artifact.path!r} belongs to uid {status.st_uid}")
        # One byte more than it may have: a file that is longer than its manifest says ends here.
        while size <= artifact.size and (chunk := reader.read(min(_CHUNK, artifact.size + 1 - size))):
            sha256.update(chunk)
            writer.write(chunk)
            size += len(chunk)
    if size != artifact.size:
        raise WireError(f"artifact {artifact.path!r} has not the {artifact.size} bytes of its manifest")
    if sha256.hexdigest() != artifact.sha256:
        raise WireError(f"artifact {artifact.path!r} differs from its digest")
    os.chmod(copy, 0o700 if artifact.path.endswith(".so") else 0o600)
    return copy


def _place(copy: Path, target: Path) -> None:
    """Give the copy its final name, unless another process was quicker: that file may be mapped already."""
    try:
        os.link(copy, target)
    except FileExistsError:
        if not _kept(target):
            os.replace(copy, target)  # heals a dangling link or half a library; a folder in the way is an error
    except OSError:
        os.replace(copy, target)  # a file system without hard links


def _kept(target: Path) -> bool:
    """Whether what has the name already stays. A host that lost power may have half a library there."""
    return is_whole(target) if target.suffix == ".so" else target.is_file()


def is_whole(library: Path) -> bool:
    """Whether ``library`` is there, and as long as its ELF header says. Loading one that was cut short can end in
    SIGBUS; what is no library at all fails when it is loaded."""
    try:
        with library.open("rb") as file:
            header = file.read(64)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return False
    if not b"\x7fELF".startswith(header[:4]):
        return True
    if len(header) < 64:
        return False
    order = "<" if header[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", header, 40)  # the table of sections is what comes last
    entry, count = struct.unpack_from(f"{order}HH", header, 58)
    return bool(sections + entry * count <= size)


def _open(artifact: Artifact, source: Path) -> int:
    """The artifact's descriptor, reached without following any link."""
    parts = artifact.path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise WireError(f"artifact {artifact.path!r} leaves the job's folder")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = -1
    try:
        folder = os.open(source, flags | os.O_DIRECTORY)
        for part in parts[:-1]:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: a FIFO must not hold us up.
        return os.open(parts[-1], flags | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        raise WireError(f"artifact {artifact.path!r} cannot be opened: {error.strerror}") from None
    finally:
        if folder >= 0:
            os.close(folder)


def _relocate_group(copy: Path, path: str, folder: Path, names: set[str]) -> None:
    """Triton's group file lists the files of one kernel by absolute path: make them those in the user's cache.

    Source: `FileCacheManager.put_group` in triton/runtime/cache.py (3.6, 3.7).
    """
    parent, _, own = path.rpartition("/")
    try:
        children = {}
        for name, child in json.loads(copy.read_bytes())["child_paths"].items():
            file = str(child).rpartition("/")[2]
            if f"{parent}/{file}" not in names:
                raise ValueError(f"it names {file!r}, which the job does not hand back")
            children[str(name)] = str(folder / file)
        # Without it Triton takes the entry for missing, and nobody would ever make it again.
        if own.removeprefix(_GROUP) not in children:
            raise ValueError(f"it does not name {own.removeprefix(_GROUP)!r}")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise WireError(f"artifact {path!r} is not a Triton group file: {error}") from None
    copy.write_text(json.dumps({"child_paths": children}))
