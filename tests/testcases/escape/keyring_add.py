"""Leave a key in the service's session keyring."""

from escape_tools import call

NEEDS = ("seccomp",)


def attempt(at):
    call("add_key", b"user", at.mark.encode(), b"x", 1, -3)
