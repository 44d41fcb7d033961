"""Confinement of one job: what the kernel is asked for, and what was really reached.

    keeper   prepare_keeper: subreaper, namespaces, own /dev/shm
      └─ its first child   namespaces.close_off: all but the scratch folder read-only, own /proc
           └─ worker   confine_worker: other user, no_new_privs, capabilities, Landlock, rlimits, seccomp

All run in freshly forked processes with one thread; :func:`prepare_template` has found for them what is always the
same. The first child is the worker itself where the host gives no own process ids. :func:`probe` tries the same in a
process of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox.enforce import identity, landlock, namespaces, paths, privileges, rlimits, seccomp
from sandbox.errors import EnforcementError
from sandbox.limits import Confinement, Limits
from sandbox.results import Enforcement, Mechanism, State

__all__ = ["Place", "check", "confine_worker", "prepare_keeper", "prepare_template", "probe"]


@dataclass(frozen=True)
class Place:
    """Where a worker stands, as far as it cannot see that itself."""

    scratch: str = ""
    """The job's folder, the only one that it may write to. Empty: none."""
    template: str = ""
    """The template's temporary folder, in which the warm-up has left the precompiled header. Empty: none."""
    own_shm: bool = False
    """Whether /dev/shm is the job's own. It may write there then, and not see it otherwise."""
    report: int | None = None
    """A socket to the keeper, for the listener of the seccomp filter; closed by :func:`confine_worker`."""


def prepare_template(environment: Mapping[str, str]) -> None:
    """In the template, once all is imported: find out what each of its workers would have to, 30 ms once."""
    paths.needed(environment, gpu=False)
    seccomp.prepare()
    if not namespaces.is_privileged():
        namespaces.try_user_namespace()


def prepare_keeper(
    confinement: Confinement, shm_bytes: int = namespaces.SHM_BYTES, root: str = "/", *, gpu: bool = False
) -> namespaces.Entered:
    """Confine what the keeper shares with the job. ``shm_bytes`` is the size of the job's own /dev/shm; ``root``, the
    folder of scratch folders, stays in sight.

    Call it in the keeper before it forks its first child, which calls :func:`namespaces.close_off`. States:
    process_tree and those of namespaces.

    Raises:
        EnforcementError: if a required mechanism is unavailable; the keeper may then be half confined: let it end.
    """
    entered = namespaces.enter(confinement, shm_bytes, root, gpu=gpu)
    entered.states["process_tree"] = privileges.adopt_orphans(confinement.process_tree)
    check(confinement, entered.states)
    return entered


def confine_worker(
    confinement: Confinement,
    limits: Limits,
    keeper_pid: int | None = None,
    place: Place | None = None,
    *,
    gpu: bool = False,
) -> dict[str, Mechanism]:
    """Confine the worker itself. Call it in the worker right before the job; what it holds by then it keeps.

    Give ``keeper_pid`` (taken in the keeper before the fork), so that a keeper that is dead by now is noticed: the
    worker then ends at once. The search paths of the environment, which is the job's by now, are what it may read.
    States: no_new_privs, capabilities, landlock, rlimits, seccomp.

    Raises:
        EnforcementError: if a required mechanism is unavailable, or the user of `run_as` cannot be had.
    """
    privileges.die_with_parent(signal.SIGKILL, os.getppid() if keeper_pid is None else keeper_pid)
    place = place or Place()
    os.umask(0o077)
    privileges.prefer_as_oom_victim()
    user = identity.user_of(confinement)
    if user is not None:
        identity.become(user, confinement.run_as, place.scratch)
        privileges.die_with_parent(signal.SIGKILL, os.getppid() if keeper_pid is None else keeper_pid)
    states = {
        "no_new_privs": privileges.forbid_new_privileges(confinement.no_new_privs),
        "capabilities": privileges.drop_capabilities(confinement.capabilities),
        "landlock": _landlock(confinement, place, gpu),
        # From here on this process can run out of things.
        "rlimits": rlimits.apply(confinement.rlimits, limits),
        "seccomp": seccomp.install(confinement.seccomp, gpu=gpu, report=place.report),
    }
    check(confinement, states)
    return states


def _landlock(confinement: Confinement, place: Place, gpu: bool) -> Mechanism:
    if confinement.landlock == "off":
        return Mechanism(state=State.OFF)
    extra = (*confinement.read, *filter(None, [place.template]))
    readable = paths.needed(os.environ, gpu=gpu, extra=extra)
    writable = [*filter(None, [place.scratch]), *([namespaces.SHM] if place.own_shm else [])]
    return landlock.restrict(confinement.landlock, readable, writable)


def probe(confinement: Confinement, timeout_seconds: float = 30.0) -> Enforcement:
    """What a job would be confined by on this host: tried for real, in a small process of its own.

    Unavailable mechanisms are told, not raised, also required ones.

    Raises:
        EnforcementError: if the probe itself fails or takes longer than ``timeout_seconds``.
    """
    package_parent = str(Path(__file__).parents[2])
    search = [package_parent, *(entry for entry in sys.path if os.path.isabs(entry))]
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


def check(confinement: Confinement, states: dict[str, Mechanism]) -> None:
    """Raises EnforcementError if one of ``states`` is unavailable although the policy requires it."""
    missing = [
        f"{name}: {mechanism.reason}"
        for name, mechanism in states.items()
        if mechanism.state is State.UNAVAILABLE and getattr(confinement, name) == "require"
    ]
    if missing:
        raise EnforcementError("required by the policy but unavailable on this host: " + "; ".join(missing))
