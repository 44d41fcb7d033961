"""Take away a mount, to uncover what it hides."""

import errno

from escape_tools import reaches

NEEDS = ("capabilities", "seccomp", "landlock")
PRIVILEGED = True


def attempt(at):
    return reaches(errno.EINVAL, "umount2", b"home", 2)  # where nothing is mounted
