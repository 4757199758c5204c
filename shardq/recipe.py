"""Recipe: what the user wants, as one frozen value that decides every output byte.

What only decides how fast or where (workers, memory caps, folders) is not here but in `limits.Limits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from shardq.errors import BadOption, LayoutRefuses
from shardq.formats import WEIGHT_DTYPES
from shardq.gguf.file_types import FileType, find_file_type
from shardq.layouts import GGUF_LAYOUT, PLAIN_LAYOUT, default_layout, find_layout
from shardq.patterns import Dialect, LayerRule, Pattern, parse_layer_config, parse_pattern
from shardq.policy import Policy
from shardq.schemes import BLOCKS, PLAIN_WEIGHTS, Scheme, change_scheme, parse_scheme

if TYPE_CHECKING:  # what few recipes have, and each brings modules of its own
    from shardq.fold import Fold
    from shardq.gguf.options import GgufOptions
    from shardq.importance import Importance
    from shardq.tuned import TunedCodes

CONVERTED = "converted"  # the preset of what has the source's own schemes
Ragged = Literal["refuse", "keep", "shrink"]
Mtp = Literal["keep", "quantize", "drop"]
Decode = Literal["exact", "rounded"]
SearchMode = Literal["none", "auto", "auto-round"]
Purpose = Literal["quantize", "convert", "dequantize"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Default scheme, exceptions, layout."""

    preset: str  # name of the preset that the default scheme started from
    scheme: Scheme  # default scheme, after --bits, --group-size and --sym
    layout: str  # key of layouts.LAYOUTS
    preset_rules: tuple[LayerRule, ...] = ()  # the preset's own exceptions; a user's rule for the same module wins
    layer_rules: tuple[LayerRule, ...] = ()  # of --layer-config; an exact name wins over a pattern, else the first hit
    ignore: tuple[Pattern, ...] = ()  # modules kept in source precision
    include: tuple[Pattern, ...] = ()  # modules quantized although the default rule keeps them
    quant_lm_head: bool = False
    ragged: Ragged = "refuse"  # what to do with columns that the group size does not divide, in a layout that needs it
    split_fused: bool = False  # members of fused groups may differ: no reader that is meant runs them as one matrix
    policy: Policy = "all"  # which Linear layers of the text model are quantized
    mtp: Mtp = "keep"  # what becomes of multi-token prediction layers
    quant_nontext: bool = False  # Linear layers of vision, audio and projector parts are quantized too
    search: SearchMode = "none"  # for better scales than round-to-nearest has
    importance: "Importance | None" = None  # how much an error counts in each input column
    fold: "Fold | None" = None  # scales that are moved between neighbours first
    purpose: Purpose = "quantize"  # convert: codes of the source into another layout, and its scheme is the commonest;
    # dequantize: everything is kept, and nothing stays encoded
    requantize: bool = False  # codes that a source has already are made anew; of `convert` those that may not fit
    symmetric: bool | None = None  # of `convert`: whether integers are, where the source does not say so itself
    dtype: str | None = None  # of weights that are decoded and kept; None: what the source's own reader makes of them
    decode: Decode = "exact"  # weights of a quantized source are quantized as decoded in fp32, or as a checkpoint of 16
    # bits would have them
    gguf: "GgufOptions | None" = None  # of a file of llama.cpp, whose file type is the preset
    tuned: "TunedCodes | None" = None  # codes of some weights, which are then not made anew

    @property
    def scheme_name(self) -> str:
        """What outputs are called after; what is converted has schemes that are not known before its source is."""
        if self.gguf:
            return self.preset
        return CONVERTED if self.purpose == "convert" else self.scheme.name

    @property
    def title(self) -> str:
        """What a model card calls the numbers."""
        return self.preset if self.gguf else self.scheme.name

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the fingerprint, shardq.json and the message that names differing keys."""
        return {
            "preset": self.preset,
            "scheme": _scheme_dict(self.scheme),
            "layout": self.layout,
            "layer_config": [  # in order: the first rule that hits a module wins
                [f"{r.pattern.kind}:{r.pattern.text}", rule_values(r)] for r in (*self.layer_rules, *self.preset_rules)
            ],
            "ignore": [f"{p.kind}:{p.text}" for p in self.ignore],
            "include": [f"{p.kind}:{p.text}" for p in self.include],
            "quant_lm_head": self.quant_lm_head,
            "ragged": self.ragged,
            "split_fused": self.split_fused,
            "policy": self.policy,
            "mtp": self.mtp,
            "quant_nontext": self.quant_nontext,
            "decode": self.decode,
            "search": self.search,
            "importance": self.importance and self.importance.sha256,
            "fold": self.fold and self.fold.sha256,
            "purpose": self.purpose,
            "requantize": self.requantize,
            "symmetric": self.symmetric,
            "dtype": self.dtype,
            **({"gguf": self.gguf.as_dict()} if self.gguf else {}),
            **({"tuned": self.tuned.sha256} if self.tuned else {}),
        }


def load_named(
    importance: "str | Path | Importance | None",
    fold: "str | Path | Fold | None",
    tuned: "str | Path | TunedCodes | None",
) -> "tuple[Importance | None, Fold | None, TunedCodes | None]":
    """Read those that are paths. Raises BadFold, BadImportance, BadTuned, SourceUnreadable."""
    if isinstance(fold, str | Path):  # each reader brings its file format
        from shardq.fold import read_fold

        fold = read_fold(fold)
    if isinstance(importance, str | Path):
        from shardq.importance import load_importance

        importance = load_importance(importance)
    if isinstance(tuned, str | Path):
        from shardq.tuned import load_tuned

        tuned = load_tuned(tuned)
    return importance, fold, tuned


def make_recipe(
    scheme: str,
    *,
    layout: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    symmetric: bool | None = None,
    layer_config: str | Mapping[str, Any] | None = None,
    ignore: Sequence[str] = (),
    include: Sequence[str] = (),
    ignore_dialect: Dialect = "shardq",
    quant_lm_head: bool = False,
    ragged: Ragged = "refuse",
    split_fused: bool = False,
    policy: Policy = "all",
    mtp: Mtp = "keep",
    quant_nontext: bool = False,
    decode: Decode = "exact",
    requantize: bool = False,
    search: SearchMode | None = None,
    importance: "str | Path | Importance | None" = None,
    fold: "str | Path | Fold | None" = None,
    gguf: "GgufOptions | None" = None,
    tuned: "str | Path | TunedCodes | None" = None,
) -> Recipe:
    """A Recipe from the words that the command line and scripts use.

    `scheme` may carry its layout, as in "W4A16@gptq". `importance` is a file of statistics, `fold` one of moved scales,
    or what they hold; with either `search` is "auto" unless it is given, else "none". A file type of llama.cpp, as
    "gguf:q4_k_m" or "Q4_K_M", takes `gguf`, `importance`, `decode` and `requantize` alone.
    Raises BadOption, UnknownScheme, BadGroupSize, LayoutRefuses, and for the files BadImportance, BadFold,
    SourceUnreadable.
    """
    scheme_name, _, layout_name = scheme.partition("@")
    if layout and layout_name and find_layout(layout) is not find_layout(layout_name):
        raise BadOption(f"two layouts: --scheme says {layout_name!r} and --format says {layout!r}; give one")
    file_type = find_file_type(scheme_name)
    if gguf and not file_type:
        raise BadOption(f"options of GGUF files mean nothing for scheme {scheme_name}: expected a file type as Q4_K_M")
    for option, word, words in (
        ("--ragged", ragged, Ragged),
        ("--ignore-dialect", ignore_dialect, Dialect),
        ("--policy", policy, Policy),
        ("--mtp", mtp, Mtp),
        ("--decode", decode, Decode),
        ("--search", search or "none", SearchMode),
    ):
        if word not in get_args(words):
            raise BadOption(f"{option} {word!r}: expected one of {', '.join(get_args(words))}")
    weighed, moved, codes = load_named(importance, fold, None if file_type else tuned)
    if weighed and search == "none" and not file_type:
        raise BadOption("--importance weighs a search, and --search none wants none: take one of them back")
    if file_type:
        for option, meaningless in (
            ("--bits", bits is not None),
            ("--group-size", group_size is not None),
            ("--sym", symmetric is not None),
            ("--layer-config (see --tensor-type)", layer_config),
            ("--ignore (see --tensor-type)", ignore),
            ("--include", include),
            ("--quant-lm-head", quant_lm_head),
            ("--ragged", ragged != "refuse"),
            ("--policy", policy != "all"),
            ("--mtp", mtp != "keep"),
            ("--quant-nontext", quant_nontext),
            ("--search", search not in (None, "none")),
            ("--fold", moved),
            ("--tuned", tuned),
        ):
            if meaningless:
                raise BadOption(f"{option} means nothing for the file type {file_type.name}: leave it out")
        return _gguf_recipe(file_type, layout or layout_name, gguf, weighed, decode, requantize)
    preset = parse_scheme(scheme_name)
    chosen = find_layout(layout or layout_name or default_layout(preset.scheme))
    return Recipe(
        preset=preset.name,
        scheme=chosen.settle(change_scheme(preset.scheme, bits, group_size, symmetric)),
        layout=chosen.name,
        preset_rules=parse_layer_config({k: {"bits": b} for k, b in preset.bits_of}, "shardq"),
        layer_rules=parse_layer_config(layer_config, ignore_dialect) if layer_config else (),
        ignore=tuple(parse_pattern(t, ignore_dialect) for t in ignore),
        include=tuple(parse_pattern(t, "shardq") for t in include),
        quant_lm_head=quant_lm_head,
        ragged=ragged,
        split_fused=split_fused,
        policy=policy,
        mtp=mtp,
        quant_nontext=quant_nontext,
        decode=decode,
        requantize=requantize,
        search=search or ("auto" if weighed or moved else "none"),
        importance=weighed,
        fold=moved,
        tuned=codes,
    )


def as_recipe(recipe: str | Recipe) -> Recipe:
    """What functions that take either work with: of a scheme's name what `make_recipe` makes, and raises."""
    return make_recipe(recipe) if isinstance(recipe, str) else recipe


