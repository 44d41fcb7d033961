"""Read the disk below the file system."""

import os

from escape_tools import Absent

NEEDS = ("landlock",)
PRIVILEGED = True


def attempt(at):
    for name in os.listdir("/dev"):
        if os.lstat(f"/dev/{name}").st_rdev == os.stat("/").st_dev:
            return os.read(os.open(f"/dev/{name}", os.O_RDONLY), 16)
    raise Absent("no device node of the root file system")
