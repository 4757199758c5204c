"""What a ledger says of each tensor's error, against the weights that a reader of the output gets."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import shardq
from shardq import Limits, make_recipe
from shardq.cli._result_text import describe_result, print_result
from shardq.files.safetensors import read_header
from shardq.importance_files import Provenance, write_importance
from shardq.importance_vectors import weights_of
from shardq.kernels import load
from shardq.ledger import LEDGER, decode_ledger, encode_ledger
from shardq.outputs import open_result, read_output, target_of
from shardq.quantizers.decode import decode_rows
from shardq.quantizers.quantized import Quantized
from shardq.schemes import Scheme, parse_name
from shardq.unpack import OutputShard, read_module

ZEROS = "model.layers.1.mlp.up_proj.weight"
SMALL = "model.layers.0.mlp.up_proj.weight"
NOTHING = "model.layers.2.mlp.up_proj.weight"
SCHEMES = {
    "int sym": ("W4A16@auto_round", {}),
    "int asym": ("W4A16_ASYM@compressed-tensors", {}),
    "mlx": ("W4A16@mlx", {"group_size": 64, "ignore": ["lm_head"]}),
    "mxfp4": ("MXFP4", {}),
    "nvfp4": ("NVFP4A16", {}),
    "fp8": ("FP8_BLOCK", {}),
    "fp8 rows": ("FP8_DYNAMIC", {}),
}


@pytest.fixture(scope="module")
def source(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tensor that has rows of zeros, one with groups too small for any scale, one of zeros."""
    folder = tmp_path_factory.mktemp("hurt") / "model"
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        if ZEROS in tensors:
            tensors[ZEROS][:7] = 0
        if SMALL in tensors:
            tensors[SMALL][5:17] *= 1e-7
        if NOTHING in tensors:
            tensors[NOTHING][:] = 0
        save_file(tensors, folder / path.name)
    return folder


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    tensors: dict[str, dict[str, Any]] = decode_ledger((folder / LEDGER).read_bytes())["tensors"]
    return {name: e for name, e in tensors.items() if e["outcome"] == "quantized"}


