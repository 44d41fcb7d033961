"""Symbolic expressions as plain data: the guards that lowering added in a child.

Nothing is parsed or evaluated from text: an expression is a tree of lists, each function is on an allow-list, and
symbols are those of the parent's own ShapeEnv.
"""

from __future__ import annotations

import ast
from typing import Any, Final, NamedTuple

import sympy

from sandbox.errors import UnserializableError, WireError
from sandbox.inductor import compat
from sandbox.inductor.budget import MAX_BITS, Budget, shown

_SYMPY: Final = (
    "Add", "Mul", "Pow", "And", "Or", "Not", "Xor", "Mod", "Max", "Min", "floor", "ceiling", "Abs", "Equality",
    "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
)  # fmt: skip
_TORCH: Final = (
    "FloorDiv", "ModularIndexing", "Where", "PythonMod", "Mod", "CleanDiv", "CeilToInt", "FloorToInt", "CeilDiv",
    "IntTrueDiv", "FloatTrueDiv", "LShift", "RShift", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal",
    "ToFloat", "FloatPow", "PowByNatural", "Identity", "Max", "Min", "BitwiseFn_bitwise_and", "BitwiseFn_bitwise_or",
    "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_exp", "OpaqueUnaryFn_log", "OpaqueUnaryFn_log2", "OpaqueUnaryFn_sin",
    "OpaqueUnaryFn_cos", "OpaqueUnaryFn_tan", "OpaqueUnaryFn_tanh", "OpaqueUnaryFn_sinh", "OpaqueUnaryFn_cosh",
    "OpaqueUnaryFn_asin", "OpaqueUnaryFn_acos", "OpaqueUnaryFn_atan",
)  # fmt: skip
_MAX_DEPTH: Final = 100
_MAX_ARGUMENTS: Final = 64
#: sympy compares the arguments of these with one another.
_MAX_COMPARED: Final = 16
_COMPARED: Final = frozenset({"sympy.Max", "sympy.Min", "torch.Max", "torch.Min", "sympy.Xor"})
_POWERS: Final = frozenset({"sympy.Pow", "torch.PowByNatural", "torch.FloatPow"})
#: Their second argument is a number of digits.
_SHIFTS: Final = frozenset({"torch.LShift", "torch.RShift", "torch.RoundDecimal"})
#: sympy looks for common factors of the summands of these, again at each level: how many summands there may be.
_DIVISIONS: Final = {
    **dict.fromkeys(("torch.FloorDiv", "torch.CleanDiv", "torch.CeilDiv", "torch.ModularIndexing"), 64),
    **dict.fromkeys(("torch.PythonMod", "torch.Mod", "sympy.Mod"), 16),
}
_MAX_DIVISIONS: Final = 16  # levels
_MAX_EXPONENT: Final = 16
#: Degree of an expression as a polynomial: with sizes of 64 bits its value has 64 times as many bits at most.
_MAX_DEGREE: Final = 64
#: Summands of one expression once it is expanded, which ShapeEnv does.
_MAX_TERMS: Final = 1000
#: Characters of one stride.
_MAX_STRIDE: Final = 4000


def _functions() -> dict[str, Any]:
    table: dict[str, Any] = {f"sympy.{name}": getattr(sympy, name) for name in _SYMPY if hasattr(sympy, name)}
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


class _Size(NamedTuple):
    """How large an expression can become when it is evaluated or expanded."""

    degree: int
    terms: int
    divisions: int
    """Levels of division within one another."""


_ATOM: Final = _Size(1, 1, 0)


def decode(data: Any, symbols: dict[str, sympy.Symbol], budget: Budget) -> Any:
    """The expression that :func:`encode` described, over ``symbols`` (by name).

    Raises:
        WireError: for anything else, and for one that would take long to build, to evaluate or to expand.
    """
    functions = _functions()

    def build(node: Any, depth: int) -> tuple[Any, _Size]:
        budget.spend("expression nodes")
        if depth > _MAX_DEPTH:
            raise WireError("an expression of the reply is nested too deeply")
        match node:
            case ["bool", bool(value)]:
                return (sympy.true if value else sympy.false), _ATOM
            case ["int", int(value)] if type(value) is int and value.bit_length() <= MAX_BITS:
                return sympy.Integer(value), _ATOM
            case ["rational", int(p), int(q)] if q > 0 and max(p.bit_length(), q.bit_length()) <= MAX_BITS:
                return sympy.Rational(p, q), _ATOM
            case ["float", float(value)]:
                return sympy.Float(value), _ATOM
            case ["symbol", str(name)]:
                if name not in symbols:
                    raise WireError(f"an expression of the reply names the unknown symbol {shown(name)}")
                return symbols[name], _ATOM
            case ["call", str(name), list(arguments)] if name in functions:
                if len(arguments) > (_MAX_COMPARED if name in _COMPARED else _MAX_ARGUMENTS):
                    raise WireError(f"{name} with {len(arguments)} arguments")
                made = [build(argument, depth + 1) for argument in arguments]
                size = _size(name, made)
                if size.degree > _MAX_DEGREE or size.terms > _MAX_TERMS or size.divisions > _MAX_DIVISIONS:
                    raise WireError(f"{name} of the reply is too large")
                return functions[name](*(item for item, _ in made)), size
            case _:
                raise WireError(f"an expression of the reply is malformed: {shown(node)}")

    try:
        made, size = build(data, 0)
        budget.spend("terms", size.terms)
        return made
    except WireError:
        raise
    except Exception as error:  # noqa: BLE001 - sympy raises whatever it likes on nonsense arguments
        raise WireError(f"an expression of the reply cannot be built: {type(error).__name__}") from None


