"""Raise a hard limit of the job."""

import errno
import resource

NEEDS = ("capabilities",)
PRIVILEGED = True


def attempt(at):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard + 100))
    except ValueError as error:  # Python's word for EPERM here
        raise OSError(errno.EPERM, str(error)) from None
