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
# The rooms, each above those that it may import. Rooms of one floor do not import each other.
FLOORS = (
    ("errors",),
    ("core", "system"),
    ("devices", "config"),
    ("models", "data"),
    ("detector",),
    ("store", "export", "output"),
    ("runs",),
    ("api", "main"),
    ("loading",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `import padim_jax` offers its contents on first use; it stands above all rooms. Every room
# may read the version there.
FACADE = "padim_jax"
MODULES = [name for name in SOURCES if name != FACADE]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def our_modules(importer: str) -> set[str]:
    """Modules of this package that a module imports, lazily or not."""
    names = [name for name, _ in IMPORTS[importer] if within(name, FACADE)]
    # `from package import name` means the module of that name, or else the package.
    return {name if name in SOURCES else name.rpartition(".")[0] for name in names}


def room(module: str) -> str:
    return module.split(".")[1]


def libraries(importer: str) -> set[str]:
    names = {name.partition(".")[0] for name, _ in IMPORTS[importer]}
    return names - sys.stdlib_module_names - {FACADE}


def test_imports_form_no_cycle():
    graph = {name: our_modules(name) - {name, FACADE} for name in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_a_room_imports_rooms_below_it_only():
    """errors <- core, system <- devices, config <- models, data <- detector <- ... <- main."""
    for module in MODULES:
        others = {name for name in our_modules(module) - {FACADE} if room(name) != room(module)}
        if module == f"{FACADE}.main":
            assert "api" not in map(room, others)
        else:
            assert {
                name for name in others if FLOOR[room(name)] >= FLOOR[room(module)]
            } == set(), module


def test_the_core_is_the_paper():
    """Arrays in, arrays out: no file, device, process or print."""
    for module in (name for name in MODULES if room(name) == "core"):
        assert libraries(module) <= {"contourpy", "jax", "numpy", "jaxtyping", "scipy"}, module
        standard = {name.partition(".")[0] for name, _ in IMPORTS[module]}
        assert not standard & {"io", "os", "pathlib", "shutil", "subprocess", "sys"}, module
        tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
        calls = {
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"open", "print", "input"}, module


@pytest.mark.parametrize(
    ("imported", "owners"),
    [
        ("absl.app", "main"),
        ("absl.flags", "runs"),
        ("ml_collections.config_flags", "runs"),
        ("filelock", "system"),
        ("orbax", "store"),
        ("jax.sharding", "devices"),
        ("jax.experimental.multihost_utils", "devices"),
        ("jax.experimental.shard_map", "devices"),
    ],
)
def test_imported_by_its_room_only(imported, owners):
    importers = {name for name in MODULES if any(within(x, imported) for x, _ in IMPORTS[name])}
    assert {room(name) for name in importers} <= set(owners.split())


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


def test_devices_is_the_only_room_that_knows_devices():
    for module in MODULES:
        found = DEVICES & set(names(ast.parse(SOURCES[module].read_text(encoding="utf-8"))))
        if room(module) == "devices":
            # What the test looks for is found where it is.
            if module == f"{FACADE}.devices.mapping":
                assert {"pmap", "all_to_all", "NamedSharding"} <= found
        else:
            assert not found, module


def test_torch_is_imported_on_demand_only():
    for module in SOURCES:
        eager = {name for name, lazy in IMPORTS[module] if not lazy}
        assert not any(
            within(name, "torch") or within(name, "torchvision") for name in eager
        ), module


# Checking a configuration, listing a dataset and showing --help are to be quick.
LIGHT = [
    *("", "config.settings", "config.defaults", "errors", "main", "core.metrics"),
    "output.figures",
]
HEAVY = ["flax", "jax", "matplotlib", "optax", "orbax", "tensorflow", "torch"]


def test_light_modules_do_not_bring_heavy_libraries():
    names = [f"{FACADE}.{name}".rstrip(".") for name in LIGHT]
    names += [name for name in MODULES if within(name, f"{FACADE}.data.layouts")]
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
    argument = json.dumps([HEAVY, names, f"{FACADE}.data.packing"])
    process = subprocess.run(
        [sys.executable, "-c", code, argument], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout)
    assert found == {name: [] for name in found}
