"""`sandbox bench`: its plan, its arithmetic, what makes it fail, and what it writes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sandbox.cli import bench, main
from sandbox.cli.bench import MEASURES, costs, plan, summary
from sandbox.cli.bench.summary import BARS, NORMAL, SCHEMES, Answer, summarise
from sandbox.policy import ForkserverSettings, Policy, load


def run(round_: int, *samples: tuple[str, str, str, str, list[float]]) -> dict[str, Any]:
    """A run's document with these samples: measure, cache, scheme, figure, values."""
    answer = Answer("any")
    for measure, cache, scheme, figure, values in samples:
        answer.add(measure, cache, figure, values, scheme=scheme)
    return {"name": "a run", "round": round_, "load": 0.0, **dataclasses.asdict(answer)}


def answered(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]) -> list[dict[str, Any]]:
    """Let every measurement answer at once, with ``change`` in its document; returns the tasks as they come."""
    tasks: list[dict[str, Any]] = []

    def run_one(task: dict[str, Any], folder: Path) -> dict[str, Any]:
        tasks.append(task)
        scheme = task.get("scheme", "fresh")
        seconds = {NORMAL: 10.0, "subprocess": 2.0}.get(scheme, 8.0)
        measured = [
            (name, task.get("caches", [""])[0], scheme, "seconds", [seconds]) for name in task.get("measures", ())
        ]
        return {**run(task["round"], *measured), **change}

    monkeypatch.setattr(bench, "run_one", run_one)
    return tasks


def test_a_round_has_every_measure_and_scheme_once_in_an_order_of_its_own() -> None:
    tasks = plan(MEASURES, SCHEMES, ("off", "on"), 3, 7, "default")
    blocks = [[(task["kind"], task.get("scheme")) for task in tasks if task["round"] == each] for each in range(3)]
    wanted = {("compiles", scheme) for scheme in SCHEMES} | {("jobs", None), ("crash", None)}
    assert set(blocks[0]) - {("async", None)} == wanted | {("idle", None)}
    assert set(blocks[1]) == set(blocks[2]) == set(blocks[0]) - {("idle", None)}
    assert all(len(set(block)) == len(block) for block in blocks)
    assert blocks[1] != blocks[2]
    assert tasks == plan(MEASURES, SCHEMES, ("off", "on"), 3, 7, "default")
    assert tasks != plan(MEASURES, SCHEMES, ("off", "on"), 3, 8, "default")


def test_medians_are_of_all_samples_and_ratios_of_medians_and_by_round() -> None:
    key = ("steady", "off")
    rows = summarise([
        run(0, (*key, NORMAL, "seconds", [1.0]), (*key, "subprocess", "seconds", [1.5])),
        run(1, (*key, NORMAL, "seconds", [2.0]), (*key, "subprocess", "seconds", [2.0])),
        {"name": "a failure", "round": 2, "load": 0.0, "error": "no answer"},
    ])  # fmt: skip
    normal, ours = sorted(rows, key=summary.order)
    assert (normal["scheme"], ours["scheme"]) == (NORMAL, "subprocess")
    assert ours["of_normal"] == pytest.approx(1.75 / 1.5)
    assert ours["by_round"] == [1.0, 1.5]
    assert (ours["min"], ours["median"], ours["max"], ours["samples"]) == (1.5, 1.75, 2.0, 2)
    [bar] = ours["bars"]
    assert (bar["of"], bar["met"]) == (NORMAL, False)  # 1.17 of at most 1.15


@pytest.mark.parametrize("bar", BARS, ids=lambda bar: f"{bar.measure}-{bar.scheme}-{bar.of}")
def test_a_bar_is_met_up_to_its_limit_and_not_beyond(bar: summary.Bar) -> None:
    def met(value: float) -> Any:
        samples = [(bar.measure, bar.cache, bar.scheme, bar.figure, [value])]
        samples += [(bar.measure, bar.cache, bar.of, bar.figure, [1.0])] if bar.of else []
        rows = [row for row in summarise([run(0, *samples)]) if row["scheme"] == bar.scheme]
        [judged] = [each for each in rows[0]["bars"] if each["of"] == bar.of]
        return judged["met"]

    over, under = bar.limit * 1.01 + 0.1, bar.limit * 0.99 - 0.1
    assert met(bar.limit) is True
    assert (met(over), met(under)) == ((True, False) if bar.at_least else (False, True))


def test_a_bar_without_its_base_is_neither_met_nor_missed() -> None:
    [row] = summarise([run(0, ("first", "off", "subprocess", "seconds", [1.0]))])
    assert row["bars"][0]["met"] is None
    assert "nothing to compare with" in summary.words(row["bars"][0])


