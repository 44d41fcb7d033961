"""Policy files: the shipped ones are complete and load; a mistake gives one readable message."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from pydantic import BaseModel, ValidationError

from sandbox.errors import PolicyError
from sandbox.limits import Confinement, Limits
from sandbox.policy import Ladder, Policy, load, parse, schema, shipped
from sandbox.results import KILLERS, Status

NAMES = ["ci", "default", "production", "strict"]
FOLDER = Path(__file__).parent.parent / "policies"


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def flat(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, dict) and prefix + name not in ("reduced", "quick"):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def uncommented(name: str) -> str:
    """The file with the defaults that it shows set: a # without a space after it."""
    return re.sub(r"(?m)^#(?=[^ \n])", "", (FOLDER / f"{name}.toml").read_text()).replace('"NAME"', f'"{name}"')


def test_these_are_shipped() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_loads_by_name_and_by_path(name: str) -> None:
    policy = load(name)
    assert policy.name == name
    assert policy.description
    assert load(FOLDER / f"{name}.toml") == policy
    assert load(policy) is policy


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_policy_shows_every_key_and_the_true_defaults(name: str) -> None:
    assert set(flat(tomllib.loads(uncommented(name)))) == set(keys(Policy)), "a key is missing in the file"
    assert parse(uncommented(name), name, name) == load(name), "a default that the file shows is not the real one"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_of_a_shipped_policy_stands_below_its_description(name: str) -> None:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"^#?[a-z_]+ = ", line) and "#[reduced]" not in lines[:number]:
            assert lines[number - 1].startswith("# ") or line.startswith("description"), line


@pytest.mark.parametrize("name", NAMES)
def test_no_shipped_policy_holds_a_word_that_weakens(name: str) -> None:
    policy = load(name)
    text = (FOLDER / f"{name}.toml").read_text()
    assert not policy.allow_in_process_after_crash
    assert not re.search(r"(?m)allow_in_process_after_crash\s*=\s*true", text)
    assert "off" not in policy.confinement.demands().values()
    for status in KILLERS:
        assert "in_process" not in policy.ladder.steps(status)
    for mechanism in ("rlimits", "no_new_privs", "watchdog", "process_tree"):
        assert getattr(policy.confinement, mechanism) == "require"


def test_what_sets_the_policies_apart() -> None:
    default, production, strict, ci = map(load, ["default", "production", "strict", "ci"])
    assert default == Policy(name="default", description=default.description)
    for policy in (production, strict, ci):
        assert not policy.allow_in_process
        assert policy.limits.wall_seconds < default.limits.wall_seconds
        assert policy.limits.memory_bytes < default.limits.memory_bytes
        for status in Status:
            assert "in_process" not in policy.ladder.steps(status)
    for status in set(Status) - {Status.OK, Status.CANCELLED}:
        assert production.ladder.steps(status)[-1] == "eager"
        assert ci.ladder.steps(status)[-1] == "raise"
    assert {name for name, demand in strict.confinement.demands().items() if demand != "require"} == {"cgroup"}
    assert strict.ladder.violation == ("raise",)
    assert strict.ladder.unserializable == ("raise",)
    assert "LD_LIBRARY_PATH" not in strict.environment


