"""Replace a file in the template's folder, from which every later job would compile."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    with open("replacement", "w") as file:
        file.write("EVIL")
    os.rename("replacement", at.template_file)


def proof(at, seen):
    return open(at.template_file).read() == "EVIL"
