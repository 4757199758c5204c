"""Make a file of importance: mean x_j**2 and mean x_j of the input of every Linear layer, by a forward pass of
transformers.

    python bench/probe_importance.py MODEL OUT.safetensors [--tokens 64] [--seed 0] [--text FILE] [--dtype float32]

MODEL is a folder that transformers 5.23 can load and that fits into memory. Without a text the model gets one sequence
of random ids, uniform over those that are not special; with one, its first tokens in windows. All tokens go through
every expert, whatever the router says, so that none is unseen; gate and up of a layer's experts share one vector.
Source of the recipe: quality.md, section 6 D.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from shardq.checkpoint import Checkpoint
from shardq.headers import read_checkpoint
from shardq.importance import load_importance, match
from shardq.importance_files import Provenance, join_names, write_importance
from shardq.recipe import make_recipe
from shardq.roles import Role, assign_roles
from shardq.sources import open_source
from shardq.weights import Weights, find_weights

WINDOW_TOKENS: Final = 512
WITH_HEAD: Final = make_recipe(
    "W4A16", quant_lm_head=True
)  # of it only the head matters: a tied one has no module else

Vector = NDArray[np.float64]


class Sums:
    """Sums of squares and of values of inputs, in double precision."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = defaultdict(int)

    def add(self, name: str, inputs: torch.Tensor) -> None:
        """`inputs`: [..., columns]; each of the rows is a token."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        self._sums[name] = self._sums.get(name, 0) + torch.stack([(rows * rows).sum(0), rows.sum(0)])
        self.tokens[name] += len(rows)

    def mean(self, name: str) -> Vector | None:
        """Mean squares and means, [2, columns]; None where nothing came through."""
        if not self.tokens.get(name):
            return None
        return (self._sums[name] / self.tokens[name]).cpu().numpy()


# --- what comes in -------------------------------------------------------------------------------------------------


def random_ids(model: PreTrainedModel, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """One sequence, uniform over ids that are not special. Without a tokenizer the config says which ones are."""
    config = model.config.get_text_config()
    size, special = config.vocab_size, set[int]()
    if tokenizer is None:
        for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
            special.update(value if isinstance(value, list) else {value} - {None})
    else:
        size = min(size, len(tokenizer))  # what is beyond pads the table
        special.update(tokenizer.all_special_ids)
        special.update(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    ids = np.array([i for i in range(size) if i not in special])
    return [np.random.default_rng(seed).choice(ids, count).tolist()]


def text_ids(tokenizer: Any, text: str, count: int) -> list[list[int]]:
    """The first tokens of a text, in windows."""
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=count)["input_ids"][:count]
    return [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids), WINDOW_TOKENS)]


# --- the pass ------------------------------------------------------------------------------------------------------


@contextmanager
def recording(model: PreTrainedModel, sums: Sums) -> Iterator[None]:
    """Hooks on every Linear layer, and on modules that hold experts as stacks."""
    hooks = []
    for name, module in model.named_modules():
        if name.endswith(".experts") and isinstance(module, torch.nn.ModuleList):
            raise SystemExit(f"{name} is a list of experts: only stacks are supported, as transformers 5.23 has them")
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(_linear_hook(name, sums)))
        elif hasattr(module, "_apply_gate") and hasattr(module, "down_proj"):
            hooks.append(module.register_forward_pre_hook(_experts_hook(name, sums)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linear_hook(name: str, sums: Sums) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda _, inputs: sums.add(name, inputs[0])


def _experts_hook(name: str, sums: Sums) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    """All tokens through every expert, by the arithmetic of transformers' own (integrations/moe.py)."""

    def hook(experts: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        sums.add(name, x)
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        for index in range(experts.num_experts):
            weight = getattr(experts, first)[index]
            out = x @ (weight if experts.is_transposed else weight.T)
            if experts.has_bias:
                out = out + getattr(experts, f"{first}_bias")[index]
            sums.add(f"{name}.{index}", experts._apply_gate(out) if experts.has_gate else experts.act_fn(out))

    return hook


# --- names ---------------------------------------------------------------------------------------------------------


def parameters_of(model: PreTrainedModel, names: Sequence[str]) -> dict[str, str]:
    """Tensor of the checkpoint -> parameter of the model that transformers loads it into."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, WeightRenaming)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    return {n: rename_source_key(n, renamings, converters, prefix, state)[0] for n in names}


def gather(model: PreTrainedModel, checkpoint: Checkpoint, weights: Weights, sums: Sums) -> dict[str, Vector]:
    """Module of the checkpoint -> its vector; experts' gate and up under a name with `*`. Modules that no token has
    reached (encoders of images, prediction layers) are left out."""
    stacks = {f"{s.prefix}.": s.tensor for s in weights.stacks}
    found: dict[str, Vector] = {}
    modules = {t.module: t.name for t in weights.tensors.values() if t.shape is None or len(t.shape) == 2}
    parameters = parameters_of(model, [*checkpoint.tensors, *weights.tensors])
    for module, tensor in modules.items():
        expert = re.search(r"^(.*experts\.)(\d+)\.(\w+)$", module)
        stored = _stack_of(module, stacks) or tensor
        owner, _, leaf = parameters[stored].rpartition(".")
        if expert is None or f"{owner}.0" not in sums.tokens:
            vector, name = sums.mean(owner), module
        elif leaf == "down_proj" or expert[3] in ("down_proj", "w2"):
            vector, name = sums.mean(f"{owner}.{expert[2]}"), module
        else:
            vector, name = sums.mean(owner), f"{expert[1]}*.{expert[3]}"
        if vector is not None:
            found[name] = vector
    return found


def _stack_of(module: str, stacks: Mapping[str, str]) -> str | None:
    return next((tensor for prefix, tensor in stacks.items() if module.startswith(prefix)), None)


def share(vectors: Mapping[str, Vector]) -> dict[str, Vector]:
    """One entry for modules beside each other that had the same input."""
    groups: dict[tuple[str, bytes], list[str]] = defaultdict(list)
    for name, vector in vectors.items():
        groups[name.rpartition(".")[0], vector.tobytes()].append(name)
    return {join_names(names): vectors[names[0]] for names in groups.values()}


# --- the command ---------------------------------------------------------------------------------------------------


def probe(folder: Path, out: Path, tokens: int, seed: int, text: Path | None, dtype: str) -> None:
    """Make the file, and hold it against the Linear layers that are quantized by default."""
    checkpoint = read_checkpoint(open_source(str(folder)))
    weights = find_weights(checkpoint, WITH_HEAD)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    has_tokenizer = text is not None or (folder / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
    if text is None:
        windows = random_ids(model, tokenizer, tokens, seed)
    else:
        windows = text_ids(tokenizer, text.read_text(encoding="utf-8"), tokens)
    sums = Sums()
    with recording(model, sums), torch.no_grad():
        for window in windows:
            model(torch.tensor([window], device=model.device), use_cache=False)
    provenance = Provenance(
        "text" if text else "random ids",
        sum(map(len, windows)),
        None if text else seed,
        checkpoint.label,
        checkpoint.commit,
        text.name if text else "",
    )
    vectors = share(gather(model, checkpoint, weights, sums))
    squares, means = ({name: both[i] for name, both in vectors.items()} for i in (0, 1))
    write_importance(out, squares, provenance, means)
    roles = assign_roles(weights.tensors.values(), checkpoint.config)
    linear = [t for t in weights.tensors.values() if roles[t.name].role is Role.LINEAR]
    wanted = {t.module: (t.shape[0], t.shape[1]) for t in linear if t.shape is not None and len(t.shape) == 2}
    match(load_importance(out), wanted)
    print(f"{out}: {len(vectors)} vectors for {len(wanted)} modules, {provenance.tokens} tokens ({provenance.data})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=64, help="256 or more below 3 bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a text file instead of random ids")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    a = parser.parse_args()
    probe(a.model, a.out, a.tokens, a.seed, a.text, a.dtype)


if __name__ == "__main__":
    main()
