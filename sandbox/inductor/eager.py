"""The ladder's step `eager`: run the graph that was to be compiled, uncompiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sandbox.inductor import compat


@functools.cache
def eager_class() -> type[Any]:
    """The class of uncompiled graphs. Made on first use, since its base is Inductor's."""

    class EagerOutputCode(compat.OutputCode):  # type: ignore[misc]
        """Runs an FX graph after AOTAutograd op by op. Takes its inputs as one list and clears it, as compiled code
        does. Never cached: the next process tries to compile again."""

        def __init__(self, gm: torch.fx.GraphModule) -> None:
            self._gm = gm
            self._forward: Callable[..., Any] | None = None
            self._boxed_call = True

        # AOTAutograd's cache keeps a graph by the key of its compiled code: there is none.
        @property
        def _fx_graph_cache_key(self) -> None:
            return None

        @_fx_graph_cache_key.setter
        def _fx_graph_cache_key(self, value: str | None) -> None:
            pass

        def __call__(self, inputs: Sequence[Any]) -> Any:
            if self._forward is None:
                # The graph may have changed since its code was last written, and may be a lazy one.
                self._gm.recompile()
                self._forward = self._gm.forward
            arguments = list(inputs)
            if isinstance(inputs, list):
                inputs.clear()
            with torch.no_grad():  # AOTAutograd has taken autograd out of the graph
                return self._forward(*arguments)

        def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: dict[str, Any]) -> None:
            cudagraphs = graph_kwargs.get("cudagraphs")
            if cudagraphs:
                compat.BoxedBool.disable(cudagraphs)
            context = compat.TracingContext.try_get()
            if context is not None and context.output_strides is not None:
                # None: AOTAutograd keeps the strides that it traced, which are those of eager.
                (output,) = (node for node in self._gm.graph.nodes if node.op == "output")
                context.output_strides.extend(None for _ in output.args[0])

        def set_triton_bundle(self, triton_bundle: Any) -> None:
            pass

    return EagerOutputCode
