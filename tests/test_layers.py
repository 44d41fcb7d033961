"""The shape of the package: who imports whom, who may know torch, and what the public names are."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import sandbox
from sandbox import child

ROOT = Path(__file__).parents[1]

#: Every module, in layers. A module imports only from lines above its own; nobody imports from its own line.
LAYERS = """
    background errors explain limits memory processes results gpus scratch enforce.libc enforce.paths

    enforce.cgroups
    jobs                          # what is to be done
    artifacts ledger meter trackers   # files handed back; what is held; what is used
    origins reclaim footprint gpu_memory
    leftovers
    policy                        # what is allowed
    capsule                       # what a failed job leaves
    fallback quarantine report    # the decision, the memory of killers, the counts
    admission breaker quarantine_files    # who may start; what a restart does not forget

    envelopes opcodes
    unpickle sealed
    wire                          # frames, and all that reads them

    enforce.identity enforce.landlock enforce.namespaces enforce.privileges enforce.rlimits enforce.seccomp
    enforce
    enforce.__main__

    callables
    child                         # the worker
    init
    keeper verdict hugepages
    template
    forkserver                    # from here on: in the parent
    launch
    standby
    monitor
    executor

    faults.kinds                  # faults on purpose, see sandbox/faults/__init__.py
    faults.inside                 # in the template

    triton inductor
    triton.kernel inductor.compat inductor.budget inductor.failures inductor.philox inductor.totals
    inductor.counting inductor.devices inductor.eager inductor.expressions inductor.groups inductor.identity
    inductor.helpers
    inductor.kernels inductor.logs inductor.registrations inductor.tensors inductor.workers inductor.deferred
    inductor.constants inductor.inflight inductor.outputcode inductor.cached inductor.traced
    inductor.pickling
    inductor.jitted inductor.aoti
    inductor.sidetable inductor.launch
    inductor.payload inductor.reply
    inductor.snapshot inductor.graph
    inductor.later                # compiles that nobody waits for
    inductor.compile              # the child's side
    inductor.samples              # the template's warm-up
    inductor.warmup
    inductor.job
    inductor.walk                 # the parent's side
    inductor.scheme
    inductor.launches
    inductor.install
    inductor.backend
    faults.injection              # in the parent
    faults faults.pytest           # and for the tests of users

    sandbox                       # the public API

    cli.output cli.models cli.bench.graphs
    cli.program cli.policy cli.quarantine cli.check cli.bench_corpus cli.faults_host
    cli.bench.summary
    cli.bench.compiles cli.bench.costs cli.bench.plot
    cli.bench.serving
    cli.bench.worker
    cli.doctor cli.bench cli.run cli.demo cli.replay cli.faults
    cli
    __main__
