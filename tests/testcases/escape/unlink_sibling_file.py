"""Remove a file in another job's folder."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    os.unlink(f"{at.sibling_folder}/doomed")


def proof(at, seen):
    return not os.path.exists(f"{at.sibling_folder}/doomed")
