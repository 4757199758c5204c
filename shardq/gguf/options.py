"""What a user may ask of a GGUF file beside its file type."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """Names and meaning as of llama.cpp's tools; types are ggml's."""

    pure: bool = False  # one type for all that is quantized
    output_type: str | None = None  # of the head
    embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()  # pattern of names in the file, type; the first that fits
    max_part_bytes: int | None = None  # tensors of one file; None: all in one
    tokenizer_pre: str | None = None  # pre-tokenizer, where it is not to be found out

    def as_dict(self) -> dict[str, Any]:
        """Plain values for the fingerprint."""
        return {
            "pure": self.pure,
            "output_type": self.output_type,
            "embedding_type": self.embedding_type,
            "overrides": [list(pair) for pair in self.overrides],
            "max_part_bytes": self.max_part_bytes,
            "tokenizer_pre": self.tokenizer_pre,
        }
