"""Options of GGUF files, named as llama.cpp's tools name them."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from shardq.cli._kept import add_options, kept_option, take_kept
from shardq.errors import BadOption
from shardq.sizes import parse_size

if TYPE_CHECKING:
    from shardq.gguf.options import GgufOptions

F = TypeVar("F", bound=Callable[..., Any])
_KEY: Final = "shardq.gguf"  # in the context: values of `gguf_options`


def _option(*words: str, **settings: Any) -> Callable[[F], F]:
    return kept_option(_KEY, *words, **settings)


def gguf_options(function: F) -> F:
    """What only file types of GGUF take; a command finds them with `take_gguf_options`."""
    options = (
        _option(
            "--tensor-type", "overrides", multiple=True, metavar="REGEX=TYPE",
            help="GGUF: the type of tensors whose name in the file the expression hits, as attn_v=Q6_K. May be "
            "repeated; the first that hits counts.",
        ),
        _option("--pure", is_flag=True, help="GGUF: one type for all that is quantized."),
        _option("--output-tensor-type", "output_type", metavar="TYPE", help="GGUF: the type of output.weight."),
        _option(
            "--token-embedding-type", "embedding_type", metavar="TYPE", help="GGUF: the type of token_embd.weight."
        ),
        _option(
            "--split-max-size", "max_part", metavar="SIZE",
            help="GGUF: several files with at most so much of tensors in each, as 40G.",
        ),
        _option(
            "--tokenizer-pre", metavar="NAME",
            help="GGUF: llama.cpp's name of the pre-tokenizer, where it is not found out.",
        ),
    )  # fmt: skip
    return add_options(function, options)


def take_gguf_options() -> "GgufOptions | None":
    """What the user gave for `gguf_options`; None for nothing. Raises BadOption."""
    words = take_kept(_KEY)
    if not words or not any(words.values()):  # a command without them, or nothing given
        return None
    from shardq.gguf.options import GgufOptions

    return GgufOptions(
        pure=words["pure"],
        output_type=words["output_type"],
        embedding_type=words["embedding_type"],
        overrides=tuple(_override(text) for text in words["overrides"]),
        max_part_bytes=parse_size(words["max_part"], "--split-max-size"),
        tokenizer_pre=words["tokenizer_pre"],
    )


def _override(text: str) -> tuple[str, str]:
    pattern, separator, kind = text.rpartition("=")
    if not separator:
        raise BadOption(f"--tensor-type {text!r}: expected REGEX=TYPE, as attn_v=Q6_K")
    return pattern, kind
