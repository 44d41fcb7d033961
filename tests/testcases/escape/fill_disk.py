"""Write more to the disk than the job may."""

import time

NEEDS = ()


def attempt(at):
    for number in range(20):
        with open(f"tmp/{number}", "wb") as file:
            file.write(bytes(4 << 20))
    time.sleep(3)


def proof(at, seen):
    return seen.outcome == "returned"
