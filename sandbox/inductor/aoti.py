"""AOTInductor packages: made in a child, handed back as files, put where the caller wants them.

The child builds in a folder of its job. Its files come back as artifacts of the kind `aoti`, checked like all others,
into a folder of their own beside the caller's; from there they take their places here, under names that Inductor
would have chosen and no others.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat, outputcode
from sandbox.inductor.budget import shown

#: A hash by which Inductor names files, and what it appends to it (2.11, 2.13).
_HASH: Final = r"c[a-z2-7]{20,80}"
_ENDINGS: Final = (
    r"(\.wrapper|\.kernel|\.weights)?(_metadata|_compile_flags|_linker_flags|_weights|_serialized_weights)?"
    r"\.(so|cpp|h|o|json|blob|bin)"
)
_OTHERS: Final = ("kernel_information.json", "custom_objs_config.json")
#: What the child calls a library that the caller has named.
_NAMED: Final = "named.so"
_STAGING: Final = ".sandbox-aoti-"


def wanted() -> bool:
    """Whether what is compiled now is to become files."""
    return compat.V.aot_compilation is True


def check_sendable(graph_kwargs: dict[str, Any], target: str) -> None:
    """Refuse what a child cannot make.

    Raises:
        UnserializableError: reason `aot_inductor`.
    """
    if graph_kwargs.get("fx_wrapper"):
        raise UnserializableError("aot_inductor", "with fx_wrapper the result is a module, not files")
    if target != "cpu":
        raise UnserializableError("aot_inductor", "packages for a GPU name their kernels by absolute path")


def _output() -> tuple[Path, str]:
    """The folder and the name of the library (empty: Inductor chooses) that the caller's settings ask for."""
    path = compat.inductor_config.aot_inductor.output_path
    if path.endswith(".so"):  # a file of the caller, not of the cache
        return Path(os.path.abspath(os.path.dirname(path))), os.path.basename(path)
    return Path(compat.runtime_cache_dir(), path), ""


# In the child -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def building(folder: str) -> Iterator[None]:
    """Inductor puts its files into ``folder``."""
    named = compat.inductor_config.aot_inductor.output_path.endswith(".so")
    path = os.path.join(folder, _NAMED) if named else folder
    os.makedirs(folder, exist_ok=True)
    with compat.V.set_aot_compilation(True), compat.inductor_config.patch({"aot_inductor.output_path": path}):
        yield


def encode(code: Any, folder: str, constants: dict[int, str]) -> dict[str, Any]:
    """What Inductor returned, as plain data: `{files: [path relative to folder, ...], single, device_type, weights}`.

    Raises:
        UnserializableError: it names a file elsewhere, or a weight that cannot be sent.
    """
    names = code.filename
    single = isinstance(names, str)
    files: list[str] = []
    weights: dict[str, Any] | None = None
    for entry in [names] if single else names:
        if isinstance(entry, dict):
            weights = {name: outputcode.encode_constant(value, constants) for name, (value, _) in entry.items()}
        elif entry == compat.LINKER_SCRIPT:
            files.append("")
        elif Path(entry).is_relative_to(folder):
            files.append(Path(entry).relative_to(folder).as_posix())
        else:
            raise UnserializableError("aot_inductor", f"{entry} is not in the folder of the package")
    return {"files": files, "single": single, "device_type": code.device_type, "weights": weights}


# In the parent ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def staging() -> Iterator[Path]:
    """A folder beside the place where the files belong, for the block.

    Raises:
        OSError: that place cannot be written.
    """
    folder, _ = _output()
    folder.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def decode(data: Any, gm: torch.fx.GraphModule, staged: Path) -> Any:
    """:func:`_decode`; ``staged`` is empty afterwards, for another child's files."""
    try:
        return _decode(data, gm, staged)
    finally:
        for left in staged.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def _decode(data: Any, gm: torch.fx.GraphModule, staged: Path) -> Any:
    """Put the files of ``staged`` into their places and return what Inductor would have: a CompiledAOTI.

    A file of that name that is there already is replaced in one step, as Inductor would.

    Raises:
        WireError: ``data`` is malformed, a file has another name than Inductor gives, one is missing, or the library
            cannot be loaded where it has to be.
        UnserializableError: a weight lives on a device that is not there.
        OSError: the place cannot be written.
    """
    match data:
        case {"files": list(files), "single": bool(single), "device_type": "cpu", "weights": weights, **rest} if (
            not rest and files
        ):
            pass
        case _:
            raise WireError("the reply's package is malformed")
    folder, name = _output()
    found = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    allowed = re.compile(rf"({_HASH}/)?({_HASH}{_own_name()}){_ENDINGS}|{_HASH}/CMakeLists\.txt")
    for relative in found:
        if not (allowed.fullmatch(relative) or relative in _OTHERS or (name and relative == _NAMED)):
            raise WireError(f"a file of the reply's package has the name {shown(relative)}")
    made: list[Any] = []
    for file in files:
        if file == "":
            made.append(compat.LINKER_SCRIPT)
        elif type(file) is str and file in found:
            made.append(str(folder / (name if file == _NAMED else file)))
        else:
            raise WireError(f"the reply's package names {shown(file)}, which was not handed back")
    if weights is not None:
        made.append(_weights(weights, gm))
    if single and len(made) != 1:
        raise WireError("the reply's package has several files where one was asked for")
    mask = _umask()
    for relative, path in found.items():
        target = folder / (name if relative == _NAMED else relative)
        target.parent.mkdir(exist_ok=True)
        os.chmod(path, (0o777 if relative.endswith(".so") else 0o666) & ~mask)
        os.replace(path, target)
    try:
        return compat.CompiledAOTI(filename=made[0] if single else made, device_type="cpu")
    except Exception as error:  # with enable_autograd_for_aot it loads the library
        raise WireError(f"the package cannot be loaded: {type(error).__name__}: {error}") from error


def _own_name() -> str:
    """The name that the caller's settings give all files, as an alternative of the pattern."""
    chosen = getattr(compat.inductor_config.aot_inductor, "model_name_for_generated_files", None)
    return f"|{re.escape(chosen)}" if chosen else ""


def _weights(data: Any, gm: torch.fx.GraphModule) -> Any:
    if not isinstance(data, dict):
        raise WireError("the weights of the reply's package are not a table")
    tensors = {name: outputcode.decode_constant(value, gm) for name, value in data.items()}
    return compat.AotWeights({name: (tensor, compat.AotWeight(tensor)) for name, tensor in tensors.items()})


def _umask() -> int:
    """This process's umask, without changing it for a moment, which other threads would see."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077
