"""The modes `async` and `progressive`: the same results before, during and after the exchange, whatever a compile does.

The sandbox is replaced by one whose jobs end when and how a test says; what a job makes is a real child's.
"""

from __future__ import annotations

import functools
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from inductor_harness import Template  # noqa: E402

import sandbox  # noqa: E402
from sandbox.inductor import compat, deferred, expressions, install, kernels, later, reply, scheme, traced, workers  # noqa: E402
from sandbox.policy import ForkserverSettings, Policy, QuarantineSettings  # noqa: E402
from sandbox.report import Recorder, Stats  # noqa: E402
from sandbox.results import Failure, JobResult, LeakReport, Status  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]

POLICY = Policy(name="deferred", quarantine=QuarantineSettings(persist=False))
#: Seconds within which a job must come, or a thread end; never slept.
SOON = 60.0

#: What eager and compiled code say of an index that is too large.
OUT = r"out of (range|bounds)"

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def template(tmp_path_factory: Any) -> Iterator[Template]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("parent"))
    torch.set_num_threads(1)
    made = Template()
    yield made
    made.close()
    kernels.remove_loader()
    del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    if before is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


class Job:
    """A job that has been submitted, to be ended by the test."""

    def __init__(self, template: Template, job: Any, step: str) -> None:
        self._template = template
        self.spec, self._payload, self.step = job.spec, job.payload, step
        self.future: Future[JobResult] = Future()
        self.value: dict[str, Any] | None = None

    def _end(self, status: Status, **more: Any) -> None:
        job_id = self.spec.job_id
        self.future.set_result(JobResult(job_id=job_id, status=status, leaks=LeakReport(job_id=job_id), **more))

    def ok(self, change: Change = lambda value: None) -> None:
        """It ends well; ``change`` is what a hostile child makes of its reply."""
        self.value = self._template.run(self._payload)
        change(self.value)
        self._end(Status.OK, value=self.value)

    def fails(self, status: Status) -> None:
        failure = Failure(module="builtins", qualname="ValueError", message="no") if status == "compile_error" else None
        self._end(status, detail=f"it ended with {status.value}", failure=failure)


class Sandbox:
    """Stands where the executor stands."""

    made: Template
    slots = 3
    foreign = False

    def kernel_threads(self, target: str) -> int:
        return 2

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.recorder = Recorder()
        self.recorder.policy = policy.name
        self.jobs: list[Job] = []
        self.quick: Callable[[Job], None] = Job.ok
        self._answering = False
        self._taken = 0
        self._came = threading.Condition()

    def start(self) -> None:
        pass

    def environment(self) -> dict[str, str]:
        return {}

    def submit(self, job: Any, *, name: str, step: str, cache: Any) -> Future[JobResult]:
        with self._came:
            one = Job(self.made, job, step)
            self.jobs.append(one)
            self._came.notify_all()
            if self._answering:
                one.ok()
        if step == "quick" and not one.future.done():  # somebody waits for it
            self.quick(one)
        return one.future

    def cancel(self, job_id: str, reason: str = "") -> bool:
        return True

    def close(self) -> None:
        for job in self.jobs:
            if not job.future.done():
                job.fails(Status.CANCELLED)

    def stats(self) -> Stats:
        return self.recorder.snapshot()

    def answer_all(self) -> None:
        """Jobs end well, those to come as well."""
        with self._came:
            self._answering = True
            for job in self.jobs:
                if not job.future.done():
                    job.ok()

    def next(self) -> Job:
        """The next job that nobody waits for."""
        with self._came:
            while True:
                assert self._came.wait_for(lambda: len(self.jobs) > self._taken, SOON), "no job came"
                job = self.jobs[self._taken]
                self._taken += 1
                if job.step != "quick":
                    return job


Start = Callable[..., Sandbox]


