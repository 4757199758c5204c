"""How much memory tuning takes beside what it computes with: at most four blocks as the checkpoint has them, and the
activations of a batch. Measured in a process of its own, which has tuned another model before."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

pytest.importorskip("transformers", reason="block mode needs transformers")

from shardq.recipe import make_recipe
from shardq.sources import open_source
from shardq.tune import block_gptq
from shardq.tune.blocks import BlockModel
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import build_options

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent)
    models: Any = importlib.import_module("tuned_models")

HIDDEN: Final = 1024
INNER: Final = 2816
SAMPLES, TOKENS = 2, 16
BLOCK_BYTES: Final = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
# What a pass and the way back keep, fp32: of each token some twenty vectors of the block, and ten of the MLP.
ACTIVATION_BYTES: Final = 4 * SAMPLES * TOKENS * (20 * HIDDEN + 10 * INNER)
OTHER_BYTES: Final = 16 << 20  # that no model's size changes: pieces of files, tiles, what libraries keep
ALGORITHMS: Final = ("opt-rtn", "awq", "signround")
MOST_BLOCKS: Final = 4

PROGRAM: Final = """
import importlib, json, sys
from pathlib import Path
import torch
from shardq.tune.freeing import return_freed_memory
return_freed_memory()
import transformers
from shardq.recipe import make_recipe
from shardq.sources import open_source
from shardq.tune.driver import Place, tune_blocks
from shardq.tune.options import build_options

folder, models_folder, hidden, inner, samples, tokens, *algorithms = sys.argv[1:]
sys.path.insert(0, models_folder)
models = importlib.import_module("tuned_models")
torch.set_num_threads(1)
base = Path(folder)
models.make_model("llama", base / "small")
torch.manual_seed(0)
config = models._config(
    "LlamaConfig", hidden_size=int(hidden), intermediate_size=int(inner), num_attention_heads=8, head_dim=128,
    num_key_value_heads=8, num_hidden_layers=2,
)
models.auto_class(config).from_config(config, dtype=torch.bfloat16).save_pretrained(base / "large")
models.write_tokenizer(base / "large")


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def tune(name, algorithm):
    words = {"algorithm": algorithm, "dataset": "random", "nsamples": int(samples), "seqlen": int(tokens)}
    words |= {"iters": 2, "batch_size": int(samples)} if "signround" in algorithm else {}
    words |= {"awq_n_grid": 2} if "awq" in algorithm else {}
    recipe = make_recipe("W4A16G32", layout="auto_round")
    tune_blocks(open_source(str(base / name)), recipe, build_options(words), Place(base / f"{name}-{algorithm}"))


peaks = {}
for algorithm in algorithms:
    tune("small", algorithm)
    before = status("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    tune("large", algorithm)
    peaks[algorithm] = status("VmHWM:") - before
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks from /proc")
def test_no_algorithm_takes_more_than_four_blocks(tmp_path: Path) -> None:
    arguments = map(str, (tmp_path, Path(__file__).parent, HIDDEN, INNER, SAMPLES, TOKENS, *ALGORITHMS))
    ran = subprocess.run([sys.executable, "-P", "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    peaks = json.loads(ran.stdout.splitlines()[-1])
    blocks = {a: round((peak - ACTIVATION_BYTES - OTHER_BYTES) / BLOCK_BYTES, 2) for a, peak in peaks.items()}
    assert max(blocks.values()) <= MOST_BLOCKS, blocks
    assert min(blocks.values()) > 1, blocks  # a block was there


def test_what_is_expected_of_a_folder_is_not_on_the_heap(tmp_path: Path) -> None:
    with BlockModel.open(open_source(str(models.make_model("llama", tmp_path / "model")))) as model:
        model.prefetch(1)
        assert all(p.content is None for p in model._fetched[1].pieces())
        with model.block(1) as block:
            assert all(not p.is_meta for p in block.parameters())


def test_matrices_that_gptq_takes_alone_get_the_codes_that_they_get_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(models.make_model("llama", tmp_path / "model")))
    options = build_options({"algorithm": "gptq", "dataset": "random", "nsamples": 4, "seqlen": 32})
    files = []
    for together in (1, 1 << 23):
        monkeypatch.setattr(block_gptq, "TOGETHER", together)
        out = tmp_path / str(together)
        tune_blocks(source, make_recipe("W4A16G32", layout="auto_round"), options, Place(out))
        files.append({p.name: p.read_bytes() for p in out.glob("*.safetensors")})
    assert len(files[0]) == 3
    assert files[0] == files[1]
