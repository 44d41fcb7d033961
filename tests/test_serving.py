"""The serving example, really served: over loopback, while its compiles are broken."""

from __future__ import annotations

import socket
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "serving"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("starlette", reason="the extra `serving` is not installed")
    pytest.importorskip("uvicorn", reason="the extra `serving` is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("load", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import load

    return load


def test_an_answer_that_is_not_right_is_seen(load: ModuleType) -> None:
    import torch

    scores = torch.tensor([0.1, 0.9])
    right = b'{"scores": [0.1, 0.9], "compiled": true}'
    assert load.differs(right, scores) == ""
    for body in (b"", b"[]", b'{"scores": null, "compiled": true}', b'{"scores": [0.1, 0.9]}',
                 right.replace(b"0.9]", b"NaN]"), right.replace(b"0.9]", b"0.901]"),
                 right.replace(b"0.1, ", b""), right.replace(b"[0.1, 0.9]", b"0.1")):  # fmt: skip
        assert load.differs(body, scores), body


def test_the_load_ends_when_the_server_has_died(load: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would wait for children that nobody starts any more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(load._Run, "wait_warm", lambda self: None)
    monkeypatch.setattr(load._Run, "get", lambda self, path: (_ for _ in ()).throw(ConnectionRefusedError()))
    outcome = load.Outcome(False)
    run = load._Run(port, None, outcome, load.Load(requests=20, rate=1000.0, children=5))
    run.started = 0.0
    threads = [threading.Thread(target=target, daemon=True) for target in (run.client, run.steer)]
    for thread in threads:
        thread.start()
    threads[0].join(30)
    run.done.set()
    threads[1].join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert len(outcome.problems) >= 20 and not outcome.latencies


@pytest.mark.slow
@pytest.mark.timeout(1100)
def test_every_request_is_answered_rightly_while_compiles_fail(load: ModuleType) -> None:
    outcome = load.measure(load.Load(requests=500, rate=50.0, broken=True, seed=6, children=3, kill_every=50.0))
    assert not outcome.problems, outcome.problems[:5]
    assert len(outcome.latencies) >= 500
    assert outcome.exit_status in load.STOPPED
    assert outcome.metrics["in_process"] == outcome.metrics["raised"] == 0
    # If nothing had been compiled, or nothing broken, this would have tested nothing.
    outcomes = outcome.metrics["outcomes"]
    assert outcome.compiled > 0 and outcomes.get("ok", 0) > 0, outcomes
    assert sum(outcomes.values()) > outcomes["ok"], outcomes
    assert outcome.killed > 0
