"""What a token is, in GGUF's numbers, which are SentencePiece's too."""

from typing import Final

NORMAL: Final = 1
UNKNOWN: Final = 2
CONTROL: Final = 3
USER_DEFINED: Final = 4
UNUSED: Final = 5
BYTE: Final = 6

SPACE: Final = "\u2581"  # for a space, in SentencePiece

_CONTROLS: Final = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_AROUND: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


def looks_special(text: str) -> bool:
    """Whether a token is for control, though its model does not say so.

    Source: llama.cpp as in llama-cpp-python 0.3.36, `TextModel.does_token_look_special`.
    """
    return text in _CONTROLS or any(text.startswith(a) and text.endswith(b) for a, b in _AROUND)
