"""A recipe as a table of words, in TOML: the options of `quantize` that decide output bytes, with `_` in place of `-`.

    scheme = "W4A16@gptq"
    group_size = 64
    ignore = ["re:.*down_proj"]

Files that it names are beside it, unless their paths are absolute.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from shardq.errors import BadOption
from shardq.gguf.file_types import find_file_type
from shardq.gguf.options import GgufOptions
from shardq.patterns import parse_layer_config
from shardq.recipe import Recipe, make_recipe, rule_values
from shardq.sizes import parse_size
from shardq.tables import Kinds, check_table, check_texts, read_toml

DEFAULT_SCHEME: Final = "W4A16"
LAYERS: Final = ".layers.toml"  # behind an output folder's name: the file of its mixture
_TEXT, _FLAG, _TEXTS = (str,), (bool,), (list,)
_GGUF: Final[Mapping[str, Kinds]] = {
    "tensor_type": _TEXTS, "pure": _FLAG, "output_tensor_type": _TEXT, "token_embedding_type": _TEXT,
    "split_max_size": (str, int), "tokenizer_pre": _TEXT,
}  # fmt: skip
_FILES: Final = ("importance", "fold", "tuned")
WORDS: Final[Mapping[str, Kinds]] = {
    "scheme": _TEXT, "format": _TEXT, "bits": (int,), "group_size": (int,), "sym": _FLAG, "layer_config": (str, dict),
    "ignore": _TEXTS, "include": _TEXTS, "ignore_dialect": _TEXT, "quant_lm_head": _FLAG, "quant_nontext": _FLAG,
    "policy": _TEXT, "mtp": _TEXT, "decode": _TEXT, "requantize": _FLAG, "ragged": _TEXT, "target": _TEXTS,
    "search": _TEXT, **dict.fromkeys(_FILES, _TEXT), **_GGUF,
}  # fmt: skip
# Fields of Recipe that have the words' names.
_PLAIN: Final = (
    "quant_lm_head", "quant_nontext", "policy", "mtp", "decode", "requantize", "ragged", "search",
)  # fmt: skip
MIXTURE: Final[Mapping[str, Kinds]] = {"target_bits": (float,), "options": _TEXT, "ignore_scale_bits": _FLAG}


@dataclass(frozen=True, slots=True)
class MixtureWords:
    """A mixture for a size, which is chosen when the weights can be read."""

    target_bits: float
    options: str
    ignore_scale_bits: bool


@dataclass(frozen=True, slots=True)
class Written:
    """What a table stands for."""

    recipe: Recipe
    targets: tuple[str, ...] = ()  # engines that must load the output
    mixture: MixtureWords | None = None  # that is still to be chosen


def read_recipe_file(path: Path) -> Written:
    """The recipe in a file. Raises as `recipe_of`."""
    return recipe_of(read_toml(path), str(path), path.parent)


def with_layers(recipe: Recipe, path: Path) -> Recipe:
    """A recipe with the layer config that its mixture was written to. Raises BadOption."""
    return replace(recipe, layer_rules=parse_layer_config(path, "shardq"))


def recipe_of(table: object, where: str, folder: Path) -> Written:
    """The recipe of a table. `where` names it in messages, `folder` is what its paths start from.

    Raises BadOption with the place of what is wrong, and what make_recipe raises.
    """
    words = check_table(table, where, {**WORDS, **MIXTURE})
    mixture = _mixture(words, where)
    scheme = words.get("scheme", mixture.options.partition(",")[0] if mixture else DEFAULT_SCHEME)
    lists = {k: check_texts(words.get(k, ()), f"{where}: {k}") for k in ("ignore", "include", "target", "tensor_type")}
    is_gguf = find_file_type(scheme.partition("@")[0]) is not None
    if not is_gguf and (lost := sorted(_GGUF.keys() & words.keys())):
        raise BadOption(f"{where}: {', '.join(lost)} means nothing for scheme {scheme}, which is no file type of GGUF")
    files = {k: folder / Path(words[k]).expanduser() for k in _FILES if k in words}
    recipe = make_recipe(
        scheme,
        layout=words.get("format"),
        bits=words.get("bits"),
        group_size=words.get("group_size"),
        symmetric=words.get("sym"),
        layer_config=_layer_config(words.get("layer_config"), folder),
        ignore=lists["ignore"],
        include=lists["include"],
        ignore_dialect=words.get("ignore_dialect", "shardq"),
        quant_lm_head=words.get("quant_lm_head", False),
        ragged=words.get("ragged", "refuse"),
        split_fused=may_split_fused(lists["target"]),
        policy=words.get("policy", "all"),
        mtp=words.get("mtp", "keep"),
        quant_nontext=words.get("quant_nontext", False),
        decode=words.get("decode", "exact"),
        requantize=words.get("requantize", False),
        search=words.get("search"),
        importance=files.get("importance"),
        fold=files.get("fold"),
        gguf=_gguf_options(words, lists["tensor_type"], where) if is_gguf else None,
        tuned=files.get("tuned"),
    )
    return Written(recipe, lists["target"], mixture)


def _mixture(words: Mapping[str, Any], where: str) -> MixtureWords | None:
    if "target_bits" not in words:
        if lone := sorted(MIXTURE.keys() & words.keys()):
            raise BadOption(f"{where}: {', '.join(lone)} has a meaning only with target_bits")
        return None
    if "options" not in words:
        raise BadOption(f'{where}: target_bits needs options, as in options = "W2A16G64,W4A16,W8A16"')
    return MixtureWords(float(words["target_bits"]), words["options"], words.get("ignore_scale_bits", False))


def _layer_config(value: str | Mapping[str, Any] | None, folder: Path) -> str | Mapping[str, Any] | None:
    """A file beside the table, or rules that stand in it."""
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return value
    return str(folder / Path(value).expanduser())


def may_split_fused(targets: Sequence[str]) -> bool:
    """True if all engines that must load an output run the members of fused groups one by one. Raises BadOption."""
    if not targets:
        return False
    from shardq.serving.targets import may_split, parse_target  # the table of engines takes its time

    return may_split([parse_target(t) for t in targets])


def _gguf_options(words: Mapping[str, Any], overrides: tuple[str, ...], where: str) -> GgufOptions | None:
    pairs = tuple((pattern, kind) for pattern, _, kind in (text.rpartition("=") for text in overrides))
    if any(not pattern for pattern, _ in pairs):
        raise BadOption(f'{where}: tensor_type: expected "REGEX=TYPE", as "attn_v=Q6_K"')
    size = words.get("split_max_size")
    made = GgufOptions(
        pure=words.get("pure", False),
        output_type=words.get("output_tensor_type"),
        embedding_type=words.get("token_embedding_type"),
        overrides=pairs,
        max_part_bytes=None if size is None else parse_size(str(size), f"{where}: split_max_size"),
        tokenizer_pre=words.get("tokenizer_pre"),
    )
    return None if made == GgufOptions() else made


def words_of(recipe: Recipe) -> dict[str, Any]:
    """The words that `recipe_of` reads as this recipe; the engines that it was checked against are not in it. Files are
    named without their folders."""
    r, own = recipe, recipe.gguf
    usual = make_recipe(f"gguf:{r.preset}" if own else r.preset, layout=r.layout)
    words: dict[str, Any] = {"scheme": f"gguf:{r.preset.lower()}" if own else r.preset, "format": r.layout}
    if r.scheme.is_adjustable and r.scheme != usual.scheme:
        words |= {"bits": r.scheme.bits, "group_size": r.scheme.group_size, "sym": r.scheme.symmetric}
    if r.layer_rules:
        words["layer_config"] = {rule.pattern.text: rule_values(rule) for rule in r.layer_rules}
    patterns = (*r.ignore, *(rule.pattern for rule in r.layer_rules))
    if any(p.kind in ("search", "substring") for p in patterns):
        words["ignore_dialect"] = "auto-round"
    words |= {k: [p.text for p in getattr(r, k)] for k in ("ignore", "include") if getattr(r, k)}
    words |= {k: v for k in _PLAIN if (v := getattr(r, k)) != getattr(usual, k)}
    if own:
        words |= {
            "pure": own.pure or None, "output_tensor_type": own.output_type, "token_embedding_type": own.embedding_type,
            "tensor_type": [f"{pattern}={kind}" for pattern, kind in own.overrides],
            "split_max_size": own.max_part_bytes, "tokenizer_pre": own.tokenizer_pre,
        }  # fmt: skip
    labels = {"importance": r.importance and r.importance.label, "tuned": r.tuned and r.tuned.label}
    return {k: v for k, v in {**words, **labels}.items() if v is not None and v != []}


def toml_of(words: Mapping[str, Any], head: str) -> str:
    """A file of these words, with comment lines before them."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines += [f"{key} = {_toml(value)}" for key, value in words.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    """A value in TOML: strings are JSON's, which TOML's basic strings contain but for DEL."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(k))} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value).replace("\x7f", "\\u007f")
