"""Global scales of encoded weights, which come with the headers."""

import json
import struct

import pytest
from network_source import NetworkSource

from shardq.files.safetensors import TensorSpec, plan_file
from shardq.headers import read_checkpoint

CONFIG = b'{"model_type": "llama"}'


@pytest.mark.parametrize("count", [256, 257])
def test_global_scales_in_too_many_places_are_not_asked_for(count: int) -> None:
    specs = []
    for number in range(count):
        m = f"model.layers.{number}.mlp.up_proj."
        specs += [TensorSpec(m + "weight_packed", "U8", (128, 64)), TensorSpec(m + "weight_scale", "F8_E4M3", (128, 8))]
        specs += [TensorSpec(m + "weight_global_scale", "F32", (1,))]
    header = {s.name: {"dtype": s.dtype, "shape": list(s.shape)} for s in specs}
    at = 0
    for s in specs:  # as they come, not by type
        size = {"U8": 8192, "F8_E4M3": 1024, "F32": 4}[s.dtype]
        header[s.name]["data_offsets"] = [at, at + size]
        at += size
    text = json.dumps(header).encode()
    files = {"model.safetensors": len(text).to_bytes(8, "little") + text + bytes(at), "config.json": CONFIG}
    source = NetworkSource(files, [])
    found = read_checkpoint(source)
    assert len(found.peeked) == (count if count == 256 else 0)
    assert [w for w in found.warnings if "Global scales lie in 257 places" in w] == list(found.warnings)
    assert len(found.warnings) == (count > 256)


def test_global_scales_come_with_the_headers_and_neighbours_in_one_request() -> None:
    """Files have them together, as they are sorted by type; only something large between two makes it another."""
    specs = []
    for number in range(20):
        m = f"model.layers.{number}.mlp.up_proj."
        specs += [TensorSpec(m + "weight_packed", "U8", (32, 16)), TensorSpec(m + "weight_scale", "F8_E4M3", (32, 2))]
        specs += [TensorSpec(m + "weight_global_scale", "F32", (1,))]
    scales = [s for s in specs if s.dtype == "F32"]
    plan = plan_file([*specs, TensorSpec("model.layers.15.large", "F32", (2048,))])
    body = bytearray(plan.size_bytes)
    body[: len(plan.header)] = plan.header
    for number, scale in enumerate(scales):
        begin, end = plan.offsets[scale.name]
        body[begin:end] = struct.pack("<f", number)
    source = NetworkSource({"model.safetensors": bytes(body), "config.json": CONFIG}, [])
    found = read_checkpoint(source).peeked
    assert {n: struct.unpack("<f", data)[0] for n, data in found.items()} == {s.name: i for i, s in enumerate(scales)}
    assert len([r for r in source.reads if r[0] == "model.safetensors"]) == 1 + 2
