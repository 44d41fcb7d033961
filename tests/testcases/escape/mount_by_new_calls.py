"""Open a file system by fsopen, the new way to mount, which old filters do not know."""

from escape_tools import call

NEEDS = ("capabilities", "seccomp")
PRIVILEGED = True


def attempt(at):
    call("fsopen", b"tmpfs", 0)
