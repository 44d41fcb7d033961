"""Hand back a file into a folder of the cache from which PyTorch unpickles."""

import os

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    os.makedirs("artifacts/inductor/fxgraph/ab/cd")
    open("artifacts/inductor/fxgraph/ab/cd/ef", "w").close()
    say(reply(path="inductor/fxgraph/ab/cd/ef"))


def proof(at, seen):
    return at.adopted("fxgraph") is not None
