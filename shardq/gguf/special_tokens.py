"""Which tokens are special, whether they are put before and behind a text, and how chats are laid out.

Source: llama.cpp as in llama-cpp-python 0.3.36, gguf-py `SpecialVocab`: what tokenizer.json, tokenizer_config.json,
config.json and files of templates say, in this order, and which of them wins.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shardq.errors import SourceUnreadable
from shardq.gguf.model_files import (
    CONFIG,
    MERGES,
    MORE_TEMPLATES,
    TEMPLATE,
    TEMPLATE_JSON,
    TOKENIZER,
    TOKENIZER_CONFIG,
    ModelFiles,
)
from shardq.gguf.pairs import Pairs

KINDS: Final = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
ID_KEYS: Final[Mapping[str, str]] = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask",
    "eot": "eot", "eom": "eom",
}  # fmt: skip  # GGUF's spelling; other kinds (cls) have no place in a file
ADDED: Final = ("bos", "eos", "sep")  # what llama.cpp can add by itself


@dataclass(slots=True)
class SpecialTokens:
    """What was found so far; a first finding is never replaced."""

    count: int | None  # ids from here on are left out
    kinds: tuple[str, ...] = KINDS
    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    merges: tuple[str, ...] = ()
    template: str | Sequence[Mapping[str, str]] | None = None
    lowercase: bool | None = None
    strips_accents: bool | None = None

    def put(self, kind: str, number: object) -> None:
        """Note an id, unless there is one. Raises SourceUnreadable for a negative one."""
        if not isinstance(number, int):
            return
        if number < 0:
            raise SourceUnreadable(f"{CONFIG} or {TOKENIZER}: the id of {kind} is {number}, expected 0 or more")
        if self.count is None or number < self.count:
            self.ids.setdefault(kind, number)

    def add_to(self, pairs: Pairs) -> None:
        """Add all of it to the metadata."""
        pairs.array("tokenizer.ggml.merges", self.merges)
        for kind, number in self.ids.items():
            if kind in ID_KEYS:
                pairs.u32(f"tokenizer.ggml.{ID_KEYS[kind]}_token_id", number)
        for kind, added in self.adds.items():
            if kind in ADDED:
                pairs.flag(f"tokenizer.ggml.add_{kind}_token", added)
        _add_template(pairs, self.template)
        if self.lowercase is not None:
            pairs.flag("tokenizer.ggml.normalizer.lowercase", self.lowercase)
        if self.strips_accents is not None:
            pairs.flag("tokenizer.ggml.normalizer.strip_accents", self.strips_accents)


def read_special_tokens(
    model: ModelFiles, count: int | None = None, with_merges: bool = False, more: Mapping[str, int] | None = None
) -> SpecialTokens:
    """What the files say; `more` are ids for what they do not name.

    Raises SourceUnreadable.
    """
    found = SpecialTokens(count)
    tokenizer = model.table(TOKENIZER) or {}
    config = model.table(TOKENIZER_CONFIG)
    if with_merges:
        found.merges = _merges(tokenizer) or _merges_text(model.text(MERGES) or "")
    if normalizer := tokenizer.get("normalizer"):
        _read_normalizer(found, normalizer)
    if tokenizer:
        config = _read_post_processor(found, tokenizer, config)
    if config:
        found.template = _template(model, config)
        _read_config(found, config, tokenizer.get("added_tokens", []))
    own = model.config()
    text = own.get("text_config")
    for kind in found.kinds:
        number = own.get(f"{kind}_token_id")
        if number is None and isinstance(text, Mapping):
            number = text.get(f"{kind}_token_id")
        found.put(kind, number)
    for kind, number in (more or {}).items():
        found.put(kind, number)
    return found


def _merges(tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Merges as "a b"; a space inside one of a pair becomes the letter that stands for it in byte-level BPE."""
    merges = tokenizer.get("model", {}).get("merges")
    if not isinstance(merges, list) or not merges:
        return ()
    if isinstance(merges[0], str):
        return tuple(merges)
    if not isinstance(merges[0], list) or len(merges[0]) != 2:
        raise SourceUnreadable(f"{TOKENIZER}: merges are {str(merges[0])[:80]!a}, expected text or pairs")
    return tuple(" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges)


def _merges_text(text: str) -> tuple[str, ...]:
    lines = text.splitlines()
    if lines and lines[0].strip().startswith("#"):
        lines = lines[1:]
    parts = [line.split(None, 3) for line in lines]
    return tuple(f"{pair[0]} {pair[1]}" for pair in parts if len(pair) == 2)


def _read_normalizer(found: SpecialTokens, normalizer: Mapping[str, Any]) -> None:
    kind = normalizer.get("type")
    if kind == "Lowercase":
        found.lowercase = True
    elif kind == "StripAccents":
        found.strips_accents = True
    elif kind == "BertNormalizer":
        found.lowercase = normalizer.get("lowercase", found.lowercase)
        found.strips_accents = normalizer.get("strip_accents", found.strips_accents)
    elif kind == "Sequence":
        for inner in normalizer.get("normalizers", ()):
            _read_normalizer(found, inner)


def _read_post_processor(
    found: SpecialTokens, tokenizer: Mapping[str, Any], config: dict[str, Any] | None
) -> dict[str, Any] | None:
    """What is put around a text; the config with the tokens that the post-processor knows better."""
    special = dict(config or {})
    for kind, other in (("bos", "cls"), ("eos", "sep")):
        if not special.get(f"{kind}_token") and special.get(f"{other}_token"):
            special[f"{kind}_token"] = special[f"{other}_token"]
    processor = tokenizer.get("post_processor")
    for one in processor.get("processors", [processor]) if processor else ():
        kind = one.get("type")
        if kind == "ByteLevel":
            found.adds.setdefault("bos", False)
            found.adds.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            found.adds |= {"bos": True, "eos": True, "sep": True}
            for name, default in (("cls", "bos"), ("sep", "eos")):
                if not special.get(f"{name}_token"):
                    special[f"{name}_token"] = one.get(name, [special.get(f"{default}_token")])[0]
        elif kind == "TemplateProcessing":
            _read_template_processing(found, one, special, bool(config))
    return special if config else config


def _read_template_processing(
    found: SpecialTokens, processor: Mapping[str, Any], special: dict[str, Any], has_config: bool
) -> None:
    """Whether a first and a last token are added, from the template for one text; a separator, from that for two."""
    single = processor.get("single", [])
    first = last = None
    if len(single) > 1:
        first = single[0].get("SpecialToken", {}).get("id")
        last = single[-1].get("SpecialToken", {}).get("id")
    if first:
        if not has_config:
            special["bos_token"] = first
        elif first not in (special.get("bos_token"), special.get("cls_token")):
            for name in ("bos_token", "cls_token"):
                special[name] = special.get(name) or first
        found.adds["bos"] = first in (special.get("bos_token"), special.get("cls_token"))
    if last:
        if has_config and last != special.get("eos_token"):
            for name in ("eot", "eom"):
                if name not in found.kinds:
                    found.kinds = (*found.kinds, name)
                    special[f"{name}_token"] = special.get("eos_token")
                    break
        special["eos_token"] = last
        found.adds["eos"] = True
    _read_separator(found, processor.get("pair", []), first, last, special)


def _read_separator(
    found: SpecialTokens, pair: Sequence[Mapping[str, Any]], first: object, last: object, special: dict[str, Any]
) -> None:
    def token(entry: Mapping[str, Any]) -> object:
        return entry.get("SpecialToken", {}).get("id")

    if not pair:
        return
    inner = pair[1:] if first and token(pair[0]) == first else pair
    inner = inner[:-1] if last and inner and token(inner[-1]) == last else inner
    if not inner or inner[0].get("Sequence", {}).get("id") != "A" or inner[-1].get("Sequence", {}).get("id") != "B":
        return
    between = inner[1:-1]
    if not between:
        return
    known = (special.get("sep_token"), special.get("eos_token"))
    adds = bool(token(between[0])) and token(between[0]) in known and not last
    if len(between) == 2 and token(between[1]) and token(between[1]) in known:
        adds = True
    found.adds["sep"] = adds
    if adds and not special.get("sep_token"):
        special["sep_token"] = special.get("eos_token")


def _read_config(found: SpecialTokens, config: Mapping[str, Any], added: Iterable[Mapping[str, Any]]) -> None:
    """Tokens that tokenizer_config.json names, looked up among the added tokens of tokenizer.json."""
    ids: dict[object, object] = {}
    for token in added:
        ids.setdefault(token.get("content"), token.get("id"))
    for kind in found.kinds:
        adds = config.get(f"add_{kind}_token")
        if isinstance(adds, bool):
            found.adds.setdefault(kind, adds)
        entry = config.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(content, str):
            found.put(kind, ids.get(content))


def _template(model: ModelFiles, config: Mapping[str, Any]) -> str | Sequence[Mapping[str, str]] | None:
    other: Any = None
    if (text := model.text(TEMPLATE)) is not None:
        names = sorted(n for n in model.files if n.startswith(MORE_TEMPLATES) and n.endswith(".jinja"))
        more = [
            {"name": n.removeprefix(MORE_TEMPLATES).removesuffix(".jinja"), "template": model.text(n)} for n in names
        ]
        other = [{"name": "default", "template": text}, *more] if more else text
    elif (table := model.table(TEMPLATE_JSON)) is not None:
        other = table.get("chat_template")
    found = config.get("chat_template", other)
    return found if isinstance(found, str | list) else None


def _add_template(pairs: Pairs, template: str | Sequence[Mapping[str, str]] | None) -> None:
    """One template, or several by name: the list of names, each of them, and the one that is the default."""
    if template is None or isinstance(template, str):
        pairs.text("tokenizer.chat_template", template or "")
        return
    default = None
    names = []
    for choice in template:
        name, text = choice.get("name", ""), choice.get("template")
        kept = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name)
        if not kept or text is None:
            continue
        if kept == "default":
            default = text
        else:
            names.append(kept)
            pairs.text(f"tokenizer.chat_template.{kept}", text)
    pairs.array("tokenizer.chat_templates", tuple(dict.fromkeys(names)))
    pairs.text("tokenizer.chat_template", default or "")
