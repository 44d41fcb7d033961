"""Open a POSIX semaphore of another job by its name, and take it for ever."""

from _multiprocessing import SemLock

NEEDS = ("mount_namespace", "landlock")


def attempt(at):
    SemLock._rebuild(-1, 1, 1, f"/{at.sibling_mark}-semaphore")
