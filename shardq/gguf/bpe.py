"""Byte-level BPE: the vocabulary of a tokenizer.json, and which pre-tokenizer llama.cpp is to use for it.

Source: llama.cpp as in llama-cpp-python 0.3.36, `TextModel.get_vocab_base`, which asks transformers; the tokenizers
package alone has the same answers where tokenizer.json has all tokens.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final

from shardq.errors import SourceUnreadable, UnsupportedSource
from shardq.gguf.model_files import TOKENIZER, TOKENIZER_CONFIG, ModelFiles
from shardq.gguf.packages import import_tokenizers
from shardq.gguf.pairs import Pairs
from shardq.gguf.parameters import Parameters
from shardq.gguf.pre_tokenizers import PRE_TOKENIZERS, PROBE
from shardq.gguf.special_tokens import KINDS, read_special_tokens
from shardq.gguf.token_types import CONTROL, NORMAL, SPACE, UNUSED, USER_DEFINED, looks_special

NAMES: Final = tuple(sorted(set(PRE_TOKENIZERS.values())))


def add_bpe(
    pairs: Pairs, model: ModelFiles, parameters: Parameters, pre: str | None, more: Mapping[str, str] | None = None
) -> None:
    """Add the vocabulary; `more` names tokens for kinds that the files do not (`{"eot": "<|user|>"}`).

    `pre` overrides the pre-tokenizer's name. Raises UnsupportedSource, SourceUnreadable, MissingPackage.
    """
    tokenizer = load_tokenizer(model)
    tokens, types = _vocabulary(tokenizer, parameters)
    pairs.text("tokenizer.ggml.model", "gpt2")
    pairs.text("tokenizer.ggml.pre", pre or find_pre_tokenizer(tokenizer))
    pairs.array("tokenizer.ggml.tokens", tokens)
    pairs.array("tokenizer.ggml.token_type", types)
    ids = {}
    for kind, content in (more or {}).items():
        number = tokenizer.token_to_id(content)
        if number is None:
            raise UnsupportedSource(f"{TOKENIZER} has no token {content!a}, which its architecture needs as {kind}")
        ids[kind] = number
    read_special_tokens(model, with_merges=True, more=ids).add_to(pairs)


def load_tokenizer(model: ModelFiles) -> Any:
    """The `tokenizers.Tokenizer` of a model. Raises UnsupportedSource, SourceUnreadable, MissingPackage."""
    data = model.files.get(TOKENIZER)
    if data is None:
        raise UnsupportedSource(f"{model.name} has no {TOKENIZER}: this version writes no other BPE vocabulary to GGUF")
    package = import_tokenizers()
    try:
        tokenizer = package.Tokenizer.from_buffer(data)
    except Exception as error:  # the package raises no other class for damaged files
        raise SourceUnreadable(f"{TOKENIZER} of {model.name}: {error}") from error
    _check_special(tokenizer, model)
    return tokenizer


def find_pre_tokenizer(tokenizer: Any) -> str:
    """llama.cpp's name. Raises UnsupportedSource where the fingerprint is none that it knows."""
    found = fingerprint(tokenizer)
    if found not in PRE_TOKENIZERS:
        raise UnsupportedSource(
            f"{TOKENIZER}: the pre-tokenizer with fingerprint {found} is unknown; --tokenizer-pre NAME says which of "
            f"llama.cpp's it is: {', '.join(NAMES)}"
        )
    return PRE_TOKENIZERS[found]


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer makes of the probe."""
    return sha256(str(tokenizer.encode(PROBE).ids).encode()).hexdigest()


def _vocabulary(tokenizer: Any, parameters: Parameters) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id; ids without a token are padding."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    contents = {token.content for token in added.values()}
    by_id = {number: token for token, number in vocabulary.items()}
    count = len(by_id) if parameters.find("vocab_size") is None else parameters.tokens
    if by_id and max(by_id) >= count:
        raise UnsupportedSource(f"{TOKENIZER} has a token with id {max(by_id)}, config.json says vocab_size {count}")
    tokens, types = [], []
    for number in range(count):
        token, kind = by_id.get(number), NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", UNUSED
        elif token in contents:
            if not added[number].normalized:
                token = tokenizer.decode(
                    tokenizer.encode(token, add_special_tokens=False).ids, skip_special_tokens=False
                )
            kind = CONTROL if added[number].special or looks_special(token) else USER_DEFINED
            token = token.replace(SPACE, " ") if kind == USER_DEFINED else token
        tokens.append(token)
        types.append(kind)
    return tuple(tokens), tuple(types)


def _check_special(tokenizer: Any, model: ModelFiles) -> None:
    """transformers gives a named token that is not there a new id; refuse it. Raises UnsupportedSource."""
    config = model.table(TOKENIZER_CONFIG) or {}
    for kind in KINDS:
        entry = config.get(f"{kind}_token")
        content = entry.get("content") if isinstance(entry, Mapping) else entry
        if isinstance(content, str) and content and tokenizer.token_to_id(content) is None:
            raise UnsupportedSource(f"{TOKENIZER_CONFIG}: {kind}_token {content!a} is not in {TOKENIZER}")
