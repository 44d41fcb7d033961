"""A graph as a job of its own, for a GPU that need not be here: see :func:`job`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from sandbox.errors import JobError
from sandbox.gpus import Gpus, recorded
from sandbox.inductor import compat, payload
from sandbox.jobs import FxGraphSpec, Job, digest, given, new_job_id
from sandbox.limits import Confinement, Limits

Role = Literal["inference", "forward", "backward"]


def job(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    target: str = "cuda:90",
    gpus: Gpus | None = None,
    role: Role = "inference",
    limits: Limits | None = None,
    confinement: Confinement | None = None,
    environment: dict[str, str] | None = None,
) -> Job:
    """A job that compiles a graph for a GPU, down to its kernels' binaries, on a machine that may have none.

    The child asks no GPU: what the compile wants to know of one is answered from a snapshot. Nothing is tuned by
    running it; of kernels with several configurations each is compiled.

    Args:
        gm: as AOTAutograd hands it to Inductor: functional, of aten operators, its inputs placeholders, its output a
            tuple; decomposed by `torch._inductor.decomposition.select_decomp_table()`.
        example_inputs: FakeTensors on `cuda`, of one mode, and integers.
        target: what is compiled for, `cuda:CAPABILITY`.
        gpus: the GPUs to compile for. Default: a recorded snapshot of the target.
        role: what the graph is to AOTAutograd: of an inference, or one of the two of a training step.

    The binaries are those of this machine's ptxas and libdevice. To trace on `cuda` with a PyTorch for the CPU, some
    operators need :func:`sandbox.inductor.compat.lent_device_guard` around it (in a process that uses no GPU).

    The result's artifacts name the files, which lie in the ``cache`` of :meth:`sandbox.Sandbox.submit`: the binaries
    are `triton/*/*.cubin`.

    Raises:
        JobError: no snapshot of the target was recorded, or the graph was not traced with FakeTensors.
        UnserializableError: the graph cannot be sent.
        pydantic.ValidationError: a field of the spec is wrong; the snapshot is of another target.
    """
    gpus = gpus or recorded(target)
    if gpus is None:
        raise JobError(f"fx_graph: no snapshot of a GPU was recorded for {target!r}: give `gpus`")
    values = (*example_inputs, *(node.meta.get("val") for node in gm.graph.nodes))
    mode = next((value.fake_mode for value in values if isinstance(value, compat.FakeTensor)), None)
    if mode is None:
        raise JobError("fx_graph: the graph was not traced with FakeTensors")
    kwargs = {
        "cudagraphs": compat.BoxedBool(False),
        "static_input_idxs": (),
        "is_backward": role == "backward",
        "graph_id": None,
        "cpp_wrapper": False,
        "aot_mode": False,
        "is_inference": role == "inference",
        "layout_opt": None,
        "extern_node_serializer": None,
        "boxed_forward_device_index": None,
    }
    with compat.tracing(compat.TracingContext(mode)):
        data = payload.encode(gm, example_inputs, (), kwargs, None)
    spec = FxGraphSpec(
        job_id=new_job_id(),
        payload_sha256=digest(data),
        payload_bytes=len(data),
        target=target,
        gpus=gpus,
        **given(limits=limits, confinement=confinement, environment=environment),
    )
    return Job(spec, data)
