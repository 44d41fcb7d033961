"""Change a kernel between its check and its use, by a process that stays and writes without end."""

import os

from escape_tools import detach, own_artifact, reply, say

NEEDS = ()


def attempt(at):
    path = own_artifact(at.mark, "swapped.so")
    with open(path, "w") as file:
        file.write("GOOD")
    held = os.open(path, os.O_WRONLY)
    if detach(at.mark):
        while True:
            os.pwrite(held, b"EVIL", 0)
            os.pwrite(held, b"GOOD", 0)
    say(reply(path=f"inductor/zz/{at.mark}.swapped.so", content=b"GOOD"))


def proof(at, seen):
    return at.adopted(f"zz/{at.mark}.swapped.so") not in (None, "GOOD")
