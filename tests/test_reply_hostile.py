"""Replies of a child that has been taken over: refused within seconds, and nothing is applied, opened or raised."""

from __future__ import annotations

import copy
import json
import linecache
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import sympy  # noqa: E402

from sandbox.errors import SandboxError, WireError  # noqa: E402
from sandbox.inductor import (  # noqa: E402  # noqa: E402
    budget,
    compat,
    compile,
    counting,
    expressions,
    failures,
    kernels,
    logs,
    payload,
    reply,
    tensors,
)
from sandbox.inductor.budget import Budget  # noqa: E402
from sandbox.results import Failure  # noqa: E402
from sandbox.wire import safe_dumps, safe_loads  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(120)]

#: Seconds for any one reply; the machine may be busy.
SOON = 10.0


class Good:
    """A graph, and the reply that an honest child gives."""

    def __init__(self) -> None:
        self.value: dict[str, Any] = {}
        self.call: tuple[Any, ...] = ()

    def compile(self, gm: Any, inputs: Any, checks: Any, region: Any = None, **kwargs: Any) -> Any:
        data = payload.encode(gm, inputs, checks, kwargs, region)
        self.value, self.call = compile.run(data, {}, 1), (gm, inputs, checks, kwargs)
        return self.decode(self.value)

    def decode(self, value: Any) -> Any:
        return reply.decode_graph(value, *self.call)

    @property
    def shape_env(self) -> Any:
        return reply._shape_env(self.call[1])


@pytest.fixture(scope="module")
def good(tmp_path_factory: Any) -> Iterator[Good]:
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("hostile"))
    torch.set_num_threads(1)
    one = Good()
    original = compat.replace_compile(one.compile)
    try:
        torch._dynamo.reset()
        off = {"fx_graph_cache": False}
        with compat.inductor_config.patch(off), compat.functorch_config.patch(enable_autograd_cache=False):
            compiled = torch.compile(lambda x: torch.cat([x, x * 2]).sin() + torch.tensor([3.0]), dynamic=True)
            compiled(torch.randn(6, 7))
    finally:
        compat.replace_compile(original)
    yield one
    kernels.remove_loader()
    if before is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def shared(depth: int, leaf: Any) -> Any:
    """A few bytes on the wire, 2**depth values to whoever walks it."""
    for _ in range(depth):
        leaf = [leaf, leaf]
    return leaf


def nested(depth: int) -> Any:
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


def user(depth: int) -> dict[str, Any]:
    made: dict[str, Any] = {"name": "x", "stack_trace": None, "users": [], "mutating_use_stack_trace": None}
    for _ in range(depth):
        made = {"name": "x", "stack_trace": None, "users": [made, made], "mutating_use_stack_trace": None}
    return made


def tower(height: int) -> Any:
    made: Any = ["int", 2]
    for _ in range(height):
        made = ["call", "sympy.Pow", [["int", 60], made]]
    return ["call", "sympy.GreaterThan", [made, ["int", 0]]]


def wide(name: str, symbol: str, count: int) -> Any:
    terms = [
        ["call", "sympy.Mul", [["int", n + 2], ["call", "torch.FloorDiv", [["symbol", symbol], ["int", n + 3]]]]]
        for n in range(count)
    ]
    return ["call", "sympy.GreaterThan", [["call", name, terms], ["int", 0]]]


def expanding(symbol: str, terms: int, power: int) -> Any:
    parts = [["call", "torch.FloorDiv", [["symbol", symbol], ["int", n + 2]]] for n in range(terms)]
    whole = ["call", "sympy.Pow", [["call", "sympy.Add", parts], ["int", power]]]
    return ["call", "sympy.Unequality", [whole, ["int", 7]]]


def true(symbol: str, number: int) -> Any:
    return ["call", "sympy.Unequality", [["symbol", symbol], ["int", -1 - number]]]


def guard(tree: Any) -> dict[str, Any]:
    return {"expr": tree, "size_oblivious": False}


Change = Callable[[dict[str, Any], str], None]


