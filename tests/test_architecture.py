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


# What each stage may import of this package besides its own modules; with the stages, what
# shares their work out and shows how far it is.
STAGES = {
    "datasets": {"errors", "fetch", "library_logs", "locks", "paths"},
    "image_cache": {"config", "paths"},
    "input_pipeline": {
        "config",
        "datasets",
        "datasets.decoding",
        "datasets.files",
        "datasets.masks",
        "datasets.records",
        "errors",
        "image_cache",
        "paths",
    },
    "progress": {
        "config",
        "datasets.files",
        "datasets.records",
        "errors",
        "image_cache",
        "input_pipeline",
        "parallel",
    },
    "models": {"errors", "fetch", "locks"},
    "parallel": {"errors", "types"},
    "interpolation": set(),
    "embedding": {"interpolation", "types"},
    "reduction": {"interpolation", "types"},
    "gaussian": {"types"},
    "low_rank": {"types"},
    "scoring": {"interpolation", "types"},
    "metrics": {"errors"},
    "figures": {"errors", "paths"},
    # Of a pretraining, whose stages build upon each other.
    "pretrain.config": {"checks", "errors", "models", "paths"},
    "pretrain.defaults": set(),
    "pretrain.textures": set(),
    "pretrain.scenes": {"pretrain.textures"},
    "pretrain.inspection": set(),
    "pretrain.redundancy": set(),
    "pretrain.network": {"models", "models.resnet", "parallel"},
    "pretrain.training": {
        "models",
        "parallel",
        "pretrain.config",
        "pretrain.inspection",
        "pretrain.network",
        "pretrain.redundancy",
        "pretrain.scenes",
        "pretrain.textures",
    },
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


@pytest.mark.parametrize(
    "stage", ["interpolation", "embedding", "reduction", "gaussian", "low_rank", "scoring"]
)
def test_numeric_stages_import_jax_and_numpy_only(stage):
    assert libraries(f"{FACADE}.{stage}") <= {"jax", "numpy", "jaxtyping"}


# What a pretraining draws and learns; `run` and `saving` beside it read and write.
LEARNING = ["textures", "scenes", "inspection", "redundancy", "network", "training"]


@pytest.mark.parametrize("stage", LEARNING)
def test_pretraining_is_pure_but_for_its_run(stage):
    module = f"{FACADE}.pretrain.{stage}"
    assert libraries(module) <= {"flax", "jax", "jaxtyping", "numpy", "optax"}
    standard = {name.partition(".")[0] for name, _ in IMPORTS[module]} & sys.stdlib_module_names
    assert standard <= {"collections", "dataclasses", "functools", "math", "typing"}
    # Without an import one could still do this.
    files = {"open", "load", "save", "savez", "fromfile", "tofile"}
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {call.id for call in calls if isinstance(call, ast.Name)}
    called |= {call.attr for call in calls if isinstance(call, ast.Attribute)}
    assert not called & files


def test_pretraining_stands_apart():
    pretrain = f"{FACADE}.pretrain"
    importers = {
        name
        for name in MODULES
        if not within(name, pretrain)
        and any(within(found, pretrain) for found, _ in IMPORTS[name])
    }
    assert importers == {f"{FACADE}.main"}
    used = {name for name in our_modules(f"{FACADE}.main") if within(name, pretrain)}
    assert used - {pretrain} == {f"{pretrain}.config", f"{pretrain}.run"}


@pytest.mark.parametrize(
    ("imported", "owners"),
    [
        ("absl.app", "main"),
        ("absl.flags", "main"),
        ("ml_collections.config_flags", "main"),
        ("padim_jax.api", ""),  # but by the facade
        ("padim_jax.experiment", "api main sweep"),
        ("padim_jax.main", ""),
        ("padim_jax.pretrain.run", "main"),
        ("padim_jax.sweep", "main"),
        (
            "padim_jax.fitting",
            "api evaluation experiment growing results_folder sweep thresholding",
        ),
        ("padim_jax.distributed", "main"),
        ("filelock", "locks"),
        ("optax", "pretrain.training"),
        ("orbax", "checkpoint pretrain.saving"),
        ("psutil", "memory"),
        ("jax.sharding", "parallel"),
        ("jax.experimental.multihost_utils", "parallel"),
        ("jax.experimental.shard_map", "parallel"),
    ],
)
def test_imported_by_its_owners_only(imported, owners):
    importers = {
        name for name in MODULES if any(within(found, imported) for found, _ in IMPORTS[name])
    }
    assert importers <= {f"{FACADE}.{owner}" for owner in owners.split()}


# What tells devices and processes apart, by the last part of its name.
DEVICES = {
    *("pmap", "shard_map", "Mesh", "NamedSharding", "PartitionSpec", "multihost_utils"),
    *("SingleDeviceSharding", "PositionalSharding", "make_mesh", "set_mesh"),
    *("devices", "local_devices", "device_count", "local_device_count", "default_backend"),
    *("device_put", "device_put_sharded", "device_put_replicated", "default_device"),
    *("process_index", "process_count", "host_id", "host_count"),
    *("psum", "pmean", "pmax", "pmin", "all_gather", "all_to_all", "ppermute", "axis_index"),
    *("psum_scatter", "axis_size", "memory_stats"),
}


def names(tree: ast.AST) -> Iterator[str]:
    """Names in a source that stand for something of JAX: `jax.pmap`, `lax.psum`, `Mesh`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root = node.value
            while isinstance(root, ast.Attribute | ast.Call | ast.Subscript):
                root = root.func if isinstance(root, ast.Call) else root.value
            if isinstance(root, ast.Name) and root.id in ("jax", "lax"):
                yield node.attr
        elif isinstance(node, ast.ImportFrom) and within(node.module or "", "jax"):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_parallel_is_the_only_module_that_knows_devices(module):
    found = DEVICES & set(names(ast.parse(SOURCES[module].read_text(encoding="utf-8"))))
    if module == f"{FACADE}.parallel":
        # What the test looks for is found where it is.
        assert {"pmap", "all_to_all", "NamedSharding", "local_devices"} <= found
    else:
        assert not found


@pytest.mark.parametrize("module", SOURCES)
def test_torch_is_imported_on_demand_only(module):
    eager = {name for name, lazy in IMPORTS[module] if not lazy}
    assert not any(within(name, "torch") or within(name, "torchvision") for name in eager)


# Checking a configuration, listing a dataset and showing --help are to be quick.
LIGHT = [
    *("", "checks", "config", "defaults", "errors", "figures", "main", "metrics", "models"),
    *("datasets", "pretrain", "pretrain.config", "pretrain.defaults"),
]
HEAVY = ["flax", "grain", "jax", "matplotlib", "optax", "orbax", "tensorflow", "torch"]


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
