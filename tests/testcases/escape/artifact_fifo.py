"""Hand back a FIFO as a kernel, so that the service waits for ever as it reads."""

import os

from escape_tools import own_artifact, reply, say

NEEDS = ()


def attempt(at):
    os.mkfifo(own_artifact(at.mark, "fifo.so"))
    say(reply(path=f"inductor/zz/{at.mark}.fifo.so"))


def proof(at, seen):
    return at.adopted(f"zz/{at.mark}.fifo.so") is not None
