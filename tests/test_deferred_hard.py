"""The modes `async` and `progressive` where it is hard: caches that modes share, threads, forks, memory."""

from __future__ import annotations

import contextvars
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from inductor_harness import Template  # noqa: E402

import sandbox  # noqa: E402
from sandbox.inductor import compat, deferred, kernels, later, reply, scheme, workers  # noqa: E402
from sandbox.policy import Policy, QuarantineSettings  # noqa: E402
from sandbox.report import Recorder  # noqa: E402
from sandbox.results import JobResult, LeakReport, Status  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]

POLICY = Policy(name="hard", quarantine=QuarantineSettings(persist=False))
#: Seconds within which something must come; never slept.
SOON = 120.0


class Children:
    """Stands where the executor stands: jobs end well, in order; those that nobody waits for not before `go`."""

    made: Template
    slots = 1
    foreign = False

    def kernel_threads(self, target: str) -> int:
        return 1

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.recorder = Recorder()
        self.waited_for = True
        self.go = threading.Event()

    def start(self) -> None:
        pass

    def environment(self) -> dict[str, str]:
        return {}

    def submit(self, job: Any, *, name: str, step: str, cache: Any) -> Future[JobResult]:
        if threading.current_thread().name == "sandbox-deferred" and not self.go.wait(SOON):
            raise RuntimeError("the test has forgotten this job")
        future: Future[JobResult] = Future()
        job_id = job.spec.job_id
        value = self.made.run(job.payload)
        future.set_result(JobResult(job_id=job_id, status=Status.OK, value=value, leaks=LeakReport(job_id=job_id)))
        return future

    def cancel(self, job_id: str, reason: str = "") -> bool:
        return True

    def close(self) -> None:
        self.go.set()

    def stats(self) -> Any:
        return self.recorder.snapshot()


Begin = Callable[[str], Children]


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    torch.set_num_threads(1)
    made = Template()
    yield made
    made.close()
    kernels.remove_loader()


@pytest.fixture
def children(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Children]]:
    """Installs a mode with both of Inductor's caches on, in a folder of the test's; returns its children."""
    Children.made = template
    monkeypatch.setattr(scheme, "Sandbox", Children)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def begin(mode: str) -> Children:
        sandbox.install(POLICY, mode)
        installed = sandbox.inductor.install.installed()
        assert installed is not None
        return installed.sandbox  # type: ignore[return-value]

    torch._dynamo.reset()
    with compat.inductor_config.patch(fx_graph_cache=True), compat.functorch_config.patch(enable_autograd_cache=True):
        yield begin
    sandbox.uninstall()
    torch._dynamo.reset()


def _entries(folder: Path) -> dict[str, int]:
    """Key -> entries, of Inductor's cache."""
    return {root.name: len(list(root.iterdir())) for root in folder.glob("fxgraph/*/*")}


