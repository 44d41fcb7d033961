"""Every exception that this library raises.

    SandboxError                     the root: catch this to catch all of ours
    ├── PolicyError                  a policy file or name is wrong; nothing was started
    ├── JobError                     a job description is wrong; nothing was started
    ├── WireError                    a frame or a reply is malformed (becomes status ``protocol_error``)
    ├── ForkserverError              the forkserver could not be started or did not answer
    ├── RefusedError                 a job was not started: the circuit breaker is open, or no memory became free
    ├── EnforcementError             a mechanism that the policy requires is unavailable on this host
    ├── QuarantineError              the quarantine's folder or one of its files cannot be used
    ├── UnserializableError          a graph cannot be sent to a child
    ├── CapsuleError                 a crash capsule cannot be read, or not left where the policy says
    ├── IncompatibleTorchError       this PyTorch lacks a private name that we build on
    └── CompileFailed                a compile ended with a status for which the policy says ``raise``

What the *compiler* raised in a child is not in this tree: the user sees the exception that in-process
Inductor would have raised.
"""

from __future__ import annotations


class SandboxError(Exception):
    """Root of every exception that this library raises."""


class PolicyError(SandboxError):
    """A policy file or name is wrong. The message names file, key, value and what is allowed."""


class JobError(SandboxError):
    """A job description or its payload is wrong. Raised before any process is started."""


class WireError(SandboxError):
    """A frame or a reply is truncated, oversized, garbled, late or duplicate."""


class ForkserverError(SandboxError):
    """The forkserver could not be started, died, or did not answer in time."""


class RefusedError(SandboxError):
    """A job was not started: the circuit breaker is open, or no memory became free in time. Becomes the status
    ``sandbox_error``."""


class EnforcementError(SandboxError):
    """A mechanism that the policy requires is unavailable on this host."""


class QuarantineError(SandboxError):
    """The quarantine's folder or one of its files cannot be used. Never stops a compile: it is counted and logged."""


class UnserializableError(SandboxError):
    """A graph cannot be sent to a child. ``reason`` is the short word used as a count in reports."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class CapsuleError(SandboxError):
    """A crash capsule cannot be read, or not be left where the policy says."""


class IncompatibleTorchError(SandboxError):
    """This PyTorch lacks a private name that ``sandbox.inductor.compat`` builds on."""


class CompileFailed(SandboxError):
    """A sandboxed compile ended with a status for which the policy's ladder says ``raise``.

    ``status`` is the value of :class:`sandbox.results.Status`, ``job_id`` finds the job in the logs.
    """

    def __init__(self, status: str, detail: str, job_id: str) -> None:
        super().__init__(f"sandboxed compile {job_id} ended with {status}: {detail}")
        self.status = status
        self.detail = detail
        self.job_id = job_id
