import itertools
import pickle
from typing import Any

from shardq.files.safetensors import parse_header
from shardq.plans import make_plan
from shardq.recipe import make_recipe
from shardq.tasks import SLAB_BYTES, CopyTask, QuantizeTask

CONFIG = {"num_hidden_layers": 1, "vocab_size": 512}
BF16 = "BF16"


def checkpoint(make_checkpoint: Any, rows: int = 256) -> Any:
    return make_checkpoint(
        {
            "b.safetensors": {
                "model.layers.0.mlp.up_proj.weight": (BF16, (rows, 1024)),
                "model.layers.0.mlp.up_proj.bias": (BF16, (rows,)),
                "empty": ("F32", (0, 4)),
            },
            "a.safetensors": {"model.embed_tokens.weight": (BF16, (512, 256)), "step": ("I64", ())},
        },
        CONFIG,
    )


def test_plans_are_equal_for_equal_input(make_checkpoint: Any) -> None:
    one = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    two = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint != make_plan(checkpoint(make_checkpoint), make_recipe("W8A16")).fingerprint


def test_headers_are_valid_and_hold_every_output(make_checkpoint: Any) -> None:
    plan = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16@gptq"))
    names = []
    for f in plan.files:
        header = parse_header(f.header, f.size_bytes, f.name)
        names += [t.name for t in header.tensors]
        assert header.metadata == {"format": "pt"}
    module = "model.layers.0.mlp.up_proj"
    assert sorted(names) == sorted(
        [f"{module}.{s}" for s in ("qweight", "qzeros", "scales", "g_idx", "bias")]
        + ["model.embed_tokens.weight", "step", "empty"]
    )


def test_giants_are_cut_into_slabs_that_cover_every_row_once(make_checkpoint: Any) -> None:
    rows = 3 * SLAB_BYTES // 2048 + 32
    plan = make_plan(checkpoint(make_checkpoint, rows), make_recipe("W4A16"))
    slabs = [t for t in plan.tasks if isinstance(t, QuantizeTask)]
    assert len(slabs) == 4
    covered = sorted((t.row, t.end_row) for t in slabs)
    assert covered[0][0] == 0
    assert covered[-1][1] == rows
    assert all(a[1] == b[0] and a[1] % 32 == 0 for a, b in itertools.pairwise(covered))
    assert all(t.source_bytes <= SLAB_BYTES for t in slabs)


def test_copies_cover_every_kept_byte_once(make_checkpoint: Any) -> None:
    plan = make_plan(checkpoint(make_checkpoint), make_recipe("W4A16"))
    copied = sum(p.size_bytes for t in plan.tasks if isinstance(t, CopyTask) for p in t.pieces)
    kept = sum(d.tensor.size_bytes for d in plan.decisions if d.action == "copy")
    assert copied == kept == 512 * 256 * 2 + 8 + 256 * 2


def test_tasks_are_small_messages(make_checkpoint: Any) -> None:
    many = {f"model.layers.0.norm{i}.weight": (BF16, (256,)) for i in range(300)}
    big = make_checkpoint(
        {"a.safetensors": {"model.layers.0.mlp.up_proj.weight": (BF16, (256, 1024)), **many}},
        CONFIG,
    )
    plan = make_plan(big, make_recipe("W4A16"))
    assert max(len(pickle.dumps(t)) for t in plan.tasks) < 8192
    assert [t.id for t in plan.tasks] == list(range(len(plan.tasks)))
