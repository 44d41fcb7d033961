"""Open the kernel's core pattern for writing: the program named there runs as root, outside of all namespaces."""

import os

NEEDS = ("landlock", "mount_namespace")
PRIVILEGED = True


def attempt(at):
    os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY)
