"""The corpus runner: its bookkeeping with a worker that only pretends, then a few real entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.corpus import __main__ as runner
from benchmarks.corpus import compare
from benchmarks.corpus.records import Records
from benchmarks.corpus.summary import judge, summarise
from sandbox.cli import bench_corpus
from sandbox.errors import SandboxError
from tests.corpus_fake import NAMES

ROOT = Path(__file__).parents[1]
FAKE = ["--worker", "tests.corpus_fake"]


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_each_way_an_entry_can_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A worker that crashes or hangs costs its entry and no other; what is not as claimed is told by name."""
    children = len(psutil.Process().children(recursive=True))
    assert runner.main([*FAKE, "--out", str(tmp_path), "--jobs", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdicts"] == {"ok": 2, "normal failed": 2, "not in child": 1, "differs": 1, "failed": 1}
    told = {each["name"]: (each["verdict"], each["reason"]) for each in found["exceptions"]}
    assert told["crash/sandbox"] == ("failed", told["crash/sandbox"][1])
    assert "SIGSEGV" in told["crash/sandbox"][1]
    assert "about to hang" in told["hang/normal"][1]
    assert told["differs/always"] == ("differs", "1 of 4 bytes differ")
    assert told["lost/graph"] == ("not in child", "0 of 1 graphs in a child; 1 uncompiled")
    assert found["graphs"] == {"normal": 5, "in_child": 3}
    assert found["ratio"]["first"] == 2.0
    record = next(line for line in _lines(tmp_path) if line["name"] == "differs/always")
    assert record["normal_repeats"] and record["sandbox_repeats"]
    assert len(psutil.Process().children(recursive=True)) == children


def test_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines on disk are not run again, a torn one is; `--again bad` runs what was bad."""
    first = ["--out", str(tmp_path), "--only", "plain/*", "--only", "lost/*", *FAKE]
    runner.main([*first, "--limit", "2"])
    file = next(tmp_path.glob("*.jsonl"))
    file.write_bytes(file.read_bytes() + b'{"name": "plain/')
    before = file.read_bytes()
    runner.main(first)
    assert file.read_bytes().startswith(before + b"\n")
    names = [record["name"] for record in Records(tmp_path, cache=False).known().values()]
    assert sorted(names) == ["lost/graph", "plain/a", "plain/b"]
    known = len(file.read_bytes().splitlines())
    assert runner.main([*first, "--again", "bad"]) == 1
    assert len(file.read_bytes().splitlines()) == known + 1
    capsys.readouterr()
    assert runner.main([*first, "--summary"]) == 1
    assert "not in child: lost/graph" in capsys.readouterr().out


def test_a_worker_that_never_starts_is_no_entry_s_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main([*FAKE, "--out", str(tmp_path), "--catalogue", "broken"]) == 2
    assert "no such catalogue" in capsys.readouterr().err
    assert _lines(tmp_path) == []


def test_shards_cover_everything_once() -> None:
    seen: list[str] = []
    for index in range(3):
        given = runner.parser().parse_args(["--out", "x", "--shard", f"{index}/3"])
        seen += runner.choose(NAMES, {}, given)
    assert sorted(seen) == sorted(NAMES)
    with pytest.raises(SystemExit):
        runner.parser().parse_args(["--out", "x", "--shard", "3/3"])


def test_verdicts() -> None:
    normal = {"state": "ok", "seconds": 1.0, "graphs": 2}
    ours = {"state": "ok", "seconds": 1.0, "graphs": 2, "in_child": 2}
    assert judge({"normal": normal, "sandbox": ours})[0] == "ok"
    assert judge({"normal": {**normal, "graphs": 0}, "sandbox": {**ours, "in_child": 0}})[0] == "no graph"
    lost = {**ours, "in_child": 1, "in_process": 1, "in_process_reasons": {"unserializable: config": 1}}
    assert judge({"normal": normal, "sandbox": lost}) == (
        "not in child",
        "1 of 2 graphs in a child; 1 x unserializable: config",
    )
    assert judge({"normal": normal, "sandbox": lost}, "an AOTInductor package")[0] == "allowed"
    raised = {"state": "raised", "error": "ValueError: no", "graphs": 0}
    assert judge({"normal": raised, "sandbox": raised})[0] == "normal failed"
    assert judge({"normal": normal, "sandbox": raised})[0] == "failed"
    assert judge({"normal": raised, "sandbox": {"state": "crashed", "error": "SIGSEGV"}})[0] == "failed"
    unequal = {"normal": normal, "sandbox": ours, "difference": "x"}
    assert judge({**unequal, "normal_repeats": True, "sandbox_repeats": True})[0] == "differs"
    assert judge({**unequal, "normal_repeats": False, "sandbox_repeats": True})[0] == "nondeterministic"
    assert judge({**unequal, "sandbox": lost, "normal_repeats": False})[0] == "not in child"
    assert summarise([]) == {
        "entries": 0, "verdicts": {}, "graphs": {}, "seconds": {}, "ratio": {}, "exceptions": [],
    }  # fmt: skip


def test_what_counts_as_equal() -> None:
    """Every bit, stride and type; any NaN equals any other."""
    nan = torch.tensor([float("nan"), 1.0])
    other_nan = torch.tensor([0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    keep, differ = compare.keep, compare.difference
    assert differ(keep(nan, "r"), keep(other_nan, "r")) == ""
    one = keep({"a": torch.ones(2, 3), "b": [1, float("nan"), None]}, "r")
    assert differ(one, keep({"a": torch.ones(2, 3), "b": [1, float("nan"), None]}, "r")) == ""
    assert "against" in differ(one, keep({"a": torch.ones(3, 2).t(), "b": [1, float("nan"), None]}, "r"))
    assert "1 against 2" in differ(one, keep({"a": torch.ones(2, 3), "b": [2, float("nan"), None]}, "r"))
    near = torch.tensor([1.0, torch.finfo(torch.float32).eps + 1.0])
    assert "at most 1.19e-07" in differ(keep(near, "r"), keep(torch.ones(2), "r"))
    assert differ(keep(near, "r"), keep(torch.ones(2), "r"), (1e-5, 0.0)) == ""
    assert differ(keep(torch.zeros(2), "r"), keep(-torch.zeros(2), "r")) != ""
    complex_ = torch.tensor([1 + 2j, complex("nan")])
    assert differ(keep(complex_, "r"), keep(complex_.clone(), "r")) == ""


def test_without_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="use a checkout"):
        bench_corpus.run(["--help"], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_entries(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both schemes, real children: operators, a module and models, forward and backward; and the command's door."""
    chosen = [
        "op/argmax/uint8/*",
        "op/log/float32/training",
        "op/mul/int64/*",
        "module/nn.GLU/inference-dynamic",
    ]
    only = [word for name in (*chosen, "model/lennard-jones/inference") for word in ("--only", name)]
    code = bench_corpus.run(["--out", str(tmp_path), *only])
    told = capfd.readouterr()
    assert code == 0, told.out + told.err
    found = json.loads((tmp_path / "summary-off.json").read_text())
    assert found["verdicts"] == {"ok": found["entries"]}
    assert found["graphs"]["in_child"] == found["graphs"]["normal"] >= 5