def _gguf_recipe(
    file_type: FileType,
    layout: str,
    options: "GgufOptions | None",
    importance: "Importance | None",
    decode: Decode,
    requantize: bool,
) -> Recipe:
    if layout and find_layout(layout).name != GGUF_LAYOUT:
        raise LayoutRefuses(
            f"layout {layout} holds no {file_type.name}, which is a file type of llama.cpp: leave it out"
        )
    from shardq.gguf.options import GgufOptions

    return Recipe(
        preset=file_type.name,
        scheme=BLOCKS.get(file_type.base, PLAIN_WEIGHTS),
        layout=GGUF_LAYOUT,
        decode=decode,
        requantize=requantize,
        importance=importance,
        gguf=options or GgufOptions(),
    )


def convert_recipe(
    layout: str, *, ignore: Sequence[str] = (), requantize: bool = False, symmetric: bool | None = None
) -> Recipe:
    """A Recipe that puts the codes of a quantized source into another layout; modules under `ignore` are decoded.

    With `requantize` what may not fit gets new codes instead of an error. `symmetric` says what MLX and AWQ sources do
    not: that all zero points are in the middle, which is checked. Raises BadOption, LayoutRefuses."""
    return Recipe(
        preset=CONVERTED,
        scheme=PLAIN_WEIGHTS,  # until the source is known
        layout=find_layout(layout).name,
        ignore=tuple(parse_pattern(t, "shardq") for t in ignore),
        purpose="convert",
        requantize=requantize,
        symmetric=symmetric,
    )


