"""AWQ's scales and clipped ranges are those that auto-round 0.16.1 finds for the same block and tokens."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardq.kernels import load
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.sources import open_source

pytestmark = pytest.mark.oracle
GROUP = 32


def _theirs(model: Any, ids: torch.Tensor, symmetric: bool, duo: Any) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Of each mapping of the first block: its first balanced layer, the scales that are applied in the end, and the
    layers with their clipped ranges."""
    awq = pytest.importorskip("auto_round.algorithms.transforms.awq.base", reason="auto-round is not installed")
    config = importlib.import_module("auto_round.algorithms.transforms.awq.config").AWQConfig(
        bits=4, group_size=GROUP, sym=symmetric, data_type="int", duo_scaling=duo, apply_clip=True
    )
    peer = awq.AWQTransform(config)
    peer._qdq_tool.disable_opt_rtn = True
    mappings = importlib.import_module("auto_round.algorithms.transforms.awq.mappings").resolve_mappings(
        model, skip_moe=True
    )
    own = [m for m in mappings if m.smooth_name.startswith("model.layers.0.")]
    peer._block_mappings = {"model.layers.0": own}
    handles = peer._register_awq_hooks(model, model.model.layers[0], "model.layers.0")
    for row in ids:
        model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    found = []
    for m in own:
        total, count = peer._activation_stats[m.smooth_name]
        scales = peer._grid_search_scales(m, total / count)
        peer._apply_scales(m, scales)
        found.append((m, scales))
    for m, scales in found:
        ranges = {
            name: peer._compute_best_clip(layer, peer._clip_input_feat[m.smooth_name])
            for layer, name in zip(m.balance_layers, m.balance_names, strict=True)
            if not peer._should_skip_clip(name)
        }
        yield m.balance_names[0], scales, ranges


@pytest.mark.parametrize(
    ("name", "scheme", "duo"),
    [
        ("llama", "W4A16", True),
        ("gemma3", "W4A16", "both"),
        ("qwen3", "W4A16_ASYM", False),
        ("qwen3", "W4A16_ASYM", True),
    ],
)
@torch.no_grad()
def test_scales_and_ranges_equal_auto_rounds(
    name: str, scheme: str, duo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    pytest.importorskip("transformers", reason="block mode needs transformers")
    pytest.importorskip("auto_round", reason="auto-round is not installed")
    import tuned_models as models

    from shardq.tune.awq_sites import find_awq_sites
    from shardq.tune.block_awq import scale_block
    from shardq.tune.blocks import BlockModel
    from shardq.tune.settings import AwqOptions
    from shardq.tune.subjects import find_subjects
    from shardq.tune.work import Work

    folder = models.make_model(name, tmp_path / name, torch.float32)
    ids = models.some_ids(4, 48)
    words = AwqOptions(
        awq_duo_scaling=str(duo).lower(), awq_loss="output", awq_codes="nearest", awq_apply_clip=True,
        awq_clip_as_init=True,
    )  # fmt: skip
    with BlockModel.open(open_source(str(folder)), attention="eager") as model, model.block(0) as block:
        plan = make_plan(model.checkpoint, make_recipe(scheme, group_size=GROUP, layout="auto_round"))
        subjects = find_subjects(model, plan)
        sites = find_awq_sites(model, plan, subjects)[0]
        work = Work(block, 0, subjects.blocks[0], model.embed(ids), None, load(), 0)
        changes, ranges = scale_block(work, sites, words)
    theirs = list(_theirs(models.load_whole(folder), ids, "ASYM" not in scheme, duo))
    assert len(theirs) == len(sites) == 3
    for first, scales, clipped in theirs:
        torch.testing.assert_close(changes.columns[f"{first}.weight"], scales, rtol=1e-4, atol=0)
        for layer, (low, high) in clipped.items():
            ours = ranges[f"{layer}.weight"]
            assert float((ours[0] - low[..., 0]).abs().max()) < 1e-5
            assert float((ours[1] - high[..., 0]).abs().max()) < 1e-5
    assert {n for _, _, c in theirs for n in c} == {n.removesuffix(".weight") for n in ranges}
