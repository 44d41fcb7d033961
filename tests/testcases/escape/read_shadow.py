"""Read the password hashes of the host."""

NEEDS = ("landlock",)
PRIVILEGED = True


def attempt(at):
    return len(open("/etc/shadow").read())


def proof(at, seen):
    return bool(seen.got)
