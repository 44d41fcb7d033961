"""Specs, limits and results: strict, frozen, closed; a payload that is not the one in the spec is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sandbox import results
from sandbox.errors import JobError
from sandbox.jobs import (
    CallableSpec,
    FxGraphSpec,
    Job,
    TraceContext,
    TritonKernelSpec,
    check_payload,
    digest,
    new_job_id,
    parse_spec,
)
from sandbox.limits import Confinement, Limits
from sandbox.policy import ForkserverSettings, Ladder, Policy
from sandbox.results import KILLERS, Artifact, JobResult, Leak, LeakReport, Status, Usage

PAYLOAD = b"payload"
BASE: dict[str, Any] = {
    "job_id": "job-0123456789ab",
    "payload_sha256": digest(PAYLOAD),
    "payload_bytes": len(PAYLOAD),
    "limits": Limits(),
}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SPECS = [
    FxGraphSpec(**BASE, config_overrides={"max_autotune": False, "cpp.threads": 1, "x": None, "y": 0.5, "z": "s"}),
    TritonKernelSpec(**BASE, function="add", signature={"x": "*fp32"}, constants={"BLOCK": 64}, target="cuda:90"),
    CallableSpec(**BASE, result_globals=("collections:deque",), trace=TraceContext(traceparent=TRACEPARENT)),
]  # fmt: skip


def ids(spec: BaseModel) -> str:
    return type(spec).__name__


# Specs


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_spec_comes_back_equal_through_json(spec: Any) -> None:
    assert parse_spec(spec.model_dump_json()) == spec
    assert parse_spec(spec.model_dump_json().encode()) == spec


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_a_spec_is_frozen_and_closed(spec: Any) -> None:
    for name in type(spec).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(spec, name, getattr(spec, name))
    for place in ("", "limits", "confinement"):
        data = json.loads(spec.model_dump_json())
        (data[place] if place else data)["more"] = 1
        with pytest.raises(JobError, match="more = 1: there is no such key"):
            parse_spec(json.dumps(data))


BAD_FIELDS: list[tuple[str, Any]] = [
    ("schema_version", 2),
    ("schema_version", "1"),
    ("job_id", "x"),
    ("job_id", "../../etc/passwd"),
    ("job_id", "job-0123456789ab\n"),
    ("job_id", "JOB-0123456789AB"),
    ("payload_sha256", "0" * 63),
    ("payload_sha256", "F" * 64),
    ("payload_bytes", -1),
    ("payload_bytes", "7"),
    ("payload_bytes", 7.0),
    ("payload_bytes", True),
    ("target", "cuda"),
    ("target", "cuda:90:33"),
    ("target", "cpu\n"),
    ("target", "tpu:1"),
    ("gpu", 1),
    ("gpu", "true"),
    ("kernel_threads", 0),
    ("kernel_threads", 257),
    ("compile_id", "x" * 65),
    ("trace", {"traceparent": "00-x"}),
    ("trace", {"traceparent": TRACEPARENT.upper()}),
    ("environment", {"A=B": "1"}),
    ("environment", {"1A": "1"}),
    ("environment", {"A": 1}),
    ("environment", ["A"]),
    ("limits", None),
    ("limits", {"wall_seconds": "1"}),
    ("confinement", {"rlimits": True}),
    ("kind", "shell"),
    ("kind", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=str)
def test_a_bad_field_is_refused_by_name(name: str, value: Any) -> None:
    data = json.loads(SPECS[0].model_dump_json())
    data[name] = value
    with pytest.raises(JobError) as caught:
        parse_spec(json.dumps(data))
    assert str(caught.value).startswith("job spec: ")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name", "value"),
    [
        (1, "function", "os.system"),
        (1, "function", "add\n"),
        (1, "signature", {"x": "__import__('os')"}),
        (1, "constants", {"B": [1]}),
        (1, "num_warps", 0),
        (1, "num_stages", 33),
        (2, "result_globals", ["os"]),
        (2, "result_globals", ["a:b:c"]),
        (2, "result_globals", "collections:deque"),
        (0, "config_overrides", {"a": {}}),
        (0, "function", "add"),
    ],
    ids=str,
)
def test_a_bad_field_of_one_kind_is_refused(spec: int, name: str, value: Any) -> None:
    data = json.loads(SPECS[spec].model_dump_json())
    data[name] = value
    with pytest.raises(JobError, match=name):
        parse_spec(json.dumps(data))


@pytest.mark.parametrize("name", sorted({*BASE, "kind"} - {"limits"}))
def test_a_missing_field_is_refused(name: str) -> None:
    data = json.loads(SPECS[0].model_dump_json())
    del data[name]
    with pytest.raises(JobError):
        parse_spec(json.dumps(data))


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b"1", b"[" * 100_000, b'{"kind": "fx_graph"}'])
def test_what_is_no_spec_is_a_job_error(data: bytes) -> None:
    with pytest.raises(JobError, match="job spec: "):
        parse_spec(data)


@given(st.binary(max_size=60) | st.text(max_size=60))
def test_garbage_is_a_job_error(data: bytes | str) -> None:
    with pytest.raises(JobError):
        parse_spec(data)


@pytest.mark.parametrize("target", ["cpu", "cuda:90", "cuda:100", "cuda:90:32", "hip:gfx942", "hip:gfx90a:64"])
def test_known_targets(target: str) -> None:
    assert FxGraphSpec(**BASE, target=target).target == target


# Payloads


def test_a_payload_that_is_not_the_one_in_the_spec_is_refused() -> None:
    assert Job(SPECS[0], PAYLOAD).payload == PAYLOAD
    with pytest.raises(JobError, match="job-0123456789ab: the payload's SHA-256 is not the one in the spec"):
        Job(SPECS[0], b"PAYLOAD")
    with pytest.raises(JobError, match="the payload has 6 bytes, the spec says 7"):
        Job(SPECS[0], PAYLOAD[:-1])
    limits = Limits(payload_bytes=1024)
    large = bytes(1025)
    spec = FxGraphSpec(**BASE | {"limits": limits, "payload_bytes": 1025, "payload_sha256": digest(large)})
    with pytest.raises(JobError, match=r"has 1025 bytes, limits\.payload_bytes allows 1024"):
        check_payload(spec, large)
    with pytest.raises(AttributeError):
        Job(SPECS[0], PAYLOAD).payload = b""  # type: ignore[misc]


def test_job_ids_are_valid_and_new() -> None:
    found = {new_job_id() for _ in range(1000)}
    assert len(found) == 1000
    for job_id in list(found)[:10]:
        FxGraphSpec(**BASE | {"job_id": job_id})


# Limits and confinement


@pytest.mark.parametrize("name", sorted(Limits.model_fields))
@pytest.mark.parametrize("value", ["1", None, True, -1, float("nan"), float("inf"), 1 << 60], ids=str)
def test_a_limit_takes_only_a_sensible_number(name: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Limits(**{name: value})


@pytest.mark.parametrize("name", sorted(name for name in Limits.model_fields if name.endswith("_bytes")))
def test_a_size_takes_no_fraction(name: str) -> None:
    with pytest.raises(ValidationError):
        Limits(**{name: 1e9})


@pytest.mark.parametrize("model", [Limits(), Confinement(), Ladder(), ForkserverSettings(), Policy(), Usage()], ids=ids)
def test_settings_are_frozen_and_closed(model: Any) -> None:
    for name in type(model).model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(model, name, getattr(model, name))
    with pytest.raises(ValidationError, match="more"):
        type(model)(more=1)
    assert type(model).model_validate_json(model.model_dump_json()) == model


@pytest.mark.parametrize("value", ["required", "", True, None, 1])
def test_a_mechanism_takes_one_of_three_words(value: Any) -> None:
    for name in Confinement().demands():
        with pytest.raises(ValidationError):
            Confinement(**{name: value})


# Results


def test_a_result_is_closed_and_only_ok_is_ok() -> None:
    for status in Status:
        result = JobResult(job_id="job-1", status=status, leaks=LeakReport(job_id="job-1"))
        assert result.ok is (status is Status.OK)
    with pytest.raises(ValidationError, match="frozen"):
        result.status = Status.OK  # type: ignore[misc]
    with pytest.raises(ValidationError):
        JobResult(job_id="job-1", status=Status.OK, leaks=LeakReport(job_id="job-1"), more=1)  # type: ignore[call-arg]
    with pytest.raises(ValidationError):
        JobResult(job_id="job-1", status="ok", leaks=LeakReport(job_id="job-1"))  # type: ignore[arg-type]


def test_the_statuses_are_the_ones_that_others_build_on() -> None:
    assert {status.value for status in Status} == {
        "ok", "compile_error", "crashed", "timeout", "cpu_limit", "memory_limit", "output_limit", "violation",
        "protocol_error", "unserializable", "sandbox_error", "cancelled",
    }  # fmt: skip
    assert Status.OK not in KILLERS and Status.COMPILE_ERROR not in KILLERS and Status.CANCELLED not in KILLERS
    assert {Status.CRASHED, Status.TIMEOUT, Status.MEMORY_LIMIT, Status.CPU_LIMIT} < KILLERS


BAD_PATHS = [
    "/etc/passwd", "etc/passwd", "inductor", "inductor/", "triton\\a", "inductor/a b", "inductor/a\n", "inductor/\0",
    "INDUCTOR/a", "inductor/../../x", "inductor/..", "triton/./a/../b", "inductor/" + "a" * 513, "",
]  # fmt: skip


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_an_artifact_stays_in_its_folder(path: str) -> None:
    with pytest.raises(ValidationError):
        Artifact(path=path, size=1, sha256="0" * 64)


def test_artifacts_have_sane_sizes_and_digests() -> None:
    assert Artifact(path="inductor/ab/cab.so", size=0, sha256="0" * 64)
    for fields in ({"size": -1}, {"size": 1.0}, {"sha256": "0" * 65}, {"sha256": "G" * 64}):
        with pytest.raises(ValidationError):
            Artifact(**{"path": "triton/x", "size": 1, "sha256": "0" * 64} | fields)


def test_leaks_are_counted_by_kind() -> None:
    leak = Leak(kind="fd", object="fd 7", owner="child", reclaimed=False)
    other = Leak(kind="process", object="pid 8", owner="child", reclaimed=True)
    assert LeakReport(job_id="job-1", leaks=(leak, other, leak)).counts() == {"fd": 2, "process": 1}
    with pytest.raises(ValidationError):
        Leak(kind="soul", object="", owner="child", reclaimed=True)  # type: ignore[arg-type]


# Descriptions

UNITS = re.compile(r"\b(seconds|bytes|count)\b")


@pytest.mark.parametrize("model", [Limits, Confinement, Ladder, ForkserverSettings, Policy, *map(type, SPECS)])
def test_every_setting_says_what_it_means(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if name == "kind":
            continue  # the discriminator, said by the class
        assert field.description and field.description.endswith((".", "`")), f"{model.__name__}.{name}"
        kinds = {"int", "float"} & set(re.findall(r"\w+", str(field.annotation)))
        if kinds and name not in ("schema_version", "constants", "config_overrides", "reduced", "quick", "nice"):
            assert UNITS.search(field.description.lower()), f"{model.__name__}.{name} names no unit"


@pytest.mark.parametrize("name", sorted(Limits.model_fields))
def test_every_limit_says_what_happens_when_it_is_hit(name: str) -> None:
    description = Limits.model_fields[name].description or ""
    assert "When hit" in description or name == "stderr_tail_bytes"


def test_every_model_of_results_is_frozen_strict_and_closed() -> None:
    models = [found for found in vars(results).values() if isinstance(found, type) and issubclass(found, BaseModel)]
    assert len(models) > 8
    for model in models:
        if model is BaseModel:
            continue
        config = model.model_config
        assert (config.get("frozen"), config.get("strict"), config.get("extra")) == (True, True, "forbid"), model