"""

#: What is imported by name, so that a process loads only what it needs: `importer: {imported}`.
BY_NAME = {
    "sandbox.template": {
        "sandbox.callables",
        "sandbox.inductor.job",
        "sandbox.inductor.warmup",
    },
}
#: Modules that may import these packages when they are imported themselves, and those that may do so in a function.
HEAVY = ("torch", "triton", "transformers")
HEAVY_AT_TOP = (
    "sandbox.inductor",
    "sandbox.triton",
    "sandbox.cli.models",
    "sandbox.cli.check",
    "sandbox.cli.bench.graphs",
)
HEAVY_IN_FUNCTIONS = (*HEAVY_AT_TOP, "sandbox.cli")
#: Private names of torch outside `sandbox.inductor.compat`. Each is documented by PyTorch, or is what is measured.
PRIVATE = {
    ("sandbox.cli.bench.compiles", "torch._dynamo"),
    ("sandbox.cli.bench.compiles", "torch._inductor.compile_fx"),
}
PUBLIC = [
    "CompileFailed",
    "Confinement",
    "JobResult",
    "Limits",
    "Policy",
    "PolicyError",
    "Sandbox",
    "SandboxError",
    "Stats",
    "Status",
    "__version__",
    "callable_job",
    "graph_job",
    "install",
    "stats",
    "triton_job",
    "uninstall",
    "wait",
]


@dataclass(frozen=True)
class Import:
    """One import statement's target."""

    name: str
    top: bool
    """Whether it runs when the module is imported. False in a function, and under `if TYPE_CHECKING`."""


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the package, by dotted name."""
    found = {}
    for path in sorted((ROOT / "sandbox").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def imports(module: str) -> list[Import]:
    """What ``module`` imports, wherever in it; `from package import module` is an import of the module."""
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}:{node.lineno}: a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                inside = full in modules() or (node.module == "torch" and alias.name.startswith("_"))
                found.append(Import(full if inside else node.module, top))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            top = False
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for inner in node.body:
                visit(inner, False)
            for inner in node.orelse:
                visit(inner, top)
            return
        for inner in ast.iter_child_nodes(node):
            visit(inner, top)

    visit(tree(module), True)
    return found


def ranks() -> dict[str, int]:
    """Line of each module in ``LAYERS``."""
    found: dict[str, int] = {}
    for number, line in enumerate(LAYERS.splitlines()):
        for word in line.partition("#")[0].split():
            name = word if word == "sandbox" else f"sandbox.{word}"
            assert name not in found, f"{name} stands twice in LAYERS"
            found[name] = number
    return found


def below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_every_module_has_its_line() -> None:
    assert sorted(ranks()) == sorted(modules())


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_lines_above(module: str) -> None:
    rank = ranks()
    ours = {each.name for each in imports(module) if below(each.name, "sandbox")}
    unknown = ours - set(modules())
    assert not unknown, f"{module} imports {sorted(unknown)}, which are no modules of the package"
    wrong = sorted(name for name in ours if rank[name] >= rank[module])
    assert not wrong, f"{module} imports {wrong}, which stand on its own line of LAYERS or below it"


def test_imports_by_name_are_told() -> None:
    """`importlib.import_module("sandbox...")` with a constant name; the handlers of the job kinds stand in a table."""
    found: dict[str, set[str]] = {}
    for module in modules():
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                for argument in node.args:
                    if isinstance(argument, ast.Constant) and below(str(argument.value), "sandbox"):
                        found.setdefault(module, set()).add(str(argument.value))
    assert found == BY_NAME
    by_name = [*child.HANDLERS.values(), *(name for names in BY_NAME.values() for name in names)]
    assert set(by_name) <= set(modules())
    for name in child.HANDLERS.values():
        functions = {node.name for node in tree(name).body if isinstance(node, ast.FunctionDef)}
        assert "prepare" in functions, f"{name} lacks the function that the worker calls"


def test_only_some_modules_know_torch() -> None:
    wrong = [
        f"{module} imports {each.name}{'' if each.top else ' in a function'}"
        for module in modules()
        for each in imports(module)
        if below(each.name, *HEAVY) and not below(module, *(HEAVY_AT_TOP if each.top else HEAVY_IN_FUNCTIONS))
    ]
    assert not wrong


def test_what_stays_light_stays_light() -> None:
    """Importing the API, the command and every process's module but the compiler's brings no torch."""
    light = [
        "sandbox",
        "sandbox.cli",
        "sandbox.executor",
        "sandbox.template",
        "sandbox.callables",
        "sandbox.triton.kernel",
    ]
    code = f"import sys, {', '.join(light)}; print(sorted({set(HEAVY)} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def private_names(module: str) -> Iterator[str]:
    """Names of torch with a part that begins with one underscore, as imports, attributes and constant module names."""
    for each in imports(module):
        if below(each.name, "torch"):
            yield each.name
    inner: set[int] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and id(node) not in inner:
            value: ast.expr = node
            while isinstance(value, ast.Attribute):
                inner.add(id(value))
                value = value.value
            if isinstance(value, ast.Name) and value.id == "torch":
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(each.value) for each in node.args if isinstance(each, ast.Constant))


def test_private_names_of_torch_are_in_one_module() -> None:
    found = {
        (module, name)
        for module in modules()
        for name in private_names(module)
        if module != "sandbox.inductor.compat"
        and below(name, "torch")
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    }
    assert found - PRIVATE == set(), "say it in sandbox/inductor/compat.py instead"
    assert PRIVATE - found == set(), "no longer in use: take it off the list"


def test_the_public_names() -> None:
    assert sorted(sandbox.__all__) == PUBLIC
    assert set(sandbox._WHERE) == set(PUBLIC) - {"__version__"}
    for name, where in sandbox._WHERE.items():
        module, _, attribute = where.partition(":")
        assert attribute in defined(module), f"sandbox.{name}: {module} has no {attribute}"
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sandbox.no_such_name


def defined(module: str) -> set[str]:
    """Names that a module defines at its top, found without importing it."""
    found = set()
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_the_project_file_names_every_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = project["tool"]["setuptools"]["package-dir"]
    assert folders == {"sandbox.policies": "policies"}
    assert list((ROOT / folders["sandbox.policies"]).glob("*.toml"))
    holding = {".".join(path.relative_to(ROOT).parent.parts) for path in modules().values()}
    assert listed - set(folders) == holding
    for package in holding:
        assert package in modules(), f"{package} lacks its __init__.py"
    assert project["project"]["version"] == sandbox.__version__
    places = {**project["project"]["scripts"], **project["project"]["entry-points"]["torch_dynamo_backends"]}
    for place in places.values():
        module, _, name = place.partition(":")
        assert name in defined(module), f"{place} is not there"
