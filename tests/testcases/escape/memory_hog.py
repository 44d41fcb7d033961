"""Take more memory than the job may."""

NEEDS = ()


def attempt(at):
    kept = [bytearray(b"x" * (8 << 20)) for _ in range(60)]
    return len(kept)


def proof(at, seen):
    return seen.outcome == "returned"
