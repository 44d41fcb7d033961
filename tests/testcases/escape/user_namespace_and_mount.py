"""Use the capabilities of a nested user namespace: mount there."""

from escape_tools import CLONE_NEWNS, CLONE_NEWUSER, call, forked

NEEDS = ("seccomp", "landlock")


def attempt(at):
    def inside():
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        call("mount", b"none", b"home", b"tmpfs", 0, None)

    forked(inside)
