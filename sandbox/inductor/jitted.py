"""Triton kernels as the user wrote them, on their way to a child: rebuilt there from their source.

Neither their module nor the user's script is imported: what they name travels with them.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import re
import sys
import textwrap
import types
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


def _names(function: Any, source: str) -> set[str]:
    """The variables that the function takes from outside. Defaults and annotations are among them: the child asks for
    those when it defines the function, and Triton when it compiles it."""
    (tree,) = (node for node in ast.parse(textwrap.dedent(source)).body if isinstance(node, ast.FunctionDef))
    body = {node.id for part in tree.body for node in ast.walk(part) if isinstance(node, ast.Name)}
    arguments = (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)
    parts = (*tree.args.defaults, *tree.args.kw_defaults, tree.returns, *(one.annotation for one in arguments))
    around = {node.id for part in parts if part is not None for node in ast.walk(part) if isinstance(node, ast.Name)}
    code = function.__code__
    return (body - set(code.co_varnames)) | around | set(code.co_freevars)


def _globals_of(function: Any, source: str, seen: dict[int, str]) -> dict[str, Any]:
    """Each global that the function's code or annotations name, as `(how, what)`."""
    known = dict(function.__globals__)
    if function.__closure__:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True):
            known[name] = cell.cell_contents
    words = {word for value in function.__annotations__.values() if isinstance(value, str) for word in _words(value)}
    found: dict[str, Any] = {}
    for name in sorted(_names(function, source) | words | {"tl", "triton"}):
        if name not in known or known[name] is getattr(builtins, name, _NO_BUILTIN):
            continue
        value = known[name]
        if isinstance(value, types.ModuleType):
            found[name] = ("module", value.__name__)
        elif hasattr(value, "src") and hasattr(value, "fn"):
            found[name] = ("kernel", kernel_data(value, seen))
        else:
            try:
                pickling.dumps(value)
            except UnserializableError as error:
                raise UnserializableError("triton_kernel", f"{function.__name__} uses {name}: {error}") from None
            found[name] = ("value", value)
    return found


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
    exec(compile(source, file, "exec", dont_inherit=True), namespace)
    function = namespace[data["name"]]
    function.__defaults__ = data["defaults"]
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
