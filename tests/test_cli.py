"""The command line, as a user meets it: each test is a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox.cli import demo, main, models, output
from sandbox.cli.doctor import budget_of, judge
from sandbox.cli.policy import as_toml
from sandbox.cli.run import split
from sandbox.limits import Confinement
from sandbox.memory import Free
from sandbox.policy import load, parse, shipped
from sandbox.report import Stats
from sandbox.results import Enforcement, Mechanism, State

BAD_POLICY = "[limits]\nwall_seconds = -1\n"
COMPILES = """\
import torch

@torch.compile
def scaled(x):
    return x * {factor} + 1

rows = torch.randn(7)
assert torch.allclose(scaled(rows), rows * {factor} + 1)
"""


def call(
    *words: str, cwd: Path, text: str | None = None, variables: dict[str, str] | None = None, seconds: float = 110
) -> subprocess.CompletedProcess[str]:
    """Run `python -m sandbox` in a folder of its own, with empty caches."""
    (cwd / "tmp").mkdir(exist_ok=True)
    package = str(Path(__file__).parents[1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("TORCH_COMPILE_SANDBOX")},
        "PYTHONPATH": package,
        "TMPDIR": str(cwd / "tmp"),
        "TORCHINDUCTOR_CACHE_DIR": str(cwd / "cache"),
        **(variables or {}),
    }
    return subprocess.run(
        [sys.executable, "-m", "sandbox", *words],
        cwd=cwd, env=environment, input=text, capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


def script(folder: Path, text: str, name: str = "script.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# Help and bad input.


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["demo"],
        ["run"],
        ["doctor"],
        ["policy"],
        ["policy", "show"],
        ["bench"],
        ["quarantine"],
        ["quarantine", "clear"],
        ["replay"],
    ],
)
def test_help_is_quick_and_needs_no_torch(command: list[str], tmp_path: Path) -> None:
    script(tmp_path, "raise RuntimeError('torch was imported')", "torch.py")
    started = time.monotonic()
    done = call(*command, "--help", cwd=tmp_path, variables={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"})
    assert done.returncode == 0, done.stderr
    assert "usage: sandbox" in done.stdout
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["bogus"], "'bogus'"),
        (["demo", "--policy", "nope"], "no policy 'nope'"),
        (["doctor", "--policy", "nope"], "no policy 'nope'"),
        (["bench", "--policy", "nope"], "no policy 'nope'"),
        (["bench", "--repeats", "0"], "--repeats 0"),
        (["demo", "--only", "resnet"], "'resnet'"),
        (["demo", "--mode", "fast"], "no compile mode 'fast'"),
        (["run", "--mode", "fast", "--", "x.py"], "no compile mode 'fast'"),
        (["run"], "which program?"),
        (["run", "--", "absent.py"], "absent.py: no such file"),
        (["run", "-m", "absent_module"], "absent_module"),
        (["run", "--report", "absent/r.json", "--", "script.py"], "--report"),
        (["policy", "show", "nope"], "no policy 'nope'"),
    ],
)
def test_bad_input_is_one_readable_line(words: list[str], told: str, tmp_path: Path) -> None:
    script(tmp_path, "print('ran')")
    done = call(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("sandbox: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert told in done.stderr


def test_a_bad_policy_file_is_refused_before_anything_starts(tmp_path: Path) -> None:
    script(tmp_path, "print('ran')")
    (tmp_path / "bad.toml").write_text(BAD_POLICY)
    for words in (["run", "--policy", "bad.toml", "--", "script.py"], ["demo", "--policy", "bad.toml"]):
        done = call(*words, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("sandbox: error: bad.toml: limits.wall_seconds = -1")
        assert "Traceback" not in done.stderr


def test_modes_and_names_are_those_of_the_library() -> None:
    from sandbox.inductor.scheme import MODES

    assert sorted(MODES) == sorted(output.MODES)
    assert sorted(demo.NAMES) == sorted([model.name for model in models.MODELS] + ["triton"])


# policy


def test_policy_list_names_all(tmp_path: Path) -> None:
    done = call("policy", "list", "--json", cwd=tmp_path)
    assert [entry["name"] for entry in json.loads(done.stdout)] == shipped()
    assert all(name in call("policy", "list", cwd=tmp_path).stdout for name in shipped())


@pytest.mark.parametrize("name", shipped())
def test_what_show_prints_is_the_policy(name: str) -> None:
    policy = load(name)
    assert parse(as_toml(policy), name=name) == policy


def test_policy_validate_tells_each_fault(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text(as_toml(load("default")))
    (tmp_path / "bad.toml").write_text(BAD_POLICY + "wall = 3\n")
    done = call("policy", "validate", "good.toml", "bad.toml", "absent.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "good.toml: ok" in done.stdout
    assert "bad.toml: limits.wall_seconds = -1" in done.stdout
    assert "bad.toml: limits.wall = 3" in done.stdout
    assert "absent.toml" in done.stdout
    assert call("policy", "validate", "good.toml", cwd=tmp_path).returncode == 0


def test_policy_schema_is_json(tmp_path: Path) -> None:
    assert json.loads(call("policy", "schema", cwd=tmp_path).stdout)["title"] == "Policy"


# doctor


def test_doctor_shows_what_a_child_was_confined_by(tmp_path: Path) -> None:
    done = call("doctor", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1), done.stderr
    assert report["child"]["status"] == "ok"
    assert set(report["enforcement"]) == set(Confinement().demands())
    assert report["host"]["torch"] and report["host"]["private_names_of_torch"] == "all found"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_doctor_tells_the_memory_budget() -> None:
    class Made:
        def __init__(self, *bounds: Free) -> None:
            self._bounds = list(bounds)

        def bounds(self) -> list[Free]:
            return self._bounds

    policy = load("production")  # 4 jobs of 4 GiB, 512 MiB reserved
    host = Free(24 << 30, "the host")
    found = budget_of(policy, Made(host))
    assert (found["jobs_that_fit"], found["job_bytes"], found["problem"]) == (4, 4 << 30, "")
    found = budget_of(policy, Made(host, Free(9 << 30, "the cgroup /pod")))
    assert (found["jobs_that_fit"], found["free_bytes"], found["bound"]) == (3, 9 << 30, "the cgroup /pod")
    found = budget_of(policy, Made(host, Free(3 << 30, "the cgroup /pod")))
    assert (found["jobs_that_fit"], found["job_bytes"]) == (1, 5 << 29)
    found = budget_of(policy, Made(host, Free(900 << 20, "the cgroup /pod")))
    assert found["jobs_that_fit"] == 0
    assert "the cgroup /pod has 943718400 free" in found["problem"] and "536870912" in found["problem"]
    assert budget_of(policy, Made())["jobs_that_fit"] == 4


def test_doctor_says_one_sentence_for_each_missing_mechanism() -> None:
    confinement = Confinement(network_namespace="require")
    found = {name: Mechanism(state=State.ENFORCED) for name in Confinement().demands()}
    assert judge(confinement, Enforcement(mechanisms=found)) == ([], [])
    found["network_namespace"] = Mechanism(state=State.UNAVAILABLE, reason="EPERM")
    found["watchdog"] = Mechanism(state=State.PARTIAL, reason="no smaps_rollup")
    found["ipc_namespace"] = Mechanism(state=State.UNAVAILABLE)
    del found["rlimits"]
    missing, partial = judge(confinement, Enforcement(mechanisms=found))
    assert len(missing) == 2 and "rlimits" in missing[0] and "EPERM" in missing[1]
    assert len(partial) == 2 and "no smaps_rollup" in partial[0] and "prefers ipc_namespace" in partial[1]


# run


@pytest.mark.parametrize(
    ("words", "ours", "program"),
    [
        (["--policy", "p", "--", "a.py", "--", "-x"], ["--policy", "p"], ["a.py", "--", "-x"]),
        (["a.py", "--policy", "p"], [], ["a.py", "--policy", "p"]),
        (["--report", "r", "-m", "x", "-m"], ["--report", "r"], ["-m", "x", "-m"]),
        (["--mode=normal", "-"], ["--mode=normal"], ["-"]),
        (["--help"], ["--help"], []),
    ],
)
def test_the_programs_arguments_are_its_own(words: list[str], ours: list[str], program: list[str]) -> None:
    assert split(words) == (ours, program)


def test_a_script_finds_itself_as_without_us(tmp_path: Path) -> None:
    folder = tmp_path / "code"
    folder.mkdir()
    script(folder, "VALUE = 3", "neighbour.py")
    text = (
        "import atexit, json, os, sys, threading, neighbour\n"
        "import __main__\n"
        "print(json.dumps([__name__, __file__, sys.argv, sys.path[0], neighbour.VALUE, __main__.neighbour.VALUE,\n"
        "    __package__, __spec__ is None, 'torch' in sys.modules]))\n"
        "sys.stdout.flush()\n"
        "atexit.register(lambda: print(__main__.neighbour.VALUE))\n"
        "threading.Timer(0.2, lambda: print(__main__.neighbour.VALUE + 1)).start()\n"
        "sys.exit(7)\n"
    )
    script(folder, text)
    done = call("run", "--", "code/script.py", "a", "--", "--policy", cwd=tmp_path)
    plain = subprocess.run(
        [sys.executable, "code/script.py", "a", "--", "--policy"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (7, plain.stdout) == (plain.returncode, plain.stdout)
    assert json.loads(done.stdout.splitlines()[0])[:3] == [
        "__main__", str(folder / "script.py"), ["code/script.py", "a", "--", "--policy"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return 1 / 0\nf()\n",
        "def f(:\n",
        "try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('b') from e\n",
        "import sys\nsys.exit('last words')\n",
        "import sys\nsys.exit(3)\n",
        "raise SystemExit\n",
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(5)\n",
        "from sandbox.errors import PolicyError\nraise PolicyError('of the script')\n",
    ],
)
def test_exit_and_traceback_are_those_of_plain_python(text: str, tmp_path: Path) -> None:
    script(tmp_path, text)
    done = call("run", "script.py", cwd=tmp_path)
    plain = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == plain.returncode
    ours = [line for line in done.stderr.splitlines() if not line.startswith("sandbox: ")]
    assert ours == plain.stderr.splitlines()


def test_a_program_from_stdin_and_a_module(tmp_path: Path) -> None:
    text = "import sys\nprint(__name__, sys.argv, repr(sys.path[0]))\nsys.exit(5)\n"
    done = call("run", "--", "-", "x", cwd=tmp_path, text=text)
    assert (done.returncode, done.stdout) == (5, "__main__ ['-', 'x'] ''\n")
    (tmp_path / "package").mkdir()
    script(tmp_path / "package", "", "__init__.py")
    file = script(tmp_path / "package", "import sys\nprint(__name__, __package__, sys.argv)\n", "__main__.py")
    done = call("run", "-m", "package", "--flag", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"__main__ package ['{file}', '--flag']\n")
    done = call("run", "package", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "__main__  ['package']\n")


def test_variables_set_before_torch_is_imported_count(tmp_path: Path) -> None:
    script(tmp_path, "import os\nos.environ['OMP_NUM_THREADS'] = '1'\nimport torch\nprint(torch.get_num_threads())\n")
    done = call("run", "--mode", "normal", "script.py", cwd=tmp_path, variables={"OMP_NUM_THREADS": "2"})
    assert done.stdout == "1\n", done.stderr


def test_the_report_tells_every_graph_also_after_an_exception(tmp_path: Path) -> None:
    # Without a `__main__` guard, and by policy and mode from the environment.
    script(tmp_path, COMPILES.format(factor=3) + "import os\nos.chdir('/')\nprint('ran')\nraise KeyError('late')\n")
    done = call(
        "run", "--report", "r.json", "script.py", cwd=tmp_path, variables={"TORCH_COMPILE_SANDBOX": "production"}
    )
    assert (done.returncode, done.stdout) == (1, "ran\n"), done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "r.json").read_text())
    assert report["policy"] == "production" and report["mode"] == "subprocess" and report["finished"]
    assert (report["graphs"], report["in_child"], report["in_process"], report["eager"]) == (1, 1, 0, 0)
    assert report["outcomes"] == {"ok": 1} and report["children_started"] == 1
    assert report["leaks"] == report["fallbacks"] == report["in_process_reasons"] == {}
    assert report["forkserver_restarts"] == 0 and set(report["enforcement"]) == set(Confinement().demands())
    assert "KeyError: 'late'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("sandbox: 1 graph")
    assert sorted(path.name for path in tmp_path.glob("*r.json*")) == ["r.json"]
    # Kernels are in the user's cache, and nothing of ours is left.
    assert list((tmp_path / "cache").rglob("*.so"))
    assert not list((tmp_path / "tmp").glob("sandbox-*"))


def test_the_report_survives_a_program_that_is_killed(tmp_path: Path) -> None:
    text = COMPILES.format(factor=5) + "import os, signal, time\ntime.sleep(5)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    script(tmp_path, text)
    done = call("run", "--mode", "normal", "--report", "r.json", "script.py", cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["graphs"], report["in_process"], report["finished"]) == (1, 1, False)
    assert report["in_process_reasons"] == {"mode_normal": 1}


# demo


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_demo_of_one_model_and_the_triton_kernel(tmp_path: Path) -> None:
    done = call("demo", "--json", "--only", "cond", "--only", "triton", cwd=tmp_path, seconds=280)
    report = json.loads(done.stdout)
    assert done.returncode == 0, (report["problems"], done.stderr)
    assert report["graphs"] == report["in_child"] == 3 and report["in_process"] == report["eager"] == 0
    assert report["leaks"] == {} and report["forkserver_restarts"] == 0
    assert [(entry["model"], entry["phase"]) for entry in report["results"]] == [
        ("cond", "inference"), ("cond", "training"), ("triton", "to cubin"),
    ]  # fmt: skip
    assert all(entry["equal"] and entry["children"] for entry in report["results"])
    assert len(report["jobs"]) == report["children_started"] == 4


def test_demo_fails_for_whatever_is_not_as_it_must_be() -> None:
    fine = demo.Outcome("conv", "training", equal=True, children=1)
    stats = Stats(mode="subprocess", graphs=1, in_child=1)
    assert demo.judge([fine], stats) == []
    assert demo.judge([demo.Outcome("conv", "training", equal=True, cache_hits=2)], Stats(mode="subprocess")) == []
    assert "differs" in demo.judge([demo.Outcome("conv", "training", children=1)], stats)[0]
    assert "nothing was compiled" in demo.judge([demo.Outcome("conv", "training", equal=True)], stats)[0]
    assert "boom" in demo.judge([demo.Outcome("conv", "training", error="boom")], stats)[0]
    assert "only 0" in demo.judge([fine], Stats(mode="subprocess", graphs=1, in_process=1))[0]
    assert "1 fd" in demo.judge([fine], stats.model_copy(update={"leaks": {"fd": 1}}))[0]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    output.write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        output.write_whole(path, "\udc80")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_doctor_without_a_temporary_folder_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc/self"])  # nobody can make a file there
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(SystemExit) as caught:
        main(["doctor"])
    assert caught.value.code == 2
    assert "set TMPDIR" in capsys.readouterr().err
