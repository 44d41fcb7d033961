"""Open a userfaultfd, which stretches races in the kernel."""

from escape_tools import call

NEEDS = ("seccomp",)


def attempt(at):
    call("userfaultfd", 1)  # UFFD_USER_MODE_ONLY
