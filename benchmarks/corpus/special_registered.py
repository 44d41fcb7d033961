"""Custom ops, lowerings and passes; packages; several processes."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import Any

import torch

from benchmarks.corpus import lowered, special
from benchmarks.corpus.cases import Compile, case, step
from benchmarks.corpus.entry import Skip

ops = torch.ops


@case
def custom_op(compile: Compile) -> Any:
    return step(compile, lambda x: ops.corpus.twice(x.sin()) + 1, torch.randn(4))


@case
def custom_op_mutates(compile: Compile) -> Any:
    def run(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        ops.corpus.add_one_(y)
        return y * 2

    return compile(run)(torch.randn(4))


@case
def library_op(compile: Compile) -> Any:
    return compile(lambda x: ops.corpus_library.thrice(x.sin()) + 1)(torch.randn(4))


@case
def custom_lowering(compile: Compile) -> Any:
    if special.GPU:
        raise Skip("a forkserver on a host with a GPU cannot import Inductor's lowerings")
    return compile(lambda x: ops.corpus_library.lowered(x.sin()) + 1)(torch.randn(4))


@case
def pass_before_grad(compile: Compile) -> Any:
    def to_cos(graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is torch.sin:
                node.target = torch.cos

    with torch._inductor.config.patch(pre_grad_custom_pass=to_cos):
        return compile(lambda x: torch.sin(x) + 1)(torch.randn(4))


@case
def pass_joint(compile: Compile) -> Any:
    with torch._inductor.config.patch(joint_custom_post_pass=lowered.ToCosine()):
        return step(compile, lambda x: torch.sin(x) + 1, torch.randn(4))


@case
def pass_after_grad(compile: Compile) -> Any:
    with torch._inductor.config.patch(post_grad_custom_post_pass=lowered.ToCosine()):
        return compile(lambda x: torch.sin(x) + 1)(torch.randn(4))


@case
def pass_by_value(compile: Compile) -> Any:
    seen: list[int] = []
    lock = threading.RLock()

    def to_cos(graph: torch.fx.Graph) -> None:
        with lock:
            seen.append(len(graph.nodes))
        for node in graph.nodes:
            if node.target is torch.ops.aten.sin.default:
                node.target = torch.ops.aten.cos.default

    with torch._inductor.config.patch(post_grad_custom_pre_pass=to_cos):
        return compile(lambda x: torch.sin(x) + 1)(torch.randn(4))


@case
def pass_with_custom_op(compile: Compile) -> Any:
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lowered.to_thrice):
        return compile(lambda x: torch.sin(x) + 1)(torch.randn(4))


class Small(torch.nn.Module):
    """What the packages are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + 1


@case
def aoti_package(compile: Compile) -> Any:
    x = torch.randn(4, 8)
    program = torch.export.export(Small(), (x,), dynamic_shapes={"x": {0: torch.export.Dim("n", min=2, max=64)}})
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/small.pt2")
        return torch._inductor.aoti_load_package(path)(x[:3])


@case
def aoti_library(compile: Compile) -> Any:
    x = torch.randn(4, 8)
    module = torch.export.export(Small(), (x,)).module()
    with tempfile.TemporaryDirectory() as folder:
        settings = {"aot_inductor.output_path": f"{folder}/small.so"}
        path = torch._inductor.aot_compile(module, (x,), options=settings)
        return torch._export.aot_load(path, "cpu")(x), os.path.basename(path)


@case
def exported(compile: Compile) -> Any:
    x = torch.randn(4, 8)
    program = torch.export.export(Small(), (x,))
    with torch.no_grad():
        return compile(program.module())(x)
