"""What the functions of `shardq.quality` do in block mode, once its packages are known to be there."""

from collections.abc import Callable
from typing import Final

import torch

from shardq.errors import BadOption
from shardq.sources.base import Source
from shardq.tune.blocks import BlockModel
from shardq.tune.data import load_samples
from shardq.tune.data_grammar import RANDOM, SELF
from shardq.tune.data_self import sample_self
from shardq.tune.evaluation import Evaluation, cut_windows, evaluate
from shardq.tune.inputs import Experts
from shardq.tune.spool import Spooling
from shardq.tune.stats import Statistics, collect
from shardq.tune.tokenizing import open_tokenizer

AUTO: Final = "auto"
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RANDOM_TOKENS: Final = 64  # quality.md, 6 D
SELF_TOKENS: Final = 2048
OTHER_TOKENS: Final = 8192
SAMPLE_TOKENS: Final = 512
SELF_SAMPLE_TOKENS: Final = 64  # each costs a pass through the model

Told = Callable[[int, int], None]


def collect_from(
    source: Source, data: str, tokens: int | None, seqlen: int | None, seed: int, experts: Experts, dtype: str,
    trust_remote_code: bool, report: Told | None, spooling: Spooling,
) -> Statistics:  # fmt: skip
    """See `shardq.quality.collect_statistics`."""
    kept = _dtype(dtype)
    wanted = {RANDOM: RANDOM_TOKENS, SELF: SELF_TOKENS}.get(data, OTHER_TOKENS) if tokens is None else tokens
    each = min(wanted, SELF_SAMPLE_TOKENS if data == SELF else SAMPLE_TOKENS) if seqlen is None else seqlen
    if wanted < 1 or each < 1:
        raise BadOption(f"statistics need at least one token, not {wanted} in samples of {each}")
    tokenizer = open_tokenizer(source, trust_remote_code)
    with BlockModel.open(source, dtype=kept, trust_remote_code=trust_remote_code) as model:
        samples = load_samples(
            data, tokenizer, count=max(1, wanted // each), seqlen=each, seed=seed,
            sampler=lambda count, seqlen, seed: sample_self(model, tokenizer, count, seqlen, seed),
        )  # fmt: skip
        return collect(model, samples, report, experts, spooling)


def evaluate_on(
    result: Source, reference: Source | None, text: str, windows: int, seqlen: int, dtype: str,
    trust_remote_code: bool, report: Told | None, spooling: Spooling,
) -> Evaluation:  # fmt: skip
    """See `shardq.quality.evaluate`."""
    with BlockModel.open(result, dtype=_dtype(dtype), trust_remote_code=trust_remote_code) as model:
        ids = cut_windows(open_tokenizer(reference or result, trust_remote_code), text, windows, seqlen)
        if reference is None:
            return evaluate(model, ids, None, report, spooling)
        with BlockModel.open(reference, dtype=model.dtype, trust_remote_code=trust_remote_code) as other:
            return evaluate(model, ids, other, report, spooling)


def _dtype(name: str) -> torch.dtype | None:
    """None for a model's own. Raises BadOption."""
    if name != AUTO and name not in DTYPES:
        raise BadOption(f"--dtype {name!r}: expected one of {', '.join((AUTO, *DTYPES))}")
    return DTYPES.get(name)
