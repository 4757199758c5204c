"""Damage by gradients, block by block: the gradients of the whole model, figures in a file, and mixtures by them."""

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq import quantize
from shardq.cli import _tuning
from shardq.cli.group import commands
from shardq.errors import BadOption, BadTuned, BudgetTooSmall, RecipeChanged
from shardq.headers import read_checkpoint
from shardq.importance_files import DataKind, Provenance, write_importance
from shardq.kernels import load
from shardq.layouts import find_layout
from shardq.limits import SpoolAs
from shardq.measured import Measured, read_measured, write_measured
from shardq.mixing import mix
from shardq.mixture_file import parse_options
from shardq.plans import make_plan
from shardq.recipe import Recipe, make_recipe
from shardq.sources import open_source
from shardq.tune import sensitivity
from shardq.tune.backward import block_gradients, head_gradients, pass_blocks
from shardq.tune.blocks import BlockModel
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.sensitivity import Measuring, damages_of, label_loss, measure_damages
from shardq.tune.spool import Spool, Spooling, Taken, plan_spool
from shardq.tune.subjects import find_subjects

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = "W2A16G32,W4A16G32,W8A16G32"
DATA = DataOptions("random", nsamples=4, seqlen=16, seed=1)
MEASURING = Measuring(OPTIONS, DATA)
NAMES = {"llama": 3 * 7, "qwen3_moe": 3 * (4 + 8 * 3), "gpt_oss": 3 * (4 + 4 * 3)}  # and matrices that get codes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in NAMES}


def _recipe() -> Recipe:
    return make_recipe("W4A16G32", layout="auto_round")


def _flat_importance(folder: Path, path: Path, provenance: Provenance | None = None) -> Path:
    """A file by which all columns of a matrix count alike."""
    tensors = read_checkpoint(open_source(str(folder))).tensors
    shapes = {n.removesuffix(".weight"): t.shape for n, t in tensors.items() if ".layers." in n}
    ones = {n: np.ones(shape[1]) for n, shape in shapes.items() if shape and len(shape) == 2}
    write_importance(path, ones, provenance or Provenance("unknown"))
    return path


def _next_token(ids: Tensor) -> Any:
    """The loss of a text: the sum over all tokens but the last."""

    def loss(logits: Tensor, sample: int, begin: int) -> Tensor:
        following = ids[sample, begin + 1 : begin + 1 + len(logits)]
        return torch.nn.functional.cross_entropy(logits[: len(following)], following, reduction="sum")

    return loss


