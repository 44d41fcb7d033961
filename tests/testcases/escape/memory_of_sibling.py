"""Read the memory of another job."""

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    with open(f"/proc/{at.sibling}/mem", "rb", buffering=0) as memory:
        memory.seek(at.sibling_address)
        return memory.read(32).decode()


def proof(at, seen):
    return seen.tells(at.token)
