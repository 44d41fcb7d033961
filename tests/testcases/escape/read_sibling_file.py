"""Read a file in another job's folder."""

NEEDS = ("landlock", "mount_namespace")


def attempt(at):
    return open(f"{at.sibling_folder}/precious").read()


def proof(at, seen):
    return seen.tells(at.token)
