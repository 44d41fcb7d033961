"""For tests of confinement: scripts in a fresh interpreter, which confine themselves or a fork and try to break out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PRELUDE = """
import ctypes, encodings.idna, errno, json, os, resource, signal, socket, subprocess, sys, threading, time
sys.path.insert(0, ROOT)
from sandbox import meter, processes
from sandbox.enforce import Place, confine_worker, landlock, libc, namespaces, paths, prepare_keeper
from sandbox.enforce import privileges, rlimits, seccomp
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement, Limits, MIB

def become_nobody():
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    # A change of user makes a process undumpable, and /proc/self root's; the exec of a forkserver undoes that.
    libc.prctl(libc.PR_SET_DUMPABLE, 1)

def keeper_states(*arguments, **settings):
    "What the keeper's part reaches, without the capabilities that its first child would need."
    entered = prepare_keeper(*arguments, **settings)
    if entered.own_user:
        libc.drop_capabilities()
    return entered.states

def in_child(body):
    "Run body in a child. Returns the JSON of what body returns (null if it was killed) and the exit code."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(write, json.dumps(body()).encode())
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\\n".encode())
        finally:
            os._exit(code)
    os.close(write)
    answer = os.read(read, 65536)
    os.close(read)
    return json.loads(answer or "null"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def states(mechanisms):
    return {name: [m.state, m.reason] for name, m in mechanisms.items()}

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field + ":"):
            return line.split()[1]
"""


def run_script(body: str, *arguments: str, timeout: float = 60.0, prelude: str = PRELUDE) -> Any:
    """Run ``prelude`` and ``body`` in a fresh interpreter; its last line of output, as JSON. Fails with its stderr."""
    source = f"ROOT = {str(ROOT)!r}\n" + prelude + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", source, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def need_root() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become someone else")
