"""The C++ kernels of one graph: recorded where they are built, loaded elsewhere without a compiler.

Inductor finds a built kernel by hashing source and compiler command line, which takes a compiler, a probe of the
vector instructions and a precompiled header. A parent should need none of them: the child notes which library
each source became, and the parent loads exactly those while it loads the graph, and builds none.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from sandbox.errors import WireError
from sandbox.inductor import compat
from sandbox.inductor.budget import shown

_KEY: Final = re.compile(r"^[a-z0-9]{8,128}$")
_PATH: Final = re.compile(r"^[A-Za-z0-9_-]{1,64}/[A-Za-z0-9._-]{1,200}\.so$")

_local = threading.local()


def _identity(cls: type, main_code: str, device_type: str, extra_flags: Any, optimized_code: str | None) -> str:
    """What names a library before it is built. Flags name files of the cache folder, so only their base names count."""
    flags = [os.path.basename(str(flag)) for flag in extra_flags]
    text = json.dumps([cls.__name__, main_code, device_type, flags, optimized_code])
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, dict[str, str]]]:
    """In a child: the block's C++ libraries, `{identity: {key, path}}`, `path` relative to the cache folder."""
    table: dict[str, dict[str, str]] = {}
    codecache = compat.codecache
    original, write = compat.CppCodeCache.__dict__["load_async"].__func__, codecache.write

    def noting_write(content: Any, extension: str, *args: Any, **kwargs: Any) -> tuple[str, str]:
        key, path = write(content, extension, *args, **kwargs)
        pending = getattr(_local, "pending", None)
        if pending is not None and extension == "main.cpp":
            folder = os.path.basename(os.path.dirname(path))
            table[pending] = {"key": key, "path": f"{folder}/{os.path.basename(path).removesuffix('.cpp')}.so"}
        result: tuple[str, str] = (key, path)
        return result

    def load_async(
        cls: Any, /, main_code: str, device_type: str = "cpu", submit_fn: Any = None, extra_flags: Any = (),
        optimized_code: str | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        _local.pending = _identity(cls, main_code, device_type, extra_flags, optimized_code)
        try:
            return original(cls, main_code, device_type, submit_fn, extra_flags, optimized_code, **kwargs)
        finally:
            _local.pending = None

    with (
        compat.replaced(compat.CppCodeCache, "load_async", classmethod(load_async)),
        compat.replaced(codecache, "write", noting_write),
    ):
        yield table


def check(table: Any) -> dict[str, dict[str, str]]:
    """``table`` if it is what :func:`recorded` yields, else WireError."""
    if not isinstance(table, dict):
        raise WireError("the reply's table of kernels is not a table")
    for identity, entry in table.items():
        if not isinstance(identity, str) or not isinstance(entry, dict) or set(entry) != {"key", "path"}:
            raise WireError("an entry of the reply's table of kernels is malformed")
        if not isinstance(entry["key"], str) or not _KEY.match(entry["key"]):
            raise WireError(f"a kernel's key is malformed: {shown(entry['key'])}")
        if not isinstance(entry["path"], str) or not _PATH.match(entry["path"]) or ".." in entry["path"]:
            raise WireError(f"a kernel's path is malformed: {shown(entry['path'])}")
    return table


_install_lock = threading.Lock()
_installed: list[Callable[[], None]] = []


def install_loader() -> None:
    """Teach this process to load recorded kernels. Idempotent; without :func:`loading` nothing changes."""
    with _install_lock:
        if _installed:
            return
        owner, pools = compat.CppCodeCache, compat.AsyncCompile
        before = owner.__dict__["load_async"]
        original, use_pool = before.__func__, pools.__dict__["use_process_pool"]

        def load_async(
            cls: Any, /, main_code: str, device_type: str = "cpu", submit_fn: Any = None, extra_flags: Any = (),
            optimized_code: str | None = None, *args: Any, **kwargs: Any,
        ) -> Any:  # fmt: skip
            table = getattr(_local, "table", None)
            if table is not None:
                identity = _identity(cls, main_code, device_type, extra_flags, optimized_code)
                if identity not in table:
                    raise FileNotFoundError(errno.ENOENT, f"no library is recorded for the C++ kernel {identity[:12]}")
                return _loader(cls, identity, table[identity])
            return original(cls, main_code, device_type, submit_fn, extra_flags, optimized_code, *args, **kwargs)

        def use_process_pool(cls: Any) -> bool:
            # While a graph is loaded its Triton kernels are read from the cache, here, and no worker is started.
            return False if getattr(_local, "table", None) is not None else bool(use_pool.__func__(cls))

        owner.load_async = classmethod(load_async)
        pools.use_process_pool = classmethod(use_process_pool)

        def remove() -> None:
            owner.load_async = before
            pools.use_process_pool = use_pool

        _installed.append(remove)


def remove_loader() -> None:
    """Undo :func:`install_loader`."""
    with _install_lock:
        for remove in _installed:
            remove()
        _installed.clear()


def _loader(cls: Any, identity: str, entry: dict[str, str]) -> Callable[[], Any]:
    """What Inductor calls for the library. Never in `cls.cache`, where one reply could claim another graph's key."""
    path = os.path.join(getattr(_local, "folder", None) or compat.runtime_cache_dir(), entry["path"])
    # Python modules go into sys.modules under this key: one of their own for each source and file.
    key = hashlib.sha256(f"{identity} {path}".encode()).hexdigest()

    @functools.cache
    def load() -> Any:
        return cls._load_library(path, key)

    return load


@contextlib.contextmanager
def _in_this_thread(name: str, value: Any) -> Iterator[None]:
    before = getattr(_local, name, None)
    setattr(_local, name, value)
    try:
        yield
    finally:
        setattr(_local, name, before)


def kept_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Inside the block, this thread loads libraries from ``folder``, wherever Inductor's cache is by now: with
    `force_disable_caches` each compile has a cache of its own, and is over when a thread loads what came of it."""
    return _in_this_thread("folder", folder)


def is_loading() -> bool:
    """Whether this thread is inside :func:`loading`."""
    return getattr(_local, "table", None) is not None


def loading(table: dict[str, dict[str, str]]) -> contextlib.AbstractContextManager[None]:
    """Inside the block, this thread loads the libraries of ``table`` and builds none: what asks for another one gets
    FileNotFoundError."""
    install_loader()
    return _in_this_thread("table", table)
