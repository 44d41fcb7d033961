"""Send a signal to the service through a pidfd."""

import os
import signal

NEEDS = ("pid_namespace", "landlock")


def attempt(at):
    signal.pidfd_send_signal(os.pidfd_open(at.service), signal.SIGRTMIN + 2)


def proof(at, seen):
    return at.signalled(2)
