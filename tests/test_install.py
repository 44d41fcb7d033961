"""Who compiles which graph: install and the backend side by side, one after the other, and closed too early."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import sandbox  # noqa: E402
from sandbox.inductor import compat, install  # noqa: E402
from sandbox.policy import Policy  # noqa: E402
from sandbox.report import Stats  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with compat.inductor_config.patch(fx_graph_cache=False), compat.functorch_config.patch(enable_autograd_cache=False):
        yield
    sandbox.uninstall()


def policy(name: str) -> Policy:
    return Policy(name=name)


def compile_with(name: str, x: Any) -> Any:
    """A graph of its own under the backend, in this process: no forkserver is started."""
    options = {"policy": policy(name), "sandbox_mode": "normal"}
    return torch.compile(lambda x: (x * 2).sin(), backend="sandbox", options=options)(x)


def test_the_counts_of_the_backend_are_told_without_install() -> None:
    assert sandbox.stats() == Stats()
    for name in ("one", "two"):
        torch._dynamo.reset()
        compile_with(name, torch.ones(3))
    stats = sandbox.stats()
    assert (stats.graphs, stats.in_process, stats.in_process_reasons) == (2, 2, {"mode_normal": 2})
    assert (stats.policy, stats.mode) == ("one, two", "normal")
    sandbox.uninstall()
    assert sandbox.stats() == Stats()


def test_another_install_closes_what_it_replaces_but_not_what_a_backend_made() -> None:
    compile_with("backend", torch.ones(3))
    (of_backend,) = install._schemes.values()
    sandbox.install(policy("first"), mode="normal")
    first = install.installed()
    sandbox.install(policy("first"), mode="normal")
    assert install.installed() is first and first is not None and not first.closed
    sandbox.install(policy("backend"), mode="normal")
    assert install.installed() is of_backend and first.closed
    sandbox.install(policy("second"), mode="normal")
    assert not of_backend.closed
    assert {scheme.policy.name for scheme in install._schemes.values()} == {"backend", "second"}
    sandbox.uninstall()
    assert of_backend.closed


def test_a_backward_graph_whose_sandbox_was_closed_gets_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 5, requires_grad=True)
    options = {"policy": policy("backend"), "sandbox_mode": "normal"}
    out = torch.compile(lambda x: (x.sin() * 3).exp(), backend="sandbox", options=options)(x)
    (before,) = install._schemes.values()
    before.close()
    # What install() of another part of the program does in between: the backward graph is compiled when it is needed.
    sandbox.install(policy("other"), mode="normal")
    used: list[Any] = []
    original = install.Scheme.compile
    monkeypatch.setattr(install.Scheme, "compile", lambda self, *args: used.append(self) or original(self, *args))
    token = install._current.set(before)
    try:
        out.sum().backward()
        torch._dynamo.reset()
        torch.compile(lambda x: x.cos())(torch.ones(3))
    finally:
        install._current.reset(token)
    assert x.grad is not None
    assert used and all(scheme is not before and not scheme.closed for scheme in used)
    assert used[-1].policy.name == "backend"


def test_only_an_installed_sandbox_takes_inductors_workers_away(monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[str] = []
    monkeypatch.setattr(compat.async_compile, "maybe_warm_pool", lambda: warmed.append("pool"))
    compile_with("backend", torch.ones(3))
    compat.async_compile.maybe_warm_pool()
    assert warmed == ["pool"]
    sandbox.install(policy("first"), mode="normal")
    compat.async_compile.maybe_warm_pool()
    assert warmed == ["pool", "pool"], "the mode `normal` is as without a sandbox"
    sandbox.install(policy("first"), mode="subprocess")
    compat.async_compile.maybe_warm_pool()
    assert warmed == ["pool", "pool"]
    assert not compat.AsyncCompile.use_process_pool(), "whoever asks whether there are workers starts them"
    sandbox.uninstall()
    compat.async_compile.maybe_warm_pool()
    assert warmed == ["pool"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["debug_dir_root", "trace.debug_dir"])
def test_debug_files_of_a_child_lie_where_those_of_this_process_would(tmp_path: Path, setting: str) -> None:
    root = tmp_path / "debug"
    dynamo = {"debug_dir_root": str(root)} if setting == "debug_dir_root" else {}
    trace = {"trace.debug_dir": str(root)} if setting == "trace.debug_dir" else {}
    sandbox.install()
    with compat.dynamo_config.patch(dynamo), compat.inductor_config.patch({"trace.enabled": True, **trace}):
        x = torch.randn(7)
        torch.testing.assert_close(torch.compile(lambda x: x.sin() + 1)(x), x.sin() + 1)
    assert sandbox.stats().in_child == 1
    found = {path.name: path for path in root.rglob("*") if path.is_file()}
    wanted = {
        "fx_graph_readable.py",
        "fx_graph_transformed.py",
        "ir_pre_fusion.txt",
        "ir_post_fusion.txt",
        "output_code.py",
    }
    assert wanted <= set(found), sorted(found)
    assert "async_compile" in found["output_code.py"].read_text()
    assert all("torchinductor" in path.parts for path in found.values())
    assert not any(os.path.islink(path) for path in found.values())
