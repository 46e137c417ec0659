"""Imports point one way, and what thinks does no I/O."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

import voxgate
from voxgate.hosts import gateway

ROOT = Path(__file__).parents[2]
FUNCTIONS = ROOT / "functions"

# A part imports parts of a lower rank and itself, nothing else. A package is one part.
RANKS = {
    "__init__": 0, "errors": 0, "model": 0, "languages": 0, "tasks": 0, "metrics": 0, "weights": 0,
    "multipart": 1, "settings": 1, "catalog": 1, "accounts": 1, "staging": 1, "audio": 1, "formats": 1,
    "receive": 2, "engines": 2, "dialects": 2, "routing": 2,
    "providers": 3, "cache": 3, "fallback": 4,
    "metering": 3, "streaming": 3,
    "transcribe": 5,
    "wiring": 6, "live": 6,
    "hosts": 7, "client": 7, "smoke": 7, "admin": 7,
    "live_client": 8, "cli": 9,
    "__main__": 10, "api": 10, "ingress": 10, "inference": 10, "sweep": 10,
}  # fmt: skip
PURE = ("errors", "model", "languages", "multipart", "formats", "dialects")
IO = {
    "os", "io", "socket", "asyncio", "httpx", "pathlib", "sqlite3", "subprocess", "tempfile", "av", "boto3", "shutil",
    "threading", "multiprocessing", "concurrent", "selectors", "ssl", "http", "requests", "logging", "time", "random",
}  # fmt: skip


def modules() -> list[Path]:
    return sorted(FUNCTIONS.rglob("*.py"))


def part_of(path: Path) -> str:
    """`voxgate/hosts/http.py` belongs to `hosts`, `voxgate/cli.py` to `cli`, `api/handler.py` to `api`."""
    parts = path.relative_to(FUNCTIONS).with_suffix("").parts
    return parts[1] if parts[0] == "voxgate" else parts[0]


def part_named(dotted: str) -> str:
    names = dotted.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside of a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they point"
            assert node.module is not None
            # `from voxgate import languages` imports a part, `from voxgate import __version__` a name.
            own = node.module == "voxgate"
            found |= {f"voxgate.{alias.name}" if own and alias.name in RANKS else node.module for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    return {part_named(name) for name in imported(path) if name.split(".")[0] == "voxgate"}


def test_every_module_has_a_rank() -> None:
    assert {part_of(path) for path in modules()} <= set(RANKS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(FUNCTIONS)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    wrong = {other for other in ours(path) if other != part and RANKS[other] >= RANKS[part]}
    assert not wrong, f"{part} (rank {RANKS[part]}) imports {wrong}"


def test_nothing_dynamic_hides_an_import() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in ("__import__", "import_module"), path


def test_the_rule_sees_lazy_imports() -> None:
    assert gateway.__file__ is not None
    assert "dialects" in ours(Path(gateway.__file__))


@pytest.mark.parametrize(
    "path", [path for path in modules() if part_of(path) in PURE], ids=lambda path: str(path.relative_to(FUNCTIONS))
)
def test_what_thinks_does_no_io(path: Path) -> None:
    assert {name.split(".")[0] for name in imported(path)} & IO == set()
    assert ours(path) <= {*PURE, "__init__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("open", "print", "input", "exec", "eval")


def test_only_the_settings_read_the_environment() -> None:
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and part_of(path) != "settings":
                # wiring hands it to the catalogue, the client's commands have settings of their own
                assert part_of(path) in ("wiring", "client", "cli", "engines"), path


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == voxgate.__version__
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line[:3] == "## "]
    versions = [heading.removeprefix("## ").lstrip("[").split("]")[0].split()[0] for heading in headings]
    assert voxgate.__version__ in versions
    released = [version for version in versions if version.lower() != "unreleased"]
    assert released[0] == voxgate.__version__
