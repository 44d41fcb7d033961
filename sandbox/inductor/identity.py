"""What a graph is remembered by, across processes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from sandbox.inductor import compat
from sandbox.policy import Policy

#: Settings that say nothing of the graph's code: folders, pools, caches, files for people.
_LEFT: Final = frozenset(
    {
        "compile_threads", "worker_start_method", "quiesce_async_compile_pool", "worker_suppress_logging", "debug",
        "fx_graph_cache", "fx_graph_remote_cache", "bundled_autograd_cache", "autotune_remote_cache",
        "autotune_local_cache", "fx_compile_mode", "verbose_progress", "aot_inductor.output_path",
    }
)  # fmt: skip
_LEFT_GROUP: Final = "trace."


def made_for(policy: Policy, target: str) -> dict[str, str]:
    """What else a graph's fate depends on than the graph: another compiler, device, limit or confinement gives it
    another chance."""
    rules = policy.model_dump_json(include={"limits", "confinement", "reduced", "gpu", "kernel_threads"})
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "target": target,
        "policy": f"{policy.name[:200]} {hashlib.sha256(rules.encode()).hexdigest()[:12]}",
    }


@functools.cache
def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def quarantine_key(gm: torch.fx.GraphModule, example_inputs: Sequence[Any], facts: Mapping[str, str]) -> str:
    """SHA-256 by which a graph is quarantined: its own digest and ``facts``, those of :func:`made_for`."""
    return key_of(graph_digest(gm, example_inputs), facts)


def key_of(what: str, facts: Mapping[str, str]) -> str:
    """SHA-256 by which anything is quarantined: the digest that says ``what`` it is, and ``facts``."""
    parts = [what, *(f"{name}: {fact}" for name, fact in sorted(facts.items()))]
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()


def graph_digest(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """SHA-256 over the code of a graph and of its subgraphs, its inputs' shapes, strides and types, and the settings
    of Inductor in force that are not the defaults: another setting may well compile what this one cannot."""
    parts = [torch.__version__]
    for name, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            parts.append(f"{name}: {module.graph}")
    for value in example_inputs:
        if isinstance(value, torch.Tensor):
            parts.append(f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}")
        else:
            parts.append(f"{type(value).__name__} {value}")
    parts.extend(_settings(compat.inductor_config))
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()


def _settings(module: Any) -> list[str]:
    found = []
    for name, value in sorted(module._get_dict().items()):
        entry = module._config.get(name)
        if name in _LEFT or name.startswith(_LEFT_GROUP) or entry is None or value is entry.default:
            continue
        text = _text(value)
        if text != _text(entry.default):
            found.append(f"{name} = {text}")
    return found


def _text(value: Any) -> str:
    """``value`` as the next process would write it, too: no addresses, no order of sets."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_text(key)}: {_text(item)}' for key, item in value.items()))}}}"
    kind = value if isinstance(value, type) or callable(value) else type(value)
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(value).__qualname__)}"
