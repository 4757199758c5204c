"""`shardq eval --tasks`: what lm-eval is asked, what is shown of its answer, and what is refused before it is. A module
of the test stands in for lm-eval; tests/oracles/test_engine_lm_eval.py has the real one."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result

from shardq import errors
from shardq.benchmarks import BenchmarkOptions

Run = Callable[..., Result]
RunJson = Callable[..., Any]
ANSWER = {
    "results": {
        "arc_easy": {
            "alias": "arc_easy", "sample_len": 8, "acc,none": 0.625, "acc_stderr,none": 0.171,
            "acc_norm,none": 0.5, "acc_norm_stderr,none": "N/A",
        },
        "wiki": {"alias": "wiki", "word_perplexity,none": float("nan"), "word_perplexity_stderr,none": "N/A"},
    },
    "n-shot": {"arc_easy": 2},
    "n-samples": {"arc_easy": {"original": 100, "effective": 8}},
    "versions": {"arc_easy": 1.0},
}  # fmt: skip


@dataclass
class Peer:
    """lm-eval as far as it is used: tasks arc_easy, arc_hard and wiki, and a fixed answer."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    included: list[str | None] = field(default_factory=list)
    failure: Exception | None = None
    gpu: bool = False

    def simple_evaluate(self, **words: Any) -> Any:
        print("lm-eval talks on stdout")
        os.write(1, b"and so do processes of an engine\n")
        self.calls.append(words)
        if self.failure:
            raise self.failure
        return ANSWER

    def manager(self, include_path: str | None) -> Any:
        self.included.append(include_path)
        known = ("arc_easy", "arc_hard", "wiki")
        return SimpleNamespace(match_tasks=lambda names: [k for k in known if any(fnmatch(k, n) for n in names)])


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Peer:
    made = Peer()
    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=made.simple_evaluate))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=made.manager))
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: made.gpu)))
    return made


def test_words_reach_lm_eval_and_figures_come_back(
    peer: Peer, run_json: RunJson, demo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--tasks", "arc_*, wiki", "--limit", "8", "--num-fewshot", "2", "--batch_size", "auto")
    more = ("--include-path", tmp_path, "--dtype", "float32", "--trust-remote-code")
    told = run_json("eval", demo_folder, *words, *more)
    (call,) = peer.calls
    assert peer.included == [str(tmp_path)]
    assert call.pop("task_manager").match_tasks(["wiki"]) == ["wiki"]
    assert call == {
        "model": "hf", "tasks": ["arc_easy", "arc_hard", "wiki"], "num_fewshot": 2, "batch_size": "auto", "limit": 8,
        "log_samples": False, "device": "cpu",
        "model_args": {"pretrained": str(demo_folder), "dtype": "float32", "trust_remote_code": True},
    }  # fmt: skip
    assert isinstance(call["limit"], int)
    acc = {"task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.625, "error": 0.171, "shots": 2,
           "documents": 8, "version": "1.0"}  # fmt: skip
    ppl = {"task": "wiki", "metric": "word_perplexity", "filter": "none", "value": None, "error": None, "shots": None,
           "documents": None, "version": ""}  # fmt: skip
    norm = {**acc, "metric": "acc_norm", "value": 0.5, "error": None}
    assert told == {"result": str(demo_folder), "reference": None, "tasks": [acc, norm, ppl]}
    assert "processes of an engine" in capfd.readouterr().err


def test_the_table_has_a_line_for_each_figure(peer: Peer, run: Run, demo_folder: Path) -> None:
    peer.gpu = True
    shown = run("eval", demo_folder, "--tasks", "arc_easy", "--limit", "0.5").stdout.splitlines()
    assert [line.split() for line in shown[1:3]] == [
        ["arc_easy", "1.0", "none", "2", "acc", "0.6250", "0.1710", "8"],
        ["arc_easy", "1.0", "none", "2", "acc_norm", "0.5000", "8"],
    ]
    assert len(shown) == 4
    assert [peer.calls[0][w] for w in ("limit", "batch_size", "num_fewshot", "device")] == [0.5, 1, None, "cuda"]


@pytest.mark.parametrize(
    ("words", "error", "told"),
    [
        ((), errors.BadOption, "--text or --tasks"),
        (("--tasks", "arc_easy", "--ref", "demo"), errors.BadOption, "add --text"),
        (("--tasks", "arc_easy,,"), errors.BadOption, "needs names"),
        (("--tasks", "arc_easy,winogrande"), errors.BadOption, "--tasks winogrande: lm-eval knows no such task"),
        (("--tasks", "arc_easy", "--limit", "0"), errors.BadOption, "--limit 0"),
        (("--tasks", "arc_easy", "--batch-size", "many"), errors.BadOption, "--batch-size 'many'"),
        (("--tasks", "arc_easy", "--num-fewshot", "-1"), errors.BadOption, "--num-fewshot -1"),
        (("--text", __file__, "--num-fewshot", "2"), errors.BadOption, "--num-fewshot has a meaning only with --tasks"),
    ],
)
def test_words_are_refused_before_anything_runs(
    words: tuple[str, ...], error: type[errors.ShardqError], told: str, peer: Peer, run: Run, demo_folder: Path
) -> None:
    found = run("eval", demo_folder, *words)
    assert found.exit_code == error.exit_code, found.output
    assert told in found.stderr
    assert peer.calls == []


def test_what_the_backend_will_not_load_is_refused(peer: Peer, run: Run, tmp_path: Path) -> None:
    assert run("quantize", "demo", "--format", "awq", "--parallel", "1", "-o", tmp_path / "out").exit_code == 0
    assert run("eval", tmp_path / "out", "--tasks", "arc_easy", "--backend", "vllm").exit_code == 0
    found = run("eval", tmp_path / "out", "--tasks", "arc_easy")
    assert found.exit_code == errors.TargetRefuses.exit_code
    assert "--backend hf: transformers 5.23 will not load this: experts are made anew" in found.stderr
    assert [(call["model"], call["device"]) for call in peer.calls] == [("vllm", None)]
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    found = run("eval", tmp_path / "gguf", "--tasks", "arc_easy")
    assert found.exit_code == errors.TargetRefuses.exit_code
    assert run("eval", "demo", "--tasks", "arc_easy").exit_code == errors.BadOption.exit_code


@pytest.mark.parametrize(
    ("failure", "error"),
    [(ModuleNotFoundError("no accelerate"), errors.MissingPackage), (KeyError("a\nb"), errors.TaskFailed)],
)
def test_what_goes_wrong_in_lm_eval_is_told_in_a_line(
    failure: Exception, error: type[errors.ShardqError], peer: Peer, run_json: RunJson, demo_folder: Path
) -> None:
    peer.failure = failure
    told = run_json("eval", demo_folder, "--tasks", "arc_easy", exit_code=error.exit_code)["error"]
    assert told["type"] == error.__name__
    assert "\n" not in told["message"]


def test_without_lm_eval_it_is_named(run: Run, demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run("eval", demo_folder, "--tasks", "arc_easy")
    assert found.exit_code == errors.MissingPackage.exit_code
    assert "pip install 'lm-eval[hf]'" in found.stderr


def test_a_backend_that_is_not_known_is_refused() -> None:
    backend: Any = "gguf"
    with pytest.raises(errors.BadOption, match="--backend 'gguf'"):
        BenchmarkOptions(("arc_easy",), backend=backend)
