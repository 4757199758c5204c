"""Tuned codes are packed as codes that the main job makes itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import shardq
from shardq import Limits, make_recipe
from shardq.cli.group import commands
from shardq.errors import BadOption, BadTuned, RecipeChanged, VerifyFailed
from shardq.files.safetensors import read_header
from shardq.headers import read_headers
from shardq.kernels import load
from shardq.outputs import open_result, read_output, target_of
from shardq.tuned import MANIFEST, InputScale, Tuned, TunedWriter, load_tuned
from shardq.unpack import OutputShard, read_module

SCHEMES = ["W4A16", "W3A16_ASYM@compressed-tensors", "W4A16G64@mlx", "MXFP4@compressed-tensors", "NVFP4A16"]
INLINE = Limits(parallel=1)
IDENTITY = {"algorithm": "test", "seed": 1}


def taken(folder: Path, scheme: str) -> dict[str, Tuned]:
    """The codes of an output, by module."""
    output = read_output(open_result(str(folder)), str(folder))
    headers = read_headers(output.source, [output.files[n] for n in output.provenance["files"]])
    schemes = {d.tensor.name: d.scheme for d in shardq.plan("demo", scheme).decisions if d.scheme}
    found = {}
    for name, entry in output.ledger["tensors"].items():
        if entry["outcome"] == "quantized":
            shard = OutputShard(output.source, entry["file"], headers[entry["file"]])
            q = read_module(shard, target_of(name, entry), output.layout, schemes[name], load())
            found[name.removesuffix(".weight")] = Tuned(schemes[name], q)
    return found


def tuned_folder(folder: Path, modules: dict[str, Tuned]) -> Path:
    writer = TunedWriter(folder, IDENTITY)
    for block in sorted({m.rpartition(".")[0] for m in modules}):
        writer.write(block, {m: t for m, t in modules.items() if m.rpartition(".")[0] == block})
    writer.finish()
    return folder


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_of_a_run_give_its_bytes_again(scheme: str, tmp_path: Path) -> None:
    plain = shardq.quantize("demo", scheme, output_dir=tmp_path / "plain", limits=INLINE)
    folder = tuned_folder(tmp_path / "tuned", taken(plain.output, scheme))
    made = shardq.quantize("demo", make_recipe(scheme, tuned=folder), output_dir=tmp_path / "made", limits=INLINE)
    for path in plain.output.glob("*.safetensors"):
        assert (made.output / path.name).read_bytes() == path.read_bytes()
    assert made.scales.startswith(f"{plain.quantized} tuned by test")
    assert not shardq.verify(made.output, deep=True, source="demo").problems
    with pytest.raises(VerifyFailed, match=r"codes that were tuned.*--tuned"):
        shardq.audit(made.output, source="demo")
    audit = shardq.audit(made.output, source="demo", tuned=folder)
    assert audit.problems == ()
    assert all(t.check.whole for t in audit.tensors)
    assert {t.check.scale for t in audit.tensors} == {""}  # the folder has it, too


def test_an_audit_looks_at_the_codes_of_the_folder(tmp_path: Path) -> None:
    """Blocks of tensors, too; and nothing but the folder of the run will do."""
    plain = shardq.quantize("demo", "W4A16", output_dir=tmp_path / "plain", limits=INLINE)
    modules = taken(plain.output, "W4A16")
    half = dict(list(modules.items())[::2])  # the others are made anew
    for t in half.values():
        np.copyto(t.quantized.codes, 15 - t.quantized.codes)
    folder, other = tuned_folder(tmp_path / "tuned", half), tuned_folder(tmp_path / "other", modules)
    made = shardq.quantize("demo", make_recipe("W4A16", tuned=folder), output_dir=tmp_path / "made", limits=INLINE)
    told = CliRunner().invoke(
        commands, ["audit", str(made.output), "--source", "demo", "--tuned", str(folder), "--json"]
    )
    assert json.loads(told.stdout)["verdict"] == "equal"
    small = shardq.audit(made.output, source="demo", tuned=folder, max_traffic_bytes=3_500_000)
    assert small.problems == ()
    assert not all(t.check.whole for t in small.tensors)
    for result, wrong in ((made.output, other), (plain.output, folder)):
        with pytest.raises(BadOption, match="--tuned gives"):
            shardq.audit(result, source="demo", tuned=wrong)
    name = f"{next(iter(half))}.qweight"
    path, t = next(
        (path, t) for path in made.output.glob("*.safetensors") for t in read_header(path).tensors if t.name == name
    )
    with path.open("r+b") as file:
        file.seek(t.begin)
        (byte,) = file.read(1)
        file.seek(t.begin)
        file.write(bytes([byte ^ 1]))
    (problem,) = shardq.audit(made.output, source="demo", tuned=folder).problems
    assert problem.startswith(f"{name} in {path.name} differs at byte {t.begin}")


def test_other_codes_give_other_weights_and_errors(tmp_path: Path) -> None:
    plain = shardq.quantize("demo", "W4A16", output_dir=tmp_path / "plain", limits=INLINE)
    modules = taken(plain.output, "W4A16")
    changed = next(iter(modules))
    codes = modules[changed].quantized.codes
    np.copyto(codes, (codes + 1) % 16)
    folder = tuned_folder(tmp_path / "tuned", modules)
    made = shardq.quantize("demo", make_recipe("W4A16", tuned=folder), output_dir=tmp_path / "made", limits=INLINE)
    assert plain.errors
    assert made.errors
    assert made.errors.relative > plain.errors.relative
    assert not shardq.verify(made.output, deep=True, source="demo").problems


def test_errors_of_what_is_written_as_weights_are_theirs(tmp_path: Path) -> None:
    plain = shardq.quantize("demo", "W4A16", output_dir=tmp_path / "plain", limits=INLINE)
    folder = tuned_folder(tmp_path / "tuned", taken(plain.output, "W4A16"))
    recipe = make_recipe("W4A16", layout="fake", tuned=folder)
    made = shardq.quantize("demo", recipe, output_dir=tmp_path / "made", limits=INLINE)
    assert not shardq.verify(made.output, deep=True, source="demo").problems


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    plain = shardq.quantize("demo", "W4A16", output_dir=tmp_path / "plain", limits=INLINE)
    modules = taken(plain.output, "W4A16")
    folder = tuned_folder(tmp_path / "tuned", modules)
    with pytest.raises(BadTuned, match="does not fit"):
        shardq.plan("demo", make_recipe("W4A16G32", tuned=folder))
    with pytest.raises(RecipeChanged):
        TunedWriter(folder, {**IDENTITY, "seed": 2})
    assert TunedWriter(folder, IDENTITY).has(next(iter(modules)).rpartition(".")[0])
    with pytest.raises(BadTuned, match=MANIFEST):
        load_tuned(tmp_path / "plain")
    block = next(folder.glob("*.safetensors"))
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(bytes(data))
    with pytest.raises(BadTuned, match="is not what"):
        load_tuned(folder)
    (folder / MANIFEST).write_text(json.dumps({"blocks": []}))
    with pytest.raises(BadTuned, match="damaged"):
        load_tuned(folder)


# Schemes with scales of activations, and those with the same weights that need none; the tensor, and its type.
CALIBRATED = [
    ("FP8_STATIC", "FP8_DYNAMIC", "input_scale", "BF16"),
    ("FP8_STATIC_TENSOR", "FP8_TENSOR", "input_scale", "BF16"),
    ("W8A8_STATIC", "W8A8", "input_scale", "BF16"),
    ("NVFP4", "NVFP4A16", "input_global_scale", "F32"),
]


def with_scales(folder: Path, modules: dict[str, Tuned], scheme: str) -> Path:
    """The same weights with scales of activations: 1/2, 1/4, 1/8, ..."""
    default = make_recipe(scheme).scheme
    made = {
        m: Tuned(replace(t.scheme, activation=default.activation), t.quantized, InputScale(2.0 ** -(1 + i % 8)))
        for i, (m, t) in enumerate(modules.items())
    }
    return tuned_folder(folder, made)


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of each tensor."""
    opened = open_result(str(folder))
    headers = read_headers(opened, [f for f in opened.files() if f.name.endswith(".safetensors")])
    return {
        t.name: (t.dtype, list(t.shape), opened.read(file, t.begin, t.end))
        for file, header in headers.items()
        for t in header.tensors
    }


