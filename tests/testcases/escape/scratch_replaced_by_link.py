"""Replace the job's own folder by a link, so that the service, as it cleans up, empties another folder."""

import os

NEEDS = ()


def attempt(at):
    own = os.getcwd()
    os.rename(own, f"{own}-moved")
    os.symlink(at.home, own)


def proof(at, seen):
    return not os.path.exists(f"{at.home}/kept")