def put(*path: Any) -> Callable[[Any], Change]:
    """Replaces what lies at ``path`` of a reply."""

    def with_value(value: Any) -> Change:
        def change(reply: dict[str, Any], symbol: str) -> None:
            *parents, last = path
            where: Any = reply
            for part in parents:
                where = where[part]
            where[last] = value(symbol) if callable(value) else value

        return change

    return with_value


GUARDS = put("guards")
COUNTERS = put("counts", "counters")
STRIDES = put("graph", "output_strides")
TENSOR = {
    "dtype": "float32", "shape": [1], "stride": [1], "device": "cpu", "requires_grad": False, "parameter": False,
    "frozen": False, "packed": False, "bytes": b"\0\0\0\0",
}  # fmt: skip


def constant(**changes: Any) -> Change:
    return put("graph", "constants")({"c": {"tensor": {**TENSOR, **changes}}})


def line(**changes: Any) -> dict[str, Any]:
    entry = {
        "name": "torch._inductor", "level": 30, "message": "m", "pathname": "p", "lineno": 1, "function": "f",
        "created": 1.0, "trace": None,
    }  # fmt: skip
    return {**entry, **changes}


def warning(**changes: Any) -> dict[str, Any]:
    return {"category": "builtins:UserWarning", "text": "t", "filename": "x.py", "lineno": 1, **changes}


