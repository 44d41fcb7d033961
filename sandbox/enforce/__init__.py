"""Confinement of one job: what the kernel is asked for, and what was really reached.

    keeper   prepare_keeper: subreaper, namespaces, own /dev/shm
      └─ worker   confine_worker: rlimits, no_new_privs, dies with the keeper

Both run in freshly forked processes with one thread. :func:`probe` tries the same in a process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from sandbox.enforce import namespaces, privileges, rlimits
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement, Limits
from sandbox.results import Enforcement, Mechanism, State

__all__ = ["confine_worker", "prepare_keeper", "probe"]


def prepare_keeper(confinement: Confinement, shm_bytes: int = namespaces.SHM_BYTES) -> dict[str, Mechanism]:
    """Confine what the keeper and its worker share. ``shm_bytes`` is the size of the job's own /dev/shm.

    Call it in the keeper before it forks the worker. States: process_tree, ipc_namespace, mount_namespace,
    network_namespace.

    Raises:
        EnforcementError: if a required mechanism is unavailable; the keeper may then be half confined: let it end.
    """
    states = {"process_tree": privileges.adopt_orphans(confinement.process_tree)}
    states |= namespaces.enter(confinement, shm_bytes)
    _check(confinement, states)
    return states


def confine_worker(confinement: Confinement, limits: Limits, keeper_pid: int | None = None) -> dict[str, Mechanism]:
    """Confine the worker itself. Call it in the worker right before the job; what it holds by then it keeps.

    Give ``keeper_pid`` (taken in the keeper before the fork), so that a keeper that is dead by now is noticed: the
    worker then ends at once. States: rlimits, no_new_privs.

    Raises:
        EnforcementError: if a required mechanism is unavailable.
    """
    privileges.die_with_parent(signal.SIGKILL, os.getppid() if keeper_pid is None else keeper_pid)
    os.umask(0o077)
    privileges.prefer_as_oom_victim()
    states = {
        "no_new_privs": privileges.forbid_new_privileges(confinement.no_new_privs),
        # Last: from here on this process can run out of things.
        "rlimits": rlimits.apply(confinement.rlimits, limits),
    }
    _check(confinement, states)
    return states


def probe(confinement: Confinement, timeout_seconds: float = 30.0) -> Enforcement:
    """What a job would be confined by on this host: tried for real, in a small process of its own.

    Unavailable mechanisms are told, not raised, also required ones.

    Raises:
        EnforcementError: if the probe itself fails or takes longer than ``timeout_seconds``.
    """
    package_parent = str(Path(__file__).parents[2])
    search = [package_parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sandbox.enforce"],
            input=confinement.model_dump_json().encode(),
            capture_output=True,
            timeout=timeout_seconds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
            check=True,
        )
        return Enforcement.model_validate_json(done.stdout)
    except subprocess.CalledProcessError as error:
        tail = error.stderr.decode("utf-8", "replace")[-2000:]
        raise EnforcementError(f"the probe of this host ended with {error.returncode}: {tail}") from None
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        raise EnforcementError(f"the probe of this host failed: {error}") from None


def _check(confinement: Confinement, states: dict[str, Mechanism]) -> None:
    missing = [
        f"{name}: {mechanism.reason}"
        for name, mechanism in states.items()
        if mechanism.state is State.UNAVAILABLE and getattr(confinement, name) == "require"
    ]
    if missing:
        raise EnforcementError("required by the policy but unavailable on this host: " + "; ".join(missing))
