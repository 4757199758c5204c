"""Perplexity and divergence of models that go through their blocks one by one, in every layout that is decoded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shardq.api import quantize
from shardq.errors import BadOption, UnsupportedSource
from shardq.limits import Limits
from shardq.quality import evaluate
from shardq.recipe import dequantize_recipe, make_recipe
from shardq.sources import open_source

pytest.importorskip("transformers", reason="transformers builds the models: pip install shardq[tune]")

import tuned_models as models

from shardq.tune.evaluation import cut_windows
from shardq.tune.tokenizing import open_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS, SEQLEN = 3, 20
TEXT = " ".join(str(i * i % 89) for i in range(200))
LAYOUTS = {
    "auto_round": "W4A16",
    "gptq": "W4A16",
    "awq": "W4A16",
    "compressed-tensors": "W4A16",
    "mlx": "W4A16",
    "fp8": "FP8_BLOCK",
}


@torch.no_grad()
def by_definition(model: Path, reference: Path) -> dict[str, float]:
    """Figures from whole models."""
    ids = [int(word) for word in TEXT.split()]
    step = (len(ids) - SEQLEN) // (WINDOWS - 1)
    found, truth = models.load_whole(model), models.load_whole(reference)
    loss, kl, same = [], [], []
    for i in range(WINDOWS):
        window = torch.tensor([ids[i * step : i * step + SEQLEN]])
        p, q = (m(input_ids=window).logits[0].float().log_softmax(-1) for m in (truth, found))
        loss.append(-q[:-1].gather(1, window[0, 1:, None])[:, 0])
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).float())
    means = torch.cat(kl)
    return {
        "ppl": models.perplexity(torch.cat(loss)),
        "kl": float(means.mean()),
        "kl_se": float(means.std() / len(means) ** 0.5),
        "kl_p99": float(means.quantile(0.99)),
        "top1": float(torch.cat(same).mean()),
    }


def run(model: Path, reference: Path | None) -> Any:
    return evaluate(model, TEXT, reference=reference, windows=WINDOWS, seqlen=SEQLEN, dtype="float32")


def test_figures_are_those_of_whole_models(tmp_path: Path) -> None:
    reference = models.make_model("qwen3", tmp_path / "reference")
    quantize(reference, make_recipe("W4A16", group_size=32, layout="fake"), output_dir=tmp_path / "out")
    found, expected = run(tmp_path / "out", reference), by_definition(tmp_path / "out", reference)
    assert found.tokens == WINDOWS * (SEQLEN - 1)
    assert found.ppl == pytest.approx(expected["ppl"], rel=1e-6)
    for name in ("kl", "kl_se", "kl_p99", "top1"):
        assert getattr(found.distance, name) == pytest.approx(expected[name], rel=1e-4), name
    assert found.distance.kl > 1e-4
    assert run(reference, None).ppl == pytest.approx(found.distance.reference_ppl, rel=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_decoded(layout: str, tmp_path: Path) -> None:
    reference = models.make_model("llama", tmp_path / "reference")
    scheme = LAYOUTS[layout]
    recipe = make_recipe(scheme, layout=layout, **({} if scheme == "FP8_BLOCK" else {"group_size": 32}))
    quantize(reference, recipe, output_dir=tmp_path / "out", limits=Limits(parallel=1))
    quantize(tmp_path / "out", dequantize_recipe("F32"), output_dir=tmp_path / "plain", limits=Limits(parallel=1))
    found = run(tmp_path / "out", reference)
    assert found == run(tmp_path / "plain", reference)
    assert 1e-6 < found.distance.kl < 0.1


def test_a_model_beside_itself_is_at_no_distance(tmp_path: Path) -> None:
    reference = models.make_model("gemma3", tmp_path / "reference")
    distance = run(reference, reference).distance
    assert (distance.kl, distance.kl_p99, distance.top1) == (0, 0, 1)


def test_windows_are_evenly_spaced(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(open_source(str(models.make_model("llama", tmp_path / "model"))))
    text = " ".join(map(str, range(50)))
    assert cut_windows(tokenizer, text, 3, 10)[:, 0].tolist() == [0, 20, 40]
    assert cut_windows(tokenizer, text, 1, 50).tolist() == [list(range(50))]
    with pytest.raises(BadOption, match="has 50 tokens, and 3 windows of 20 need 60"):
        cut_windows(tokenizer, text, 3, 20)
    with pytest.raises(BadOption, match="two tokens at least"):
        cut_windows(tokenizer, text, 3, 1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    model = models.make_model("llama", tmp_path / "model")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnsupportedSource, match="is in GGUF"):
        run(tmp_path / "gguf", model)