def _size(name: str, arguments: list[tuple[Any, _Size]]) -> _Size:
    """An upper bound, before sympy computes anything."""
    sizes = [size for _, size in arguments]
    degree, terms, divisions = (max((size[n] for size in sizes), default=0) for n in range(3))
    if name in _POWERS or name in _SHIFTS:
        if len(arguments) != 2 or not arguments[1][0].is_number:
            # No guard of Inductor raises to a power, or shifts by, what is not known.
            raise WireError(f"{name} needs a constant")
        exponent = abs(float(arguments[1][0]))
        if not exponent <= (_MAX_EXPONENT if name in _POWERS else MAX_BITS):
            raise WireError(f"{name} with a constant that is too large")
        if name in _SHIFTS:
            return _Size(degree + 4, terms, divisions)
        whole = max(1, int(exponent))
        # The terms are bounded before the power is taken: 1000 ** 16 has only 160 bits.
        return _Size(degree * whole, int(terms**whole), divisions)
    if name == "sympy.Mul":
        product = 1
        for size in sizes:
            product = min(product * size.terms, _MAX_TERMS + 1)
        return _Size(sum(size.degree for size in sizes), product, divisions)
    if name == "sympy.Add":
        return _Size(degree, sum(size.terms for size in sizes), divisions)
    if name in _DIVISIONS:
        if terms > _DIVISIONS[name]:
            raise WireError(f"{name} of too many summands")
        divisions += 1
    return _Size(degree, terms, divisions)


def check_stride(text: Any, symbols: frozenset[str], budget: Budget) -> str:
    """A stride as Inductor prints it, proven to be small arithmetic over known names: torch evaluates it later.

    Raises:
        WireError: for anything that is not.
    """
    if not isinstance(text, str) or len(text) > _MAX_STRIDE:
        raise WireError(f"a stride of the reply is not an expression: {shown(text)}")
    if text.isascii() and text.isdecimal() and len(text) <= 20:
        return text
    try:
        tree = ast.parse(text, mode="eval")
        budget.spend("expression nodes", sum(1 for _ in ast.walk(tree)))
        degree = _degree(tree.body, symbols)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise WireError(f"a stride of the reply cannot be read: {shown(text)}: {type(error).__name__}") from None
    if degree > _MAX_DEGREE:
        raise WireError(f"a stride of the reply is too large: {shown(text)}")
    return text


#: What PythonPrinter writes for sympy's and torch's functions: names that a stride may call.
_CALLS: Final = frozenset(
    {"max", "min", "int", "float", "abs", "round", "math.ceil", "math.floor", "math.trunc", "math.sqrt"}
    | {f"torch.sym_{name}" for name in ("max", "min", "int", "float", "ite", "not", "sqrt")}
    | {"torch._sym_sqrt"}
)
_OPERATORS: Final = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Div, ast.Mod)


def _degree(node: ast.expr, symbols: frozenset[str]) -> int:
    """How many times 64 bits the value can have at most, see :data:`_MAX_DEGREE`. WireError if it is no arithmetic."""
    match node:
        case ast.Constant(value=int() | float() as value):
            if isinstance(value, int) and value.bit_length() > MAX_BITS:
                raise WireError("a stride of the reply holds too large a number")
            return 1
        case ast.Name(id=name) if name in symbols:
            return 1
        case ast.UnaryOp(operand=operand):
            return _degree(operand, symbols)
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int(exponent))) if 0 < exponent <= 16:
            return _degree(left, symbols) * exponent
        case ast.BinOp(left=left, op=operator, right=right) if isinstance(operator, _OPERATORS):
            one, two = _degree(left, symbols), _degree(right, symbols)
            return one + two if isinstance(operator, ast.Mult) else max(one, two)
        case ast.Compare(left=left, comparators=others):
            return max(_degree(item, symbols) for item in (left, *others))
        case ast.BoolOp(values=values):
            return max(_degree(item, symbols) for item in values)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return max(_degree(item, symbols) for item in (test, body, orelse))
        case ast.Call(func=ast.Name(id="round"), args=[_, digits]) if not isinstance(digits, ast.Constant):
            pass  # `round(1, -(10**9))` computes that power
        case ast.Call(func=ast.Name() | ast.Attribute(value=ast.Name()) as function, args=arguments, keywords=[]) if (
            ast.unparse(function) in _CALLS
        ):
            return max((_degree(item, symbols) for item in arguments), default=1)
    raise WireError("a stride of the reply is not plain arithmetic")
