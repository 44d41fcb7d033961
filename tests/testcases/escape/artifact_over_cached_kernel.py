"""Hand back a kernel under the name of one that is in the cache already."""

import os

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    os.makedirs("artifacts/inductor/ab")
    with open("artifacts/inductor/ab/untouched.so", "w") as file:
        file.write("EVIL")
    say(reply(path="inductor/ab/untouched.so", content=b"EVIL"))


def proof(at, seen):
    return at.adopted("ab/untouched.so") != "GOOD"
