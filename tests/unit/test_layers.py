"""Imports point down, siblings are strangers, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYERS: list[set[str]] = [
    {"errors", "__init__", "guard"},
    {"metrics", "mistakes", "stores"},
    {"job", "task"},
    {"data", "sync"},
    {"plan", "clusters", "wan", "checkpoint", "registry", "measured", "report", "charge"},
    {"partition"},
    {"members"},
    {"run", "simulate"},
    {"doctor"},
    {"tasks"},
    {"flows"},
    {"examples", "starter", "answers", "template"},
    {"cli"},
]
SAME_LAYER_ALLOWED = {
    ("registry", "checkpoint"),  # both write whole objects to a URL
    ("report", "checkpoint"),
    ("measured", "checkpoint"),
    ("report", "plan"),  # it shows a plan
    ("plan", "wan"),  # how a link is timed
    ("report", "wan"),
}
ONLY_IN = {
    "prefect": {"flows", "tasks"},
    "dask": {"clusters", "partition"},
    "distributed": {"clusters", "partition"},
    "pydantic": {"job"},
    "typer": {"cli"},
    "rich": {"cli", "answers", "report"},
}


def noun(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] in ("flows", "tasks") else parts[1].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(file for folder in ("geotrain", "flows", "tasks") for file in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "geotrain" else {node.module}
    return names


def level(name: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    me = noun(path)
    for module in imported(path):
        parts = module.split(".")
        if parts[0] in ("flows", "tasks"):
            other = parts[0]
        elif parts[0] == "geotrain":
            other = parts[1] if len(parts) > 1 else "__init__"
        else:
            continue
        if other.startswith("__") or other == me:
            continue
        assert level(other) < level(me) or (me, other) in SAME_LAYER_ALLOWED, f"{me} must not import {other}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_libraries_stay_where_they_belong(path: Path) -> None:
    for module in imported(path):
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or noun(path) in allowed, f"{module} in {path}"


def test_the_core_has_no_clock_threads_or_sockets() -> None:
    for path in (ROOT / "geotrain/sync").rglob("*.py"):
        assert not imported(path) & {"time", "threading", "socket", "random", "queue", "os"}, path


@pytest.mark.parametrize("module", ["flows.train", "flows.plan", "flows.retrain", "geotrain.cli"])
def test_the_control_plane_never_touches_a_tensor(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_pickle_in_the_wan() -> None:
    for path in (ROOT / "geotrain/wan").glob("*.py"):
        assert not imported(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, path
