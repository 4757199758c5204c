"""Quantizing the head of a tied model: the output has a head of its own, made of the embedding, and says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import shardq
from shardq import Limits
from shardq.errors import BadOption
from shardq.files.safetensors import read_header
from shardq.run import quantize_to_folder

ONE = Limits(parallel=1)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYOUTS = (
    "W4A16G32@auto_round",
    "W4A16G32@gptq",
    "W8A16@compressed-tensors",
    "NVFP4A16@compressed-tensors",
    "W4A16@mlx",
)


def tie(folder: Path, tied: bool) -> Path:
    """The head is the embedding: it is gone and the config says so; or a copy of it, which says the same of itself."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, "pt") as file:
            tensors[shard] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    embedding = next(t[EMBEDDING] for t in tensors.values() if EMBEDDING in t)
    last = tensors[index["weight_map"].pop(HEAD)]
    del last[HEAD]
    if not tied:
        home = tensors[index["weight_map"][EMBEDDING]]
        home[HEAD] = embedding.clone()
        index["weight_map"][HEAD] = index["weight_map"][EMBEDDING]
    write(folder, tensors, index)
    config = json.loads((folder / "config.json").read_text())
    text = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-06}
    (folder / "config.json").write_text(
        json.dumps({**config, "tie_word_embeddings": tied, "text_config": text}, indent=2)
    )
    return folder


def write(folder: Path, tensors: dict[str, Any], index: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    for shard, own in tensors.items():
        save_file(own, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def tied(make_checkpoint: Callable[..., Path]) -> Path:
    return tie(make_checkpoint(), tied=True)


def tensors(folder: Path) -> dict[str, bytes]:
    """All of an output, by name; the bytes alone."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        found |= {t.name: data[t.begin : t.end] for t in read_header(path, path.name).tensors}
    return found


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_the_head_is_what_an_untied_model_gets(
    scheme: str, tied: Path, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    twin = tie(make_checkpoint(), tied=False)
    recipe = shardq.make_recipe(scheme, quant_lm_head=True)
    for name, source in (("out", tied), ("theirs", twin)):
        shardq.quantize(source, recipe, output_dir=tmp_path / name, limits=ONE)
    assert tensors(tmp_path / "out") == tensors(tmp_path / "theirs")
    config, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    assert config == theirs
    assert config["tie_word_embeddings"] is False
    assert config["text_config"] == {"tie_word_embeddings": False, "rms_norm_eps": 1e-06}
    assert '"rms_norm_eps": 1e-06' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("scheme", ["W4A16G32@compressed-tensors", "NVFP4A16@compressed-tensors"])
def test_it_is_accounted_for(scheme: str, tied: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = shardq.make_recipe(scheme, quant_lm_head=True)
    shardq.quantize(tied, recipe, output_dir=out, limits=Limits(parallel=2))
    verified = shardq.verify(out, deep=True, source=tied)
    assert verified.problems == ()
    assert shardq.audit(out, source=tied).problems == ()
    assert shardq.quantize(tied, recipe, output_dir=out, limits=ONE).already_done


def test_it_is_streamed(
    tied: Path, make_model: Callable[[Path], Any], short_spans: int, tmp_path: Path, contents: Callable[[Path], Any]
) -> None:
    model = make_model(tied)
    recipe = shardq.make_recipe("W4A16G32@compressed-tensors", quant_lm_head=True)
    for stream in (False, True):
        limits = Limits(parallel=2, stream=stream)
        quantize_to_folder(model.open(), recipe, tmp_path / str(stream), limits, False, report=lambda _: None)
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_outputs_of_one_run_untie_alike(tied: Path, tmp_path: Path) -> None:
    recipes = [shardq.make_recipe("W4A16G32", quant_lm_head=on) for on in (True, False)]
    with pytest.raises(BadOption, match="--quant-lm-head for some outputs only"):
        shardq.quantize_many(tied, recipes, output_dir=tmp_path / "out")
