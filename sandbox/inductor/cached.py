"""Graphs in Inductor's caches: their C++ kernels travel with them, and a hit runs no compiler.

An entry of Inductor's caches (local, remote, mega-cache) holds the source of a graph; its C++ kernels are built anew
where it is loaded, by the process that loads it. Here they need not be. Beside a graph's code lies a table of its
libraries, for other processes on this machine; and an entry carries the libraries, for other machines with the same
processor, as Inductor's own entries carry Triton's kernels. Where neither helps, and graphs are compiled in children,
the hit is made a miss: a child then makes the graph, kernels included.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import threading
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

from sandbox.artifacts import is_whole
from sandbox.errors import WireError
from sandbox.inductor import compat, kernels
from sandbox.results import TABLE_ENDING

log = logging.getLogger("sandbox")

Table = dict[str, dict[str, str]]
#: Attribute of a graph in a cache: `{"made_for", "table", "libraries"}`, plain data. Others who load it ignore it.
CARRIED: Final = "sandbox_kernels"
#: What generated code says where it needs a C++ library.
_ASKS: Final = ("async_compile.cpp", "CppWrapperCodeCache", "CppCodeCache")
#: Bytes of one library at most; Inductor's have some tens of thousands.
_MAX_LIBRARY = 1 << 28

_lock = threading.Lock()
_undo: list[Callable[[], None]] = []
#: `noted`: the graph that this thread's Inductor has looked up last, and its key.
_asked = threading.local()


def install(in_children: Callable[[], bool], key_for: Callable[[Any, str], str]) -> None:
    """Hook the two ends of Inductor's caches. Idempotent.

    Args:
        in_children: whether the calling thread's graphs are compiled in children, so that none may be built here.
        key_for: called with a graph and the key that Inductor has found for it; returns the one to use.
    """
    kernels.install_loader()
    graphs, cache = compat.CompiledFxGraph, compat.FxGraphCache
    with _lock:
        if _undo:
            return
        load, save, prepare = graphs.after_deserialization, graphs.prepare_for_serialization, cache.prepare_key

        def prepare_key(gm: Any, *args: Any, **kwargs: Any) -> Any:
            """Inductor's, before each look into its cache."""
            found, info = prepare(gm, *args, **kwargs)
            if found is None:
                _asked.noted = None
                return None, info
            key = key_for(gm, found[0])
            _asked.noted = (weakref.ref(gm), key)
            return (key, *found[1:]), info

        def after_deserialization(self: Any, constants: Any) -> Any:
            """Inductor's, for a graph from a cache as well as for one from a child."""
            _asked.noted = None
            carried = vars(self).pop(CARRIED, None)
            if kernels.is_loading():  # from a child, with its own table
                return load(self, constants)
            table = remembered(self.cache_key) or unpacked(self.cache_key, carried)
            if table is None and not in_children():
                return load(self, constants)
            return _load(functools.partial(load, self, constants), self, table)

        def prepare_for_serialization(self: Any) -> None:
            """Inductor's: ``self`` is the copy that goes into a cache."""
            save(self)
            if (carried := packed(self.cache_key)) is not None:
                setattr(self, CARRIED, carried)

        graphs.after_deserialization = after_deserialization
        graphs.prepare_for_serialization = prepare_for_serialization
        cache.prepare_key = staticmethod(prepare_key)

        def undo() -> None:
            graphs.after_deserialization, graphs.prepare_for_serialization = load, save
            cache.prepare_key = staticmethod(prepare)

        _undo.append(undo)


def remove() -> None:
    """Undo :func:`install`."""
    with _lock:
        for undo in _undo:
            undo()
        _undo.clear()
    kernels.remove_loader()


def key_of(gm: Any) -> str | None:
    """The key under which Inductor has just missed ``gm`` in its cache, for once; None if it did not look."""
    noted, _asked.noted = getattr(_asked, "noted", None), None
    return noted[1] if noted is not None and noted[0]() is gm else None


def holds(key: str) -> bool:
    """Whether Inductor's local cache has something under ``key``."""
    return os.path.isdir(compat.FxGraphCache._get_tmp_dir_for_key(key))


