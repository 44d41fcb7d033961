"""Leave a process behind that is no child of the worker but of its parent (CLONE_PARENT)."""

import signal
import time

from escape_tools import CLONE_PARENT, call, set_name

NEEDS = ()


def attempt(at):
    if call("clone", CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        set_name(at.mark)
        time.sleep(30)


def proof(at, seen):
    return at.alive(at.mark)