def _block_gradients(folder: Path, ids: Tensor, most: int | None, how: SpoolAs = "auto") -> dict[str, list[Tensor]]:
    """By parameter of the model, one for each sample."""
    found: dict[str, list[Tensor]] = {}
    with BlockModel.open(open_source(str(folder)), dtype=torch.float32, attention="eager") as model:
        passed = pass_blocks(model, ids, Spooling(folder, most, how=how))
        back = head_gradients(model, passed.batch.hidden, _next_token(ids))
        for index in reversed(range(len(model.block_names))):
            name = model.block_names[index]
            with model.block(index) as block:
                names = [n for n, p in block.named_parameters() if p.ndim > 1]
                inputs = passed.batch.moved(passed.inputs[index])
                for of in block_gradients(model, block, index, inputs, back, names):
                    for n in names:
                        zeros = torch.zeros_like(block.get_parameter(n))
                        found.setdefault(f"{name}.{n}", []).append(of.get(n, zeros).clone())
    return found


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_whole_model(name: str, folders: dict[str, Path]) -> None:
    ids = models.some_ids(3, 140)  # more than the head sees at once
    found = _block_gradients(folders[name], ids, None)
    whole = models.load_whole(folders[name])
    for sample in range(len(ids)):
        whole.zero_grad(set_to_none=True)
        logits = whole(input_ids=ids[sample : sample + 1], use_cache=False).logits[0]
        _next_token(ids)(logits, sample, 0).backward()
        for parameter, of in found.items():
            expected = whole.get_parameter(parameter).grad
            expected = torch.zeros_like(of[sample]) if expected is None else expected
            assert expected.abs().max() > 0 or "gate" in parameter
            torch.testing.assert_close(of[sample], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert len(found) == sum(p.ndim > 1 for n, p in whole.named_parameters() if ".layers." in n)


def test_inputs_in_files_give_the_same_gradients(folders: dict[str, Path]) -> None:
    ids = models.some_ids(2, 16)
    sample_bytes = 16 * 64 * 4
    plain = _block_gradients(folders["llama"], ids, None)
    for how in ("plain", "zstd"):
        filed = _block_gradients(folders["llama"], ids, sample_bytes, how)
        assert all(torch.equal(a, b) for n in plain for a, b in zip(plain[n], filed[n], strict=True))


def test_labels_are_drawn_from_the_predictions() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]])).repeat(4000, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(label_loss((1, 4000), 7)(logits, 0, 0), logits)
    drawn = (gradient.detach() - torch.tensor([0.1, 0.2, 0.7])).round().neg()  # p - 1 at the label, p elsewhere
    assert torch.equal(drawn.sum(1), torch.ones(4000))
    assert drawn.mean(0).tolist() == pytest.approx([0.1, 0.2, 0.7], abs=0.03)
    again = torch.autograd.grad(label_loss((1, 4000), 7)(logits[1000:], 0, 1000), logits)[0][1000:]
    assert torch.equal(again, gradient[1000:])  # wherever the head's pieces begin


@torch.no_grad()
def test_damage_is_half_the_squared_error_by_squared_gradients(folders: dict[str, Path]) -> None:
    with BlockModel.open(open_source(str(folders["llama"])), dtype=torch.float32) as model:
        plan = make_plan(model.checkpoint, make_recipe("W4A16G32", layout="fake"))
        subject = next(s for s in find_subjects(model, plan).blocks[1] if s.module.endswith("up_proj"))
        offered = (*parse_options("W4A16G32,BF16", find_layout("auto_round")),)
        with model.block(1) as block:
            squares = torch.rand(subject.shape, generator=torch.Generator().manual_seed(0))
            found = damages_of(block, subject, squares, offered, 10, load())
            w = subject.weight(block).reshape(-1, 32)
            lowest = w.gather(1, w.abs().argmax(1, keepdim=True))
            scale = (-lowest / 8).half().float()  # with its sign; that it is of the weight's type makes the 1 %
            error = w - (w / scale).round().clamp(-8, 7) * scale
            unreached = damages_of(block, subject, None, offered, 10, load())
    assert found[0] == pytest.approx(float((squares.reshape(-1, 32) * error.square()).sum() / 20), rel=1e-2)
    assert (found[1], unreached) == (0.0, (0.0, 0.0))


@pytest.mark.parametrize("name", NAMES)
def test_figures_come_back_from_their_file(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source, path = open_source(str(folders[name])), tmp_path / "damages.json"
    steps: list[tuple[int, int]] = []
    found = measure_damages(source, _recipe(), MEASURING, path, report=lambda *step: steps.append(step))
    assert steps == [(i + 1, 6) for i in range(6)]
    assert len(found.damages) == NAMES[name]
    assert all(two > four > eight >= 0 or two == 0 for two, four, eight in found.damages.values())
    assert sum(two > 0 for two, _, _ in found.damages.values()) > 0.8 * NAMES[name]
    before = path.read_bytes()
    assert measure_damages(source, _recipe(), MEASURING, path, report=lambda *_: pytest.fail("measured again")) == found
    path.unlink()
    assert measure_damages(source, _recipe(), MEASURING, path) == found
    assert path.read_bytes() == before
    with pytest.raises(RecipeChanged, match=r"otherwise \(data\)"):
        measure_damages(source, _recipe(), replace(MEASURING, data=replace(DATA, seed=2)), path)
    nearest = measure_damages(source, _recipe(), replace(MEASURING, searched=False), tmp_path / "nearest.json")
    assert (found.data, found.searched, nearest.searched) == ("random ids", True, False)
    assert sum(d[0] for d in found.damages.values()) < 0.95 * sum(d[0] for d in nearest.damages.values())


def test_inputs_in_files_take_no_more_disk_than_is_allowed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the disk has free: compressed where that is needed, or refused before a block is read."""
    source, measuring = open_source(str(folders["llama"])), replace(MEASURING, data=replace(DATA, seqlen=128))
    plain = measure_damages(source, _recipe(), measuring, tmp_path / "memory.json")
    sample_bytes, samples = 128 * 64 * 4, (3 + 1) * DATA.nsamples  # before three blocks, and behind them
    least, _ = plan_spool(samples, sample_bytes, torch.float32, "zstd", None)
    taken: list[int] = []
    real = Taken.add

    def note(own: Taken, more_bytes: int) -> None:
        real(own, more_bytes)
        taken.append(own.bytes)

    monkeypatch.setattr(Taken, "add", note)

    def measure(most: int) -> Measured:
        path = tmp_path / f"{most}.json"
        return measure_damages(source, _recipe(), measuring, path, max_ram_bytes=sample_bytes, max_disk_bytes=most)

    assert least < samples * sample_bytes
    assert measure(least) == plain
    assert 0 < max(taken) <= least
    with pytest.raises(BudgetTooSmall, match=f"--max-disk leaves {least - 1} bytes"):
        measure(least - 1)
    assert {p.name for p in tmp_path.iterdir()} == {"memory.json", f"{least}.json"}


class HeldFiles:
    """What files of hidden states hold together, and what that was at most."""

    def __init__(self) -> None:
        self._files: weakref.WeakSet[Spool] = weakref.WeakSet()
        self.most_files = self.most_bytes = self.most_disk_bytes = 0

    def look(self, file: Spool) -> None:
        self._files.add(file)
        found = []
        for f in self._files:
            os.fsync(f._file.fileno())  # blocks count once they have a place
            found.append(os.fstat(f._file.fileno()))
        self.most_files = max(self.most_files, len(found))
        self.most_bytes = max(self.most_bytes, sum(s.st_size for s in found))
        self.most_disk_bytes = max(self.most_disk_bytes, sum(s.st_blocks * 512 for s in found))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> HeldFiles:
    """Looked at when a file is made, and whenever one is written."""
    made = HeldFiles()

    def looking(real: Any) -> Any:
        def look(self: Spool, *words: Any, **more: Any) -> None:
            real(self, *words, **more)
            made.look(self)

        return look

    for name in ("__init__", "__setitem__"):
        monkeypatch.setattr(Spool, name, looking(getattr(Spool, name)))
    return made


@pytest.mark.parametrize("how", ["plain", "zstd"])
def test_the_least_disk_that_is_allowed_is_what_files_hold_at_most(
    how: SpoolAs, held: HeldFiles, folders: dict[str, Path], tmp_path: Path
) -> None:
    """No copy of hidden states is counted that no file ever has: gradients are a tensor."""
    measuring = replace(MEASURING, data=replace(DATA, seqlen=128), spool=how)
    sample_bytes, samples = 128 * 64 * 4, (3 + 1) * DATA.nsamples
    least, _ = plan_spool(samples, sample_bytes, torch.float32, how, None)

    def measure(most: int) -> None:
        source, path = open_source(str(folders["llama"])), tmp_path / "damages.json"
        measure_damages(source, _recipe(), measuring, path, max_ram_bytes=sample_bytes, max_disk_bytes=most)

    with pytest.raises(BudgetTooSmall, match=f"--max-disk leaves {least - 1} bytes"):
        measure(least - 1)
    measure(least)
    assert held.most_files == 3 + 1
    if how == "plain":
        assert held.most_bytes == held.most_disk_bytes == least
    else:
        assert least - DATA.nsamples * sample_bytes < held.most_disk_bytes <= least


def test_memory_counts_the_gradients_too(held: HeldFiles, folders: dict[str, Path], tmp_path: Path) -> None:
    source, hidden_bytes = open_source(str(folders["llama"])), DATA.nsamples * DATA.seqlen * 64 * 4
    whole = (3 + 1 + 1) * hidden_bytes
    measure_damages(source, _recipe(), MEASURING, tmp_path / "a.json", max_ram_bytes=whole)
    assert held.most_files == 0
    measure_damages(source, _recipe(), MEASURING, tmp_path / "b.json", max_ram_bytes=whole - 1)
    assert held.most_files == 3 + 1


def test_figures_are_for_the_algorithm_and_its_data() -> None:
    found = Measuring.of(OPTIONS, TuneOptions("rtn", DataOptions("self", 8, 2048, 5), "bfloat16"))
    assert found == Measuring(OPTIONS, DataOptions("self", 8, 256, 5), False, "bfloat16")
    assert Measuring.of(OPTIONS, TuneOptions()) == Measuring(OPTIONS, DataOptions(nsamples=16, seqlen=256))


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path, figures = tmp_path / "damages.json", {"m": (1.5, 0.1), "n": (2.0, 1e-300)}
    measured = Measured("by hand", ("A", "B"), figures, searched=False)
    write_measured(path, measured, {"key": [1, 2]})
    assert read_measured(path, {"key": (1, 2)}) == measured
    document = json.loads(path.read_text())
    for damaged in (
        "{",
        "[]",
        json.dumps({**document, "damages": {"m": [1.0]}}),
        json.dumps({**document, "data": "x"}),
    ):
        path.write_text(damaged)
        with pytest.raises(BadTuned, match="damaged"):
            read_measured(path, {"key": [1, 2]})
    assert read_measured(tmp_path / "none.json", {}) is None


def test_a_mixture_takes_measured_figures(folders: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(str(folders["llama"]))
    found = measure_damages(source, _recipe(), MEASURING, tmp_path / "damages.json")
    worst = "model.layers.1.mlp.down_proj"
    loaded = replace(found, damages={**found.damages, worst: tuple(1e6 * d for d in found.damages[worst])})
    mixed = mix(source, _recipe(), OPTIONS, 4.5, measured=loaded)
    assert 4.5 * 0.995 <= mixed.mixture.average_bits <= 4.5
    assert mixed.mixture.choice[worst].name == "W8A16G32"
    how = "KL in nats for a token, by gradients of 4 samples of 16 tokens (random ids)"
    assert f"# Measured: {how}; geometric mean with scores\n" in mixed.text
    with pytest.raises(BadOption, match="was not measured"):
        mix(source, _recipe(), "W3A16G32,W4A16G32", 4.0, measured=found)
    less = replace(found, damages={m: d for m, d in found.damages.items() if m != worst})
    with pytest.raises(BadOption, match=f"{worst} cannot be measured"):
        mix(source, _recipe(), OPTIONS, 4.5, measured=less)


@pytest.mark.parametrize(
    ("data", "searched", "damage", "scores", "told"),
    [
        ("text", True, 1.5, 0.0, "; to the power of 1.5"),
        ("text", False, 1.0, 0.0, ""),
        ("self-generated", True, 0.5, 0.5, "; geometric mean with scores"),
        ("random ids", False, 0.5, 0.5, "; geometric mean with scores"),
        ("unknown", True, 0.5, 0.5, "; geometric mean with scores"),
    ],
)
def test_the_data_say_what_a_choice_is_made_by(
    data: DataKind, searched: bool, damage: float, scores: float, told: str, folders: dict[str, Path]
) -> None:
    source = open_source(str(folders["llama"]))
    scored = {i.name: i for i in mix(source, _recipe(), OPTIONS, 4.5).items}
    figures = {m: (0.5 + k, 0.1, 0.0) for k, i in enumerate(scored.values()) for m in i.modules}
    measured = Measured("by hand", tuple(OPTIONS.split(",")), figures, data, searched)
    mixed = mix(source, _recipe(), OPTIONS, 4.5, measured=measured)
    assert (mixed.sampled_bytes > 0) == (scores > 0)
    assert f"# Measured: by hand{told}\n" in mixed.text
    alone = [i for i in mixed.items if len(i.modules) == 1]
    assert len(alone) > 3
    for i in alone:
        score, (figure,) = scored[i.name].damages, (figures[m] for m in i.modules)
        assert i.damages == pytest.approx([s**scores * d**damage for s, d in zip(score, figure, strict=True)])


def test_importance_of_the_recipe_decides_the_codes(folders: dict[str, Path], tmp_path: Path) -> None:
    source = open_source(str(folders["llama"]))
    path = _flat_importance(folders["llama"], tmp_path / "flat.safetensors")
    plain = make_recipe("W4A16G32", layout="auto_round", importance=path)
    by_file = measure_damages(source, plain, MEASURING, tmp_path / "a.json")
    by_inputs = measure_damages(source, _recipe(), MEASURING, tmp_path / "b.json")
    assert all(a != b for a, b in zip(by_file.damages.values(), by_inputs.damages.values(), strict=True))
    nearest = replace(MEASURING, searched=False)
    assert (
        measure_damages(source, plain, nearest, tmp_path / "c.json").damages
        == measure_damages(source, _recipe(), nearest, tmp_path / "d.json").damages
    )


def test_codes_are_those_of_the_run_that_uses_the_importance(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(_: Any, block: torch.nn.Module, *others: Any) -> Any:
        samples = len(others[2])
        return ({n: torch.ones_like(block.get_parameter(n)) for n in others[3]} for _ in range(samples))

    monkeypatch.setattr(sensitivity, "block_gradients", ones)
    source, found = models.make_model("llama", tmp_path / "source", torch.float32), {}
    plain = load_file(source / "model.safetensors")
    for tokens in (64, 8192):  # from 4096 on scales of either sign are tried
        path = _flat_importance(source, tmp_path / f"{tokens}.safetensors", Provenance("text", tokens))
        recipe = make_recipe("W4A16G32", layout="fake", importance=path)
        measured = measure_damages(open_source(str(source)), recipe, MEASURING, tmp_path / f"{tokens}.json")
        quantize(source, recipe, output_dir=tmp_path / str(tokens))
        coded = load_file(tmp_path / str(tokens) / "model.safetensors")
        for module, damages in measured.damages.items():
            error = (plain[f"{module}.weight"] - coded[f"{module}.weight"]).double().square().sum()
            assert damages[1] == pytest.approx(float(error) / (2 * DATA.seqlen), rel=1e-5)
        found[tokens] = measured.damages
    assert found[64] != found[8192]


WORDS = (
    "--target-bits", "4.5", "--options", OPTIONS, "--format", "auto_round", "--algorithm", "rtn", "--dataset", "random",
    "--nsamples", "4", "--seqlen", "16", "--parallel", "1",
)  # fmt: skip


def _run(*words: str | Path) -> Any:
    return CliRunner().invoke(commands, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture
def in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process would import torch and transformers once more, which takes seconds; test_tune_command has one."""
    monkeypatch.setattr(_tuning, "run_apart", lambda console, what, less, work, *words: work(console, *words))


@pytest.mark.usefixtures("in_one_process")
def test_tune_measures_mixes_and_tunes(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = _run("tune", folders["qwen3_moe"], *WORDS, "-o", out)
    assert made.exit_code == 0, made.output
    assert {p.name for p in tmp_path.iterdir()} == {"out", "out.damages.json", "out.layers.toml", "out.tuned"}
    assert _run("verify", out, "--deep", "--source", folders["qwen3_moe"]).exit_code == 0
    recipe = make_recipe("W2A16G32", layout="auto_round", layer_config=str(tmp_path / "out.layers.toml"))
    plan = make_plan(read_checkpoint(open_source(str(folders["qwen3_moe"]))), recipe)
    coded = {d.tensor.module: (d.tensor.numel, d.scheme.bits) for d in plan.decisions if d.scheme}
    assert len({bits for _, bits in coded.values()}) > 1
    files = load_file(out / "model.safetensors")
    size = sum(t.numel() * t.element_size() for n, t in files.items() if n.rpartition(".")[0] in coded)
    assert 4.5 * 0.98 <= 8 * size / sum(numel for numel, _ in coded.values()) <= 4.5
    again = _run("tune", folders["qwen3_moe"], *WORDS, "-o", out)
    assert again.exit_code == 0, again.output
    assert "using the mixture" in again.stderr


CALIBRATED = (*WORDS[:6], "--calibrate", "random", "--parallel", "1")


@pytest.mark.usefixtures("in_one_process")
def test_quantize_measures_its_own_scales(folders: dict[str, Path], tmp_path: Path) -> None:
    out, importance = tmp_path / "out", _flat_importance(folders["llama"], tmp_path / "out.importance.safetensors")
    made = _run("quantize", folders["llama"], *CALIBRATED, "-o", out)
    assert made.exit_code == 0, made.output
    identity = json.loads((tmp_path / "out.damages.json").read_text())["identity"]
    assert identity["searched"] is True
    assert identity["data"] == {"dataset": "random", "nsamples": 16, "seqlen": 256, "seed": 0}
    recipe = make_recipe("W2A16G32", layout="auto_round", importance=importance)
    measured = read_measured(tmp_path / "out.damages.json", identity)
    mixed = mix(open_source(str(folders["llama"])), recipe, OPTIONS, 4.5, measured=measured)
    assert mixed.text == (tmp_path / "out.layers.toml").read_text()
    assert "geometric mean with scores" in mixed.text


@pytest.mark.usefixtures("in_one_process")
@pytest.mark.parametrize("words", [("tune", *WORDS), ("quantize", *CALIBRATED)], ids=["tune", "quantize"])
def test_measuring_keeps_to_the_disk_of_the_command(
    words: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    _flat_importance(folders["llama"], tmp_path / "out.importance.safetensors")
    limits = ("--max-ram", "66k", "--max-disk", "1000")
    made = _run(words[0], folders["llama"], *words[1:], *limits, "-o", tmp_path / "out")
    assert made.exit_code == BudgetTooSmall.exit_code
    assert "--max-disk leaves 1000 bytes" in made.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"out.importance.safetensors"}


@pytest.mark.usefixtures("in_one_process")
def test_with_a_fold_scores_decide(folders: dict[str, Path], tmp_path: Path) -> None:
    _flat_importance(folders["llama"], tmp_path / "out.importance.safetensors")
    made = _run("quantize", folders["llama"], *CALIBRATED, "--fold", "auto", "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert not (tmp_path / "out.damages.json").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--target-bits", "4.5"), "needs --options"),
        (("--options", OPTIONS), "only with --target-bits"),
        (("--target-bits", "4.5", "--options", "FP8_TENSOR,W4A16", "--format", "fake"), "beyond a group"),
        (("--target-bits", "1.5", "--options", OPTIONS), "allow averages from"),
        (("--target-bits", "4.5", "--options", OPTIONS, "--dry-run"), "--dry-run makes nothing"),
    ],
)
def test_words_of_mixtures_are_refused(
    more: tuple[str, ...], told: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    found = _run("tune", folders["llama"], *WORDS[4:], *more, "-o", tmp_path / "out")
    assert found.exit_code == BadOption.exit_code, found.output
    assert told in found.output
    assert list(tmp_path.iterdir()) == []
