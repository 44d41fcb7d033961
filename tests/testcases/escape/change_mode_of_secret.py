"""Open a secret to all users of the host: a change of mode is no write, and Landlock does not know it."""

import os
import stat

NEEDS = ("mount_namespace",)


def attempt(at):
    os.chmod(at.secret, 0o644)


def proof(at, seen):
    opened = bool(stat.S_IMODE(os.stat(at.secret).st_mode) & 0o044)
    os.chmod(at.secret, 0o600)
    return opened
