"""Answer with a pickle that makes a folder when it is read."""

import os

from escape_tools import reply, say

NEEDS = ()


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def attempt(at):
    say(reply(Gadget(f"{at.home}/{at.mark}")))


def proof(at, seen):
    return os.path.exists(f"{at.home}/{at.mark}") or seen.result.status.value == "ok"
