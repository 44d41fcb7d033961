"""Read a file of the service's user that no compiler needs."""

NEEDS = ("landlock",)


def attempt(at):
    return open(at.secret).read()


def proof(at, seen):
    return seen.tells(at.token)
