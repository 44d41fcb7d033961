"""Rename a file of the service's user away."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    os.rename(f"{at.home}/kept-for-remove", f"{at.home}/{at.mark}")


def proof(at, seen):
    return os.path.exists(f"{at.home}/{at.mark}")
