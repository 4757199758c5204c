"""The sources that runs are tested with: what our readers make of each is what its twin holds, bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import encoded_sources as sources
import numpy as np
import pytest
from numpy.typing import NDArray

from shardq.checkpoint import Checkpoint
from shardq.dequantize.base import Encoded, Part
from shardq.dequantize.decoding import Ranges, decode_rows, read_parts
from shardq.dequantize.finding import find_encoded
from shardq.dequantize.kinds import KINDS
from shardq.dequantize.plain import PLAIN, plain_slices
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.sources import open_source
from shardq.stacks import find_stacks

CASES: Mapping[str, Any] = sources.CASES
LARGEST_BYTES = 2_500_000


def read(folder: Path) -> Checkpoint:
    return read_checkpoint(open_source(str(folder)))


def decode(e: Encoded, folder: Path) -> NDArray[np.float32]:
    contents = {part.shard: (folder / part.shard).read_bytes() for part in e.parts}

    def take(part: Part, ranges: Ranges) -> bytes:
        return b"".join(contents[part.shard][begin:end] for begin, end in ranges)

    out = np.empty((e.rows, e.columns), np.float32)
    decode_rows(e, read_parts(e, 0, e.rows, take), 0, e.rows, out, load())
    return out


def decoded(checkpoint: Checkpoint, folder: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    """Type and values of all weights, those of experts under their own names; stacks that stay stacks are one array."""
    found = find_encoded(checkpoint.tensors.values(), checkpoint.config, checkpoint.peeked)
    assert found.problems == ()
    assert (found.wanted, found.unmeasured) == ((), ())
    stacks = {s.weight: s for s in find_stacks(checkpoint.tensors.values(), checkpoint.config)}
    made: dict[str, tuple[str, NDArray[np.float32]]] = {}
    for name, matrices in found.encoded.items():
        if (stack := stacks.pop(name, None)) is None:
            (e,) = matrices
            made[name] = e.dtype, decode(e, folder)
        elif stack.emit == "stacked":
            made[name] = matrices[0].dtype, np.stack([decode(e, folder) for e in matrices])
        else:
            made |= experts(stack, matrices, folder)
    for stack in stacks.values():
        made |= experts(stack, plain_slices(checkpoint.tensors[stack.tensor]), folder)
    return made


def experts(stack: Any, slices: tuple[Encoded, ...], folder: Path) -> dict[str, tuple[str, NDArray[np.float32]]]:
    found = {}
    for m in stack.matrices():
        e = slices[m.expert].turned() if m.transposed else slices[m.expert]
        mine = e.picked(m.lines.start, m.lines.stop, m.lines.step)
        found[m.name] = mine.dtype, decode(mine, folder)
    return found


def bits(tensor: Any) -> bytes:
    return bytes(np.ascontiguousarray(tensor.data).tobytes())


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Any:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = sources.write_source(case, tmp_path_factory.mktemp("encoded") / case.id)
    return found


def test_rows_are_those_of_the_twin(case: Any, folder: Path, tmp_path: Path) -> None:
    checkpoint = read(folder)
    twin = sources.read_tensors(sources.write_twin(case, folder, tmp_path / "twin"))
    made = decoded(checkpoint, folder)
    for name, (dtype, values) in made.items():
        assert dtype == case.dtype
        expected = twin.pop(name)
        if expected.dtype == "BF16":
            expected = sources.Stored("F32", (expected.data.astype(np.uint32) << 16).view(np.float32))
        assert expected.data.shape == values.shape, name
        assert bits(expected) == values.tobytes(), name
    others = sources.read_tensors(folder)
    biases = {b.name: b for s in find_stacks(checkpoint.tensors.values(), checkpoint.config) for b in s.biases()}
    for name, tensor in twin.items():
        if name in biases:
            b = biases[name]
            assert bits(tensor) == others[b.stack].data[b.expert, b.lines].tobytes()
        else:
            assert (tensor.dtype, bits(tensor)) == (others[name].dtype, bits(others[name]))


def test_every_tensor_is_accounted_for(case: Any, folder: Path) -> None:
    checkpoint = read(folder)
    found = find_encoded(checkpoint.tensors.values(), checkpoint.config, checkpoint.peeked)
    assert {e.kind for es in found.encoded.values() for e in es} == case.kinds
    known = {n for piece in sources.build(case) if piece.encoded or not piece.twin for n in piece.source}
    assert found.consumed | found.dropped.keys() == known
    assert checkpoint.warnings == ()
    assert len(checkpoint.shards) >= 3
    assert sum(s.size_bytes for s in checkpoint.shards) < LARGEST_BYTES


@pytest.mark.parametrize("name", sources.PLACES)
def test_a_scattered_checkpoint_is_the_same(case: Any, folder: Path, tmp_path: Path, name: str) -> None:
    place, shards = sources.PLACES[name]
    out = sources.scatter(folder, tmp_path / "scattered", place, shards)
    before, after = sources.read_tensors(folder), sources.read_tensors(out)
    assert {n: (t.dtype, t.data.shape, bits(t)) for n, t in before.items()} == {
        n: (t.dtype, t.data.shape, bits(t)) for n, t in after.items()
    }
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert {p.name for p in out.glob("*.json")} == {p.name for p in folder.glob("*.json")}
    checkpoint = read(out)
    assert len(checkpoint.shards) == (shards if case.kinds else len({place(n) for n in before}))
    encoded = find_encoded(checkpoint.tensors.values(), checkpoint.config, checkpoint.peeked).encoded
    if name == "scales_first":
        assert all(p.shard != e.parts[0].shard for es in encoded.values() for e in es for p in e.parts[1:])


def test_every_kind_has_a_case() -> None:
    assert {kind for case in CASES.values() for kind in case.kinds} == KINDS.keys() - {PLAIN}


def test_twins_of_one_model_in_two_forms_are_equal(tmp_path: Path) -> None:
    held = []
    for name in ("gpt_oss", "gpt_oss_bf16"):
        folder = sources.write_source(CASES[name], tmp_path / name)
        twin = sources.write_twin(CASES[name], folder, tmp_path / f"{name}_twin", "BF16")
        held.append({n: (t.dtype, bits(t)) for n, t in sources.read_tensors(twin).items()})
        assert "quantization_config" not in json.loads((twin / "config.json").read_text())
    assert held[0] == held[1]