def dequantize_recipe(dtype: str | None = None) -> Recipe:
    """A Recipe that decodes what a source has quantized: to BF16, F16 or F32, or to what its own reader makes of it.
    Raises BadOption."""
    if dtype is not None and dtype.upper() not in WEIGHT_DTYPES:
        raise BadOption(f"--dtype {dtype!r}: expected one of {', '.join(WEIGHT_DTYPES)}")
    return Recipe(
        preset=PLAIN_WEIGHTS.name,
        scheme=PLAIN_WEIGHTS,
        layout=PLAIN_LAYOUT,
        purpose="dequantize",
        dtype=dtype.upper() if dtype else None,
    )


def _scheme_dict(scheme: Scheme) -> dict[str, Any]:
    return {
        "element": scheme.element,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "scale": scheme.scale,
        "numbers": scheme.numbers,
        "group_rows": scheme.group_rows,
        "exponent": scheme.exponent,
        "reach": scheme.reach,
        "activation": scheme.activation,
    }


def rule_values(rule: LayerRule) -> dict[str, Any]:
    """What a rule sets, as a layer config writes it."""
    values = {"bits": rule.bits, "group_size": rule.group_size, "sym": rule.sym, "scheme": rule.scheme}
    return {k: v for k, v in values.items() if v is not None}
