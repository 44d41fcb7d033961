"""Answer more than the service wants to hold in memory, or say that one will."""

import os
import struct
import time

from escape_tools import channel

NEEDS = ()


def attempt(at):
    os.write(channel(), struct.pack("!4sIQ32s", b"SBX1", 10, 1 << 50, b""))
    time.sleep(20)


def proof(at, seen):
    return seen.result.status.value == "ok" or seen.result.usage.wall_seconds > 5
