"""Arrows run one way, and files stay small."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import shardq

PACKAGE = Path(shardq.__file__).parent
LIBRARY = "library"
# A module may import what stands to the left of it; what is not listed may be imported by all of its own part.
ORDER = [
    "errors",
    "formats",
    "schemes",
    "layouts",
    "recipe",
    "decide",
    "plans",
    "pipeline",
    "publish",
    "run",
    "quality",
    "api",
]


def part(name: str) -> str:
    head = name.split(".")
    if head[0] != "shardq":
        return "outside"
    return head[1] if len(head) > 1 and head[1] in ("cli", "kernels") else LIBRARY


def modules() -> list[tuple[str, Path]]:
    roots = {"shardq": PACKAGE}
    for sub in ("cli", "kernels"):
        roots[f"shardq.{sub}"] = Path(importlib.import_module(f"shardq.{sub}").__file__ or "").parent
    found = []
    for name, root in roots.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root).with_suffix("").parts
            if name == "shardq" and inside[0] in ("cli", "kernels"):
                continue
            found.append((".".join((name, *inside)), path))
    return found


def imports(path: Path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return names


ALLOWED = {
    "cli": {"cli", LIBRARY, "kernels", "outside"},
    LIBRARY: {LIBRARY, "kernels", "outside"},
    "kernels": {"kernels", "outside"},
}


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_arrows_run_from_cli_to_library_to_kernels(name: str, path: Path) -> None:
    for imported in imports(path, top_level_only=False):
        if imported == "shardq" and part(name) == "cli":
            continue
        assert part(imported) in ALLOWED[part(name)], f"{name} imports {imported}"


def test_arrows_inside_the_library_run_from_plan_to_formats() -> None:
    rank = {f"shardq.{m}": i for i, m in enumerate(ORDER)}
    for name, path in modules():
        mine = next((r for m, r in rank.items() if name == m or name.startswith(m + ".")), None)
        if mine is None or part(name) != LIBRARY:
            continue
        for imported in imports(path, top_level_only=False):
            theirs = next((r for m, r in rank.items() if imported == m or imported.startswith(m + ".")), None)
            assert theirs is None or theirs <= mine, f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda x: x if isinstance(x, str) else "")
def test_files_are_small_and_named_for_what_they_know(name: str, path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500, name
    assert path.stem not in ("utils", "helpers", "common", "misc"), name


def test_workers_stay_light() -> None:
    """What a worker imports must not pull in what costs it seconds and hundreds of megabytes."""
    heavy = ("torch", "huggingface_hub", "click", "rich", "yaml")
    code = f"import sys, shardq.worker; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"