@pytest.fixture
def start(template: Template, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Installs a mode, and returns its sandbox."""
    Sandbox.made = template
    monkeypatch.setattr(scheme, "Sandbox", Sandbox)
    torch._dynamo.reset()

    def begin(mode: str = "async", policy: Policy = POLICY) -> Sandbox:
        sandbox.install(policy, mode)
        installed = install.installed()
        assert installed is not None
        box: Sandbox = installed.sandbox  # type: ignore[assignment]
        return box

    with compat.inductor_config.patch(fx_graph_cache=False), compat.functorch_config.patch(enable_autograd_cache=False):
        yield begin
    sandbox.uninstall()
    assert not [thread for thread in threading.enumerate() if thread.name == "sandbox-deferred"]


def counts() -> dict[str, Any]:
    wanted = {"graphs", "in_child", "eager", "in_process", "raised", "pending", "switched", "kept", "swallowed"}
    return {name: value for name, value in sandbox.stats().model_dump(include=wanted).items() if value}


def settled() -> dict[str, Any]:
    assert sandbox.wait(SOON), "a compile is still under way"
    return counts()


def function(x: Any) -> Any:
    return F.gelu(x @ x.t()).softmax(-1).sum(0)


# The exchange -------------------------------------------------------------------------------------------------


def _views(x: Any) -> Any:
    y = x * 2
    return y.t(), y[1:], x.expand(3, *x.shape), y


def _writes(x: Any) -> Any:
    x.add_(1)
    return x.sin(), x


def _breaks(x: Any) -> Any:
    y = x.sin()
    torch._dynamo.graph_break()
    return y.cos() + 1


def _drops(x: Any) -> Any:
    return F.dropout(x, 0.4) + torch.rand_like(x)


FUNCTIONS = {"views": _views, "writes": _writes, "graph break": _breaks, "random": _drops}


@pytest.mark.parametrize("mode", ["async", "progressive"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same_before_and_after(start: Start, mode: str, name: str) -> None:
    box, fn = start(mode), FUNCTIONS[name]
    compiled = torch.compile(fn)

    def run(one: Any) -> tuple[Any, Any]:
        torch.manual_seed(3)
        x = torch.linspace(0, 1, 35).reshape(5, 7)
        return one(x), x

    want = run(fn) if name != "random" else None
    before = run(compiled)
    for _ in range(counts()["pending"]):
        box.next().ok()
    assert settled()["switched"] >= 1
    after = run(compiled)
    torch.testing.assert_close(after, before)
    if want is not None:
        torch.testing.assert_close(before, want)
    assert [out.stride() for out in _flat(before)] == [out.stride() for out in _flat(after)]


def _flat(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.Tensor) else [one for item in value for one in _flat(item)]


def test_the_first_call_waits_for_nothing_and_the_counts_follow(start: Start) -> None:
    box, x = start(), torch.randn(6, 6)
    compiled = torch.compile(function)
    torch.testing.assert_close(compiled(x), function(x))
    assert counts() == {"graphs": 1, "eager": 1, "pending": 1}
    assert not sandbox.wait(0)
    job = box.next()
    assert job.spec.nice == POLICY.deferred.nice and job.spec.config_overrides == {}
    job.ok()
    assert settled() == {"graphs": 1, "in_child": 1, "switched": 1}
    torch.testing.assert_close(compiled(x), function(x))


def _operators(function: Callable[[], Any]) -> set[str]:
    """The operators that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key for event in profile.key_averages()}


def test_until_then_the_program_runs_as_it_was_written(start: Start) -> None:
    box, x = start(), torch.randn(6, 6)

    def normed(x: Any) -> Any:
        return F.layer_norm(F.gelu(x), (6,))

    compiled = torch.compile(normed, dynamic=False)
    assert torch.equal(compiled(x), normed(x)), "not bit by bit what eager gives"
    assert "aten::native_layer_norm" in _operators(lambda: compiled(x))
    box.next().ok()
    settled()
    assert "aten::native_layer_norm" not in _operators(lambda: compiled(x))
    torch.testing.assert_close(compiled(x), normed(x))

    compiled = torch.compile(normed, dynamic=True)
    compiled(torch.randn(7, 6))
    box.next().fails(Status.COMPILE_ERROR)
    assert settled()["kept"] == {"compile_error": 1}
    assert "aten::native_layer_norm" in _operators(lambda: compiled(torch.randn(8, 6))), "no better code, so as before"


