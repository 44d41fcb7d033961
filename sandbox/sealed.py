"""Large payloads: in a file without a name (memfd) that nobody can change any more, passed as a descriptor.

A payload that goes by a socket is copied through its buffer, some 200 KB at a time, with both sides awake all the time.
This one is written once; the seals say that neither its bytes nor its size change after that, whoever holds it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from sandbox.errors import JobError

#: Payloads above so many bytes go this way.
LARGE: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def seal(payload: bytes) -> int:
    """A descriptor of a sealed file with these bytes, to be closed by the caller.

    Raises:
        OSError: the kernel has none, or no memory or descriptor is left.
    """
    handle = os.memfd_create("payload", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(payload)
        while left:
            left = left[os.write(handle, left) :]
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(handle)
        raise
    return handle


def unseal(handle: int) -> bytes:
    """The bytes of a sealed file, which is closed.

    Raises:
        JobError: it is not sealed, or cannot be read.
    """
    try:
        if fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise JobError("the payload's file is not sealed")
        with mmap.mmap(handle, 0, prot=mmap.PROT_READ) as view:
            return view[:]
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise JobError(f"the payload's file cannot be read: {error}") from None
    finally:
        os.close(handle)
