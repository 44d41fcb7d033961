"""The index of built kernels in the user's cache: used only when all that it names is there and fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sandbox.inductor import cached, compat, kernels

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
    cached.remember(KEY, TABLE)
    assert cached.remembered(KEY) == TABLE


def test_other_flags_and_other_processors_have_their_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached.remember(KEY, TABLE)
    with torch._inductor.config.patch({"cpp.enable_unsafe_math_opt_flag": True}):
        assert cached.remembered(KEY) is None
    monkeypatch.setattr(cached, "_processor", lambda: "another one")
    assert cached.remembered(KEY) is None
    assert json.loads(index(cache).read_text()) == TABLE


def test_what_an_entry_carries_arrives_on_another_machine(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.remember(KEY, TABLE)
    carried = cached.packed(KEY)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    assert cached.packed(KEY) is None
    assert cached.unpacked(KEY, carried) == cached.remembered(KEY) == TABLE
    assert (tmp_path / "other" / "ab" / "cabc.so").read_text() == "a library"


def without(carried: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**carried, **changes}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda carried: None,
        lambda carried: without(carried, made_for="another processor"),
        lambda carried: without(carried, libraries={}),
        lambda carried: without(carried, libraries={"ab/cabc.so": carried["libraries"]["ab/cabc.so"][:-2]}),
        lambda carried: without(carried, libraries={"ab/cabc.so": 7}),
        lambda carried: without(carried, table={"identity": {"key": "c0123456789", "path": "../cabc.so"}}),
        lambda carried: without(carried, table={1: 2}),
        lambda carried: {"made_for": carried["made_for"]},
    ],
)
def test_what_an_entry_carries_is_checked(
    spoil: Callable[[dict[str, Any]], Any], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.remember(KEY, TABLE)
    carried = cached.packed(KEY)
    assert carried is not None
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "other"))
    assert cached.unpacked(KEY, spoil(carried)) is None
    assert not list((tmp_path / "other").rglob("*.json")) and not list(tmp_path.glob("*.so"))


def test_a_thread_that_loads_later_loads_from_where_the_kernels_went(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `force_disable_caches` the cache of a compile is another one than that of the process afterwards."""
    loaded: list[str] = []
    monkeypatch.setattr(compat.CppCodeCache, "_load_library", lambda path, key: loaded.append(path))
    name = kernels._identity(compat.CppCodeCache, "code", "cpu", (), None)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for _ in range(2):
        with kernels.loading({name: TABLE["identity"]}):
            compat.CppCodeCache.load_async("code")()
            with kernels.kept_in(elsewhere):
                compat.CppCodeCache.load_async("code")()
    kernels.remove_loader()
    assert loaded == [str(folder / "ab" / "cabc.so") for folder in (cache, elsewhere)] * 2
