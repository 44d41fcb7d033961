"""Read POSIX shared memory of another job."""

NEEDS = ("mount_namespace", "landlock")


def attempt(at):
    return open(f"/dev/shm/{at.sibling_mark}").read()


def proof(at, seen):
    return seen.tells(at.token)
