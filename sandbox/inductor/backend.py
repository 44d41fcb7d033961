"""The Dynamo backend `sandbox`: `torch.compile(model, backend="sandbox", options={"policy": "production"})`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sandbox.errors import PolicyError
from sandbox.inductor import compat
from sandbox.inductor.install import inner_of, scheme_for, using


def sandbox(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Inductor, with every graph compiled in the sandbox. Dynamo calls it; found by entry point, no import needed.

    Args:
        mode: `torch.compile`'s mode (`max-autotune` and so on).
        options: `policy` (default `default`), `sandbox_mode` (default `subprocess`); all others are Inductor
            settings, as for the backend `inductor`.

    Raises:
        PolicyError: policy or mode are wrong.
    """
    settings = dict(options or {})
    policy = settings.pop("policy", "default")
    scheme = scheme_for(policy, settings.pop("sandbox_mode", "subprocess"), backend=True)
    if mode and mode != "default":
        known = compat.list_mode_options()
        if mode not in known:
            raise PolicyError(f"no torch.compile mode {mode!r}: allowed are {', '.join(sorted(known))}")
        settings = {**known[mode], **settings}
    with using(scheme):
        result: Callable[..., Any] = compat.whole_compile_fx(
            gm, example_inputs, inner_compile=inner_of(scheme), config_patches=settings or None
        )
    return result
