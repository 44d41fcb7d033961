"""Make a new file in the home folder of the service's user."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    open(f"{at.home}/{at.mark}", "w").close()


def proof(at, seen):
    return os.path.exists(f"{at.home}/{at.mark}")
