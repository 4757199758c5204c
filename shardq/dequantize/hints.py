"""What a configuration says about codes. Shapes and dtypes decide; this settles what they leave open."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# How GPTQ-like zero points are stored: what readers add to them, by the word of the configuration.
ZERO_ADDED: Final[Mapping[str, int]] = {
    "gptq": 1,
    "auto_round:auto_gptq": 1,
    "auto_round:gptq": 1,
    "gptq_v2": 0,
    "auto_round": 0,
    "auto_round:auto_round": 0,
    "auto_round:gptqmodel": 0,
    "auto_round:gptq_v2": 0,
}
TORCH_DTYPES: Final[Mapping[str, str]] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Hints:
    """The quantization block of a config.json, and its torch dtype; empty where there is none."""

    method: str
    block: Mapping[str, Any]
    dtype: str | None

    def own(self, module: str) -> Mapping[str, Any] | None:
        """What is said about this module alone."""
        return _own(self.block, module)

    def widths(self, module: str) -> tuple[tuple[int, int], ...]:
        """Pairs of bits and group size (-1: the row) that a module may have, the likeliest first."""
        own = _own(self.block, module)
        found = [own, self.block] if own else [self.block]
        pairs = [(_bits(x), _group(x)) for x in (*found, *self._group_weights())]
        return tuple(dict.fromkeys((b, g) for b, g in pairs if b))

    def data_type(self, module: str) -> str:
        """auto-round's word for the numbers of a module."""
        own = _own(self.block, module) or {}
        return str(own.get("data_type", self.block.get("data_type", "")))

    def symmetric(self, module: str) -> bool | None:
        """Whether the zero points of a module's integers are all half the range; None where nothing is said. AWQ's
        `zero_point: true` says nothing: it stands there whenever there is a tensor of them."""
        for place in (_own(self.block, module) or {}, self.block, self.block.get("meta")):
            if isinstance(place, Mapping) and isinstance(place.get("sym"), bool):
                return bool(place["sym"])
        if self.block.get("zero_point") is False:
            return True
        said = {w["symmetric"] for w in self._group_weights() if isinstance(w.get("symmetric"), bool)}
        return said.pop() if len(said) == 1 else None

    def _group_weights(self) -> list[Mapping[str, Any]]:
        groups = self.block.get("config_groups")
        found = groups.values() if isinstance(groups, Mapping) else ()
        return [g["weights"] for g in found if isinstance(g, Mapping) and _is(g.get("weights"))]

    @property
    def act_order(self) -> bool:
        """True if columns of one group need not lie side by side; static groups stay in order."""
        return bool(self.block.get("desc_act")) and not self.block.get("static_groups")

    @property
    def power_scales(self) -> bool:
        """True if scales of native FP8 are said to be powers of two, whatever type they are stored in."""
        return self.block.get("scale_fmt") == "ue8m0"

    @property
    def weight_block(self) -> tuple[int, int] | None:
        """Rows and columns of a block of native FP8."""
        match self.block.get("weight_block_size"):
            case [int(rows), int(columns)] if rows > 0 and columns > 0:
                return rows, columns
        return None

    @property
    def checkpoint_format(self) -> str:
        """The word of GPTQ-like configurations for how zero points are stored."""
        keys = ("checkpoint_format", "packing_format", *(("format",) if self.method == "gptq" else ()))
        for key in keys:
            if isinstance(self.block.get(key), str):
                return str(self.block[key])
        return "auto_round" if self.method in ("auto-round", "intel/auto-round") else "gptq"


def read_hints(config: Mapping[str, Any] | None) -> Hints:
    """The hints of a parsed config.json; a block may stand at its top, in its text part, or be MLX's."""
    places = [config or {}]
    places += [p for p in (config or {}).values() if isinstance(p, Mapping)]
    block: Mapping[str, Any] = {}
    for place in places:
        for key in ("quantization_config", "compression_config", "quantization"):
            if not block and _is(place.get(key)):
                block = place[key]
    words = [p[key] for p in places for key in ("dtype", "torch_dtype") if isinstance(p.get(key), str)]
    dtype = TORCH_DTYPES.get(words[0].removeprefix("torch.")) if words else None
    return Hints(str(block.get("quant_method", "")), block, dtype)


def block_size(size: int, count: int, *declared: int) -> int | None:
    """How many of `size` rows or columns share one of `count` scales; the last block may be short.

    A declared number that fits is right; else the power of two that fits (there is at most one); else what divides
    evenly. None if nothing fits.
    """
    if not 0 < count <= size:
        return None
    if count == 1:
        return size
    powers = (1 << n for n in range(size.bit_length()))
    even = (size // count,) if size % count == 0 else ()
    return next((b for b in (*declared, *powers, *even) if b > 0 and -(-size // b) == count), None)


def _is(value: Any) -> bool:
    return isinstance(value, Mapping)


def _own(block: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What a block says about one module: MLX under its name, auto-round in extra_config, GPTQModel in dynamic."""
    for table in (block, block.get("extra_config"), block.get("dynamic")):
        if not _is(table):
            continue
        assert isinstance(table, Mapping)
        if _is(table.get(module)):
            found: Mapping[str, Any] = table[module]
            return found
    dynamic = block.get("dynamic")
    for pattern, value in dynamic.items() if isinstance(dynamic, Mapping) else ():
        if _is(value) and pattern.startswith("+:") and re.match(pattern[2:], module):
            rule: Mapping[str, Any] = value
            return rule
    return None


def _bits(block: Mapping[str, Any]) -> int:
    value = next((block[k] for k in ("bits", "num_bits", "w_bit") if k in block), 0)
    return value if isinstance(value, int) else 0


def _group(block: Mapping[str, Any]) -> int:
    value = next((block[k] for k in ("group_size", "q_group_size") if k in block), -1)
    return value if isinstance(value, int) else -1
