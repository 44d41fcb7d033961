"""Take memory that is no process's: what lies in sockets and was never read, in many processes."""

import contextlib
import os
import socket
import time

NEEDS = ("cgroup",)
LIMITS = {"memory_bytes": 96 << 20}


def attempt(at):
    for _ in range(12):
        if os.fork() == 0:
            kept = []
            with contextlib.suppress(OSError):
                while len(kept) < 100:
                    kept += socket.socketpair()
                    kept[-1].setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        while True:
                            kept[-1].send(bytes(64 << 10))
            time.sleep(20)
            os._exit(0)
    time.sleep(2)
    return "12 processes have filled 50 sockets each"


def proof(at, seen):
    return seen.outcome == "returned"
