"""The serving example, really served: over loopback, while its compiles are broken."""

from __future__ import annotations

import sys
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