#: A mistake, and what its message has to say besides the file's name.
MISTAKES = {
    "unknown key": ("[limits]\nwal_seconds = 5", "wal_seconds = 5: there is no such key; did you mean 'wall_seconds'?"),
    "key in the wrong table": ("wall_seconds = 5", "there is no such key; did you mean 'limits.wall_seconds'?"),
    "unknown table": ("[zz]\na = 1", "zz = {'a': 1}: there is no such key; allowed: allow_faults, allow_in_process"),
    "no ladder for ok": ("[ladder]\nok = ['retry']", "ladder.ok = ['retry']: there is no such key; allowed: cancel"),
    "unit": (
        '[limits]\nmemory_bytes = "4G"',
        "limits.memory_bytes = '4G': must be a valid integer: a size is a whole number of bytes, 4294967296 for '4G'",
    ),
    "unit MiB": ('[limits]\ndisk_bytes = "1.5 MiB"', "bytes, 1572864 for '1.5 MiB'"),
    "unknown unit": ('[limits]\ndisk_bytes = "much"', "a whole number of bytes, for example 4294967296 for 4 GiB"),
    "float size": ("[limits]\nmemory_bytes = 4e9", "limits.memory_bytes = 4000000000.0: must be a valid integer"),
    "boolean size": ("[limits]\nmemory_bytes = true", "limits.memory_bytes = true: must be a valid integer"),
    "time with unit": ('[limits]\nwall_seconds = "90s"', "'90s': must be a valid number: a time is a number of"),
    "nan": ("[limits]\nwall_seconds = nan", "limits.wall_seconds = nan: must be a finite number"),
    "inf": ("[limits]\ncpu_seconds = inf", "limits.cpu_seconds = inf: must be a finite number"),
    "negative": ("[limits]\nwall_seconds = -1", "limits.wall_seconds = -1: must be greater than 0"),
    "zero": ("[limits]\nprocesses = 0", "limits.processes = 0: must be greater than or equal to 1"),
    "too large": ("[limits]\nwall_seconds = 1e9", "wall_seconds = 1000000000.0: must be less than or equal to 86400"),
    "too little memory": ("[limits]\nmemory_bytes = 100000000", "memory_bytes = 100000000: must be at least 268435456"),
    "typo of a step": (
        '[ladder]\ncrashed = ["retri"]',
        "crashed[0] = 'retri': must be 'retry', 'reduced', 'in_process', 'eager' or 'raise'; did you mean 'retry'?",
    ),
    "one step, no list": ('[ladder]\ncrashed = "retry"', "ladder.crashed = 'retry': must be a valid array"),
    "in_process after a crash": (
        '[ladder]\ncrashed = ["retry", "in_process"]',
        "ladder.crashed = ['retry', 'in_process']: 'in_process' repeats in the serving process what has just killed a "
        "child; remove it, or set allow_in_process_after_crash = true",
    ),
    "typo of a demand": (
        '[confinement]\nrlimits = "required"',
        "'required': must be 'require', 'prefer' or 'off'; did you mean 'require'?",
    ),
    "boolean demand": ("[confinement]\nrlimits = true", "rlimits = true: must be 'require', 'prefer' or 'off'"),
    "value for a table": ("limits = 5", "limits = 5: must be a table: [limits] with keys below it"),
    "integer for a boolean": ("gpu = 1", "gpu = 1: must be a valid boolean"),
    "text for a boolean": ('allow_in_process = "no"', "allow_in_process = 'no': must be a valid boolean"),
    "date": ("description = 1979-05-27", "description = {'date or time': '1979-05-27'}: must be a valid string"),
    "list as setting": ("[reduced]\na = [1]", "reduced.a = [1]: must be a boolean, a number or a string"),
    "bad variable": ('environment = ["A-B"]', "environment[0] = 'A-B': must match pattern"),
    "not TOML": ("limits: 5", "not TOML: Expected '=' after a key"),
    "key twice": ("gpu = true\ngpu = false", "not TOML: Cannot overwrite a value"),
    "deep": ("x = " + "[" * 100_000, "not TOML: "),
    "long number": ("parallel_jobs = 1" + "0" * 5000, "not TOML: "),
    "long text": (f'[confinement]\nrlimits = "{"x" * 100_000}"', "xxx...: must be"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gives_one_readable_line(mistake: tuple[str, str], tmp_path: Path) -> None:
    text, message = mistake
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert message in said
    assert "\n" not in said
    assert len(said) < 500 + len(str(path))
    assert "Input should" not in said and "pydantic" not in said


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(PolicyError) as caught:
        parse("gpu = 1\n[limits]\nopen_files = 1\nprocess = 2", "two.toml")
    assert [line.split(" = ")[0] for line in str(caught.value).splitlines()] == [
        "two.toml: gpu",
        "two.toml: limits.open_files",
        "two.toml: limits.process",
    ]


def test_what_is_not_a_policy_file_is_told_apart(tmp_path: Path) -> None:
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'name = "\xff"')
    for policy, message in [
        ("prodction", "not one of the shipped policies (ci, default, production, strict) and not a file"),
        ("prodction", "; did you mean 'production'?"),
        (tmp_path, f"{tmp_path}: is a folder, not a policy file"),
        (tmp_path / "missing.toml", "and not a file"),
        (binary, "not UTF-8 at byte 8"),
        ("x" * 5000, "File name too long"),
        ("a\0b", "not a file"),
        ("", "is a folder"),
    ]:  # fmt: skip
        with pytest.raises(PolicyError) as caught:
            load(policy)
        assert message in str(caught.value)
        assert len(str(caught.value)) < 500


def test_a_file_is_read_as_utf_8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "umlaut.toml"
    path.write_bytes('description = "für ü"'.encode())
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    monkeypatch.setenv("LC_ALL", "C")
    assert load(path).description == "für ü"
    assert load(path).name == "umlaut"


def test_the_word_that_can_be_grepped_for_opens_the_ladder() -> None:
    policy = parse('allow_in_process_after_crash = true\n[ladder]\ncrashed = ["in_process"]')
    assert policy.ladder.crashed == ("in_process",)


@pytest.mark.parametrize("status", sorted(KILLERS))
def test_in_process_needs_the_word_for_each_status_that_kills(status: Status) -> None:
    with pytest.raises(ValidationError, match=f"ladder.{status.value} = "):
        Policy(ladder=Ladder.model_validate({status.value: ("in_process",)}))


def test_a_ladder_has_steps_for_each_status_but_ok() -> None:
    assert set(Ladder.model_fields) == set(Status) - {Status.OK}
    assert Ladder().steps(Status.OK) == ()
    assert Ladder().steps(Status.CRASHED) == ("retry", "reduced", "eager")


def test_the_schema_describes_every_key() -> None:
    found = schema()
    for model in ("Limits", "Confinement", "Ladder", "ForkserverSettings"):
        for name, field in found["$defs"][model]["properties"].items():
            assert field["description"], f"{model}.{name}"
    assert Limits() == Policy().limits and Confinement() == Policy().confinement


def test_a_pattern_lets_no_secret_and_no_remote_cache_through() -> None:
    secret = {
        "TORCHINDUCTOR_REDIS_URL": "redis://user:hunter2@cache:6379",
        "TORCHINDUCTOR_REDIS_HOST": "cache",
        "TORCHINDUCTOR_FX_GRAPH_REMOTE_CACHE": "1",
        "TORCHINDUCTOR_SOME_TOKEN": "t",
        "TRITON_REDIS_HOST": "cache",
        "TRITON_CACHE_MANAGER": "triton.runtime.cache:RemoteCacheManager",
    }
    plain = {"TORCHINDUCTOR_FREEZING": "1", "TRITON_PTXAS_PATH": "/usr/bin/ptxas", "PATH": "/bin"}
    assert Policy().allowed({**secret, **plain}) == plain
    named = Policy(environment=("TORCHINDUCTOR_REDIS_URL",))
    assert set(named.allowed({**secret, **plain})) == {"TORCHINDUCTOR_REDIS_URL"}


def test_a_variable_that_another_thread_takes_away_meanwhile() -> None:
    class Vanishing(dict[str, str]):
        def get(self, name: str, default: object = None) -> str | None:  # type: ignore[override]
            return None if name == "LANG" else super().get(name)

        def items(self) -> NoReturn:
            raise KeyError("as os.environ does")

    assert Policy().allowed(Vanishing(LANG="C", PATH="/bin")) == {"PATH": "/bin"}
