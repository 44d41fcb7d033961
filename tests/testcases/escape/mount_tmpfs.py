"""Mount a file system over the job's own folder."""

from escape_tools import call

NEEDS = ("capabilities", "seccomp", "landlock")
PRIVILEGED = True


def attempt(at):
    call("mount", b"none", b"home", b"tmpfs", 0, None)
    call("umount2", b"home", 2)