class _Doubled(torch.overrides.TorchFunctionMode):
    """A mode of the caller's, which Dynamo traces through."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        return made * 2 if function is torch.sin else made


def test_a_mode_of_the_caller_acts_once(start: Start) -> None:
    start()
    x = torch.randn(6, 6)
    compiled = torch.compile(lambda x: F.layer_norm(x.sin(), (6,)) + torch.sin(x))
    with _Doubled():
        want = F.layer_norm(x.sin(), (6,)) + torch.sin(x)
        for _ in range(2):
            torch.testing.assert_close(compiled(x), want)


def test_an_error_between_switches_leaves_the_callers_state(start: Start) -> None:
    start()

    def looked_up(index: Any, table: Any) -> Any:
        with torch.no_grad():
            found = F.embedding(index, table)
        return found * 2

    table = torch.randn(4, 3)
    compiled = torch.compile(looked_up)
    torch.testing.assert_close(compiled(torch.tensor([1, 3]), table), table[[1, 3]] * 2)
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError), match=OUT):
            compiled(torch.tensor([1, 9]), table)
        assert torch.is_grad_enabled()
    torch.testing.assert_close(compiled(torch.tensor([1, 3]), table), table[[1, 3]] * 2)


def test_a_program_that_switches_autocast_leaves_it_as_it_was(start: Start) -> None:
    start()

    def looked_up(index: Any, table: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return F.embedding(index, table) @ table.t()

    table = torch.randn(4, 3)
    compiled = torch.compile(looked_up)
    assert compiled(torch.tensor([1, 3]), table).dtype is torch.bfloat16
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError), match=OUT):
            compiled(torch.tensor([1, 9]), table)
        assert not torch.is_autocast_enabled("cpu")
    twice = torch.compile(lambda x: torch.func.vmap(lambda row: row.sin() + 1)(x))
    torch.testing.assert_close(twice(table), table.sin() + 1)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}])
def test_it_is_so_with_settings_for_one_compile(start: Start, options: dict[str, Any]) -> None:
    start()
    x = torch.randn(6, 6)
    compiled = torch.compile(lambda x: F.layer_norm(x, (6,)), **options)
    compiled(x)
    assert "aten::native_layer_norm" in _operators(lambda: compiled(x))


def test_a_program_that_only_its_decomposition_can_run() -> None:
    asked: list[bool] = []

    def no_kernel(x: Any) -> Any:
        asked.append(True)
        raise NotImplementedError("no kernel for this device")

    graph = torch.fx.Graph()
    graph.output(graph.call_function(no_kernel, (graph.placeholder("x"),)))
    gm, code, x = torch.fx.GraphModule({}, graph), SimpleNamespace(unchanged=True), torch.ones(3)
    run = traced._switch(gm, lambda x: x * 2, traced._Made(code, usable=True, again=True))
    for _ in range(2):
        assert torch.equal(run(x), x * 2)
    assert len(asked) == 1
    run = traced._switch(gm, lambda x: x * 2, traced._Made(code, usable=True, again=False))
    with pytest.raises(NotImplementedError, match="no kernel for this device"):
        run(x)


def test_inputs_that_are_written_to_and_views(start: Start) -> None:
    start()
    for function in (_writes, _views):
        one, other = (torch.linspace(0, 1, 35).reshape(5, 7) for _ in range(2))
        found, want = torch.compile(function)(one), function(other)
        torch.testing.assert_close((found, one), (want, other))
        assert found[1].untyped_storage().data_ptr() == found[-1].untyped_storage().data_ptr()


def test_a_backend_that_changes_the_graph_before_it_asks_inductor(start: Start) -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    start()
    x = torch.linspace(-1, 1, 6)

    def changed(gm: Any, inputs: Any, **options: Any) -> Any:
        for node in gm.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.sigmoid.default
        gm.recompile()
        return compile_fx_inner(gm, inputs, **options)

    def ask(gm: Any, inputs: Any) -> Any:
        return changed(gm, inputs, is_inference=True)

    @functools.wraps(compile_fx_inner)
    def wrapped(gm: Any, inputs: Any, **options: Any) -> Any:
        return changed(gm, inputs, **options)

    backends = {
        "its own": aot_autograd(fw_compiler=ask),
        "wrapped": lambda gm, inputs: compile_fx(gm, inputs, inner_compile=wrapped),
        "inductor's": lambda gm, inputs: compile_fx(gm, inputs, inner_compile=changed),
    }
    for name, backend in backends.items():
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(lambda x: torch.relu(x) + 1, backend=backend)(x)
        assert torch.allclose(found, torch.sigmoid(x) + 1), name


def test_a_frozen_program_runs_as_it_was_traced(start: Start) -> None:
    start()
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)).eval()
    x = torch.randn(4, 6)
    with torch.no_grad(), compat.inductor_config.patch(freezing=True, freezing_discard_parameters=True):
        want = model(x)
        for _ in range(2):
            torch.testing.assert_close(torch.compile(model)(x), want)


def test_what_draws_random_numbers_or_has_a_backward_pass_runs_as_it_was_traced(start: Start) -> None:
    start()
    x, w = torch.randn(6, 6), torch.randn(6, 6, requires_grad=True)
    dropped = torch.compile(lambda x: F.layer_norm(F.dropout(x, 0.4), (6,)))
    trained = torch.compile(lambda x, w: F.layer_norm(x @ w, (6,)))
    for function in (lambda: dropped(x), lambda: trained(x, w).sum().backward()):
        function()
        assert "aten::native_layer_norm" not in _operators(function)
    with torch.no_grad():
        trained(x, w)
        assert "aten::native_layer_norm" in _operators(lambda: trained(x, w))


@pytest.mark.parametrize("exchanged", ["never", "forward", "backward", "both"])
def test_training_with_dropout_mixes_both_kinds_of_code(start: Start, exchanged: str) -> None:
    box = start()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.ReLU(), torch.nn.Dropout(0.4), torch.nn.Flatten(), torch.nn.Linear(64, 3)
    )
    images = torch.randn(2, 2, 6, 6)

    def step(one: Any, between: Callable[[], None] = lambda: None) -> list[Any]:
        model.zero_grad()
        torch.manual_seed(5)
        out = one(images)
        between()
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    compiled = torch.compile(model)
    want = step(compiled)
    jobs = {"forward": box.next(), "backward": box.next()}
    for name, job in jobs.items():
        if exchanged in (name, "both"):
            job.ok()
            job.future.result()
        else:
            job.fails(Status.COMPILE_ERROR)
    made = 2 if exchanged == "both" else int(exchanged != "never")
    assert settled().get("switched", 0) == made
    torch.testing.assert_close(step(compiled), want)


def test_a_forward_pass_before_and_its_backward_pass_after(start: Start) -> None:
    box = start()
    weight = torch.randn(6, 6, requires_grad=True)

    def step(x: Any) -> Any:
        return F.dropout((x @ weight).tanh(), 0.5).square().sum()

    compiled = torch.compile(step)
    x = torch.randn(4, 6)
    torch.manual_seed(1)
    compiled(x).backward()
    want = weight.grad.clone()
    jobs = [box.next(), box.next()]
    weight.grad = None
    torch.manual_seed(1)
    out = compiled(x)
    for job in jobs:
        job.ok()
    assert settled()["switched"] == 2
    out.backward()
    torch.testing.assert_close(weight.grad, want)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_surroundings_of_a_call(start: Start, context: Any) -> None:
    box = start()

    def fn(x: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            y = x @ x
        return y, x @ x

    x = torch.randn(8, 8)
    with context():
        compiled = torch.compile(fn)
        before = compiled(x)
        assert [one.dtype for one in before] == [one.dtype for one in fn(x)]
        box.next().ok()
        assert settled()["switched"] == 1
        after = compiled(x)
    torch.testing.assert_close(after, before, rtol=2e-2, atol=2e-2)
    assert [one.is_inference() for one in before] == [one.is_inference() for one in after]


def test_many_threads_call_while_it_is_exchanged(start: Start) -> None:
    box, x = start(), torch.randn(5, 5)
    compiled = torch.compile(function)
    want, wrong, stop = compiled(x), [], threading.Event()
    job = box.next()

    def call() -> None:
        while not stop.is_set():
            if not torch.allclose(compiled(x), want, atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    job.ok()
    switched = settled()
    stop.set()
    for thread in threads:
        thread.join(SOON)
    assert not wrong and switched == {"graphs": 1, "in_child": 1, "switched": 1}


def test_reset_while_compiles_are_under_way(start: Start) -> None:
    box, x = start(), torch.randn(4, 4)
    torch.compile(function)(x)
    job = box.next()
    torch.compiler.reset()
    gc.collect()
    again = torch.compile(function)
    again(x)
    job.ok()
    box.next().ok()
    assert settled() == {"graphs": 2, "in_child": 2, "switched": 2}
    torch.testing.assert_close(again(x), function(x))


# What goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [status for status in Status if status not in ("ok", "cancelled")])
def test_a_compile_that_fails_leaves_the_graph_as_it_is(
    start: Start, monkeypatch: pytest.MonkeyPatch, status: Status
) -> None:
    box, x = start(), torch.randn(3, 3)
    told: list[str] = []
    monkeypatch.setattr(later.log, "warning", lambda text, *more: told.append(text % more))
    compiled = torch.compile(function)
    want = compiled(x)
    steps = {"retry", "reduced"} & set(POLICY.ladder.steps(status))
    for _ in range(1 + len(steps)):
        box.next().fails(status)
    # What cannot be sent says more: what it is.
    reason = "unserializable: it ended with unserializable" if status is Status.UNSERIALIZABLE else status.value
    assert settled() == {"graphs": 1, "eager": 1, "kept": {reason: 1}}
    torch.testing.assert_close(compiled(x), want)
    assert any(f"keeps the code that it began with (eager): {status.value}" in text for text in told)
    assert "in_process" not in sandbox.stats().fallbacks


def test_a_killer_is_quarantined_and_gets_no_other_child(start: Start) -> None:
    box, x = start(policy=POLICY.model_copy(update={"name": "killer"})), torch.randn(3, 4)
    for again in (False, True):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(_breaks)(x), _breaks(x))
        for _ in range(0 if again else 6):
            box.next().fails(Status.CRASHED)
        settled()
    assert len(box.jobs) == 6
    assert counts() == {"graphs": 4, "eager": 4, "kept": {"crashed": 2, "quarantined": 2}}


def _nonsense(value: dict[str, Any]) -> None:
    value["graph"] = [value]


def _other_strides(value: dict[str, Any]) -> None:
    value["graph"]["output_strides"] = [["3", "1"], ["1", "3"]]


def _too_few_strides(value: dict[str, Any]) -> None:
    value["graph"]["output_strides"] = None


def _write(value: dict[str, Any], source: str) -> None:
    value["graph"]["source_code"] = source
    value["graph"]["cache_key"] = compat.codecache.code_hash(source.strip())


def _does_not_load(value: dict[str, Any]) -> None:
    _write(value, "raise KeyError('on import')")


@pytest.mark.parametrize(
    ("change", "jobs", "reason"),
    [
        (_nonsense, 2, "protocol_error"),
        (_does_not_load, 2, "protocol_error"),
        (_other_strides, 1, "strides"),
        (_too_few_strides, 1, "strides"),
    ],
)
def test_a_reply_that_is_of_no_use(start: Start, change: Change, jobs: int, reason: str) -> None:
    box, x = start(), torch.randn(3, 3)

    def fn(x: Any) -> Any:
        return x + 1, x.sin()

    compiled = torch.compile(fn)
    compiled(x)
    for _ in range(jobs):
        box.next().ok(change)
    assert settled() == {"graphs": 1, "eager": 1, "kept": {reason: 1}}
    torch.testing.assert_close(compiled(x), fn(x))


def _raising(value: dict[str, Any]) -> None:
    call = "def call(args):\n    args.clear()\n    raise RuntimeError('the better code is broken')\n"
    _write(value, value["graph"]["source_code"] + "\n" + call)


def test_better_code_that_fails_where_the_code_before_does_not_is_dropped(start: Start) -> None:
    box, x = start(), torch.randn(3, 3)
    compiled = torch.compile(function)
    want = compiled(x)
    box.next().ok(_raising)
    assert settled() == {"graphs": 1, "in_child": 1, "switched": 1}
    for _ in range(2):
        torch.testing.assert_close(compiled(x), want)
        assert counts() == {"graphs": 1, "eager": 1, "kept": {"failed_when_run": 1}}


def test_a_call_that_cannot_be_repeated_is_not(start: Start) -> None:
    box = start()
    compiled = torch.compile(_writes)
    compiled(torch.zeros(3))
    box.next().ok(_raising)
    settled()
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="the better code is broken"):
        compiled(x)


def test_the_users_own_error_is_raised_and_the_better_code_stays(start: Start) -> None:
    box, x = start(), torch.randn(5, 3)
    compiled = torch.compile(lambda x, index: x[index] * 2)
    good, bad = torch.tensor([0, 4]), torch.tensor([0, 5])
    compiled(x, good)
    with pytest.raises((IndexError, RuntimeError), match=OUT):
        compiled(x, bad)
    box.next().ok()
    settled()
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError), match=OUT):
            compiled(x, bad)
        torch.testing.assert_close(compiled(x, good), x[good] * 2)
    assert counts() == {"graphs": 1, "in_child": 1, "switched": 1}


def test_what_cannot_be_sent_runs_uncompiled(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    box, x = start(), torch.randn(3, 3)

    def refuse(*args: Any) -> bytes:
        raise scheme.UnserializableError("by_value", "a lambda of the parent")

    monkeypatch.setattr(scheme.payload, "encode", refuse)
    torch.testing.assert_close(torch.compile(function)(x), function(x))
    assert settled() == {"graphs": 1, "eager": 1, "kept": {"unserializable: by_value": 1}} and not box.jobs


def test_a_surprise_in_the_thread_is_counted(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    box, x = start(), torch.randn(3, 3)
    compiled = torch.compile(function)
    compiled(x)

    def surprise(*args: Any) -> None:
        raise SystemExit("surprise")

    monkeypatch.setattr(deferred, "same_strides", surprise)
    box.next().ok()
    assert settled() == {"graphs": 1, "eager": 1, "kept": {"SystemExit": 1}, "swallowed": {"SystemExit": 1}}
    torch.testing.assert_close(compiled(x), function(x))


# Sizes --------------------------------------------------------------------------------------------------------


def test_a_guard_that_comes_too_late_is_asked_at_each_call(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    box, seen, here = start(), [], reply.Sizes.here
    monkeypatch.setattr(reply.Sizes, "here", lambda inputs: seen.append(here(inputs)) or seen[-1])
    compiled = torch.compile(lambda x: (x * 2).sin().sum(0), dynamic=True)
    ran: list[str] = []
    better, first = compat.CompiledFxGraph.__call__, install.eager_class().__call__
    monkeypatch.setattr(compat.CompiledFxGraph, "__call__", lambda *a: ran.append("better") or better(*a))
    monkeypatch.setattr(install.eager_class(), "__call__", lambda *a: ran.append("first") or first(*a))

    def call(size: int) -> None:
        x = torch.randn(size, 3)
        torch.testing.assert_close(compiled(x), (x * 2).sin().sum(0))

    call(8)

    name = next(iter(seen[0].symbols))
    guard = {"expr": expressions.encode(sympy.Symbol(name) > 5), "size_oblivious": False}
    box.next().ok(lambda value: value["guards"].append(guard))
    assert settled()["switched"] == 1
    for size in (9, 6, 5, 3, 8):
        call(size)
    assert ran == ["better", "better", "first", "first", "better"]


def test_guards_as_text_and_as_a_check() -> None:
    gm = compat.make_fx(lambda x: x * 2, None, "symbolic")(torch.ones(7, 9))
    rows, columns = next(iter(gm.graph.nodes)).meta["val"].shape
    inputs = [torch.ones(1), rows, columns]
    symints = deferred.symints_of(inputs)
    assert [place for place, _ in symints] == [1, 2]
    values = [value for _, value in symints]
    one, two = rows.node.expr, columns.node.expr
    text = deferred.guards_text([sympy.Eq(one % 2, 1), one * two > 12, sympy.true], values)
    check = deferred.check_of(text, [1, 2])
    assert check is not None and check([None, 7, 9]) and not check([None, 8, 9]) and not check([None, 1, 9])
    assert not check([None, rows, columns]), "symbols are asked nothing"
    assert deferred.guards_text([], values) == "" and deferred.check_of("", [1, 2]) is None
    assert deferred.guards_text([sympy.Symbol("u0") > 1], values) is None


def test_strides_are_compared_where_they_matter() -> None:
    traced = [(("3", "1", "s0"), ("s0", "s0", "1")), None, (("0", "5"), ("5", "1"))]
    assert deferred.same_strides(traced, [["s0", "99", "1"], None, ["1", "1"]])
    assert not deferred.same_strides(traced, [["3", "s0", "1"], None, ["5", "1"]])
    assert not deferred.same_strides(traced, [["s0", "1"], None, ["5", "1"]])
    assert not deferred.same_strides(traced, [["s0", "s0", "1"], None])
    assert not deferred.same_strides(traced, None)


# Progressive --------------------------------------------------------------------------------------------------


def test_progressive_is_compiled_quickly_and_then_well(start: Start) -> None:
    box, x = start("progressive"), torch.randn(6, 6)
    compiled = torch.compile(function)
    want = compiled(x)
    assert counts() == {"graphs": 1, "in_child": 1, "pending": 1}
    quick = box.jobs[0]
    assert quick.step == "quick" and quick.spec.config_overrides == POLICY.quick and quick.spec.nice == 0
    better = box.next()
    assert better.spec.config_overrides == {} and better.spec.nice == POLICY.deferred.nice
    better.ok()
    assert settled() == {"graphs": 1, "in_child": 1, "switched": 1}
    torch.testing.assert_close(compiled(x), want)


def test_a_killer_of_the_better_compile_keeps_the_quick_one_now_and_later(start: Start) -> None:
    box, x = start("progressive", POLICY.model_copy(update={"name": "quick"})), torch.randn(6, 6)
    want = torch.compile(function)(x)
    for step in ("first", "retry"):  # `reduced` is what runs already
        job = box.next()
        assert job.step == step
        job.fails(Status.CRASHED)
    assert settled() == {"graphs": 1, "in_child": 1, "kept": {"crashed": 1}}
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function)(x), want)
    assert settled() == {"graphs": 2, "in_child": 2, "kept": {"crashed": 1, "quarantined": 1}}
    assert [job.step for job in box.jobs] == ["quick", "first", "retry", "quick"]


def test_a_quick_compile_that_fails_takes_the_ladder(start: Start) -> None:
    ladder = POLICY.ladder.model_copy(update={"compile_error": ("eager",)})
    box, x = start("progressive", POLICY.model_copy(update={"ladder": ladder})), torch.randn(4, 6)
    box.quick = lambda job: job.fails(Status.COMPILE_ERROR)
    compiled = torch.compile(lambda x: x.sin() * 2)
    compiled(x)
    assert counts() == {"graphs": 1, "eager": 1, "pending": 1}
    box.next().ok()
    assert settled() == {"graphs": 1, "in_child": 1, "switched": 1}
    torch.testing.assert_close(compiled(x), x.sin() * 2)


def test_a_quick_compile_that_fails_raises_where_the_ladder_says_so(start: Start) -> None:
    box = start("progressive")
    box.quick = lambda job: job.fails(Status.COMPILE_ERROR)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="ValueError: no"):
        torch.compile(lambda x: x.sin() * 3)(torch.randn(4))
    assert settled() == {"graphs": 1, "raised": 1}


# Caches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "aot", "dynamic"),
    [("async", False, False), ("async", True, False), ("async", True, True), ("progressive", True, False)],
)
def test_both_caches_get_the_better_code_when_it_is_there(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, aot: bool, dynamic: bool
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    box = start(mode)
    x = torch.randn(6, 4, requires_grad=True)

    def fn(x: Any) -> Any:
        return (torch.cat([x, x * 2]).relu() + x.shape[0]).mean(0).sum()

    def run() -> Any:
        torch._dynamo.reset()
        x.grad = None
        torch.compile(fn, dynamic=dynamic)(x).backward()
        return x.grad.clone()

    counters = compat.counters
    with compat.inductor_config.patch(fx_graph_cache=True), compat.functorch_config.patch(enable_autograd_cache=aot):
        want = run()
        torch.testing.assert_close(run(), want)  # nothing is there yet, and nothing wrong either
        box.answer_all()
        assert settled()["switched"] == 4
        counters.clear()
        before = len(box.jobs)
        torch.testing.assert_close(run(), want)
        assert len(box.jobs) == before and counts()["graphs"] == 4, "it came from the cache"
        assert counters["inductor"]["fxgraph_cache_hit"] == 2
        if aot and not dynamic:
            assert counters["aot_autograd"]["autograd_cache_hit"] == 1


def test_what_is_made_to_be_kept_is_compiled_at_once(start: Start) -> None:
    box = start()
    box.quick = Job.ok
    submit = box.submit
    box.submit = lambda job, **rest: submit(job, **{**rest, "step": "quick"})  # type: ignore[method-assign]
    with compat.functorch_config.patch(bundled_autograd_cache=True):
        x = torch.randn(3, 3)
        torch.testing.assert_close(torch.compile(function)(x), function(x))
    assert settled() == {"graphs": 1, "in_child": 1}


# The end ------------------------------------------------------------------------------------------------------


def test_uninstall_with_compiles_under_way_and_waiting(start: Start) -> None:
    box = start()
    ops = (torch.sin, torch.cos, torch.tan, torch.exp, torch.tanh)
    functions = [lambda x, op=op: op(x) + 1 for op in ops]
    compiled = [torch.compile(one) for one in functions]
    x = torch.randn(3)
    for one in compiled:
        one(x)
    for _ in range(Sandbox.slots):  # the others wait for their turn
        box.next()
    recorder = box.recorder
    assert recorder.snapshot().pending == 5
    sandbox.uninstall()
    assert sandbox.wait(SOON)
    assert recorder.snapshot().kept == {"cancelled": 5} and recorder.snapshot().pending == 0
    for one, fn in zip(compiled, functions, strict=True):
        torch.testing.assert_close(one(x), fn(x))


def test_workers_drop_what_comes_too_late_and_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    task = workers.Task(lambda: told.append("run"), lambda: told.append("drop"))
    pool = workers.Workers(2)
    pool.add(task)
    assert pool.wait(SOON) and told == ["run"]
    monkeypatch.setattr(threading.Thread, "start", _no_thread)
    pool.add(task)
    assert told == ["run", "drop"] and pool.wait(0)
    monkeypatch.undo()
    pool.close()
    pool.add(task)
    assert told == ["run", "drop", "drop"]


def _no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_fork_waits_for_a_load_and_finds_no_lock_held() -> None:
    inside, go, forked = threading.Event(), threading.Event(), threading.Event()

    def load() -> None:
        with workers.exclusive.held(lambda: True) as held:
            assert held
            inside.set()
            go.wait(SOON)

    def fork() -> None:
        pid = os.fork()
        if pid == 0:
            free = compat.compile_lock.acquire(timeout=10)
            os._exit(0 if free else 1)
        forked.set()
        code.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    code: list[int] = []
    threads = [threading.Thread(target=load), threading.Thread(target=fork)]
    threads[0].start()
    assert inside.wait(SOON)
    threads[1].start()
    assert not forked.wait(0.3)
    go.set()
    for thread in threads:
        thread.join(SOON)
    assert code == [0]


def test_a_child_that_nobody_waits_for_steps_back() -> None:
    def priority() -> int:
        import os

        return os.getpriority(os.PRIO_PROCESS, 0)

    policy = Policy(name="nice", forkserver=ForkserverSettings(import_torch=False))
    with sandbox.Sandbox(policy) as box:
        jobs = [sandbox.callable_job(priority) for _ in range(2)]
        back = jobs[1].spec.model_copy(update={"nice": 7})
        plain, nice = box.submit(jobs[0]), box.submit(type(jobs[1])(back, jobs[1].payload))
        assert (plain.result().value, nice.result().value) == (os.getpriority(os.PRIO_PROCESS, 0), 7)


@pytest.mark.parametrize("end", ["", "uninstalled()"])
def test_a_process_ends_soon_and_in_silence_with_compiles_under_way(end: str) -> None:
    """With a real sandbox, whose template starts at that moment."""
    program = f"""
        import os, torch, sandbox
        sandbox.install("default", "async")
        f = torch.compile(lambda x: x.sin() + 1)
        x = torch.ones(3)
        want = f(x)
        assert sandbox.stats().pending == 1
        pid = os.fork()
        if pid == 0:
            assert torch.equal(f(x), want) and sandbox.stats().graphs == 0 and sandbox.wait(0)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

        def uninstalled():
            sandbox.uninstall()
            assert torch.equal(f(x), want)

        {end}
    """
    body = textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, timeout=SOON, check=False)
    assert (done.returncode, done.stderr) == (0, "")