def _load(load: Callable[[], Any], graph: Any, table: Table | None) -> Any:
    """Load a cached graph with its libraries. Any OSError is a miss to Inductor."""
    if table is None and any(word in graph.source_code for word in _ASKS):
        log.info("a cached graph (%s) has no kernels for this machine: it is compiled again", graph.cache_key)
        raise FileNotFoundError(errno.ENOENT, "no kernels for this machine", graph.cache_key)
    with kernels.loading(table or {}):
        try:
            return load()
        except ImportError as error:  # made for another C library, for one
            for entry in (table or {}).values():
                Path(compat.runtime_cache_dir(), entry["path"]).unlink(missing_ok=True)
            raise OSError(errno.ENOEXEC, f"a kernel cannot be loaded: {error}", graph.cache_key) from error


# On this machine: a table beside the code ------------------------------------------------------------------------


def remember(cache_key: str, table: Table) -> None:
    """Keep the table beside the graph's code in the user's cache, for a cache hit in a later process.

    Raises:
        OSError: the cache cannot be written.
    """
    if table and remembered(cache_key) is None:
        _write(_beside(cache_key), json.dumps(table).encode("ascii"))


def remembered(cache_key: str) -> Table | None:
    """The table of :func:`remember`, if it is there and so is every library that it names."""
    try:
        table = kernels.check(json.loads(_beside(cache_key).read_bytes()))
    except (OSError, ValueError, WireError):
        return None
    cache = Path(compat.runtime_cache_dir())
    return table if all(is_whole(cache / entry["path"]) for entry in table.values()) else None


def _beside(cache_key: str) -> Path:
    """The same code can be built with other flags, or for another processor: what decides that is part of the name."""
    return Path(compat.runtime_cache_dir()) / cache_key[1:3] / f"{cache_key}.{_made_for()}{TABLE_ENDING}"


def _made_for() -> str:
    config = compat.inductor_config
    flags = {name: repr(getattr(config, name, None)) for name in sorted(config._config) if name.startswith("cpp")}
    return hashlib.sha256(json.dumps([torch.__version__, _processor(), flags]).encode()).hexdigest()[:16]


@functools.cache
def _processor() -> str:
    """What `-march=native` and the vector-ISA probe depend on: a cache may travel to another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join([platform.machine(), *told])


def _write(path: Path, data: bytes, mode: int = 0o600) -> None:
    """A whole file under its name, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


# On other machines: the libraries in the entry -------------------------------------------------------------------


def packed(cache_key: str) -> dict[str, Any] | None:
    """What an entry carries: the table, the libraries, and for what they were made. None if there are none."""
    if (table := remembered(cache_key)) is None:
        return None
    cache = Path(compat.runtime_cache_dir())
    try:
        libraries = {entry["path"]: zlib.compress((cache / entry["path"]).read_bytes(), 1) for entry in table.values()}
    except OSError:
        return None  # somebody is clearing the cache
    return {"made_for": _made_for(), "table": table, "libraries": libraries}


def unpacked(cache_key: str, carried: Any) -> Table | None:
    """Put what an entry carries into the user's cache; returns the table, or None if it is of no use here."""
    match carried:
        case {"made_for": str(made_for), "table": dict(data), "libraries": dict(libraries)} if made_for == _made_for():
            pass
        case _:
            return None
    cache = Path(compat.runtime_cache_dir())
    try:
        table = kernels.check(data)
        for entry in table.values():
            path = cache / entry["path"]
            if not is_whole(path):
                _write(path, _inflated(libraries[entry["path"]]), 0o700)
        remember(cache_key, table)
    except (OSError, KeyError, TypeError, zlib.error, WireError) as error:
        log.warning("the kernels in a cache entry (%s) are of no use: %s: %s", cache_key, type(error).__name__, error)
        return None
    return remembered(cache_key)


def _inflated(data: bytes) -> bytes:
    machine = zlib.decompressobj()
    library = machine.decompress(data, _MAX_LIBRARY)
    if not machine.eof:
        raise zlib.error("it is cut short, or too large")
    return library
