"""Triton kernels as the user wrote them, on their way to a child: rebuilt there from their source.

Neither their module nor the user's script is imported: what they name travels with them.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import linecache
import re
import sys
import textwrap
import types
from collections.abc import Iterable
from typing import Any, Final

from sandbox.errors import UnserializableError
from sandbox.inductor import pickling

_LAYERS: Final = ("Autotuner", "Heuristics")
_FUNCTIONS: Final = ("JITFunction", "ConstexprFunction")
_NO_BUILTIN: Final = object()


def kernel_data(kernel: Any, seen: dict[int, str]) -> dict[str, Any]:
    """A kernel as data that pickles: source, options and the globals it names, nested kernels included."""
    kind = type(kernel).__name__
    if kind in _LAYERS:
        return {"kind": kind, "fn": kernel_data(kernel.fn, seen), "fields": _layer_fields(kernel)}
    if kind not in _FUNCTIONS:
        raise UnserializableError("triton_kernel", f"{kind} is neither a jit function, an autotuner nor heuristics")
    if id(kernel) in seen:
        return {"kind": "Seen", "name": seen[id(kernel)]}
    function = kernel.fn
    label = f"{function.__module__}.{function.__qualname__}.{len(seen)}"
    seen[id(kernel)] = label
    return {
        "kind": kind,
        "label": label,
        "name": function.__name__,
        "qualname": function.__qualname__,
        "module": function.__module__,
        "file": function.__code__.co_filename,
        "line": int(getattr(kernel, "starting_line_number", 1)),
        "source": kernel.src,
        "raw": getattr(kernel, "raw_src", None),
        "options": {
            name: getattr(kernel, name, None)
            for name in ("do_not_specialize", "do_not_specialize_on_alignment", "debug", "noinline")
        },
        "repr": _repr_of(kernel),
        "globals": _globals_of(function, kernel.src, seen),
        "defaults": function.__defaults__,
        "keyword_defaults": function.__kwdefaults__,
    }


def _repr_of(kernel: Any) -> Any:
    """What names the kernel in the binary, where the user has a function for that."""
    function = getattr(kernel, "_repr", None)
    try:
        pickling.dumps(function)
    except UnserializableError as error:
        raise UnserializableError("triton_kernel", f"{kernel.fn.__name__}, its `repr`: {error}") from None
    return function


def _layer_fields(layer: Any) -> dict[str, Any]:
    """The attributes of an autotuner or of heuristics, without caches and without hooks that triton made itself."""
    fields = {}
    for name, value in vars(layer).items():
        if name in ("fn", "base_fn", "cache", "do_bench", "_do_bench", "nargs", "bench_time"):
            continue
        if name in ("pre_hook", "post_hook") and not getattr(layer, f"user_defined_{name}", False):
            # Closures over the autotuner; they only run when it benchmarks, which a child does not.
            continue
        try:
            pickling.dumps(value)
        except UnserializableError as error:
            raise UnserializableError("triton_kernel", f"{type(layer).__name__}.{name}: {error}") from None
        fields[name] = value
    return fields


def _tree(source: str) -> ast.FunctionDef:
    (tree,) = (node for node in ast.parse(textwrap.dedent(source)).body if isinstance(node, ast.FunctionDef))
    return tree


def _named(parts: Iterable[ast.AST | None]) -> set[str]:
    return {node.id for part in parts if part is not None for node in ast.walk(part) if isinstance(node, ast.Name)}


def _around(tree: ast.FunctionDef) -> set[str]:
    """Names in defaults and annotations: the child asks for them when it defines the function, not later."""
    arguments = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs, tree.args.vararg, tree.args.kwarg]
    annotations = (one.annotation for one in arguments if one is not None)
    return _named((*tree.args.defaults, *tree.args.kw_defaults, tree.returns, *annotations))


def _outside(function: Any, source: str) -> dict[str, tuple[Any, bool]]:
    """What the function takes from outside, by name, and whether it surely does: Triton reads a global of the name of a
    local variable, too, until that is set."""
    known = dict(function.__globals__)
    if function.__closure__:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            known[name] = cell.cell_contents
    tree, code = _tree(source), function.__code__
    parameters = code.co_argcount + code.co_kwonlyargcount
    sure = _around(tree) | set(code.co_freevars) | {"tl", "triton"}
    sure |= {word for value in function.__annotations__.values() if isinstance(value, str) for word in _words(value)}
    body = _named(tree.body) - set(code.co_varnames[:parameters])
    local = set(code.co_varnames[parameters:]) | set(code.co_cellvars)
    return {
        name: (known[name], name in sure or name not in local)
        for name in sorted(sure | body)
        if name in known and known[name] is not getattr(builtins, name, _NO_BUILTIN)
    }


def _globals_of(function: Any, source: str, seen: dict[int, str]) -> dict[str, Any]:
    """Each of them, as `(how, what)`."""
    found: dict[str, Any] = {}
    for name, (value, sure) in _outside(function, source).items():
        if isinstance(value, types.ModuleType):
            found[name] = ("module", value.__name__)
        elif hasattr(value, "src") and hasattr(value, "fn"):
            found[name] = ("kernel", kernel_data(value, seen))
        else:
            try:
                pickling.dumps(value)
            except UnserializableError as error:
                if not sure:
                    continue
                raise UnserializableError("triton_kernel", f"{function.__name__} uses {name}: {error}") from None
            found[name] = ("value", value)
    return found


def digest(kernel: Any) -> str:
    """SHA-256 of a kernel and those it calls: equal for the original and for what is rebuilt from its data, after
    :func:`as_written`. (Triton's own `cache_key` also depends on which kernels were asked for theirs before.)"""
    parts: list[str] = []
    _add(kernel, parts, set())
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()


def _add(kernel: Any, parts: list[str], seen: set[int]) -> None:
    if id(kernel) in seen:
        return
    seen.add(id(kernel))
    function = kernel.fn
    facts = (function.__module__, function.__qualname__, kernel.starting_line_number, getattr(kernel, "noinline", None))
    parts.append(f"{type(kernel).__name__} {facts} {kernel.src}")
    for name, (value, _) in _outside(function, kernel.src).items():
        if type(value).__name__ in _FUNCTIONS:
            parts.append(name)
            _add(value, parts, seen)
        elif type(value).__name__ == "constexpr" and isinstance(value.value, bool | int | float | str | None):
            parts.append(f"{name} = {value.value!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z_][A-Za-z0-9_]*", text)


def _no_hook(*args: Any, **kwargs: Any) -> None:
    """Stands for the hooks that triton makes for an autotuner."""


def make_kernel(data: dict[str, Any], made: dict[str, Any]) -> Any:
    """Rebuild a kernel from :func:`kernel_data`. In a child."""
    import triton
    import triton.runtime.autotuner as autotuner
    import triton.runtime.jit as jit

    if data["kind"] == "Seen":
        return made[data["name"]]
    if data["kind"] in _LAYERS:
        cls = getattr(autotuner, data["kind"])
        layer = cls.__new__(cls)
        vars(layer).update(data["fields"])
        layer.fn = make_kernel(data["fn"], made)
        if data["kind"] == "Autotuner":
            layer.cache, layer.nargs = {}, None
            layer._do_bench = None
            vars(layer).setdefault("pre_hook", _no_hook)
            vars(layer).setdefault("post_hook", _no_hook)
        base = layer.fn
        while type(base).__name__ in _LAYERS:
            base = base.fn
        layer.base_fn = base.fn if hasattr(base, "fn") else base
        return layer
    if data["label"] in made:
        return made[data["label"]]
    # A file name of its own: `inspect` finds the source in linecache, wherever the child runs.
    file = f"<sandboxed {data['file']}:{data['line']}:{data['name']}>"
    source = textwrap.dedent(data["source"])
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = types.ModuleType(f"sandboxed_kernel_{len(made)}_{data['name']}")
    sys.modules[module.__name__] = module
    namespace = vars(module)
    namespace.update({"triton": triton, "tl": triton.language, "__file__": file})
    pending = {}
    for name, (how, what) in data["globals"].items():
        if how == "kernel":
            pending[name] = what
        else:
            namespace[name] = __import__(what, fromlist=["_"]) if how == "module" else what
    # Variables of the function around it, perhaps, which are known by their values only.
    unknown = dict.fromkeys(_around(_tree(source)) - namespace.keys() - vars(builtins).keys())
    namespace.update(unknown)
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    for name in unknown:
        del namespace[name]
    function = namespace[data["name"]]
    function.__defaults__, function.__kwdefaults__ = data["defaults"], data["keyword_defaults"]
    options = {name: value for name, value in data["options"].items() if value is not None}
    kernel = jit.JITFunction(function, **options) if data["kind"] == "JITFunction" else jit.ConstexprFunction(function)
    if data["repr"] is not None:
        kernel._repr = data["repr"]
    made[data["label"]] = kernel
    namespace[data["name"]] = kernel
    for name, nested in pending.items():
        namespace[name] = make_kernel(nested, made)
    return kernel


def as_written(data: dict[str, Any], made: dict[str, Any]) -> None:
    """Give rebuilt kernels the full names, the files and the lines of the originals, which Triton writes into what it
    makes of them.

    Args:
        data, made: of :func:`make_kernel`.
    """
    if "fn" in data:
        as_written(data["fn"], made)
    if data["kind"] not in _FUNCTIONS:
        return
    kernel = made[data["label"]]
    function = kernel.fn
    function.__code__ = function.__code__.replace(co_filename=data["file"])
    function.__module__, function.__qualname__ = data["module"], data["qualname"]
    kernel.__module__, kernel.__qualname__ = data["module"], data["qualname"]
    kernel.module, kernel._fn_name = data["module"], f"{data['module']}.{data['qualname']}"
    if data["raw"] is not None:
        kernel.raw_src, kernel.starting_line_number = data["raw"], data["line"]
    for how, what in data["globals"].values():
        if how == "kernel":
            as_written(what, made)
