"""Imports point one way: service -> workers -> storage -> api; and what must not be imported, is not."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = {
    "gnomon": ROOT / "api/gnomon",
    "gnomon_storage": ROOT / "storage/gnomon_storage",
    "gnomon_workers": ROOT / "workers/gnomon_workers",
    "gnomon_service": ROOT / "service/gnomon_service",
}
ORDER = list(LAYERS)
ROOMS = {
    # from the top down: a room imports only what stands below it
    "gnomon_workers": [
        "attempts", "train", "evaluate", "dictionaries", "kernels", "checkpoints", "sae", "harvest", "parallel",
        "models", "runtime",
    ],
    "gnomon_service": [
        "__main__", "commands", "app", "rest", "local", "planning", "dispatch", "jobs", "tenancy", "db",
        "storage_root", "settings", "logs",
    ],
}  # fmt: skip
MAX_ROOMS = 13
"""Of a package: more is a heap, in which nobody finds anything."""
PICKLES = {"cloudpickle", "dill", "jsonpickle", "joblib", "pickle", "shelve"}
PICKLED_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("np", "save")}
SOURCES = sorted(path for folder in LAYERS.values() for path in folder.rglob("*.py"))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from package import room` names a room only there
            names = [f"{module}.{alias.name}" for alias in node.names] if module in LAYERS else [module]
            yield from ((node.lineno, name) for name in names)


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a file imports, anywhere in it."""
    return (name.partition(".")[0] for _, name in imported_modules(path))


def room_of(path: Path, package: str) -> str:
    """The folder below the package that a file lies in, or the file itself."""
    first = path.relative_to(LAYERS[package]).parts[0]
    return first.removesuffix(".py")


def faults_of(path: Path, package: str) -> list[str]:
    """Imports of a file that break the order of rooms, each as a sentence."""
    order, room = ROOMS[package], room_of(path, package)
    faults = []
    for line, module in imported_modules(path):
        parts = module.split(".")
        is_room = parts[0] == package and len(parts) > 1 and parts[1] in order
        if is_room and order.index(parts[1]) < order.index(room):
            faults.append(f"{label(path)}:{line} imports {module}, but {room!r} stands below {parts[1]!r}")
    return faults


def label(path: Path) -> str:
    """A short name for a test's id."""
    return str(path.relative_to(ROOT))


def test_every_layer_has_sources() -> None:
    assert all(any(path.is_relative_to(folder) for path in SOURCES) for folder in LAYERS.values())


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_point_one_way(path: Path) -> None:
    layer = next(name for name, folder in LAYERS.items() if path.is_relative_to(folder))
    above = set(ORDER[ORDER.index(layer) + 1 :])
    assert not above & set(imported(path)), f"{layer} imports what lies above it"


@pytest.mark.parametrize("package", ROOMS)
def test_every_room_has_a_place_in_the_order(package: str) -> None:
    rooms = {room_of(path, package) for path in SOURCES if path.is_relative_to(LAYERS[package])} - {"__init__"}
    assert rooms == set(ROOMS[package]), "say in ROOMS what it may import"
    assert len(rooms) <= MAX_ROOMS


@pytest.mark.parametrize("package", ROOMS)
def test_a_room_imports_only_what_stands_below_it(package: str) -> None:
    files = [path for path in SOURCES if path.is_relative_to(LAYERS[package]) and path.parent != LAYERS[package]]
    files += [LAYERS[package] / f"{room}.py" for room in ROOMS[package] if (LAYERS[package] / f"{room}.py").exists()]
    faults = [fault for path in files for fault in faults_of(path, package)]
    assert not faults, "\n".join(faults)


def test_an_import_upwards_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "gnomon_workers", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "sae").mkdir()
    file = tmp_path / "sae" / "step.py"
    file.write_text(
        "import math\nfrom gnomon_workers.train.step import TrainStep\nfrom gnomon_workers import kernels\n"
    )
    assert faults_of(file, "gnomon_workers") == [
        "sae/step.py:2 imports gnomon_workers.train.step, but 'sae' stands below 'train'",
        "sae/step.py:3 imports gnomon_workers.kernels, but 'sae' stands below 'kernels'",
    ]


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_no_pickle_anywhere(path: Path) -> None:
    assert not PICKLES & set(imported(path))
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in PICKLED_CALLS, f"line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant), f"line {node.value.lineno}"
            assert node.value.value is False, f"line {node.value.lineno}"


@pytest.mark.parametrize("path", [path for path in SOURCES if "sae" in path.parts], ids=label)
def test_mathematics_knows_neither_ray_nor_web(path: Path) -> None:
    assert not {"fastapi", "ray", "starlette"} & set(imported(path))


PROBE = """
import importlib, sys
{before}
for name in {modules!r}:
    importlib.import_module(name)
loaded = sorted(set({forbidden!r}) & set(sys.modules))
assert not loaded, loaded
"""
BLOCK = """
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def probe(*modules: str, forbidden: set[str], blocked: bool = False) -> None:
    """Import modules in a fresh interpreter and fail if that pulls in anything forbidden."""
    before = BLOCK.format(forbidden=forbidden) if blocked else ""
    program = PROBE.format(before=before, modules=modules, forbidden=forbidden)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


HEAVY = {"fastapi", "numpy", "obstore", "ray", "sqlalchemy", "torch", "zarr"}


def test_sdk_and_cli_need_only_the_base_install() -> None:
    modules = ["gnomon", "gnomon.client", "gnomon.async_client", "gnomon.cli", "gnomon.loading"]
    probe(*modules, "gnomon.specs", "gnomon.resources", forbidden=HEAVY, blocked=True)


def test_every_public_name_works_without_the_heavy_packages() -> None:
    program = BLOCK.format(forbidden=HEAVY) + "import gnomon; [getattr(gnomon, name) for name in gnomon.__all__]"
    command = [sys.executable, "-c", "import sys\n" + program]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_loads_no_part_of_it() -> None:
    probe("gnomon", forbidden={"gnomon.client", "gnomon.specs", "httpx2", "pydantic", "typer"})


def test_api_process_imports_neither_ray_nor_torch() -> None:
    probe("gnomon_service.app", forbidden={"ray", "torch", "transformers"})


def test_listing_commands_imports_neither_ray_nor_torch() -> None:
    probe("gnomon_service.commands", "gnomon_service.local.demo", forbidden={"ray", "torch", "transformers"})


def test_protocol_of_the_workers_imports_neither_ray_nor_torch() -> None:
    probe("gnomon_workers.runtime.protocol", "gnomon_workers.models.catalog", forbidden={"ray", "torch"})


def test_what_a_training_costs_is_told_without_torch() -> None:
    probe("gnomon_workers.sae.costs", "gnomon_workers.harvest.room", forbidden={"fastapi", "ray", "torch"})
