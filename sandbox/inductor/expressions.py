"""Symbolic expressions as plain data: the guards that lowering added in a child.

Nothing is parsed or evaluated from text: an expression is a tree of lists, each function is on an allow-list, and
symbols are those of the parent's own ShapeEnv.
"""

from __future__ import annotations

import ast
from typing import Any, Final

import sympy

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat

_SYMPY: Final = (
    "Add", "Mul", "Pow", "And", "Or", "Not", "Xor", "Mod", "Max", "Min", "floor", "ceiling", "Abs", "Piecewise",
    "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "ExprCondPair",
)  # fmt: skip
_TORCH: Final = (
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "IntTrueDiv", "FloatTrueDiv", "LShift", "RShift", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal",
    "ToFloat", "FloatPow", "PowByNatural", "Identity", "Max", "Min", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or",
    "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_exp", "OpaqueUnaryFn_log", "OpaqueUnaryFn_log2", "OpaqueUnaryFn_sin",
    "OpaqueUnaryFn_cos", "OpaqueUnaryFn_tan", "OpaqueUnaryFn_tanh", "OpaqueUnaryFn_sinh", "OpaqueUnaryFn_cosh",
    "OpaqueUnaryFn_asin", "OpaqueUnaryFn_acos", "OpaqueUnaryFn_atan",
)  # fmt: skip
_MAX_NODES: Final = 10_000
_MAX_DEPTH: Final = 200
_MAX_BITS: Final = 256


def _functions() -> dict[str, Any]:
    table: dict[str, Any] = {f"sympy.{name}": getattr(sympy, name) for name in _SYMPY if hasattr(sympy, name)}
    table["sympy.ExprCondPair"] = sympy.functions.elementary.piecewise.ExprCondPair
    for name in _TORCH:
        if hasattr(compat.sympy_functions, name):
            table[f"torch.{name}"] = getattr(compat.sympy_functions, name)
    return table


def encode(expr: Any) -> list[Any]:
    """An expression as nested lists: `[kind, ...]` with kind `symbol`, `int`, `rational`, `float`, `bool`, `call`.

    Raises:
        UnserializableError: for a function that is not on the allow-list.
    """
    if expr is True or expr is False or isinstance(expr, sympy.logic.boolalg.BooleanAtom):
        return ["bool", bool(expr)]
    if isinstance(expr, int | sympy.Integer):
        return ["int", int(expr)]
    if isinstance(expr, sympy.Rational):
        return ["rational", int(expr.p), int(expr.q)]
    if isinstance(expr, float | sympy.Float):
        return ["float", float(expr)]
    if isinstance(expr, sympy.Symbol):
        return ["symbol", expr.name]
    for name, function in _functions().items():
        if type(expr) is function:
            return ["call", name, [encode(argument) for argument in expr.args]]
    raise UnserializableError("guard", f"{type(expr).__name__} is not on the list of functions that a guard may use")


def decode(data: Any, symbols: dict[str, sympy.Symbol]) -> Any:
    """The expression that :func:`encode` described, over ``symbols`` (by name).

    Raises:
        WireError: for anything else.
    """
    budget = [_MAX_NODES]
    functions = _functions()

    def build(node: Any, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > _MAX_DEPTH:
            raise WireError("an expression of the reply is too large")
        match node:
            case ["bool", bool(value)]:
                return sympy.true if value else sympy.false
            case ["int", int(value)] if type(value) is int and value.bit_length() <= _MAX_BITS:
                return sympy.Integer(value)
            case ["rational", int(p), int(q)] if q > 0 and max(p.bit_length(), q.bit_length()) <= _MAX_BITS:
                return sympy.Rational(p, q)
            case ["float", float(value)]:
                return sympy.Float(value)
            case ["symbol", str(name)]:
                if name not in symbols:
                    raise WireError(f"an expression of the reply names the unknown symbol {name!r:.80}")
                return symbols[name]
            case ["call", str(name), list(arguments)] if name in functions:
                made = [build(argument, depth + 1) for argument in arguments]
                _check_power(name, made)
                return functions[name](*made)
            case _:
                raise WireError(f"an expression of the reply is malformed: {node!r:.120}")

    try:
        return build(data, 0)
    except WireError:
        raise
    except Exception as error:  # noqa: BLE001 - sympy raises whatever it likes on nonsense arguments
        raise WireError(f"an expression of the reply cannot be built: {type(error).__name__}: {error}") from None


def _check_power(name: str, arguments: list[Any]) -> None:
    """A constant power or shift is computed at once: keep it small."""
    if name in ("sympy.Pow", "torch.PowByNatural", "torch.LShift", "torch.FloatPow") and len(arguments) == 2:
        base, exponent = arguments
        if exponent.is_number and base.is_number and abs(exponent) > 64:
            raise WireError(f"{name} with the exponent {exponent} is too large")


def check_stride(text: Any, symbols: frozenset[str]) -> str:
    """A stride as Inductor prints it, proven to be arithmetic over known names before anybody evaluates it.

    Raises:
        WireError: for anything that is not.
    """
    if not isinstance(text, str) or len(text) > 10_000:
        raise WireError(f"a stride of the reply is not an expression: {text!r:.80}")
    if text.isdecimal():
        return text
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WireError(f"a stride of the reply cannot be read: {text!r:.80}: {error}") from None
    allowed = (
        ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.IfExp, ast.Load, ast.operator, ast.unaryop,
        ast.cmpop, ast.boolop,
    )  # fmt: skip
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=int() | float()):
                continue
            case ast.Name(id=name) if name in symbols or name in ("max", "min", "int", "float", "abs", "round"):
                continue
            case ast.Name(id="math" | "torch"):
                continue
            case ast.Attribute(value=ast.Name(id="math"), attr="ceil" | "floor" | "trunc" | "sqrt" | "pow"):
                continue
            case ast.Attribute(value=ast.Name(id="torch"), attr=attr) if attr.startswith("sym_") or attr == "_sym_sqrt":
                continue
            case ast.Call(keywords=[]):
                continue
            case _ if isinstance(node, allowed) and not isinstance(node, ast.Pow | ast.LShift):
                continue
            case ast.Pow():
                continue
        raise WireError(f"a stride of the reply is not plain arithmetic: {text!r:.80}")
    return text
