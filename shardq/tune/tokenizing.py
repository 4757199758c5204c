"""A checkpoint's tokenizer: texts to ids, as transformers does it, without transformers where tokenizer.json is there.

Source: transformers 5.23, `TokenizersBackend`: the post-processor of tokenizer.json alone says which special tokens are
put around a text; `add_bos_token` and `add_eos_token` of tokenizer_config.json count only where there is no such file.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from shardq.errors import MissingPackage, SourceUnreadable
from shardq.side_files import LARGEST_BYTES
from shardq.sources.base import Source
from shardq.tune.chat_templates import ChatTemplate
from shardq.tune.packages import import_transformers, import_tuning_package

FAST: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
TEMPLATE_JSON: Final = "chat_template.json"
KINDS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SMALL: Final = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".tekken")  # endings of what a tokenizer is made of
PROBE: Final = "a"  # a text that is never empty


class Encoder(Protocol):
    """The part of a tokenizer that differs with the package."""

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        """Ids of each text, whole; with `special` as the model wants them."""
        ...

    def ids(self) -> tuple[Mapping[str, int], Mapping[int, bool]]:
        """All ids by their tokens; those of added tokens, True where they are special."""
        ...


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Texts to ids, and what the ids are."""

    label: str
    encoder: Encoder
    prefix: tuple[int, ...]  # that stand before a text
    suffix: tuple[int, ...]
    regular: tuple[int, ...]  # ids that are text and nothing else, rising: without special and added tokens
    limit: int  # all ids are below
    special: frozenset[int]  # ids that stand for no text, as the end of one
    bos_text: str  # "" where there is none
    keep_end: bool  # of a text that is too long
    template: ChatTemplate | None

    def encode(self, texts: Sequence[str], most: int) -> list[list[int]]:
        """Ids of each text with the special tokens around it, at most `most`: the text is cut, not they."""
        return [self.wrap(self._cut(ids, most)) for ids in self.encoder.encode(texts, special=False)]

    def encode_rendered(self, texts: Sequence[str], most: int) -> list[list[int]]:
        """As `encode`; what a chat template has begun with the token of a beginning gets no second one."""
        bare = [bool(self.bos_text) and t.startswith(self.bos_text) for t in texts]
        plain = self.encoder.encode(texts, special=False)
        return [ids[:most] if done else self.wrap(self._cut(ids, most)) for ids, done in zip(plain, bare, strict=True)]

    def encode_plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, whole and with nothing around it."""
        return self.encoder.encode(texts, special=False)

    def wrap(self, ids: Sequence[int]) -> list[int]:
        """`ids` with the special tokens around them."""
        return [*self.prefix, *ids, *self.suffix]

    @property
    def around(self) -> int:
        """How many ids `wrap` adds."""
        return len(self.prefix) + len(self.suffix)

    def _cut(self, ids: list[int], most: int) -> list[int]:
        room = max(most - self.around, 0)
        return ids[len(ids) - min(room, len(ids)) :] if self.keep_end else ids[:room]


def open_tokenizer(source: Source, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises SourceUnreadable, MissingPackage, HubAccess, HubTransfer.

    `trust_remote_code` matters only where there is no tokenizer.json: code of the checkpoint may run then.
    """
    files = {f.name: f.size_bytes for f in source.files() if "/" not in f.name}
    small = {
        name: source.read(name, 0, size)
        for name, size in files.items()
        if size <= LARGEST_BYTES and (name in (FAST, CONFIG, TEMPLATE, TEMPLATE_JSON))
    }
    config = _table(small, CONFIG, source.label)
    if FAST in small:
        encoder: Encoder = _open_fast(small[FAST], source.label)
    else:
        encoder = _open_slow(source, files, trust_remote_code)
    return _describe(encoder, config, _template(small, config, source.label), source.label)


