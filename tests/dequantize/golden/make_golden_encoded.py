"""Write the golden files beside this script, those whose reader is here and which are not there yet:

    python make_golden_encoded.py

in an environment with the library that PROVENANCE.md of the folder names. A file holds what a checkpoint would, and
what the reader makes of it in float32, under EXPECTED and the weight's name.
"""

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch
from encoded_cases import CASES  # type: ignore[import-not-found,unused-ignore]
from encoded_draws import Case  # type: ignore[import-not-found,unused-ignore]
from peer_readers import PEERS, READERS  # type: ignore[import-not-found,unused-ignore]
from safetensors.torch import save_file

HERE: Final = Path(__file__).parent
EXPECTED: Final = "EXPECTED."
SEED: Final = 20261128


def make(case: Case) -> None:
    """Write one case."""
    peer = PEERS[case.reader]
    tensors = case.make(torch.Generator().manual_seed(SEED))
    weight = READERS[case.reader](tensors, case.config, case.args)
    assert weight.isfinite().all(), case.id
    target = HERE / f"{case.id}.safetensors"
    target.parent.mkdir(exist_ok=True)
    content = {k: v.contiguous() for k, v in tensors.items()} | {EXPECTED + case.weight: weight.contiguous()}
    reader = f"{peer} {version(peer.partition('.')[0])}" if peer else "formula"
    save_file(content, target, metadata={"config": json.dumps(case.config), "reader": f"{case.reader}: {reader}"})
    print(case.id, reader, tuple(weight.shape))


for each in CASES:
    needed = PEERS[each.reader]
    if not (HERE / f"{each.id}.safetensors").exists() and (needed is None or find_spec(needed)):
        make(each)
