"""Write to the service's pipe without end."""

import os

NEEDS = ()


def attempt(at):
    for _ in range(10_000):
        os.write(2, b"flood " * 1000)


def proof(at, seen):
    return seen.outcome == "returned"