def _describe(encoder: Encoder, config: Mapping[str, Any], template: str | None, label: str) -> Tokenizer:
    by_token, added = encoder.ids()
    tokens = {kind: text for kind in KINDS if (text := _content(config.get(kind)))}
    named = {by_token[t] for t in tokens.values() if t in by_token}
    prefix, suffix = _around(encoder)
    regular = tuple(sorted(set(by_token.values()) - set(added) - named))
    if not regular:
        raise SourceUnreadable(f"{label}: its tokenizer has no tokens but special ones")
    return Tokenizer(
        label,
        encoder,
        prefix,
        suffix,
        regular,
        1 + max(by_token.values()),
        frozenset(named | {number for number, is_special in added.items() if is_special}),
        tokens.get("bos_token", ""),
        config.get("truncation_side") == "left",
        None if template is None else ChatTemplate(template, tokens, label),
    )


def _around(encoder: Encoder) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind every text."""
    (bare,), (whole,) = encoder.encode([PROBE], special=False), encoder.encode([PROBE], special=True)
    for begin in range(len(whole) - len(bare) + 1):
        if whole[begin : begin + len(bare)] == bare:
            return tuple(whole[:begin]), tuple(whole[begin + len(bare) :])
    raise SourceUnreadable(f"a tokenizer that makes {whole} of {PROBE!r} with special tokens, and {bare} without")


# --- tokenizer.json ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Fast:
    backend: Any  # tokenizers.Tokenizer

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        return [list(e.ids) for e in self.backend.encode_batch(list(texts), add_special_tokens=special)]

    def ids(self) -> tuple[Mapping[str, int], Mapping[int, bool]]:
        added = self.backend.get_added_tokens_decoder()
        return self.backend.get_vocab(with_added_tokens=True), {n: bool(t.special) for n, t in added.items()}


def _open_fast(data: bytes, label: str) -> _Fast:
    package = import_tuning_package("tokenizers", f"the {FAST} of {label}")
    try:
        backend = package.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises no other class for damaged files
        raise SourceUnreadable(f"{FAST} of {label}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return _Fast(backend)


# --- everything else, through transformers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Slow:
    tokenizer: Any  # transformers.PreTrainedTokenizerBase

    def encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        found = self.tokenizer(list(texts), add_special_tokens=special, truncation=False)["input_ids"]
        return [list(ids) for ids in found]

    def ids(self) -> tuple[Mapping[str, int], Mapping[int, bool]]:
        added = self.tokenizer.added_tokens_decoder
        return self.tokenizer.get_vocab(), {n: bool(t.special) for n, t in added.items()}


def _open_slow(source: Source, files: Mapping[str, int], trust_remote_code: bool) -> _Slow:
    """Through a folder of the small files: what transformers can load from nothing else."""
    try:
        transformers = import_transformers(f"the tokenizer of {source.label}, which has no {FAST}")
    except MissingPackage as error:
        raise MissingPackage(f"{error}; or put a {FAST} beside the checkpoint") from error
    endings = (*SMALL, ".py") if trust_remote_code else SMALL
    wanted = {n: s for n, s in files.items() if n.endswith(endings) and s <= LARGEST_BYTES and "index" not in n}
    with tempfile.TemporaryDirectory(prefix="shardq-tokenizer-") as folder:
        for name, size in wanted.items():
            with open(os.path.join(folder, name), "wb") as file:
                file.write(source.read(name, 0, size))
        try:
            return _Slow(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
        except Exception as error:  # any class, from any package that it needs
            raise SourceUnreadable(f"{source.label}: transformers cannot load its tokenizer: {error}") from error


# --- small things ------------------------------------------------------------------------------------------------


def _table(files: Mapping[str, bytes], name: str, label: str) -> dict[str, Any]:
    """A file that is a JSON object, {} where it is not there."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise SourceUnreadable(f"{name} of {label}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise SourceUnreadable(f"{name} of {label}: expected a JSON object, found {type(found).__name__}")
    return found


def _content(entry: object) -> str | None:
    """The text of a token as the config names it: plain, or an object."""
    content = entry.get("content") if isinstance(entry, Mapping) else entry
    return content if isinstance(content, str) else None


def _template(files: Mapping[str, bytes], config: Mapping[str, Any], label: str) -> str | None:
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", "replace")
    found = _table(files, TEMPLATE_JSON, label).get("chat_template", config.get("chat_template"))
    if isinstance(found, list):  # several, each with a name
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
