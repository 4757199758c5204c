"""Scales of activations that a checkpoint has: those of a whole model in torch, equal where servers fuse, the same
after a stop, and in the output under the names that readers know."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="block mode needs transformers")

import tuned_models as models

from shardq.cli.group import commands
from shardq.errors import BadOption, BadTuned, UnsupportedSource
from shardq.fused import fused_groups
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.plans import make_plan
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.input_scales import input_scale
from shardq.recipe import Recipe, make_recipe
from shardq.replaced import read_whole
from shardq.schemes import PRESETS, Scheme
from shardq.sources import open_source
from shardq.tune import driver, passes
from shardq.tune.activation_scales import _with_siblings
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.result import TuneResult
from shardq.tune.settings import SignRoundOptions
from shardq.tune.stored import put_replaced
from shardq.tune.subjects import check_left, find_subjects
from shardq.tune.work import Work
from shardq.tuned import TunedRef, load_tuned, read_tuned

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataOptions("random", nsamples=4, seqlen=16, seed=1)
FEW = DataOptions("random", nsamples=1, seqlen=2, seed=1)
NAMES = ("llama", "qwen3_moe")
LAST = 2
Kept = dict[str, float]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: models.make_model(name, base / name) for name in NAMES}


def _tune(
    folder: Path, out: Path, scheme: str, algorithm: Any = "rtn", data: DataOptions = DATA, **more: Any
) -> TuneResult:
    learning = SignRoundOptions(iters=3, batch_size=2)
    options = TuneOptions(algorithm=algorithm, data=data, signround=learning, dtype="float32", **more)
    return tune_blocks(open_source(str(folder)), make_recipe(scheme), options, Place(out))


def _refs(out: Path) -> dict[str, TunedRef]:
    return dict(load_tuned(out).refs)


def _values(out: Path, layer: int | None = None) -> Kept:
    inside = "" if layer is None else f".layers.{layer}."
    return {m: r.input_scale.value for m, r in _refs(out).items() if r.input_scale and inside in m}


def _watch(kept: Kept, name: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, *others = [*args, *kwargs.values()]
        if name.endswith(".experts"):
            chosen = others[0]
            for e in chosen.unique().tolist():
                own = x.reshape(-1, x.shape[-1])[(chosen == e).any(-1)]
                gate, up = (own @ module.gate_up_proj[e].T).chunk(2, dim=-1)
                between = module.act_fn(gate) * up
                for part, rows in (("gate_proj", own), ("up_proj", own), ("down_proj", between)):
                    _keep(kept, f"{name}.{e}.{part}", rows)
        else:
            _keep(kept, name, x)

    return hook


def _keep(kept: Kept, name: str, rows: torch.Tensor) -> None:
    kept[name] = max(kept.get(name, 0.0), float(rows.abs().max()))


@torch.no_grad()
def _largest(model: Any, ids: torch.Tensor) -> Kept:
    """The largest magnitude that comes into each matrix of a whole model."""
    kept: Kept = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name.endswith(".experts"):
            module.register_forward_pre_hook(_watch(kept, name), with_kwargs=True)
    for one in ids:
        model(input_ids=one[None], use_cache=False)
    return kept


def _put(model: Any, out: Path, layers: int) -> None:
    """The weights that codes stand for, in the first layers of a whole model."""
    tuned = load_tuned(out)
    for module, ref in tuned.refs.items():
        if int(module.split(".")[2]) >= layers:
            continue
        codes = read_tuned(ref, 0, tuned.shapes[module][0])
        values = torch.from_numpy(decode_rows(codes, Scheme(**tuned.schemes[module]), load()))
        with torch.no_grad():
            _weight(model, module).copy_(values)


def _weight(model: Any, module: str) -> torch.Tensor:
    parent, _, part = module.rpartition(".")
    if ".experts." not in module:
        return model.get_submodule(module).weight
    experts, _, number = parent.rpartition(".")
    stacks = model.get_submodule(experts)
    if part == "down_proj":
        return stacks.down_proj[int(number)]
    half = stacks.gate_up_proj.shape[1] // 2
    return stacks.gate_up_proj[int(number)][slice(0, half) if part == "gate_proj" else slice(half, None)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quanted", [True, False])
def test_scales_are_those_of_a_whole_model(name: str, quanted: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _tune(folders[name], out, "NVFP4", enable_quanted_input=quanted, enable_act_quant=False)
    model = models.load_whole(folders[name])
    if quanted:
        _put(model, out, LAST)
    largest = _largest(model, torch.from_numpy(np.load(out / driver.IDS)))
    found = _values(out, LAST if quanted else None)
    assert len(found) == (3 if not quanted else 1) * (7 if name == "llama" else 4 + 3 * 8)
    scheme = PRESETS["NVFP4"].scheme
    expected = {m: input_scale(scheme, largest[m], "BF16") for m in found if m not in result.borrowed}
    assert expected
    assert {m: found[m] for m in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["rtn", "opt-rtn", "gptq", "signround"])
def test_scales_do_not_depend_on_the_algorithm(algorithm: str, folders: dict[str, Path], tmp_path: Path) -> None:
    _tune(folders["llama"], tmp_path / "other", "W8A8_STATIC", algorithm, enable_quanted_input=False)
    _tune(folders["llama"], tmp_path / "nearest", "W8A8_STATIC", enable_quanted_input=False)
    found = _values(tmp_path / "other", 0)
    assert found == _values(tmp_path / "nearest", 0)
    assert len(found) == 7


def test_scales_are_of_inputs_as_awq_leaves_them(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    _tune(folders["llama"], out, "FP8_STATIC", "awq,rtn", enable_quanted_input=False)
    replaced, model = load_tuned(out).replaced, models.load_whole(folders["llama"])
    norm = "model.layers.0.input_layernorm.weight"
    before = _largest(models.load_whole(folders["llama"]), torch.from_numpy(np.load(out / driver.IDS)))
    put_replaced(model, {norm: norm}, {norm: read_whole(replaced[norm])})
    after = _largest(model, torch.from_numpy(np.load(out / driver.IDS)))
    module, scheme = "model.layers.0.self_attn.q_proj", PRESETS["FP8_STATIC"].scheme
    assert _values(out, 0)[module] == pytest.approx(input_scale(scheme, after[module], "BF16"), rel=1e-2)
    assert after[module] != pytest.approx(before[module], rel=0.02)


@pytest.mark.parametrize("nblocks", [1, 2])
def test_scales_are_of_inputs_as_learned_norms_and_biases_leave_them(nblocks: int, tmp_path: Path) -> None:
    folder, out = models.make_model("qwen2", tmp_path / "qwen2"), tmp_path / "out"
    learning = SignRoundOptions(4, nblocks, 2, lr=0.3, not_use_best_mse=True, enable_norm_bias_tuning=True)
    options = TuneOptions(data=DATA, signround=learning, dtype="float32", enable_act_quant=False)
    tune_blocks(open_source(str(folder)), make_recipe("FP8_STATIC"), options, Place(out))
    model, replaced = models.load_whole(folder), load_tuned(out).replaced
    ids = torch.from_numpy(np.load(out / driver.IDS))
    _put(model, out, LAST + 1)
    before = _largest(model, ids)
    put_replaced(model, {name: name for name in replaced}, {name: read_whole(ref) for name, ref in replaced.items()})
    after, found = _largest(model, ids), _values(out)
    assert sum(name.endswith("v_proj.bias") for name in replaced) == sum("input_" in name for name in replaced) == 3
    scheme, config = PRESETS["FP8_STATIC"].scheme, json.loads((folder / "config.json").read_text())
    groups = fused_groups(found, config)
    largest = {m: max(after[other] for other in groups.get(m, (m,))) for m in found}
    assert found == pytest.approx({m: input_scale(scheme, amax, "BF16") for m, amax in largest.items()}, rel=1e-4)
    assert sum(abs(before[m] / after[m] - 1) > 0.003 for m in found) > 3  # norms and biases did it


def test_members_of_a_fused_group_share_their_scale(folders: dict[str, Path], tmp_path: Path) -> None:
    _tune(folders["qwen3_moe"], tmp_path / "out", "FP8_STATIC")
    found = _values(tmp_path / "out")
    groups = set(fused_groups(found, json.loads((folders["qwen3_moe"] / "config.json").read_text())).values())
    assert len(groups) == 3 * (1 + 8)
    assert all(len({found[m] for m in group}) == 1 for group in groups)


def test_an_expert_that_no_token_reaches_gets_the_largest_of_its_siblings(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    result = _tune(folders["qwen3_moe"], tmp_path / "out", "FP8_STATIC", data=FEW)
    found, borrowed = _values(tmp_path / "out", 1), [m for m in result.borrowed if ".layers.1." in m]
    assert len(borrowed) >= 3 * (8 - 2 * FEW.seqlen)
    for part in ("gate_proj", "up_proj", "down_proj"):
        own = {m for m in borrowed if m.endswith(part)}
        siblings = [v for m, v in found.items() if m.endswith(part) and m not in own and ".experts." in m]
        assert {found[m] for m in own} == {max(siblings)}


def test_what_a_block_does_not_use_is_told() -> None:
    own = {"a.0.experts.0.up": None, "a.0.experts.1.up": 2.0, "a.0.experts.2.up": 3.0, "a.0.idle": 1.0}
    assert _with_siblings(own) == {**own, "a.0.experts.0.up": 3.0}
    with pytest.raises(UnsupportedSource, match=r"a\.0\.idle gets no input"):
        _with_siblings({**own, "a.0.idle": None})


def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    borrowed = _tune(folders["qwen3_moe"], whole, "FP8_STATIC", data=FEW).borrowed
    real = passes.tune_block

    def stopping(work: Work, options: TuneOptions, *more: Any) -> Any:
        if work.index == LAST:
            raise KeyboardInterrupt
        return real(work, options, *more)

    with monkeypatch.context() as stopped:
        stopped.setattr(passes, "tune_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            _tune(folders["qwen3_moe"], again, "FP8_STATIC", data=FEW)
    result = _tune(folders["qwen3_moe"], again, "FP8_STATIC", data=FEW)
    assert (result.resumed, result.borrowed) == (LAST, borrowed)
    assert all((again / p.name).read_bytes() == p.read_bytes() for p in whole.iterdir())


def test_a_head_has_its_scale_too(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe, options = make_recipe("NVFP4", quant_lm_head=True), TuneOptions("rtn", DATA, enable_quanted_input=False)
    tune_blocks(open_source(str(folders["llama"])), recipe, options, Place(tmp_path / "out"))
    found = _values(tmp_path / "out")
    largest = _largest(models.load_whole(folders["llama"]), torch.from_numpy(np.load(tmp_path / "out" / driver.IDS)))
    assert len(found) == 3 * 7 + 1
    assert found["lm_head"] == pytest.approx(input_scale(recipe.scheme, largest["lm_head"], "BF16"), rel=1e-4)


def test_what_has_no_scale_is_refused_before_tuning(folders: dict[str, Path], tmp_path: Path) -> None:
    with BlockModel.open(open_source(str(folders["llama"]))) as model:
        plan = make_plan(model.checkpoint, make_recipe("FP8_STATIC"), before_tuning=True)
        subjects = find_subjects(model, plan)
        check_left(subjects, plan)
        name = "model.layers.0.mlp.up_proj"
        with pytest.raises(BadOption, match=f"1 modules are none: {name}"):
            check_left(replace(subjects, left=(name,)), plan)


# --- from a folder to an output ------------------------------------------------------------------------------------


def _run(*words: str) -> Any:
    return CliRunner().invoke(commands, list(words), catch_exceptions=False)


@pytest.mark.parametrize(
    ("scheme", "suffix", "dtype"),
    [
        ("FP8_STATIC", "input_scale", torch.bfloat16), ("FP8_STATIC_TENSOR", "input_scale", torch.bfloat16),
        ("W8A8_STATIC", "input_scale", torch.bfloat16), ("NVFP4", "input_global_scale", torch.float32),
        ("FP8_STATIC@auto_round", "input_scale", torch.bfloat16),
        ("NVFP4@auto_round", "input_global_scale", torch.float32),
    ],
)  # fmt: skip
def test_outputs_have_the_scales(
    scheme: str, suffix: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Files, `verify` and `inspect`; the folder of the tuning is what `quantize --tuned` takes."""
    _tune(folders["llama"], tmp_path / "tuned", scheme)
    words = ("--tuned", str(tmp_path / "tuned"), "--parallel", "1", "-o", str(tmp_path / "out"))
    made = _run("quantize", str(folders["llama"]), "--scheme", scheme, *words)
    assert made.exit_code == 0, made.output
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    found = {n.removesuffix(f".{suffix}"): t for n, t in tensors.items() if n.endswith(f".{suffix}")}
    assert {(t.dtype, t.shape) for t in found.values()} == {(dtype, (1,))}
    assert {m: float(t) for m, t in found.items()} == _values(tmp_path / "tuned")
    assert "with shardq, with calibration data:" in (tmp_path / "out" / "README.md").read_text()
    checked = _run("verify", str(tmp_path / "out"), "--deep", "--source", str(folders["llama"]))
    assert checked.exit_code == 0, checked.output
    shown = json.loads(_run("inspect", str(tmp_path / "out"), "--json").output)
    assert shown["schemes"] == {PRESETS[scheme.partition("@")[0]].scheme.name: 21}


