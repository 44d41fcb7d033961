"""Plant a `.pth` file where the service's next start would execute it."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    with open(f"{at.site}/{at.mark}.pth", "w") as file:
        file.write("import os\n")


def proof(at, seen):
    return os.path.exists(f"{at.site}/{at.mark}.pth")
