"""Options of the commands that make a plan, and the Recipe that they stand for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import click

from shardq.cli._gguf import take_gguf_options
from shardq.cli._kept import add_options, kept_option, take_kept
from shardq.errors import BadOption

if TYPE_CHECKING:
    from shardq.patterns import Dialect
    from shardq.policy import Policy
    from shardq.recipe import Decode, Mtp, Ragged, Recipe, SearchMode

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_SCHEME: Final = "W4A16"
_KEY: Final = "shardq.recipe"  # in the context: values of `recipe_options`
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True, slots=True)
class RecipeWords:
    """The values of `recipe_options`, which decide output bytes, and those of `--target`."""

    schemes: tuple[str, ...] = ()
    layout: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    layer_config: str | None = None
    ignore: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    ignore_dialect: str = "shardq"
    quant_lm_head: bool = False
    quant_nontext: bool = False
    policy: str = "all"
    mtp: str = "keep"
    decode: str = "exact"
    requantize: bool = False
    ragged: str = "refuse"
    targets: tuple[str, ...] = ()
    search: str | None = None
    importance: str | None = None
    fold: str | None = None
    tuned: str | None = None
    rtn: bool = False

    def build(self) -> "list[Recipe]":
        """A Recipe for each scheme in each layout. Raises what make_recipe does, which checks all words."""
        from shardq.gguf.file_types import find_file_type
        from shardq.recipe import load_named, make_recipe

        if self.rtn and self.search not in {None, "none"}:
            raise BadOption(f"--rtn is --search none, and --search {self.search} is given, too: take one of them back")
        search = "none" if self.rtn else self.search
        weighed, moved, codes = load_named(self.importance or None, self.fold, self.tuned or None)  # once for all
        layouts = [x.strip() for x in self.layout.split(",")] if self.layout else [None]
        gguf = take_gguf_options()
        wanted = self.schemes or (DEFAULT_SCHEME,)
        if gguf and not any(find_file_type(x.partition("@")[0]) for x in wanted):
            raise BadOption("options of GGUF files mean nothing without a file type, as in --scheme gguf:q4_k_m")
        split_fused = False
        if self.targets:
            from shardq.recipe_file import may_split_fused  # with all that is known of engines

            split_fused = may_split_fused(self.targets)
        return [
            make_recipe(
                scheme,
                layout=each,
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                layer_config=self.layer_config,
                ignore=split_patterns(self.ignore),
                include=split_patterns(self.include),
                ignore_dialect=cast("Dialect", self.ignore_dialect),
                quant_lm_head=self.quant_lm_head,
                ragged=cast("Ragged", self.ragged),
                split_fused=split_fused,
                policy=cast("Policy", self.policy),
                mtp=cast("Mtp", self.mtp),
                quant_nontext=self.quant_nontext,
                decode=cast("Decode", self.decode),
                requantize=self.requantize,
                search=cast("SearchMode | None", search),
                importance=weighed,
                fold=moved,
                tuned=codes,
                gguf=gguf if find_file_type(scheme.partition("@")[0]) else None,
            )
            for scheme in wanted
            for each in layouts
        ]


def _option(*words: str, **settings: Any) -> Callable[[F], F]:
    return kept_option(_KEY, *words, **settings)


def recipe_options(function: F) -> F:
    """Everything that decides output bytes, in the order of --help; a command finds it with `take_recipe_words`."""
    options = (
        _option(
            "--scheme", "schemes", multiple=True, metavar="SCHEME[@LAYOUT]",
            help=f"Scheme, with a layout if you like: W4A16@gptq. Default: {DEFAULT_SCHEME}. Several make several "
            "outputs from one read. See `shardq schemes`. File types of llama.cpp: gguf:q4_k_m.",
        ),
        _option(
            "--format", "layout", metavar="LAYOUT[,LAYOUT]",
            help="Layout; default: one that fits. Several make several outputs. See `shardq formats`.",
        ),
        _option("--bits", type=int, help="Bits of a code, instead of the scheme's."),
        _option(
            "--group-size", "--group_size", type=int,
            help="Columns that share a scale, instead of the scheme's; -1: the whole row.",
        ),
        _option(
            "--sym/--asym", "symmetric", default=None,
            help="One fixed zero point, or one for each group, instead of the scheme's.",
        ),
        _option(
            "--layer-config", "--layer_config", metavar="JSON|FILE",
            help='Schemes of single modules: {"PATTERN": {"bits": 8}}, {"PATTERN": "W8A16"}; bits 16 keeps. '
            "Or a .json or .toml file.",
        ),
        _option(
            "--ignore", multiple=True, metavar="PATTERN",
            help="Keep these modules in source precision: a full name, a glob (`*` in a segment, `**` over many), or "
            "re:REGEX. May be repeated, or separated by commas.",
        ),
        _option(
            "--include", multiple=True, metavar="PATTERN",
            help="Quantize these too, although the default keeps them; written as for --ignore.",
        ),
        _option(
            "--ignore-dialect", default="shardq", metavar="shardq|auto-round", show_default=True,
            help="How --ignore and --layer-config patterns read; auto-round: a part of a name.",
        ),
        _option("--quant-lm-head", is_flag=True, help="Quantize the output projection too."),
        _option(
            "--quant-nontext", is_flag=True, help="Quantize the Linear layers of vision and audio parts too."
        ),
        _option(
            "--policy", default="all", metavar="all|published", show_default=True,
            help="Linear layers to quantize: all, or as published recipes for the family have it.",
        ),
        _option(
            "--mtp", default="keep", metavar="keep|quantize|drop", show_default=True,
            help="Layers for multi-token prediction: keep in source precision, quantize, or leave out.",
        ),
        _option(
            "--decode", default="exact", metavar="exact|rounded", show_default=True,
            help="How weights of a quantized source are taken: in fp32, or rounded to 16 bits first, as a dequantized "
            "checkpoint has them.",
        ),
        _option(
            "--requantize", is_flag=True,
            help="Make new codes also for what a quantized source holds in the wanted scheme already.",
        ),
        _option(
            "--ragged", default="refuse", metavar="refuse|keep|shrink", show_default=True,
            help="Where the group size does not divide the columns: stop, keep the module, or take the largest group "
            "that fits.",
        ),
        _option(
            "--target", "targets", multiple=True, metavar="ENGINE[:tp=N,device=cpu]",
            help="Refuse what this engine will not load: vllm:tp=8, sglang, transformers, llama.cpp, mlx. May be "
            "repeated.",
        ),
        _option(
            "--search", metavar="none|auto|auto-round",
            help="Look for better scales than round-to-nearest has: auto wherever that never loses (without "
            "--importance: MX, NVFP4, and 4-bit integers with zero points or biases), auto-round by that tool's own "
            "rule. Default: auto with --importance, else none.",
        ),
        _option(
            "--importance", "--imatrix", metavar="FILE", type=click.Path(dir_okay=False),
            help="How much an error counts in each input column: shardq's statistics, or an imatrix of llama.cpp.",
        ),
        _option(
            "--fold", metavar="auto|FILE",
            help="Move scales between neighbours first, which changes nothing of what the model computes: as a file "
            "says, or as is best for these weights (auto: they are read once more; makes the file).",
        ),
        _option(
            "--tuned", metavar="DIR", type=click.Path(file_okay=False),
            help="Take codes that were tuned before, from their folder, in place of making them.",
        ),
        _option("--rtn", is_flag=True, help="Plain round-to-nearest: the same as --search none."),
    )  # fmt: skip
    return add_options(function, options)


def take_recipe_words() -> RecipeWords:
    """What the user gave for `recipe_options`."""
    return RecipeWords(**(take_kept(_KEY) or {}))


def split_patterns(values: Sequence[str]) -> list[str]:
    """Single patterns, split at commas; one inside brackets, as in `re:.*[.][0-9]{1,2}[.]`, belongs to its pattern."""
    return [pattern for value in values for pattern in _split(value)]


def _split(value: str) -> list[str]:
    parts, depth, escaped = [""], 0, False
    for c in value:
        if c == "," and depth <= 0 and not escaped:
            parts.append("")
            continue
        if not escaped:
            depth += (c in _OPENING) - (c in _CLOSING)
        escaped = c == "\\" and not escaped
        parts[-1] += c
    stripped = [p.strip() for p in parts]
    return [p for p in stripped if p] or [value]  # an empty value stays, for the library to refuse
