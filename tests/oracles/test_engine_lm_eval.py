"""`shardq eval --tasks` with lm-eval itself, on a task of a few lines in a file: its figures are those that the model's
own logits give."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from click.testing import CliRunner

pytestmark = pytest.mark.oracle
DOCUMENTS: Final = 12
CHOICES: Final = 3
TASK: Final = """\
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{begin}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 3.0}}
"""


@pytest.fixture(scope="module")
def models() -> Any:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed here; `nox -s engine_lm_eval` installs it")
    pytest.importorskip("transformers", reason="lm-eval loads models with transformers")
    import tuned_models

    return tuned_models


def _write_task(folder: Path) -> list[dict[str, Any]]:
    """Documents of words that are numbers, three words to choose from."""
    drawn = torch.randint(0, 90, (DOCUMENTS, 8 + CHOICES), generator=torch.Generator().manual_seed(3)).tolist()
    documents = [
        {"begin": " ".join(map(str, row[:8])), "choices": [str(w) for w in row[8:]], "answer": i % CHOICES}
        for i, row in enumerate(drawn)
    ]
    (folder / "numbers.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (folder / "numbers.yaml").write_text(TASK.format(data=folder / "numbers.jsonl"))
    return documents


def _accuracy(models: Any, folder: Path, documents: list[dict[str, Any]]) -> float:
    """Of the likeliest choice behind each text."""
    ids = torch.tensor([[int(w) for w in d["begin"].split()] for d in documents])
    last = models.whole_logits(folder, ids)[:, -1]
    chosen = [int(last[i, [int(c) for c in d["choices"]]].argmax()) for i, d in enumerate(documents)]
    return sum(c == d["answer"] for c, d in zip(chosen, documents, strict=True)) / len(documents)


def _run(*words: object) -> Any:
    from shardq.cli.group import commands

    return CliRunner().invoke(commands, [str(w) for w in words])


@pytest.mark.parametrize(("layout", "limit"), [(None, 5), ("fake", 12), ("compressed-tensors", 12)])
def test_figures_are_those_of_the_models_own_logits(
    layout: str | None, limit: int, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = out = models.make_model("llama", tmp_path / "source")
    words = {"bos_token": "93", "eos_token": "94", "unk_token": "95"}  # lm-eval asks for a beginning
    (source / "tokenizer_config.json").write_text(json.dumps(words))
    if layout:
        out = tmp_path / "out"
        how = ("--scheme", "W4A16G32", "--format", layout, "--parallel", "1", "-o", out)
        assert _run("quantize", source, *how).exit_code == 0
    (tmp_path / "tasks").mkdir()
    documents = _write_task(tmp_path / "tasks")
    asked = ("--tasks", "numbers", "--include-path", tmp_path / "tasks", "--limit", limit, "--dtype", "float32")
    found = _run("eval", out, *asked, "--json")
    assert found.exit_code == 0, found.output
    (figure,) = json.loads(found.stdout)["tasks"]
    expected = _accuracy(models, out, documents[:limit])
    assert figure.pop("error") is not None
    assert figure == {
        "task": "numbers", "metric": "acc", "filter": "none", "value": pytest.approx(expected), "shots": 0,
        "documents": limit, "version": "3.0",
    }  # fmt: skip


def test_a_task_that_is_not_there_is_told(models: Any, tmp_path: Path) -> None:
    source = models.make_model("llama", tmp_path / "source")
    found = _run("eval", source, "--tasks", "no_such_task")
    assert found.exit_code == 3
    assert "lm-eval knows no such task" in found.stderr
