"""Append to a kernel that already lies in the user's Inductor cache."""

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    with open(at.cached, "a") as file:
        file.write("EVIL-APPENDED")


def proof(at, seen):
    return "EVIL-APPENDED" in open(at.cached).read()
