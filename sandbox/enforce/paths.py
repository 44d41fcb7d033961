"""What a compiler has to read: the interpreter, the code on its search path, the toolchain, a few files of the system.

One list for two mechanisms: Landlock lets a worker read what is named here, and a mount namespace has to show it.
Nothing is opened and nothing imported. 30 ms in the template, 1 ms in its forks, which know what it has found.
"""

from __future__ import annotations

import functools
import glob
import os
import pwd
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: The toolchain and the libraries of a distribution, and vendors' usual places.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib*", "/opt/rocm*", "/nix/store", "/gnu/store")
#: Of /etc by name only: shadow, keys and tokens live beside these.
_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "passwd", "group", "nsswitch.conf", "hosts",
    "host.conf", "localtime", "timezone", "locale.alias", "locale.conf", "default/locale", "alternatives",
    "os-release", "debian_version", "ssl/openssl.cnf", "pki/tls/openssl.cnf", "crypto-policies", "mime.types",
    "OpenCL", "python3*",
)  # fmt: skip
#: What the kernel tells of itself. /proc shows other processes' names; what is secret in it (memory, environment,
#: descriptors) is guarded by the right to trace, which Landlock denies.
_KERNEL = ("/proc", "/sys/devices/system", "/sys/fs/cgroup", "/sys/kernel/mm")
_DEVICES = ("null", "zero", "full", "random", "urandom")
#: What CUDA and ROCm use besides: their devices, and where they look for cards.
_GPU_DEVICES = ("/dev/nvidia*", "/dev/dri", "/dev/kfd")
#: Of the process that asks: CUDA names its threads there, and does not start if it cannot.
_THREADS = "/proc/self/task"
_GPU_KERNEL = ("/sys/devices", "/sys/bus", "/sys/class", "/sys/module")
#: Variables that name folders, separated by colons, and those that name one.
_SEARCH = ("PATH", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "LD_LIBRARY_PATH")
_HOMES = ("CUDA_HOME", "CUDA_PATH", "ROCM_HOME", "ROCM_PATH")
_COMPILERS_BY_NAME = ("CC", "CXX")
#: A compiler looks for its parts beside the folder that it lies in: GCC by its own path, CUDA likewise.
_COMPILERS = ("g++", "gcc", "c++", "cc", "clang++", "clang", "nvcc", "ptxas", "hipcc")
_PARTS = ("bin", "lib*", "include", "*-linux-*", "nvvm", "targets", "sysroot")
#: Never as a whole, whatever names them, nor what they lie in.
_TOO_MUCH = ("/etc", "/dev", "/proc", "/sys", "/run", "/var", "/tmp", "/var/tmp", "/home", "/root", "/opt", "/mnt")


@dataclass(frozen=True)
class Paths:
    """Absolute paths that exist. No path lies below another of its own list, unless by a link."""

    read: tuple[str, ...]
    """Files and folders to read and to execute. Where a name is a link, the link and what it leads to."""
    devices: tuple[str, ...]
    """Devices, and folders of devices, to read and to write."""


def needed(environment: Mapping[str, str], *, gpu: bool, extra: Iterable[str] = ()) -> Paths:
    """What a compile job reads outside its scratch folder, where that exists.

    Folders that hold other people's things are left out even if a search path names them: `/`, /tmp, a home folder
    itself. Code that lies directly in one has to be moved, or named in ``extra``, which is taken as it is.

    Args:
        environment: the job's variables, for PATH, CC, CXX, CPATH, LIBRARY_PATH, LD_LIBRARY_PATH, CUDA_HOME and
            their like.
        gpu: whether the job may use a GPU.
        extra: absolute paths to read besides: those of the policy, and the template's own folder.
    """
    relevant = tuple((name, environment.get(name, "")) for name in (*_SEARCH, *_HOMES, *_COMPILERS_BY_NAME))
    own = {os.path.normpath(path) for path in extra}
    read = {*_toolchain(relevant), *_of_this_process(), *own, *map(os.path.realpath, own)}
    devices = [f"/dev/{name}" for name in _DEVICES]
    if gpu:
        read.update(_found(_GPU_KERNEL))
        devices += [*_found(_GPU_DEVICES), _THREADS]
    return Paths(read=_outermost(read), devices=tuple(path for path in devices if os.path.exists(path)))


@functools.cache
def _of_this_process() -> frozenset[str]:
    """Interpreter, search path, loaded packages, and the system's own. Asked in the template, known in its forks."""
    executable = os.path.realpath(sys.executable)
    code: set[Any] = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.executable, executable}
    code.update(entry for entry in sys.path if os.path.isabs(entry))
    # An editable installation is on no path, but what it has loaded tells where it is.
    for name, module in list(sys.modules.items()):
        if "." not in name:
            code.update(getattr(module, "__path__", None) or [getattr(module, "__file__", None)])
    code = {os.path.normpath(path) for path in code if isinstance(path, str)}
    kept = {path for path in code if os.path.isabs(path) and not _is_too_much(path)}
    kept.update(_found((*_SYSTEM, *_KERNEL, *(f"/etc/{name}" for name in _ETC))))
    return frozenset(_outermost({*kept, *map(os.path.realpath, kept)}))


@functools.lru_cache(8)
def _toolchain(relevant: tuple[tuple[str, str], ...]) -> frozenset[str]:
    found = {os.path.normpath(path) for path in _of_environment(dict(relevant)) if not _is_too_much(path)}
    return frozenset(_outermost({*found, *map(os.path.realpath, found)}))


def _of_environment(environment: Mapping[str, str]) -> Iterator[str]:
    """Folders that the variables name, and those around the compilers that they lead to."""
    for name in _SEARCH:
        yield from filter(os.path.isabs, environment.get(name, "").split(os.pathsep))
    yield from filter(os.path.isabs, (environment.get(name, "") for name in _HOMES))
    words = [word for name in _COMPILERS_BY_NAME for word in environment.get(name, "").split()]
    for compiler in (*words, *_COMPILERS):
        found = shutil.which(compiler, path=environment.get("PATH"))
        if found is not None and os.path.isabs(found):
            for file in (found, os.path.realpath(found)):
                yield file
                prefix, folder = os.path.split(os.path.dirname(file))
                if folder == "bin":
                    yield from _found(f"{glob.escape(prefix)}/{part}" for part in _PARTS)


@functools.cache
def _private_places() -> frozenset[str]:
    """Folders that are not to be read as a whole, with all that they lie in."""
    homes = [os.path.expanduser("~")]
    try:
        homes.append(pwd.getpwuid(os.geteuid()).pw_dir)
    except KeyError:
        pass  # a user without an entry, as in many containers, has no other home
    places = {os.path.realpath(path) for path in (*_TOO_MUCH, *homes, tempfile.gettempdir())}
    for path in list(places):
        while path != "/":
            path = os.path.dirname(path)
            places.add(path)
    return frozenset(places)


def _is_too_much(path: str) -> bool:
    return os.path.realpath(path) in _private_places()


def _found(patterns: Iterable[str]) -> list[str]:
    return [path for pattern in patterns for path in glob.glob(pattern)]


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Those that exist, without those that lie below another, sorted."""
    kept: set[str] = set()
    for path in sorted(paths, key=len):
        above = path
        while above not in kept and above != "/":
            above = os.path.dirname(above)
        if above not in kept and os.path.exists(path):
            kept.add(path)
    return tuple(sorted(kept))
