"""The job of the crash table, with a compiler in a process of its own that can go wrong, too."""

from __future__ import annotations

import os
import subprocess
import sys

from sandbox.faults import KINDS


def compiler(kind: str) -> None:
    """A compiler that goes wrong; when it runs out of memory it says what GCC's cc1plus says."""
    act = KINDS[kind].act
    try:
        if act is not None:
            act()
    except MemoryError:
        print("cc1plus: out of memory allocating 65536 bytes")
        sys.exit(1)


def build(kind: str = "") -> int:
    """Have the compiler run, as a process of its own, and wait for it. ``kind``: the fault that it has."""
    code = f"import faultpoints; faultpoints.compiler({kind!r})" if kind else "print('built')"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with open("compiler.out", "w+") as output:  # a file: a survivor that holds a pipe would hold us up
        done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=output)
        output.seek(0)
        if done.returncode:
            raise RuntimeError(f"the compiler ended with {done.returncode}: {output.read(1000)}")
    return 42
