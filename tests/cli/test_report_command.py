"""`shardq report`"""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardq
from shardq.cli.group import commands
from shardq.errors import BadOption


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "demo-W4A16"
    shardq.quantize("demo", "W4A16", output_dir=out, limits=shardq.Limits(parallel=1))
    return out


def test_it_writes_a_page_beside(result: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"seconds": 12.4}))
    done = CliRunner().invoke(commands, ["report", str(result), "--run", "run.json", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    page = (tmp_path / told["page"]).read_text(encoding="utf-8")
    assert told["page"] == "demo-W4A16.html"
    assert told["bytes"] == len(page.encode())
    assert told["results"][0]["outcomes"] == {"copied": 22, "quantized": 45}
    assert "12 s" in page
    both = CliRunner().invoke(commands, ["report", "--compare", str(result), str(result)])
    assert both.exit_code == 0, both.output
    assert "demo-W4A16-demo-W4A16.html" in both.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a", "b"], "2 results: expected one"),
        (["--compare", "a"], "1 results"),
        (["a", "--run", "none"], "none is not"),
    ],
)
def test_it_refuses(words: list[str], told: str, result: Path) -> None:
    done = CliRunner().invoke(commands, ["report", *(str(result) if w == "a" else w for w in words)])
    assert done.exit_code == BadOption.exit_code
    assert told in done.stderr
    assert not list(Path().glob("demo-W4A16*.html"))
