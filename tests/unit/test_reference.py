"""docs/reference.md is what its generator makes of the code, and names all of it."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from shardq.cli.group import COMMANDS, load_command
from shardq.schemes import PRESETS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/make_reference.py."""
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_is_up_to_date(generator: ModuleType) -> None:
    found = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert found == generator.make_reference(), "run `python docs/make_reference.py`"


def test_every_option_and_every_scheme_is_there(generator: ModuleType) -> None:
    text = generator.make_reference()
    shown = [p for c in map(load_command, COMMANDS) for p in c.params if not getattr(p, "hidden", False)]
    options = {opt for p in shown for opt in p.opts if opt.startswith("--")}
    assert [opt for opt in sorted(options) if opt not in text] == []
    assert [name for name in PRESETS if f"| `{name}` |" not in text] == []
    held = [line for line in text.splitlines() if line.startswith("| `W4A16` |")]
    assert len(held) == 1
    assert "`awq`" in held[0]