def test_it_writes_json_and_a_plot_and_says_each_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = answered(monkeypatch, {})
    out = tmp_path / "bench.json"
    assert main(["bench", "--measure", "first", "--repeats", "2", "--out", str(out)]) == 0
    assert len(tasks) == 2 * len(SCHEMES)
    document = json.loads(out.read_text())
    [row] = [row for row in document["summary"] if row["scheme"] == "subprocess"]
    assert row["of_normal"] == 0.2 and row["bars"][0]["met"] is True
    picture = ElementTree.parse(tmp_path / "bench.svg").getroot()
    told = {each.text for each in picture.iter("{http://www.w3.org/2000/svg}text")}
    assert {NORMAL, "subprocess", "first, caches off, seconds", "2 (0.20 of NORMAL)"} <= told
    bars = [each for each in picture.iter("{http://www.w3.org/2000/svg}rect") if each.get("fill") != "white"]
    assert len(bars) == len(SCHEMES)
    assert "at most 0.6 of inductor-normal: 0.20, met" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"problems": ["first: the result of graph 0 differs from eager"]}, {"error": "exit status 1: boom"}]
)
def test_a_wrong_result_or_a_failed_measurement_fails_it(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(monkeypatch, change)
    assert main(["bench", "--measure", "jobs", "--repeats", "1", "--json"]) == 1
    told = capsys.readouterr()
    assert json.loads(told.out)["ok"] is False
    assert "differs from eager" in told.err or "boom" in told.err


def test_a_speed_that_misses_its_bar_does_not_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    answered(monkeypatch, {"samples": run(0, ("jobs", "", "fresh", "ms", [1e6]))["samples"]})
    assert main(["bench", "--measure", "jobs", "--repeats", "1", "--json"]) == 0


def test_a_worker_that_fails_is_told_with_its_words(tmp_path: Path) -> None:
    told = bench.run_one({"kind": "no such kind", "round": 0, "policy": "default", "seed": 0}, tmp_path)
    assert "KeyError" in told["error"] and bench.problems(told) == [told["error"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measure", "first,nothing"], "--measure nothing: allowed are first, steady"),
        (["--mode", "subproces"], "--mode subproces: allowed are inductor-normal"),
        (["--measure", ","], "--measure: names none"),
        (["--cache", "hits"], "--cache hits: allowed are off, on"),
    ],
)
def test_a_wrong_choice_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_result_that_is_off_is_seen() -> None:
    """The comparison itself, with real tensors: a graph whose compiler gives a little too much."""
    import torch

    from sandbox.cli.bench.graphs import STEADY

    def wrong(gm: Any, _inputs: Any) -> Any:
        return lambda *inputs: tuple(value * 1.01 for value in gm(*inputs))

    torch.manual_seed(0)
    graph = STEADY[0]
    function, inputs = graph.make(0)
    expected = graph.call(function, inputs)
    for backend, problems in (("eager", 0), (wrong, 1)):
        answer = Answer("any")
        torch.compiler.reset()
        answer.check("steady", [(graph.call(torch.compile(function, backend=backend), inputs), expected)])
        assert len(answer.problems) == problems


def test_variants_of_a_graph_differ_and_a_seed_decides_their_values() -> None:
    import torch

    from sandbox.cli.bench.graphs import FIRST, STEADY

    for graph in (*STEADY, FIRST):
        shapes = {tuple(tuple(value.shape) for value in graph.make(variant)[1]) for variant in range(3)}
        assert len(shapes) == 3, graph.name
    torch.manual_seed(1)
    one = FIRST.make(0)[1][0]
    torch.manual_seed(1)
    assert torch.equal(one, FIRST.make(0)[1][0])


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Policy:
    """A policy whose forkserver starts at once, and measures that take no longer than they must."""
    for name, value in {
        "JOBS": 3,
        "UNMEASURED": 1,
        "PAUSE_SECONDS": 0.0,
        "IDLE_SECONDS": 0.2,
        "REST_SECONDS": 0.2,
    }.items():
        monkeypatch.setattr(costs, name, value)
    return load("default").model_copy(update={"forkserver": ForkserverSettings(import_torch=False)})


def test_jobs_are_real_ones_of_each_kind(light: Policy) -> None:
    answer = costs.jobs({"policy": light, "seed": 0})
    assert answer.problems == []
    kinds = ["fresh", "standby"] if costs._standby(light) else ["fresh"]
    assert [(each["scheme"], len(each["values"])) for each in answer.samples] == [(kind, 3) for kind in kinds]
    assert all(value > 0 for each in answer.samples for value in each["values"])


def test_an_empty_job_that_does_not_come_back_as_it_must_is_a_problem(
    light: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "nothing", lambda: 1 / 0)
    problems = costs.jobs({"policy": light, "seed": 0}).problems
    assert problems and all("an empty job ended compile_error" in problem for problem in problems)


def test_idle_tells_memory_and_wake_ups_of_all_processes(light: Policy) -> None:
    answer = costs.idle({"policy": light})
    assert answer.problems == []
    told = {each["figure"]: each for each in answer.samples}
    assert told["wake-ups per second"]["values"][0] >= 0
    memory = told["MiB of memory, proportional"]
    assert memory["values"][0] > 1 and memory["notes"]["processes"] == len(
        answer.facts["MiB, proportional, by process"]
    )


def test_a_thread_that_wakes_is_counted() -> None:
    go, done, stop = threading.Event(), threading.Event(), threading.Event()

    def wake() -> None:
        go.wait()
        done.set()
        stop.wait()

    thread = threading.Thread(target=wake)
    thread.start()
    own, measuring = ((os.getpid(), native) for native in (thread.native_id, threading.get_native_id()))
    before = costs._switches([])
    go.set()
    assert done.wait(10)
    end = time.monotonic() + 10
    while (after := costs._switches([]))[own] <= before[own] and time.monotonic() < end:
        pass  # it may not sleep again yet
    stop.set()
    thread.join()
    assert after[own] > before[own]
    assert measuring not in after


def test_the_corpus_keeps_its_option() -> None:
    parser = argparse.ArgumentParser()
    bench.add(parser.add_subparsers())
    given = parser.parse_args(["bench", "--corpus", "--help"])
    assert given.rest == ["--help"]
