"""Checkpoints made of headers only."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import settings

from shardq.checkpoint import Checkpoint, Shard, SideFile, TensorRef
from shardq.files.safetensors import TensorSpec, plan_file

settings.register_profile("patient", settings.default, deadline=None)  # a loaded machine is no failure
settings.load_profile("patient")

Layout = Mapping[str, Mapping[str, tuple[str, tuple[int, ...]]]]  # shard -> tensor -> dtype, shape
MakeCheckpoint = Callable[..., Checkpoint]


@pytest.fixture
def make_checkpoint() -> MakeCheckpoint:
    """A function that makes a checkpoint of {shard: {tensor: (dtype, shape)}}."""

    def make(shards: Layout, config: dict[str, Any] | None = None) -> Checkpoint:
        tensors: dict[str, TensorRef] = {}
        files: list[Shard] = []
        for shard, specs in shards.items():
            planned = plan_file([TensorSpec(n, d, s) for n, (d, s) in specs.items()], {"format": "pt"})
            for n, (d, s) in specs.items():
                tensors[n] = TensorRef(n, shard, d, s, *planned.offsets[n])
            files.append(Shard(shard, planned.size_bytes, None, shard))
        return Checkpoint(
            "tiny",
            None,
            tuple(files),
            tensors,
            config,
            b"{}",
            None,
            (SideFile("tokenizer.json", 2),),
            (),
        )

    return make