def test_a_bad_scale_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    _tune(folders["llama"], tmp_path / "tuned", "FP8_STATIC")
    words = ("--scheme", "FP8_STATIC", "--tuned", str(tmp_path / "tuned"), "--parallel", "1")
    made = _run("quantize", str(folders["llama"]), *words, "-o", str(tmp_path / "out"))
    assert made.exit_code == 0, made.output
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    name = "model.layers.1.mlp.up_proj.input_scale"
    begin = json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[8 + size + begin : 8 + size + begin + 2] = b"\0\0"
    path.write_bytes(data)
    checked = _run("verify", str(tmp_path / "out"), "--deep")
    assert checked.exit_code != 0
    assert "model.layers.1.mlp.up_proj.weight: has a scale of activations of 0" in " ".join(checked.output.split())


def test_quantize_says_what_finds_the_scales(folders: dict[str, Path], tmp_path: Path) -> None:
    for words in (("quantize", "-o", str(tmp_path / "out")), ("plan",)):
        found = _run(words[0], str(folders["llama"]), "--scheme", "FP8_STATIC", *words[1:])
        assert found.exit_code == BadOption.exit_code
        assert "shardq tune SOURCE --scheme FP8_STATIC --algorithm rtn" in " ".join(found.output.split())
    assert not list(tmp_path.iterdir())
    dry = _run("tune", str(folders["llama"]), "--scheme", "FP8_STATIC", "--algorithm", "rtn", "--dry-run")
    assert dry.exit_code == 0, dry.output


def test_a_folder_that_was_tuned_for_less_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Codes alone, as an earlier version has written them, or of fewer modules."""
    _tune(folders["llama"], tmp_path / "out", "FP8_STATIC")
    tuned = load_tuned(tmp_path / "out")
    checkpoint = read_checkpoint(open_source(str(folders["llama"])))
    make_plan(checkpoint, _with(tuned))
    whole = dict(tuned.refs)
    name = "model.layers.1.mlp.up_proj"
    for refs in ({**whole, name: _without(whole[name])}, {m: r for m, r in whole.items() if m != name}):
        with pytest.raises(BadTuned, match=f"no scales of activations for 1 modules of FP8-STATIC: {name}"):
            make_plan(checkpoint, _with(replace(tuned, refs=refs)))


def _with(tuned: Any) -> Recipe:
    return make_recipe("FP8_STATIC", tuned=tuned)


def _without(ref: TunedRef) -> TunedRef:
    return replace(ref, input_scale=None)