def test_code_that_keeps_other_strides_has_a_key_of_its_own(
    children: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AOTAutograd's cache knows forward and backward code by their keys: under one key with two kinds of forward code,
    a backward pass would meet strides that it was not compiled for."""
    x, w, v = (torch.randn(*size, requires_grad=True) for size in ((1, 2, 6, 6), (3, 2, 3, 3), (3, 3, 3, 3)))

    def fn(x: Any, w: Any, v: Any) -> Any:
        return F.conv2d(F.conv2d(x, w).relu(), v).sum()  # compiled by itself the middle one gets channels last

    def run() -> Any:
        torch._dynamo.reset()
        x.grad = None
        torch.compile(fn)(x, w, v).backward()
        return x.grad.clone()

    box = children("async")
    want = run()
    children("subprocess")
    torch.testing.assert_close(run(), want)
    normal = _entries(tmp_path)
    box.go.set()
    assert sandbox.wait(SOON) and sandbox.stats().switched == 2
    found = _entries(tmp_path)
    assert set(found.values()) == {1} and len(found) == 4, found
    assert len(normal) == 2 and sum(key.endswith(deferred.KEPT) for key in found.keys() - normal.keys()) == 1
    for mode in ("subprocess", "async"):  # each takes what the other has made, or its own: always a pair
        children(mode)
        before = sandbox.stats().graphs
        torch.testing.assert_close(run(), want)
        assert sandbox.stats().graphs == before, "it came from the cache"


def test_the_better_code_is_found_by_its_own_mode(children: Begin, tmp_path: Path) -> None:
    x = torch.randn(4, 4, requires_grad=True)

    def run() -> Any:
        torch._dynamo.reset()
        x.grad = None
        torch.compile(lambda x: (x.sin() @ x).sum())(x).backward()
        return x.grad.clone()

    with compat.functorch_config.patch(enable_autograd_cache=False):
        children("async").go.set()
        want = run()
        assert sandbox.wait(SOON) and sandbox.stats().graphs == 2
        torch.testing.assert_close(run(), want)
    assert sandbox.stats().graphs == 2
    assert len(_entries(tmp_path)) == 2


def test_quick_code_that_stays_is_not_saved_as_the_better_code(
    children: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(later.Later, "keeps_strides", lambda self, code: False)
    children("progressive")
    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(lambda x: x.sin() + 1)(x), x.sin() + 1)
    assert sandbox.stats().kept == {"strides": 1} and sandbox.stats().in_child == 1
    assert _entries(tmp_path) == {}


class Request:
    """What a service may have in a context variable while it compiles."""


REQUEST: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


def test_after_the_exchange_nothing_is_kept_of_the_compile(children: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the caller's context nor the graph; and a reply is checked while others may compile."""
    graphs, owned, check = [], [], reply.check_later

    def checking(value: Any, gm: Any, *rest: Any) -> Any:
        graphs.append(weakref.ref(gm))
        owned.append(compat.compile_lock._is_owned())
        return check(value, gm, *rest)

    monkeypatch.setattr(reply, "check_later", checking)
    children("async").go.set()
    request = Request()
    gone = weakref.ref(request)
    token = REQUEST.set(request)
    fn, x = torch.compile(lambda x: x.cos() * 3), torch.randn(5)
    fn(x)
    REQUEST.reset(token)
    del request, token
    assert sandbox.wait(SOON) and sandbox.stats().switched == 1
    torch.testing.assert_close(fn(x), x.cos() * 3)  # the trial
    gc.collect()
    assert owned == [False]
    assert gone() is None and [ref() for ref in graphs] == [None]


# Without a compile --------------------------------------------------------------------------------------------


class Code:
    """Stands for an OutputCode."""

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self.run = run

    def __call__(self, inputs: list[Any]) -> Any:
        return self.run(inputs)

    def post_compile(self, *args: Any) -> None:
        pass


def _deferred(better: Callable[[list[Any]], Any], failed: Callable[[Exception], None]) -> Any:
    output = deferred.deferred_class()(Code(lambda inputs: "first"), False)
    output.post_compile([], None, {})
    output.exchange(Code(better), "", [], True, failed)
    output.settle()
    return output


def test_a_trial_by_several_threads_is_failed_once() -> None:
    meet, told, got = threading.Barrier(3), [], []

    def better(inputs: list[Any]) -> Any:
        meet.wait(SOON)
        raise ValueError("of the better code")

    output = _deferred(better, told.append)
    threads = [threading.Thread(target=lambda: got.append(output([]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert got == ["first"] * 3 and len(told) == 1
    assert output([]) == "first"


def test_a_trial_that_one_thread_passes_and_a_later_one_fails() -> None:
    entered, passed, told, got = threading.Event(), threading.Event(), [], []

    def better(inputs: list[Any]) -> Any:
        if inputs:
            return "better"
        entered.set()
        passed.wait(SOON)
        raise ValueError("of the better code")

    output = _deferred(better, told.append)
    slow = threading.Thread(target=lambda: got.append(output([])))
    slow.start()
    assert entered.wait(SOON) and output([1]) == "better"
    passed.set()
    slow.join(SOON)
    assert got == ["first"] and len(told) == 1
    assert output([1]) == "first"


@pytest.mark.parametrize("ours", [True, False])
def test_a_fork_in_the_middle_leaves_no_lock_held(monkeypatch: pytest.MonkeyPatch, ours: bool) -> None:
    """A load may take longer than a fork waits for it; and there is a moment between one lock and the other."""
    monkeypatch.setattr(workers, "FORK_SECONDS", 0.05)
    held, release = threading.Event(), threading.Event()
    with workers.exclusive.held(lambda: True):
        pass

    def hold() -> None:
        with workers.exclusive.held(lambda: True) if ours else compat.compile_lock:
            held.set()
            release.wait(SOON)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(SOON)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if compat.compile_lock.acquire(timeout=5.0):
                compat.compile_lock.release()
                with workers.exclusive.held(lambda: False) as got:
                    status = 0 if got is False else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    release.set()
    thread.join(SOON)
    with workers.exclusive.held(lambda: True) as got:
        assert got


def test_what_nobody_wants_any_more_is_not_begun() -> None:
    with workers.exclusive.held(lambda: False) as got:
        assert not got


def test_a_thread_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def run() -> None:
        raise RuntimeError("surprise")

    made = workers.Workers(1)
    made.add(workers.Task(run, lambda: None))
    assert made.wait(SOON) and seen[0].exc_type is RuntimeError
