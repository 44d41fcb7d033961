"""Cut a kernel in the user's Inductor cache short, without opening it."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    os.truncate(f"{at.cache}/ab/whole.so", 0)


def proof(at, seen):
    return at.adopted("ab/whole.so") == ""
