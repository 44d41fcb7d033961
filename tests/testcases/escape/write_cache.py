"""Put a kernel of one's own straight into the user's Inductor cache."""

import os

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    os.makedirs(f"{at.cache}/{at.mark}")
    open(f"{at.cache}/{at.mark}/kernel.so", "w").close()


def proof(at, seen):
    return os.path.exists(f"{at.cache}/{at.mark}")
