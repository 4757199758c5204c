"""Tensors that a tuning replaced are written in place of the source's, told by the ledger, and checked against it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import shardq
from shardq import Limits, Progress, make_recipe
from shardq.checkpoint import TensorRef
from shardq.errors import BadTuned, ShardqError
from shardq.headers import read_headers
from shardq.kernels import load
from shardq.ledger import decode_ledger
from shardq.outputs import open_result, read_output, target_of
from shardq.replaced import Replaced
from shardq.tasks import Piece
from shardq.tuned import Factors, Tuned, TunedWriter, load_tuned
from shardq.unpack import OutputShard, read_module

SCHEME = "W4A16"
INLINE = Limits(parallel=1)


def _tensors() -> dict[str, TensorRef]:
    return {d.tensor.name: d.tensor for d in shardq.plan("demo", SCHEME).decisions}


def _norm(tensors: dict[str, TensorRef]) -> TensorRef:
    return next(t for name, t in sorted(tensors.items()) if name.endswith("input_layernorm.weight"))


def _changed(t: TensorRef) -> Replaced:
    """Other content of the same type and shape."""
    assert t.dtype is not None
    assert t.shape is not None
    return Replaced(t.dtype, t.shape, np.random.default_rng(1).integers(0, 120, t.size_bytes, np.uint8).tobytes())


def _tuned(folder: Path, output: Path, replaced: dict[str, Replaced], factors: Factors | None = None) -> Path:
    """The codes of an output beside what replaces tensors; the first matrix has factors."""
    made = read_output(open_result(str(output)), str(output))
    headers = read_headers(made.source, [made.files[n] for n in made.provenance["files"]])
    schemes = {d.tensor.name: d.scheme for d in shardq.plan("demo", SCHEME).decisions if d.scheme}
    modules = {}
    for name, entry in made.ledger["tensors"].items():
        if entry["outcome"] == "quantized":
            shard = OutputShard(made.source, entry["file"], headers[entry["file"]])
            q = read_module(shard, target_of(name, entry), made.layout, schemes[name], load())
            modules[name.removesuffix(".weight")] = Tuned(schemes[name], q)
    if factors:
        first = next(iter(modules))
        modules[first] = replace(modules[first], factors=factors)
    writer = TunedWriter(folder, {"algorithm": "test"})
    writer.write("model.layers.0", modules, replaced)
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shardq.quantize("demo", SCHEME, output_dir=tmp_path_factory.mktemp("plain") / "out", limits=INLINE).output


def _bytes_of(folder: Path, name: str) -> bytes:
    output = read_output(open_result(str(folder)), str(folder))
    file = output.ledger["tensors"][name]["file"]
    header = read_headers(output.source, [output.files[file]])[file]
    t = next(t for t in header.tensors if t.name == name)
    return (folder / file).read_bytes()[t.begin : t.end]


def test_a_replaced_norm_is_written_told_and_checked(plain: Path, tmp_path: Path) -> None:
    norm = _norm(_tensors())
    other = _changed(norm)
    folder = _tuned(tmp_path / "tuned", plain, {norm.name: other})
    out = shardq.quantize("demo", make_recipe(SCHEME, tuned=folder), output_dir=tmp_path / "out", limits=INLINE).output
    assert _bytes_of(out, norm.name) == other.data != _bytes_of(plain, norm.name)
    ledger = decode_ledger((out / "shardq-ledger.json.zst").read_bytes())["tensors"]
    assert ledger[norm.name]["replaced"] == "test"
    assert ledger[norm.name]["sha256"] == hashlib.sha256(other.data).hexdigest()
    assert sum("replaced" in entry for entry in ledger.values()) == 1
    for words in ({"deep": True}, {"source": "demo"}, {"deep": True, "source": "demo"}):
        assert not shardq.verify(out, **words).problems
    assert not shardq.audit(out, source="demo", tuned=folder).problems
    compared = [shardq.verify(folder, source="demo").compared for folder in (plain, out)]
    assert compared[1] == compared[0] - 1
    path = out / ledger[norm.name]["file"]
    data = bytearray(path.read_bytes())
    data[data.index(other.data)] ^= 1
    path.write_bytes(bytes(data))
    for words in ({"deep": True}, {"source": "demo"}):
        assert any("was replaced by test" in p for p in shardq.verify(out, **words).problems)
    (problem,) = shardq.audit(out, source="demo", tuned=folder).problems
    assert problem.startswith(f"{norm.name} in {path.name} differs")


def test_errors_are_those_of_the_scaled_weight(plain: Path, tmp_path: Path) -> None:
    first = next(d.tensor for d in shardq.plan("demo", SCHEME).decisions if d.scheme)
    assert first.shape is not None
    ones = Factors(np.ones(first.shape[0], np.float32), np.ones(first.shape[1], np.float32))
    twice = Factors(np.full(first.shape[0], 2, np.float32), None)
    found = {}
    for name, factors in (("none", None), ("ones", ones), ("twice", twice)):
        folder = _tuned(tmp_path / f"{name}.tuned", plain, {}, factors)
        recipe = make_recipe(SCHEME, tuned=folder)
        out = shardq.quantize("demo", recipe, output_dir=tmp_path / name, limits=INLINE).output
        found[name] = decode_ledger((out / "shardq-ledger.json.zst").read_bytes())["tensors"][first.name]
        assert not shardq.verify(out, deep=True, source="demo").problems
        assert not shardq.audit(out, source="demo", tuned=folder).problems  # of the figures, too
    assert "scaled" not in found["none"]
    assert found["ones"].pop("scaled")
    assert found["ones"] == found["none"]
    assert found["twice"]["relative_error"] == pytest.approx(0.5, rel=0.02)  # codes of half of it
    assert found["twice"]["squared_weight"] == pytest.approx(4 * found["none"]["squared_weight"])


def test_outputs_of_one_pass_have_their_own(plain: Path, tmp_path: Path) -> None:
    norm = _norm(_tensors())
    other = _changed(norm)
    folder = _tuned(tmp_path / "tuned", plain, {norm.name: other})
    recipes = [make_recipe(SCHEME, tuned=folder), make_recipe("W8A16")]
    outs = [r.output for r in shardq.quantize_many("demo", recipes, output_dir=tmp_path / "outs", limits=INLINE)]
    assert [_bytes_of(out, norm.name) for out in outs] == [other.data, _bytes_of(plain, norm.name)]


def test_a_replaced_matrix_that_another_output_quantizes(tmp_path: Path) -> None:
    matrix = next(d.tensor for d in shardq.plan("demo", SCHEME).decisions if d.scheme)
    kept = make_recipe(SCHEME, ignore=(matrix.name.removesuffix(".weight"),))
    base = shardq.quantize("demo", kept, output_dir=tmp_path / "base", limits=INLINE).output
    other = _changed(matrix)
    folder = _tuned(tmp_path / "tuned", base, {matrix.name: other})
    recipes = [replace(kept, tuned=load_tuned(folder)), make_recipe("W8A16")]
    outs = [r.output for r in shardq.quantize_many("demo", recipes, output_dir=tmp_path / "outs", limits=INLINE)]
    assert _bytes_of(outs[0], matrix.name) == other.data
    assert not shardq.verify(outs[0], deep=True, source="demo").problems
    alone = shardq.quantize("demo", recipes[0], output_dir=tmp_path / "alone", limits=INLINE).output
    for path in alone.glob("*.safetensors"):
        assert (outs[0] / path.name).read_bytes() == path.read_bytes()


class EnoughError(ShardqError):
    """Ends a run from its own report."""


def test_a_run_that_was_stopped_ends_with_the_same_bytes(plain: Path, tmp_path: Path) -> None:
    norms = {n: _changed(t) for n, t in _tensors().items() if n.endswith("layernorm.weight")}
    recipe = make_recipe(SCHEME, tuned=_tuned(tmp_path / "tuned", plain, norms))
    whole = shardq.quantize("demo", recipe, output_dir=tmp_path / "whole", limits=INLINE).output
    plan, steps = shardq.plan("demo", recipe), list[Progress]()

    def stop(step: Progress) -> None:
        steps.append(step)
        if sum(s.stage == "work" for s in steps) == len(plan.tasks) - 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        shardq.quantize("demo", recipe, output_dir=tmp_path / "again", limits=INLINE, report=stop)
    more: list[Progress] = []
    again = shardq.quantize("demo", recipe, output_dir=tmp_path / "again", limits=INLINE, report=more.append).output
    replacing = [t for t in plan.tasks if any(p.replaced for p in getattr(t, "pieces", ()))]
    left_bytes = sum(t.source_bytes for t in plan.tasks) - more[-1].resumed_bytes
    assert left_bytes in {t.source_bytes for t in plan.tasks}  # of any shard: they come as they are ready
    assert replacing
    for path in whole.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_does_not_fit_the_checkpoint_is_refused(plain: Path, tmp_path: Path) -> None:
    tensors = _tensors()
    norm = _norm(tensors)
    quantized = next(d.tensor for d in shardq.plan("demo", SCHEME).decisions if d.scheme)
    good = _changed(norm)
    wrong = {
        "shape": {norm.name: replace(good, shape=(1, *good.shape))},
        "type": {norm.name: replace(good, dtype="I16")},
        "unknown": {"model.sorcery.weight": good},
        "quantized": {quantized.name: _changed(quantized)},
    }
    for name, replaced in wrong.items():
        folder = _tuned(tmp_path / name, plain, replaced)
        with pytest.raises(BadTuned, match="replaces"):
            shardq.plan("demo", make_recipe(SCHEME, tuned=folder))


def test_a_folder_that_replaces_nothing_has_the_format_of_before(plain: Path, tmp_path: Path) -> None:
    folder = _tuned(tmp_path / "tuned", plain, {})
    data = (folder / "model.layers.0.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["__metadata__"].keys() == {"modules"}
    assert {name.partition(".")[0] for name in header if name != "__metadata__"} <= {"codes", "scales", "zeros"}
    assert not load_tuned(folder).replaced
    assert all(not ref.is_scaled for ref in load_tuned(folder).refs.values())


def test_pieces_of_a_tensor_find_their_part(plain: Path, tmp_path: Path) -> None:
    norm = _norm(_tensors())
    folder = _tuned(tmp_path / "tuned", plain, {norm.name: _changed(norm)})
    plan = shardq.plan("demo", make_recipe(SCHEME, tuned=folder))
    pieces = [p for t in plan.tasks for p in getattr(t, "pieces", ()) if isinstance(p, Piece) and p.replaced]
    (ref,) = plan.replaced.values()
    assert [p.tensor for p in pieces] == [norm.name]
    assert pieces[0].replaced == ref
    assert ref.behind(6).begin == ref.begin + 6
