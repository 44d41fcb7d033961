"""The index of built kernels in the user's cache: used only when all that it names is there and fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sandbox.inductor import cached

KEY = "cabcdefghijklmnopqrstuvwxyz"
TABLE = {"identity": {"key": "c0123456789", "path": "ab/cabc.so"}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "cabc.so").write_text("a library")
    return tmp_path


def index(cache: Path) -> Path:
    (found,) = (cache / KEY[1:3]).glob("*.kernels.json")
    return found


def test_it_is_found_again(cache: Path) -> None:
    assert cached.remembered(KEY) is None
    cached.remember(KEY, TABLE)
    assert cached.remembered(KEY) == TABLE


def test_it_is_not_used_when_a_library_is_gone(cache: Path) -> None:
    cached.remember(KEY, TABLE)
    (cache / "ab" / "cabc.so").unlink()
    assert cached.remembered(KEY) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"x": 1}', '{"x": {"key": "k", "path": "../../../etc/x.so"}}', "\x00"]
)
def test_it_is_not_used_when_it_is_malformed(cache: Path, text: str) -> None:
    cached.remember(KEY, TABLE)
    index(cache).write_text(text)
    assert cached.remembered(KEY) is None


def test_other_flags_and_other_processors_have_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.remember(KEY, TABLE)
    with torch._inductor.config.patch({"cpp.enable_unsafe_math_opt_flag": True}):
        assert cached.remembered(KEY) is None
    monkeypatch.setattr(cached, "_processor", lambda: "another one")
    assert cached.remembered(KEY) is None
    assert json.loads(index(cache).read_text()) == TABLE
