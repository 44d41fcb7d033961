"""Read the service's memory by /proc/PID/mem."""

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    with open(f"/proc/{at.service}/mem", "rb", buffering=0) as memory:
        memory.seek(at.address)
        return memory.read(32).decode()


def proof(at, seen):
    return seen.tells(at.token)