HOSTILE: dict[str, Change] = {
    "shared lists in place of the graph": put("graph")(shared(60, 1)),
    "shared lists as a key": put("graph", "cache_key")(shared(60, 1)),
    "shared lists as a guard": GUARDS(shared(60, 1)),
    "shared guards": GUARDS(lambda s: [guard(shared(60, ["symbol", s]))]),
    "shared lists as a stride": STRIDES([[shared(60, "1")]]),
    "shared lists as users": put("graph", "cudagraph_info")(
        {"placeholders": [{**user(0), "users": shared(60, user(0))}], "stack_traces": [], "cudagraph_fail_reasons": []}
    ),
    "users of users": put("graph", "cudagraph_info")(
        {"placeholders": [user(8)], "stack_traces": [], "cudagraph_fail_reasons": []}
    ),
    "many users": put("graph", "cudagraph_info")(
        {"placeholders": [user(1)] * 100_000, "stack_traces": [], "cudagraph_fail_reasons": []}
    ),
    "deep lists": put("graph", "cache_linemap")(nested(100_000)),
    "300,000 guards": GUARDS(lambda s: [guard(["bool", True])] * 300_000),
    "9,000 guards with a symbol": GUARDS(
        lambda s: [guard(true(s, n)) for n in range(9_000)] + [guard(["bool", False])]
    ),
    "a tower of powers": GUARDS([guard(tower(5))]),
    "a power of a power of a symbol": GUARDS(
        lambda s: [guard(["call", "sympy.Pow", [["call", "sympy.Pow", [["symbol", s], ["int", 16]]], ["int", 16]]])]
    ),
    "a symbol as exponent": GUARDS(lambda s: [guard(["call", "sympy.Pow", [["int", 2], ["symbol", s]]])]),
    "a shift by a symbol": GUARDS(lambda s: [guard(["call", "torch.LShift", [["int", 2], ["symbol", s]]])]),
    "digits by the billion": GUARDS([guard(["call", "torch.RoundDecimal", [["int", 2], ["int", -1_000_000_000]]])]),
    "a maximum of 1,300": GUARDS(lambda s: [guard(wide("sympy.Max", s, 1300))]),
    "a maximum of torch's of 1,300": GUARDS(lambda s: [guard(wide("torch.Max", s, 1300))]),
    "a sum to the 16th": GUARDS(lambda s: [guard(expanding(s, 60, 16))]),
    "a giant number": GUARDS([guard(["int", 10**5000])]),
    "a guard that is false": GUARDS([guard(["bool", False])]),
    "a giant count": COUNTERS({"inductor": {"x": 1 << 63}}),
    "a count of 5,000 digits": COUNTERS({"inductor": {"x": 10**5000}}),
    "too many counters": COUNTERS({"inductor": {str(n): 1 for n in range(5000)}}),
    "a stride with a power": STRIDES(lambda s: [[f"{s}**{s}"]]),
    "a stride with a tower": STRIDES([["9**9**9**9"]]),
    "a stride with towers of small powers": STRIDES(lambda s: [[f"((({s}**16)**16)**16)**16"]]),
    "a stride of many digits": STRIDES([["9" * 4000]]),
    "a stride of many digits in arithmetic": STRIDES([["9" * 3000 + "*2"]]),
    "a stride of other digits": STRIDES([["\u0663"]]),
    "a stride of a long product": STRIDES(lambda s: [["*".join([s] * 900)]]),
    "a stride with a shift": STRIDES([["1<<99999999999"]]),
    "a stride that rounds": STRIDES([["round(5,-(10**9))"]]),
    "a stride deeply nested": STRIDES([["(" * 3000 + "1" + ")" * 3000]]),
    "a packed tensor of 2**28": constant(packed=True, shape=[1 << 28], stride=[0]),
    "a packed tensor of 2**40": constant(packed=True, shape=[1 << 20, 1 << 20], stride=[0, 0]),
    "a tensor of 2**61": constant(shape=[1 << 61], stride=[0]),
    "a tensor of many dimensions": constant(shape=[1] * 100_000, stride=[0] * 100_000),
    "a tensor with huge strides": constant(shape=[2], stride=[1 << 61]),
    "an integer with a gradient": constant(dtype="int32", requires_grad=True),
    "a quantised tensor": constant(dtype="qint32"),
    "a tensor without data": constant(device="meta"),
    "a tensor nowhere": constant(device="cpu:99999999999999999999"),
    "a packed integer": constant(dtype="int32", packed=True),
    "a flag that is no flag": constant(packed=[[]]),
    "the same bytes often": put("graph", "constants")({f"c{n}": {"tensor": TENSOR} for n in range(1000)}),
    "another graph's file": put("graph", "source_code")("import os"),
    "source code that is not text": put("graph", "source_code")("\ud800"),
    "an input that is not there": put("graph", "mutated_input_idxs")([99]),
    "a key that is not text": put("counts", "metrics")({1: 2}),
    "a set": put("graph", "mutated_inputs")({1, 2}),
    "too many logs": put("logs")([line()] * (logs.MAX_RECORDS + 1)),
    "too many characters": put("logs")([line(message="x" * (1 << 20))] * 40),
    "too many warnings": put("warnings")([warning()] * (logs.MAX_WARNINGS + 1)),
    "a level that is none": put("logs")([line(level=-5)]),
    "a trace of deep JSON": put("logs")(
        [line(name="torch.__trace", trace={"metadata": "[" * 100_000, "payload": None})]
    ),
    "a trace of a list": put("logs")([line(name="torch.__trace", trace={"metadata": "[]", "payload": None})]),
    "a trace for another logger": put("logs")([line(trace={"metadata": "{}", "payload": None})]),
    "a line of a giant number": put("warnings")([warning(lineno=1 << 62)]),
    "a kernel elsewhere": put("kernels")({"a": {"key": "abcdefgh", "path": "../../x.so"}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_reply_is_refused_soon_and_nothing_is_applied(good: Good, name: str) -> None:
    value = copy.deepcopy(good.value)
    symbol = next(iter(reply._symbols(good.shape_env)))
    HOSTILE[name](value, symbol)
    guards, counted = len(good.shape_env.guards), counting.Counts()
    begun = time.monotonic()
    # A context as in a real compile: there Inductor evaluates the strides.
    tracing = compat.TracingContext(compat.detect_fake_mode(good.call[1]))
    tracing.output_strides = []
    with pytest.raises(WireError) as caught, compat.tracing(tracing):
        good.decode(value)
    assert time.monotonic() - begun < SOON
    assert len(str(caught.value)) < 1000
    assert len(good.shape_env.guards) == guards
    assert counted.deltas()["counters"] == {}


def test_the_wire_admits_such_data() -> None:
    """What these tests feed in is what `safe_loads` really lets through."""
    for value in (shared(60, 1), 10**5000, nested(90), {"bytes": [b"x" * 9] * 3}):
        assert safe_loads(safe_dumps(value)) is not None


def test_the_honest_reply_is_taken(good: Good) -> None:
    assert good.decode(good.value) is not None
    Budget().admit(good.value)


def test_what_is_true_of_the_traced_sizes_is_taken(good: Good) -> None:
    value = copy.deepcopy(good.value)
    symbol = next(iter(reply._symbols(good.shape_env)))
    value["guards"] = [guard(true(symbol, n)) for n in range(20)]
    value["guards"].append(guard(wide("torch.Max", symbol, 6)))
    good.decode(value)


def test_a_reply_that_takes_too_long_is_given_up(good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_SECONDS", -1.0)
    with pytest.raises(WireError, match="longer than"):
        good.decode(good.value)


def test_errors_of_a_decoder_are_wire_errors_and_ours_stay(good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "check", lambda data: {}[data])
    with pytest.raises(WireError, match="TypeError"):
        good.decode(good.value)


def test_one_reply_cannot_name_the_library_of_another(good: Good, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cache:
        cache: dict[str, Any] = {"a" * 10: "of another graph"}
        loaded: list[tuple[str, str]] = []

        @classmethod
        def _load_library(cls, path: str, key: str) -> str:
            cls.loaded.append((path, key))
            return path

    for identity in ("one", "two"):
        entry = {"key": "a" * 10, "path": f"aa/{identity}.so"}
        load = kernels._loader(Cache, identity, entry)
        assert load() == load() == os.path.join(compat.runtime_cache_dir(), f"aa/{identity}.so")
    assert Cache.cache == {"a" * 10: "of another graph"}
    assert len({key for _, key in Cache.loaded}) == len(Cache.loaded) == 2


def test_a_warning_opens_no_file_of_the_childs_choice(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text("the secret\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    told = [warning(filename=name) for name in ("/dev/zero", str(pipe), str(secret), "<x>", logs.__file__, "")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logs.replay_logs({"logs": [], "warnings": told}, "job-0123")
    assert [item.filename for item in caught] == ["<job-0123>"] * 4 + [logs.__file__, "<job-0123>"]
    opened: list[Any] = []
    monkeypatch.setattr("tokenize.open", lambda name: opened.append(name) or open(os.devnull))
    linecache.clearcache()
    for item in caught:
        assert "UserWarning: t" in warnings.formatwarning(item.message, item.category, item.filename, item.lineno)
    assert opened == [logs.__file__], "what shows a warning opens the file that it names"


def test_only_loggers_that_exist_hear_a_child_and_no_escape_reaches_a_terminal() -> None:
    heard: list[logging.LogRecord] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    handler, logger = Keep(), logging.getLogger("torch._inductor")
    before = set(logging.root.manager.loggerDict)
    entries = [
        line(message="\x1b[2Jone\n\ttwo\x07\x9b\u202e\ud800", pathname="\x1b]0;x\x07p", created=float("nan")),
        line(name="torch._inductor.no.such.logger"),
        line(name="root"), line(name="os"), line(name="torchx"), line(name="torch.."), line(name="torch." + "x" * 9999),
        line(level=1, message="below what anybody asked for"),
    ]  # fmt: skip
    logger.addHandler(handler)
    try:
        dropped = logs.replay_logs({"logs": entries, "warnings": []}, "job-9")
    finally:
        logger.removeHandler(handler)
    assert set(logging.root.manager.loggerDict) == before
    assert dropped == 5
    assert [record.getMessage() for record in heard] == ["[2Jone\n\ttwo", "m"]
    assert all(record.name == "torch._inductor" and record.job_id == "job-9" for record in heard)
    assert heard[0].pathname == "]0;xp" and heard[0].created > 1e9


def test_a_malformed_log_tells_nothing_of_the_reply() -> None:
    heard: list[Any] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger = logging.getLogger("torch._inductor")
    logger.addHandler(handler)
    try:
        with pytest.raises(WireError):
            logs.replay_logs({"logs": [line(), line(lineno="1")], "warnings": []}, "job-9")
    finally:
        logger.removeHandler(handler)
    assert heard == []


def test_what_a_child_logs_passes_its_own_limits() -> None:
    capture = logs._Capture()
    for _ in range(40):
        capture.emit(logging.LogRecord("torch._inductor", 30, "p", 1, "x" * (1 << 20), None, None))
    assert capture.left_out > 0
    logs.check({"logs": capture.records, "warnings": []})


@pytest.mark.parametrize(
    "name",
    [
        "torch._dynamo.exc.SkipFrame", "torch._dynamo.exc.RestartAnalysis", "torch._dynamo.exc.Unsupported",
        "torch._dynamo.exc.TensorifyScalarRestartAnalysis", "torch._dynamo.exc.BackendCompilerFailed",
        "torch._dynamo.exc.ObservedKeyError", "torch._inductor.compile_fx.SkipFrame",
        "torch._inductor.compile_fx.ShortenTraceback", "builtins.StopIteration", "builtins.StopAsyncIteration",
        "builtins.KeyboardInterrupt", "builtins.GeneratorExit", "builtins.exec", "torch.nn.Module", "os.error",
        "torch._inductor.virtualized.NullHandlerError",
    ],
)  # fmt: skip
def test_no_exception_that_steers_is_raised_for_a_child(name: str) -> None:
    import torch._inductor.compile_fx  # noqa: F401

    module, _, qualname = name.rpartition(".")
    assert type(failures.rebuild_exception(Failure(module=module, qualname=qualname, message="m"))) is RuntimeError


@pytest.mark.parametrize(
    "name",
    [
        "builtins.ValueError", "builtins.MemoryError", "torch._inductor.exc.LoweringException",
        "torch._inductor.exc.InvalidCxxCompiler", "torch._inductor.exc.CppCompileError",
        "torch._subclasses.fake_tensor.DataDependentOutputException",
        "torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode",
    ],
)  # fmt: skip
def test_what_inductor_raises_keeps_its_class(name: str) -> None:
    module, _, qualname = name.rpartition(".")
    found = failures.rebuild_exception(Failure(module=module, qualname=qualname, message="m"))
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(found).__mro__]
    assert name in kinds and str(found) == "m"


def test_counters_of_unknown_groups_are_left_out() -> None:
    data = {"metrics": {}, "counters": {"inductor": {"y" * 9999: 1}, "a group of the child's": {"x": 1}}, "loops": []}
    counting.apply(data)
    assert "a group of the child's" not in compat.counters
    assert compat.counters["inductor"].pop("y" * 300) == 1


def test_tensors_come_back_as_they_were() -> None:
    for made in (
        torch.randn(3, 4).t(), torch.randn(2, 3)[:, ::2], torch.zeros(0, 5), torch.tensor(3), torch.ones(1).expand(5),
        torch.nn.Parameter(torch.randn(2)), torch.randn(2).requires_grad_(), torch.randn(3, dtype=torch.complex64),
        torch.tensor([True, False]),
    ):  # fmt: skip
        got = tensors.decode(tensors.encode(made))
        assert type(got) is type(made) and got.requires_grad == made.requires_grad
        assert got.stride() == made.stride() and torch.equal(got.detach(), made.detach())


def test_honest_expressions_and_strides_pass() -> None:
    s0 = sympy.Symbol("s0", integer=True, positive=True)
    functions = compat.sympy_functions
    for expr in (
        sympy.Eq(functions.FloorDiv(s0 + 1, 2) * s0**3, 4),
        s0 >= 2,
        sympy.And(s0 > 2, s0 < 9),
        functions.Max(s0, 3) < 7,
        functions.PythonMod(s0, 8) > 0,
        functions.ModularIndexing(s0, 2, 3) < 4,
        (s0 - 1) ** 2 * (s0 + 4) > 0,
    ):
        assert expressions.decode(expressions.encode(expr), {"s0": s0}, Budget()) == expr
    for text in ("s0", "12", "s0*(s0 // 2)", "s0**2", "max(1, s0)", "((s0 + 1) // 2) % 4", "math.floor(s0/2)", "-s0"):
        assert expressions.check_stride(text, frozenset({"s0"}), Budget()) == text


def test_every_error_of_ours_can_be_told_in_json(good: Good) -> None:
    value = copy.deepcopy(good.value)
    value["graph"]["cache_key"] = "\ud800" * 100
    with pytest.raises(SandboxError) as caught:
        good.decode(value)
    assert json.dumps(str(caught.value))
