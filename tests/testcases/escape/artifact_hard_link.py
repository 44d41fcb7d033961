"""Hand back a second name of a secret as a kernel."""

import os

from escape_tools import own_artifact, reply, say

NEEDS = ()


def attempt(at):
    os.link(at.secret, own_artifact(at.mark, "hard.so"))
    item = {"path": f"inductor/zz/{at.mark}.hard.so", "size": at.secret_size, "sha256": at.secret_sha256}
    say(reply(artifacts=[item]))


def proof(at, seen):
    return at.adopted(f"zz/{at.mark}.hard.so") is not None
