"""Look for descriptors of the service, of the template, of the keeper or of another job among one's own."""

import contextlib
import os

NEEDS = ()


def attempt(at):
    links, texts = set(), []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.add(os.readlink(f"/proc/self/fd/{name}"))
            texts.append(os.pread(int(name), 100, 0).decode())
    return [sorted(links), texts]


def proof(at, seen):
    links, _ = seen.got
    kinds = [link.partition(":")[0] for link in links]
    own = {"/dev/null", "pipe", "socket"}  # its standard input, its output, its channel: one of each
    return seen.tells(at.token) or len(kinds) > len(set(kinds)) or not own.issuperset(kinds)
