"""Hand back a device as a kernel, which has no end."""

import os

from escape_tools import own_artifact, reply, say

NEEDS = ()


def attempt(at):
    try:
        os.mknod(own_artifact(at.mark, "device.so"), 0o20600, os.makedev(1, 5))
    except PermissionError:
        os.symlink("/dev/zero", own_artifact(at.mark, "device.so"))
    say(reply(path=f"inductor/zz/{at.mark}.device.so", content=bytes(1 << 20)))


def proof(at, seen):
    return at.adopted(f"zz/{at.mark}.device.so") is not None
