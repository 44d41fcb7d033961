"""Send a signal to another job."""

import os
import signal

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    os.kill(at.sibling, signal.SIGRTMIN + 1)


def proof(at, seen):
    return at.appears(f"{at.sibling_folder}/signalled")
