"""Who may import whom, read from the source of every module that is there."""

import ast
import graphlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(node: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether only a function's call imports it) of every import."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, lazy) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute, so that this test can read them"
            yield from ((f"{child.module}.{alias.name}", lazy) for alias in child.names)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from imports(child, lazy or function)


SOURCES = {module_name(path): path for path in sorted((ROOT / "padim_jax").rglob("*.py"))}
IMPORTS = {
    name: list(imports(ast.parse(path.read_text(encoding="utf-8"))))
    for name, path in SOURCES.items()
}
# `import padim_jax` offers its contents on first use; it stands above all modules.
FACADE = "padim_jax"
MODULES = [name for name in SOURCES if name != FACADE]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def our_modules(importer: str) -> set[str]:
    """Modules of this package that a module imports, lazily or not."""
    names = [name for name, _ in IMPORTS[importer] if within(name, FACADE)]
    # `from package import name` means the module of that name, or else the package.
    return {name if name in SOURCES else name.rpartition(".")[0] for name in names}


def libraries(importer: str) -> set[str]:
    names = {name.partition(".")[0] for name, _ in IMPORTS[importer]}
    return names - sys.stdlib_module_names - {FACADE}


def test_imports_form_no_cycle():
    graph = {name: our_modules(name) - {name, FACADE} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


# What each stage may import of this package besides its own modules.
STAGES = {
    "datasets": {"errors"},
    "image_cache": {"config"},
    "input_pipeline": {
        "config",
        "datasets.files",
        "datasets.records",
        "errors",
        "image_cache",
    },
    "models": {"errors"},
    "embedding": {"types"},
    "gaussian": {"types"},
    "low_rank": {"types"},
    "scoring": {"types"},
    "metrics": {"errors"},
    "figures": {"errors"},
}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_import_each_other(stage):
    package = f"{FACADE}.{stage}"
    members = [name for name in MODULES if within(name, package)]
    assert members
    allowed = {f"{FACADE}.{name}" for name in STAGES[stage]}
    for member in members:
        others = {name for name in our_modules(member) if not within(name, package)}
        assert others <= allowed, member


@pytest.mark.parametrize("stage", ["embedding", "gaussian", "low_rank", "scoring"])
def test_numeric_stages_import_jax_and_numpy_only(stage):
    assert libraries(f"{FACADE}.{stage}") <= {"jax", "numpy", "jaxtyping"}


@pytest.mark.parametrize(
    ("imported", "owner"),
    [
        ("absl.app", "main"),
        ("absl.flags", "main"),
        ("ml_collections.config_flags", "main"),
        ("padim_jax.experiment", "main"),
        ("padim_jax.main", None),
        ("orbax", "checkpoint"),
        ("psutil", "memory"),
    ],
)
def test_imported_by_its_owner_only(imported, owner):
    importers = {
        name for name in MODULES if any(within(found, imported) for found, _ in IMPORTS[name])
    }
    assert importers <= {f"{FACADE}.{owner}"}


@pytest.mark.parametrize("module", SOURCES)
def test_torch_is_imported_on_demand_only(module):
    eager = {name for name, lazy in IMPORTS[module] if not lazy}
    assert not any(within(name, "torch") or within(name, "torchvision") for name in eager)


# Checking a configuration, listing a dataset and showing --help are to be quick.
LIGHT = ["", "config", "defaults", "errors", "figures", "main", "metrics", "models", "datasets"]
HEAVY = ["flax", "grain", "jax", "matplotlib", "orbax", "tensorflow", "torch"]


def test_light_modules_do_not_bring_heavy_libraries():
    names = [f"{FACADE}.{name}".rstrip(".") for name in LIGHT]
    names += [name for name in MODULES if within(name, f"{FACADE}.datasets")]
    # Last, since TensorFlow Datasets is this module's purpose.
    names.remove(f"{FACADE}.datasets.tfds_builder")
    code = """if True:
        import importlib, json, sys
        heavy, names, builder = json.loads(sys.argv[1])
        found = {}
        for name in names:
            importlib.import_module(name)
            found[name] = [x for x in [*heavy, "tensorflow_datasets"] if x in sys.modules]
        importlib.import_module(builder)
        found[builder] = [x for x in heavy if x in sys.modules]
        print(json.dumps(found))
    """
    argument = json.dumps([HEAVY, names, f"{FACADE}.datasets.tfds_builder"])
    process = subprocess.run(
        [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found == {name: [] for name in found}
