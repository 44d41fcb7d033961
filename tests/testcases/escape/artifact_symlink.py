"""Hand back a link to a secret as a kernel, so that the service copies the secret for us."""

import os

from escape_tools import own_artifact, reply, say

NEEDS = ()


def attempt(at):
    os.symlink(at.secret, own_artifact(at.mark, "link.so"))
    item = {"path": f"inductor/zz/{at.mark}.link.so", "size": at.secret_size, "sha256": at.secret_sha256}
    say(reply(artifacts=[item]))


def proof(at, seen):
    return at.adopted(f"zz/{at.mark}.link.so") is not None
