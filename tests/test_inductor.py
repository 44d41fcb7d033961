"""Real Inductor through real children: equal results, the ladder, the caches, and what the host sees."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import inductor_harness
import pytest
import torch
from conftest import eventually, held

import sandbox
from sandbox import faults
from sandbox.inductor.install import installed
from sandbox.inductor.scheme import Scheme
from sandbox.policy import Policy

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

POLICY = Policy(name="test", allow_faults=True)


@pytest.fixture(scope="module")
def scheme() -> Iterator[Scheme]:
    """The sandbox, installed for this module; its template takes faults."""
    with inductor_harness.installed(POLICY) as one:
        yield one


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False, fallback_random=True):
        yield


class Counted:
    """The counts of a block."""

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme
        self._before = scheme.sandbox.stats()

    def __call__(self, name: str) -> Any:
        now = getattr(self._scheme.sandbox.stats(), name)
        before = getattr(self._before, name)
        if isinstance(now, dict):
            return {key: n - before.get(key, 0) for key, n in now.items() if n != before.get(key, 0)}
        return now - before


@pytest.fixture
def counted(scheme: Scheme) -> Counted:
    return Counted(scheme)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def function(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum(0) + torch.arange(x.shape[0])


def test_inference_and_training_are_equal_to_eager(scheme: Scheme, counted: Counted) -> None:
    x = torch.randn(16, 16)
    close(torch.compile(function)(x), function(x))
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Dropout(0.5),
        torch.nn.Linear(4 * 6 * 6, 5),
    )  # fmt: skip
    images = torch.randn(2, 3, 8, 8)
    grads = []
    for run in (model, torch.compile(model)):
        torch.manual_seed(1)
        model.zero_grad()
        model[1].reset_running_stats()
        run(images).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        close(got, want)
    assert counted("graphs") == counted("in_child") == counted("children_started") == 3
    assert counted("in_process") == counted("eager") == 0
    assert counted("leaks") == {}


def test_control_flow_stays_in_children(scheme: Scheme, counted: Counted) -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin() + 1, lambda y: y.cos() * 2, (x,))

    compiled = torch.compile(branches, fullgraph=True)
    for x in (torch.ones(8), -torch.ones(8)):
        close(compiled(x), branches(x))
    assert counted("graphs") == counted("in_child") == 1


def test_guards_of_the_child_reach_the_parent(scheme: Scheme, counted: Counted) -> None:
    compiled = torch.compile(lambda x: torch.cat([x, x * 2]).relu().mean(0), dynamic=True)
    for size in (3, 7, 64, 1):
        x = torch.randn(size, 5)
        close(compiled(x), torch.cat([x, x * 2]).relu().mean(0))
    assert counted("graphs") == counted("in_child")


def test_the_parent_runs_no_compiler_and_no_worker_pool(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError(f"a process was started in the parent: {args}")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "fork", refuse)
    x = torch.randn(9, 9)
    close(torch.compile(function)(x), function(x))


def test_the_backend_by_entry_point_compiles_under_its_own_policy(scheme: Scheme, counted: Counted) -> None:
    model = torch.nn.Linear(6, 3)
    x = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(model, backend="sandbox", options={"policy": POLICY, "epilogue_fusion": False})
    compiled(x).sum().backward()
    assert counted("graphs") == counted("in_child") == 2, "the backward graph went elsewhere"
    close(x.grad, model.weight.sum(0).expand(4, 6))
    with pytest.raises(Exception, match="no policy 'nonsense'"):
        torch.compile(model, backend="sandbox", options={"policy": "nonsense"})(x)


def test_several_threads_compile_at_once(scheme: Scheme, counted: Counted) -> None:
    problems: list[BaseException] = []

    def one(number: int) -> None:
        try:
            x = torch.randn(8, 8)
            close(torch.compile(lambda x: function(x) * number)(x), function(x) * number)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    # Dynamo makes the number symbolic after the first, so there may be fewer graphs than threads.
    assert counted("graphs") == counted("in_child") >= 2


def test_logs_and_warnings_of_the_child_arrive_with_the_job_id(scheme: Scheme) -> None:
    records: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Keep()
    torch._logging.set_logs(output_code=True)
    root = logging.getLogger("torch._inductor")
    loggers = [
        root,
        *(logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith("torch._inductor.")),
    ]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        torch.compile(function)(torch.randn(11, 11))
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        torch._logging.set_logs()
    told = [record for record in records if "def call(" in record.getMessage()]
    assert told and all(getattr(record, "job_id", "").startswith("job-") for record in told)


def test_a_compile_error_is_what_inductor_would_have_raised(scheme: Scheme, counted: Counted) -> None:
    def error_of() -> BaseException:
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught:
            torch.compile(function)(torch.randn(5, 5))
        return caught.value

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        ours = error_of()
        with torch._inductor.config.patch(fx_graph_cache=False):
            scheme_mode, scheme.mode = scheme.mode, "normal"
            try:
                theirs = error_of()
            finally:
                scheme.mode = scheme_mode
    assert type(ours) is type(theirs)
    assert str(ours).splitlines()[0] == str(theirs).splitlines()[0]
    assert counted("outcomes") == {"compile_error": 1}
    assert counted("raised") == 1


@pytest.mark.parametrize(
    ("fault", "outcomes", "fallbacks"),
    [
        ("sigsegv", {"crashed": 3}, {"retry": 1, "reduced": 1, "eager": 1}),
        ("sigstop", {"timeout": 2}, {"reduced": 1, "eager": 1}),
        ("oom_slow", {"memory_limit": 2}, {"reduced": 1, "eager": 1}),
        ("fork_bomb", {"violation": 1}, {"eager": 1}),
        ("garbage", {"protocol_error": 2}, {"retry": 1, "in_process": 1}),
    ],
)
def test_the_service_gets_an_answer_whatever_happens_in_the_child(
    scheme: Scheme, counted: Counted, fault: str, outcomes: dict[str, int], fallbacks: dict[str, int]
) -> None:
    # A constant of its own for each fault: a graph that was quarantined by one is not the graph of the next.
    number = 1.0 + list(faults.KINDS).index(fault)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    x = torch.randn(3, 4)
    with faults.inject(fault), torch.no_grad():
        close(torch.compile(lambda x: model(x) * number)(x), model(x) * number)
    assert counted("outcomes") == outcomes
    assert counted("fallbacks") == fallbacks
    killed = "in_process" not in fallbacks
    assert counted("in_process") == (0 if killed else 1), "a graph that kills was compiled in the serving process"
    children = counted("children_started")
    # The same graph again, healthy or not: a killer is in quarantine, and no child is started for it.
    torch._dynamo.reset()
    with torch.no_grad():
        close(torch.compile(lambda x: model(x) * number)(x), model(x) * number)
    # The injected one ran under a lower memory limit than it has now, and a larger one is another chance.
    assert counted("children_started") == children + (0 if killed and fault != "oom_slow" else 1)


def test_a_training_step_that_falls_back_to_eager_has_the_same_gradients(scheme: Scheme, counted: Counted) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    x = torch.randn(2, 5, 16)
    grads = []
    for run in (layer, torch.compile(layer)):
        torch.manual_seed(3)
        layer.zero_grad()
        with faults.inject("sigabrt"):
            run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for got, want in zip(*grads, strict=True):
        close(got, want)
    assert counted("eager") == 2 and counted("in_process") == 0


def test_a_forkserver_killed_in_the_middle_of_a_compile_loses_nothing(scheme: Scheme, counted: Counted) -> None:
    answers: list[torch.Tensor] = []
    x = torch.randn(12, 12)
    thread = threading.Thread(target=lambda: answers.append(torch.compile(lambda x: function(x) - 3)(x)))
    thread.start()
    assert eventually(lambda: counted("children_started") >= 1, 60)
    pid = scheme.sandbox.forkserver_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    thread.join()
    close(answers[0], function(x) - 3)
    torch._dynamo.reset()
    close(torch.compile(lambda x: function(x) - 4)(x), function(x) - 4)
    assert counted("graphs") == counted("in_child") == 2
    assert counted("forkserver_restarts") == 1


def test_what_cannot_be_sent_is_counted_and_the_policy_may_forbid_it(
    scheme: Scheme, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sandbox.errors import UnserializableError
    from sandbox.inductor import payload

    def refuse(*args: object, **kwargs: object) -> bytes:
        raise UnserializableError("by_value", "injected")

    monkeypatch.setattr(payload, "encode", refuse)
    x = torch.randn(5, 5)
    close(torch.compile(lambda x: function(x) + 9)(x), function(x) + 9)
    assert counted("in_process") == 1
    assert counted("in_process_reasons") == {"unserializable: by_value": 1}
    torch._dynamo.reset()
    monkeypatch.setattr(scheme, "policy", POLICY.model_copy(update={"allow_in_process": False}))
    close(torch.compile(lambda x: function(x) + 9)(x), function(x) + 9)
    assert counted("in_process") == 1 and counted("eager") == 1
    torch._dynamo.reset()
    ladder = POLICY.ladder.model_copy(update={"unserializable": ("raise",)})
    monkeypatch.setattr(scheme, "policy", POLICY.model_copy(update={"ladder": ladder}))
    with pytest.raises(Exception, match="by_value"):
        torch.compile(lambda x: function(x) + 9)(x)


def test_a_cache_hit_starts_no_child(
    scheme: Scheme, counted: Counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    x = torch.ones(7, 7)
    with torch._inductor.config.patch(fx_graph_cache=True):
        for _ in range(3):
            torch._dynamo.reset()
            close(torch.compile(function)(x), function(x))
    assert counted("children_started") == 1


def test_the_next_process_finds_the_kernels_and_needs_neither_child_nor_compiler(tmp_path: Path) -> None:
    program = """
        import subprocess, sys, torch, sandbox
        started = []
        class Popen(subprocess.Popen):
            def __init__(self, args, *rest, **kwargs):
                started.append(args if isinstance(args, str) else args[0])
                super().__init__(args, *rest, **kwargs)
        subprocess.Popen = Popen
        sandbox.install()
        def function(x):
            return torch.nn.functional.gelu(x @ x.t()).softmax(-1).sum(0) + torch.arange(x.shape[0])
        x = torch.ones(7, 7)
        assert torch.allclose(torch.compile(function)(x), function(x))
        print(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"], sandbox.stats().children_started)
        assert set(started) <= {sys.executable}, f"a compiler ran in the serving process: {started}"
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for expected in (["0", "1"], ["1", "0"]):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True,
            timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == expected, done.stderr
        assert "leaked" not in done.stderr


@pytest.mark.parametrize("mode", ["normal", "serialize"])
def test_the_modes_in_this_process(mode: str) -> None:
    before = installed()
    sandbox.install(policy=Policy(name=f"in-{mode}"), mode=mode)
    try:
        x = torch.randn(6, 6)
        close(torch.compile(function)(x), function(x))
        stats = sandbox.stats()
        assert (stats.graphs, stats.in_process, stats.in_child, stats.children_started) == (1, 1, 0, 0)
        assert stats.in_process_reasons == {f"mode_{mode}": 1}
    finally:
        if before is not None:
            sandbox.install(policy=before.policy)
            again = installed()
            assert again is not None
            again.sandbox.wait_ready()  # the next test may count what is there
            assert eventually(lambda: again.sandbox.standbys == again.policy.forkserver.standby, 30)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(sandbox.PolicyError, match="allowed are normal, serialize, subprocess, async, progressive"):
        sandbox.install(mode="sideways")


def test_uninstall_leaves_compiled_graphs_usable_and_nothing_else() -> None:
    program = """
        import gc, os, torch, sandbox
        before = set(os.listdir("/dev/shm"))
        from torch._inductor import compile_fx
        original = compile_fx.fx_codegen_and_compile
        sandbox.install()
        compiled = torch.compile(lambda x: x.sin() + 1)
        x = torch.ones(4)
        compiled(x)
        root = sandbox.inductor.install.installed().sandbox._forkserver.root.path
        sandbox.uninstall()
        assert compile_fx.fx_codegen_and_compile is original
        assert torch.allclose(compiled(x), x.sin() + 1)
        assert not root.exists()
        assert sandbox.stats().graphs == 0
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(lambda x: x.cos())(x), x.cos())
        assert set(os.listdir("/dev/shm")) == before
        print("fine")
    """
    before = held()
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=200,
        check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["fine"], done.stderr
    assert "leaked" not in done.stderr and "ResourceWarning" not in done.stderr
    assert eventually(lambda: not held().more_than(before), 5), held().more_than(before)
