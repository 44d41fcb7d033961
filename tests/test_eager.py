"""The step `eager`: uncompiled graphs draw the random numbers that compiled ones would, so gradients stay right."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from inductor_harness import Template  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from sandbox.errors import CompileFailed  # noqa: E402
from sandbox.inductor import compat, eager, kernels, philox  # noqa: E402
from sandbox.inductor.identity import graph_digest, made_for, quarantine_key  # noqa: E402
from sandbox.inductor.walk import starved  # noqa: E402
from sandbox.limits import Limits  # noqa: E402
from sandbox.policy import Policy  # noqa: E402
from sandbox.results import JobResult, LeakReport, Status, Usage  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

Compile = Callable[..., Any]


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Iterator[Template]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("parent"))
    torch.set_num_threads(1)
    compat.disable_worker_pool()
    made = Template()
    yield made
    made.close()
    kernels.remove_loader()
    compat.enable_worker_pool()


def uncompiled(gm: Any, example_inputs: Any, inputs_to_check: Any, region: Any = None, **graph_kwargs: Any) -> Any:
    eager.note(graph_kwargs)
    return eager.eager_class()(gm)


class Mixed:
    """Stands at the hook point: forward graphs go one way, backward graphs another."""

    def __init__(self, forward: Compile, backward: Compile) -> None:
        self._ways = {False: forward, True: backward}
        self.graphs: list[tuple[bool, str]] = []

    def __call__(self, gm: Any, *args: Any, **graph_kwargs: Any) -> Any:
        backward = bool(graph_kwargs.get("is_backward"))
        self.graphs.append((backward, str(gm.graph)))
        return self._ways[backward](gm, *args, **graph_kwargs)


PAIRS = [("eager", "eager"), ("child", "eager"), ("eager", "child"), ("child", "child")]


@pytest.mark.parametrize(("forward", "backward"), PAIRS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_backward_pass_that_recomputes_dropout_uses_the_mask_of_its_forward(
    template: Template, forward: str, backward: str, dynamic: bool
) -> None:
    ways: dict[str, Compile] = {"eager": uncompiled, "child": template.compile_locally}
    mixed = Mixed(ways[forward], ways[backward])

    def step(x: Any) -> Any:
        return checkpoint(lambda y: F.dropout(y.sin(), 0.4) * 3, x, use_reentrant=False)

    x = (torch.rand(31, 67) + 0.5).requires_grad_()
    with template.installed():
        compat.replace_compile(mixed)
        out = torch.compile(step, dynamic=dynamic)(x)
        # Numbers drawn in between must not matter.
        torch.rand(1000)
        out.sum().backward()
    assert [backward for backward, _ in mixed.graphs] == [False, True]
    assert all("inductor_random" in text for _, text in mixed.graphs), "the backward graph does not recompute the mask"
    mask = (out.detach() != 0).float()
    assert 0.5 < mask.mean() < 0.7
    torch.testing.assert_close(out.detach(), mask * x.detach().sin() * 3 / 0.6)
    torch.testing.assert_close(x.grad, mask * x.detach().cos() * 3 / 0.6)


def test_the_same_generator_gives_the_same_numbers_compiled_and_uncompiled(template: Template) -> None:
    def draws(x: Any) -> Any:
        return (
            torch.rand(513, 3), torch.randn(1 << 13), torch.randint(0, 7, (999,)), torch.randint(-5, 1 << 40, (64, 64)),
            F.dropout(x, 0.3),
        )  # fmt: skip

    seen = []
    for way in (template.compile_locally, uncompiled):
        with template.installed():
            compat.replace_compile(way)
            compiled = torch.compile(draws)
            for _ in range(2):
                torch.manual_seed(11)
                seen.append(compiled(torch.ones(50, 50)))
    for other in seen[1:]:
        for index, (got, want) in enumerate(zip(other, seen[0], strict=True)):
            if index == 1:
                # A logarithm may be rounded the other way.
                torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-6)
                assert (got == want).float().mean() > 0.9
            else:
                assert torch.equal(got, want)


def test_random_numbers_in_a_branch_follow_their_seed(template: Template) -> None:
    def branches(x: Any) -> Any:
        return torch.cond(x.sum() > 0, lambda y: F.dropout(y.sin(), 0.5), lambda y: y.cos(), (x,))

    x, mixed = torch.rand(64, 64) + 0.5, Mixed(uncompiled, uncompiled)
    kept: list[Any] = []

    def keep(gm: Any, *args: Any, **graph_kwargs: Any) -> Any:
        kept.append(gm)
        return mixed(gm, *args, **graph_kwargs)

    with template.installed():
        compat.replace_compile(keep)
        compiled = torch.compile(branches)
        torch.manual_seed(5)
        out = compiled(x)
        torch.manual_seed(5)
        assert torch.equal(compiled(x), out)
        code = eager.eager_class()(kept[0])
    nested = [m for m in code._gm.modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(nested) == 3
    assert next(eager._random_nodes(code._gm), None) is None
    assert next(eager._random_nodes(kept[0]), None) is not None, "the caller's graph was changed"


def test_philox_is_the_one_of_the_paper() -> None:
    """The known answers of Random123: counter and key all zeros, all ones, and digits of pi."""

    def words(*values: int) -> Any:
        return tuple(torch.tensor([value]) for value in values)

    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ):  # fmt: skip
        got = philox._philox(words(*counter), words(*key))
        assert tuple(int(word) for word in got) == expected


@pytest.mark.parametrize(
    "divisor", [1, 2, 7, 1 << 31, (1 << 31) + 11, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 3]
)
def test_the_remainder_of_unsigned_numbers(divisor: int) -> None:
    values = [0, 1, 2, divisor - 1, divisor, divisor + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 0x9E3779B97F4A7C15]
    values = [value % (1 << 64) for value in values]
    signed = torch.tensor([value - (1 << 64) if value >= 1 << 63 else value for value in values])
    got = [int(rest) % (1 << 64) for rest in philox._unsigned_remainder(signed, divisor)]
    assert got == [value % divisor for value in values]


def test_more_numbers_than_one_chunk_are_numbered_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = philox.seeds(1, "cpu")[0]
    whole = philox.random([7, 11], seed, "rand")
    monkeypatch.setattr(philox, "_CHUNK", 10)
    assert torch.equal(philox.random([7, 11], seed, "rand"), whole)
    assert philox.random([0, 3], seed, "randn").shape == (0, 3)


def _graph_on(device: str) -> Any:
    """A backward graph with a recomputed mask, as far as the decision looks at it."""
    graph = torch.fx.Graph()
    seed = graph.placeholder("seed")
    mask = graph.call_function(torch.ops.prims.inductor_random.default, ([4], seed, "rand"))
    mask.meta["val"] = torch.empty(4, device="meta" if device == "gpu" else device)
    graph.output((mask,))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


def test_on_a_gpu_a_backward_graph_runs_as_its_forward_graph_did() -> None:
    # Compiled kernels there may draw four numbers a counter, by their shape, which the graph does not say.
    gpu, cpu = _graph_on("gpu"), _graph_on("cpu")
    eager.note({"graph_id": -7, "is_backward": False})
    of_eager, of_child = {"graph_id": -7, "is_backward": True}, {"graph_id": -8, "is_backward": True}
    assert eager.mixes(gpu, of_eager, uncompiled=False) and not eager.mixes(gpu, of_eager, uncompiled=True)
    assert eager.mixes(gpu, of_child, uncompiled=True) and not eager.mixes(gpu, of_child, uncompiled=False)
    for kwargs in (of_eager, of_child):
        assert not eager.mixes(cpu, kwargs, uncompiled=True) and not eager.mixes(cpu, kwargs, uncompiled=False)
    assert not eager.mixes(gpu, {"graph_id": -8, "is_backward": False}, uncompiled=True)


def test_a_refused_eager_says_why() -> None:
    from sandbox.inductor.scheme import Scheme, _Compile
    from sandbox.policy import Policy

    scheme = Scheme(Policy(), "subprocess")
    try:
        one = _Compile(scheme, _graph_on("gpu"), [], [], {"graph_id": -9, "is_backward": True}, None)
        with pytest.raises(CompileFailed, match="fallback_random"):
            one._eager()
        assert scheme.sandbox.stats().raised == 1
        two = _Compile(scheme, _graph_on("gpu"), [], [], {"graph_id": -10, "is_backward": True}, None)
        eager.note({"graph_id": -10, "is_backward": False})
        assert isinstance(two.run(), eager.eager_class()), "its forward graph runs uncompiled, so it does, too"
        scheme.close()
        three = _Compile(scheme, _graph_on("cpu"), [torch.ones(1)], [], {}, None)
        three._encoded = lambda: b"x"  # type: ignore[method-assign]
        output, result = three._attempt("first", way=three._way(three._load))
        assert output is None and result.status == "sandbox_error" and "closed" in result.detail
    finally:
        scheme.close()


def test_graphs_that_differ_in_a_branch_or_in_a_setting_are_not_one() -> None:
    def graph(op: Any) -> Any:
        body = torch.fx.Graph()
        body.output((body.call_function(op, (body.placeholder("x"),)),))
        root = torch.nn.Module()
        root.body = torch.fx.GraphModule(torch.nn.Module(), body)
        outer = torch.fx.Graph()
        x, inner = outer.placeholder("x"), outer.get_attr("body")
        outer.output((outer.call_function(torch.ops.higher_order.invoke_subgraph, (inner, "id", x)),))
        return torch.fx.GraphModule(root, outer)

    x = [torch.ones(3)]
    sin, cos = graph(torch.ops.aten.sin.default), graph(torch.ops.aten.cos.default)
    assert str(sin.graph) == str(cos.graph)
    assert graph_digest(sin, x) == graph_digest(graph(torch.ops.aten.sin.default), x) != graph_digest(cos, x)
    before = graph_digest(sin, x)
    with compat.inductor_config.patch(epilogue_fusion=not compat.inductor_config.epilogue_fusion):
        assert graph_digest(sin, x) != before
    with compat.inductor_config.patch({"trace.enabled": True, "compile_threads": 7, "fx_graph_cache": False}):
        assert graph_digest(sin, x) == before


def test_numbers_on_a_gpu_are_those_of_triton(tmp_path: Any) -> None:
    """In Triton's interpreter, which needs no GPU: `tl.rand`, `tl.randn` and what `triton_helpers.randint64` draws."""
    pytest.importorskip("triton")
    program = tmp_path / "program.py"
    program.write_text(
        "import torch, triton, triton.language as tl\n"
        "from sandbox.inductor import philox\n"
        "@triton.jit\n"
        "def draw(rand, randn, wide, seed, COUNT: tl.constexpr):\n"
        "    at = tl.arange(0, COUNT)\n"
        "    tl.store(rand + at, tl.rand(seed, at.to(tl.uint32)))\n"
        "    tl.store(randn + at, tl.randn(seed, at.to(tl.uint32)))\n"
        "    first, second, _, _ = tl.randint4x(seed, at.to(tl.uint32))\n"
        "    tl.store(wide + at, first.to(tl.uint64) | (second.to(tl.uint64) << 32))\n"
        "for seed in (5, 0x123456789ABCDEF0, -77):\n"
        "    rand, randn, wide = torch.empty(1024), torch.empty(1024), torch.empty(1024, dtype=torch.int64)\n"
        "    draw[(1,)](rand, randn, wide, seed, COUNT=1024)\n"
        "    key, at = torch.tensor(seed), torch.arange(1024)\n"
        "    zero = torch.zeros_like(at)\n"
        "    words = philox._philox((at, zero, zero, zero), (key & philox._MASK, (key >> 32) & philox._MASK))\n"
        "    assert torch.equal(philox._rand_gpu(words), rand)\n"
        "    torch.testing.assert_close(philox._randn_gpu(words), randn, rtol=1e-5, atol=1e-6)\n"
        "    assert torch.equal(words[0] | (words[1] << 32), wide)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_a_full_host_has_done_is_not_held_against_the_graph() -> None:
    policy = Policy()
    limit = policy.limits.memory_bytes
    for status, granted, want in [
        (Status.MEMORY_LIMIT, limit, False),
        (Status.MEMORY_LIMIT, limit - 1, True),
        (Status.CRASHED, limit - 1, False),
    ]:
        usage = Usage(memory_granted_bytes=granted)
        result = JobResult(job_id="job-1", status=status, usage=usage, leaks=LeakReport(job_id="job-1"))
        assert starved(policy, result) is want


def test_another_compiler_limit_or_device_is_another_key() -> None:
    x = [torch.ones(3)]
    sin = torch.fx.symbolic_trace(lambda x: torch.sin(x))
    policy = Policy()
    facts = made_for(policy, "cpu")
    assert facts["torch"] == torch.__version__ and facts["target"] == "cpu"
    more = policy.model_copy(update={"limits": Limits(memory_bytes=1 << 35)})
    renamed = policy.model_copy(update={"name": "other"})
    ladder = policy.model_copy(update={"description": "other", "parallel_jobs": 7})
    assert made_for(ladder, "cpu") == facts, "what cannot change the outcome is no part of it"
    others = [
        facts, made_for(policy, "cuda:90"), made_for(more, "cpu"), made_for(renamed, "cpu"), {**facts, "torch": "1"},
        {**facts, "triton": "1"},
    ]  # fmt: skip
    keys = {quarantine_key(sin, x, each) for each in others}
    assert len(keys) == len(others) and all(len(key) == 64 for key in keys)
    assert quarantine_key(sin, x, facts) == quarantine_key(
        torch.fx.symbolic_trace(lambda x: torch.sin(x)), x, dict(facts)
    )
