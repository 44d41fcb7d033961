"""Faults on purpose: break a compile at a named point, in a named way, and see what becomes of it.

    from sandbox import faults

    with faults.inject("sigsegv", at="child.run", times=1):
        model(x)                                        # the first child dies; the answer is right all the same
    with faults.inject(faults.Plan(seed=1, rate=0.3)):
        serve()                                         # three of ten children have a fault, always the same ones

Off unless the sandbox's policy says `allow_faults`, which no shipped policy does, and unless code calls `inject`: no
environment variable arms anything. `sandbox faults` runs a campaign; :mod:`sandbox.faults.pytest` is a plug-in.
"""

from __future__ import annotations

from sandbox.faults.injection import Injection, Plan, inject
from sandbox.faults.kinds import KINDS, POINTS, InjectedFault, Kind, Shot

__all__ = ["KINDS", "POINTS", "InjectedFault", "Injection", "Kind", "Plan", "Shot", "inject"]
