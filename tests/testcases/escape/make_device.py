"""Make a device node of the disk in the job's own folder."""

import os
import stat

NEEDS = ("capabilities", "landlock")
PRIVILEGED = True


def attempt(at):
    os.mknod("disk", stat.S_IFBLK | 0o600, os.stat("/").st_dev)
    os.unlink("disk")