def weights(folder: Path) -> dict[str, NDArray[np.float64]]:
    return {k: v.double().numpy() for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def at_ends(q: Quantized, scheme: Scheme) -> NDArray[np.bool_]:
    if scheme.format.is_integer:
        return (q.codes == 0) | (q.codes == (1 << scheme.bits) - 1)
    values = np.empty(q.codes.shape, np.float32)
    load().decode_scaled(q.codes, scheme.element, np.ones((len(q.codes), 1), np.float32), q.codes.shape[1], values)
    return np.abs(values) == scheme.format.max_value


def by_group(x: NDArray[np.bool_], group: int) -> NDArray[np.bool_]:
    return np.logical_or.reduceat(x, np.arange(0, x.shape[1], group), axis=1)


def expected(w: NDArray[np.float64], values: NDArray[np.float64]) -> dict[str, float | None]:
    squares, noise, there = (w**2).sum(), ((w - values) ** 2).sum(), (values**2).sum()
    return {
        "squared_error": noise,
        "squared_weight": squares,
        "max_error": np.abs(w - values).max(),
        "relative_error": np.sqrt(noise / squares) if squares else 0,
        "sqnr_db": 10 * np.log10(squares / noise) if squares and noise else None,
        "cosine": (w * values).sum() / np.sqrt(squares * there) if squares and there else None,
    }


def check(entry: Mapping[str, Any], wanted: Mapping[str, float | None]) -> None:
    assert {k: None if v is None else float(v) for k, v in wanted.items()} == {
        k: v if (v := entry[k]) is None else pytest.approx(v, rel=1e-5) for k in wanted
    }
    if (cosine := wanted["cosine"]) is not None:
        assert 1 - entry["cosine"] == pytest.approx(1 - cosine, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", SCHEMES)
def test_figures_are_those_of_what_a_reader_gets(
    source: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words, options = SCHEMES[name]
    out = tmp_path / "out"
    made = shardq.quantize(source, make_recipe(words, **options), output_dir=out, limits=Limits(parallel=1))
    opened = open_result(str(out))
    output, before = read_output(opened, str(out)), weights(source)
    headers = {path.name: read_header(path) for path in out.glob("*.safetensors")}
    found = entries(out)
    assert len(found) >= 20
    zeroed = 0
    for tensor, entry in found.items():
        scheme = output.layout.settle(parse_name(entry["scheme"]))
        shard = OutputShard(opened, entry["file"], headers[entry["file"]])
        q, w = read_module(shard, target_of(tensor, entry), output.layout, scheme, load()), before[tensor]
        values = decode_rows(q, scheme, load()).astype(np.float64)
        check(entry, expected(w, values))
        group = scheme.group_columns(w.shape[1])
        lost = int((by_group(w != 0, group) & ~by_group(values != 0, group)).sum())
        assert entry["zeroed_groups"] == lost
        assert entry["saturated_share"] == at_ends(q, scheme).sum() / w.size
        zeroed += lost
    assert found[NOTHING]["cosine"] is None
    assert found[NOTHING]["zeroed_groups"] == found[ZEROS]["zeroed_groups"] == 0  # nothing was there
    assert made.errors is not None
    assert made.errors.figures.zeroed_groups == zeroed
    document = describe_result(made)
    assert document["errors"]["zeroed_groups"] == zeroed
    assert document["zeroed"] == ([{"tensor": SMALL, "groups": zeroed}] if zeroed else [])
    print_result(made)
    summary = capsys.readouterr().out
    assert (f"{SMALL} ({zeroed} groups)" in " ".join(summary.split())) == (zeroed > 0)
    if name in ("int sym", "nvfp4"):  # whose scales go no lower
        assert zeroed == 12 * -(-found[SMALL]["shape"][1] // scheme.group_columns(found[SMALL]["shape"][1]))
    assert shardq.verify(out, deep=True, source=source).problems == ()
    assert shardq.audit(out, source=source).problems == ()


def test_where_no_codes_are_kept_they_are_counted_before(source: Path, tmp_path: Path) -> None:
    plain, fake = tmp_path / "plain", tmp_path / "fake"
    recipes = [make_recipe("W4A16@auto_round"), make_recipe("W4A16@fake")]
    for recipe, out in zip(recipes, (plain, fake), strict=True):
        shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    before, after, codes = weights(source), weights(fake), entries(plain)
    for tensor, entry in entries(fake).items():
        check(entry, expected(before[tensor], after[tensor]))
        for key in ("saturated_share", "zeroed_groups"):
            assert entry[key] == codes[tensor][key]
    assert shardq.verify(fake, deep=True, source=source).problems == ()
    assert shardq.audit(fake, source=source).problems == ()


def test_a_searched_tensor_has_a_weighted_error(source: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    modules = {d.tensor.module: d.tensor.shape for d in shardq.plan(source).decisions if d.scheme}
    vectors = {m: rng.lognormal(0, 2, shape[1]).astype(np.float32) for m, shape in modules.items() if shape}
    path, out = tmp_path / "importance", tmp_path / "out"
    write_importance(path, vectors, Provenance("text", 8192, None, "model", None, None))
    recipe = make_recipe("W4A16@fake", importance=path, layer_config={"model.layers.1.self_attn.*": {"bits": 8}})
    shardq.quantize(source, recipe, output_dir=out, limits=Limits(parallel=1))
    before, after = weights(source), weights(out)
    for tensor, entry in entries(out).items():
        e = weights_of(vectors[tensor.removesuffix(".weight")])
        energy = (before[tensor] ** 2 * e).sum()
        if not energy:
            assert entry["weighted_relative_error"] is None
            continue
        weighted = np.sqrt(((before[tensor] - after[tensor]) ** 2 * e).sum() / energy)
        assert entry["weighted_relative_error"] == pytest.approx(weighted, rel=0.03)  # `fake` rounds values once more
        assert entry["weighted_relative_error"] == pytest.approx(np.sqrt(entry["losses"][1] / energy), rel=1e-5)


@pytest.mark.parametrize(("key", "value"), [("cosine", 0.99), ("zeroed_groups", 3), ("saturated_share", 0.125)])
def test_other_figures_are_found_and_missing_ones_are_not_missed(
    checkpoint: Path, tmp_path: Path, key: str, value: float
) -> None:
    """Ledgers of earlier versions have fewer of them."""
    out = tmp_path / "out"
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    ledger = decode_ledger((out / LEDGER).read_bytes())
    name = next(n for n, e in ledger["tensors"].items() if e["outcome"] == "quantized")
    said = ledger["tensors"][name].pop(key)
    (out / LEDGER).write_bytes(encode_ledger(ledger))
    assert shardq.verify(out, source=checkpoint).problems == ()
    ledger["tensors"][name][key] = value
    (out / LEDGER).write_bytes(encode_ledger(ledger))
    (problem,) = shardq.verify(out, source=checkpoint).problems
    assert problem == f"{name}: {key} is {said!r} against the source: the ledger says {value!r}"


def test_figures_do_not_depend_on_workers_or_cuts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for number, parallel in enumerate((1, 2, 1)):
        if number == 2:
            monkeypatch.setattr("shardq.cut.SLAB_BYTES", 1 << 14)
        out = tmp_path / str(number)
        shardq.quantize(source, "W4A16", output_dir=out, limits=Limits(parallel=parallel))
        found.append(entries(out))
    assert found[0] == found[1] == found[2]


def test_journal_lines_that_lack_figures_are_made_again(checkpoint: Path, tmp_path: Path) -> None:
    """As an earlier version wrote them, sealed files among them."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    shardq.quantize(checkpoint, output_dir=undisturbed, limits=Limits(parallel=1))
    with pytest.raises(InterruptedError):
        shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1), report=stop_when_sealed(out))
    journal = out / ".shardq" / "journal.jsonl"
    events = [json.loads(line[9:]) for line in journal.read_bytes().splitlines()]
    assert {"task", "sealed"} <= {e["event"] for e in events}
    journal.write_bytes(b"".join(line_of({k: v for k, v in e.items() if k != "swe"}) for e in events))
    shardq.quantize(checkpoint, output_dir=out, limits=Limits(parallel=1))
    for path in undisturbed.iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def stop_when_sealed(out: Path) -> Any:
    def report(_: object) -> None:
        if '"sealed"' in (out / ".shardq" / "journal.jsonl").read_text():
            raise InterruptedError

    return report


def line_of(event: Mapping[str, Any]) -> bytes:
    text = json.dumps(event, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
