"""A sandboxed compile runtime for PyTorch: every `torch.compile` job in a fresh, confined, limited child.

    import sandbox
    sandbox.install(policy="default")       # every Inductor compile of this process from now on

Names are imported on first use: `import sandbox` imports no torch, so that the forkserver's processes stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sandbox.callables import job as callable_job
    from sandbox.errors import CompileFailed, PolicyError, SandboxError
    from sandbox.executor import Sandbox
    from sandbox.inductor.graph import job as graph_job
    from sandbox.inductor.install import install, stats, uninstall, wait
    from sandbox.limits import Confinement, Limits
    from sandbox.policy import Policy
    from sandbox.report import Stats
    from sandbox.results import JobResult, Status
    from sandbox.triton.kernel import job as triton_job

__version__ = "0.1.0"

_WHERE = {
    "install": "sandbox.inductor.install:install",
    "uninstall": "sandbox.inductor.install:uninstall",
    "stats": "sandbox.inductor.install:stats",
    "wait": "sandbox.inductor.install:wait",
    "Stats": "sandbox.report:Stats",
    "Sandbox": "sandbox.executor:Sandbox",
    "Policy": "sandbox.policy:Policy",
    "Limits": "sandbox.limits:Limits",
    "Confinement": "sandbox.limits:Confinement",
    "JobResult": "sandbox.results:JobResult",
    "Status": "sandbox.results:Status",
    "callable_job": "sandbox.callables:job",
    "graph_job": "sandbox.inductor.graph:job",
    "triton_job": "sandbox.triton.kernel:job",
    "SandboxError": "sandbox.errors:SandboxError",
    "PolicyError": "sandbox.errors:PolicyError",
    "CompileFailed": "sandbox.errors:CompileFailed",
}

__all__ = [
    "CompileFailed",
    "Confinement",
    "JobResult",
    "Limits",
    "Policy",
    "PolicyError",
    "Sandbox",
    "SandboxError",
    "Stats",
    "Status",
    "__version__",
    "callable_job",
    "graph_job",
    "install",
    "stats",
    "triton_job",
    "uninstall",
    "wait",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
