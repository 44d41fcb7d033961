"""Lift the memory limit of one's own control group."""

import os

from escape_tools import Absent, cgroup_files

NEEDS = ("landlock", "mount_namespace")
PRIVILEGED = True


def attempt(at):
    for _root, own in cgroup_files(at.cgroup):
        for name, value in (("memory.max", "max"), ("memory.limit_in_bytes", "-1")):
            if os.path.exists(f"{own}/{name}"):
                with open(f"{own}/{name}", "w") as file:
                    file.write(value)
                return open(f"{own}/{name}").read()
    raise Absent("no memory controller")
