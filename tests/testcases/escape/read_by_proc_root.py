"""Read a secret by way of /proc/self/root, another path to the same file."""

NEEDS = ("landlock",)


def attempt(at):
    return open(f"/proc/self/root{at.secret}").read()


def proof(at, seen):
    return seen.tells(at.token)