@pytest.mark.parametrize(("scheme", "beside", "suffix", "dtype"), CALIBRATED)
def test_scales_of_activations_are_written_beside_the_same_weights(
    scheme: str, beside: str, suffix: str, dtype: str, tmp_path: Path
) -> None:
    plain = shardq.quantize("demo", beside, output_dir=tmp_path / "plain", limits=INLINE)
    folder = with_scales(tmp_path / "tuned", taken(plain.output, beside), scheme)
    made = shardq.quantize("demo", make_recipe(scheme, tuned=folder), output_dir=tmp_path / "made", limits=INLINE)
    before, after = stored(plain.output), stored(made.output)
    refs = load_tuned(folder).refs
    assert {n.removesuffix(f".{suffix}") for n in after.keys() - before.keys()} == refs.keys()
    assert {n: t for n, t in after.items() if n in before} == before
    assert shardq.audit(made.output, source="demo", tuned=folder).problems == ()
    for module, ref in refs.items():
        assert ref.input_scale
        number = np.float32(ref.input_scale.value)  # a power of two: its first bytes are those of BF16
        data = number.tobytes() if dtype == "F32" else number.tobytes()[2:]
        assert after[f"{module}.{suffix}"] == (dtype, [1], data)
    assert not shardq.verify(made.output, deep=True, source="demo").problems


def test_scales_of_activations_are_asked_for_before_anything_is_read(tmp_path: Path) -> None:
    plain = shardq.quantize("demo", "FP8_DYNAMIC", output_dir=tmp_path / "plain", limits=INLINE)
    modules = taken(plain.output, "FP8_DYNAMIC")
    for scheme in ("FP8_STATIC", "NVFP4", "NVFP4@auto_round"):
        with pytest.raises(BadOption, match=r"shardq tune SOURCE --scheme (FP8_STATIC|NVFP4) --algorithm rtn"):
            shardq.quantize("demo", scheme, output_dir=tmp_path / "none", limits=INLINE)
    assert not (tmp_path / "none").exists()
    folder = with_scales(tmp_path / "tuned", dict(list(modules.items())[1:]), "FP8_STATIC")
    with pytest.raises(BadTuned, match=f"no scales of activations for 1 modules of FP8-STATIC: {next(iter(modules))}"):
        shardq.plan("demo", make_recipe("FP8_STATIC", tuned=folder))
    for layout in ("fake", "mlx"):  # which write none
        assert shardq.plan("demo", f"NVFP4@{layout}").tasks
