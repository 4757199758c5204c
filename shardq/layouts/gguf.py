"""GGUF: files of llama.cpp. What is in them is not a matter of single modules, so that shardq/gguf plans them."""

from typing import Final

from shardq.layouts import GGUF_LAYOUT
from shardq.layouts.plain import Plain


class Gguf(Plain):
    """Only a name among layouts. Members as in Layout."""

    name = GGUF_LAYOUT
    reason = "holds ggml's blocks: name a file type, as in --scheme gguf:q4_k_m"
    aliases = ("llama.cpp",)
    summary = "all tensors and the tokenizer in one .gguf file, or in parts: --scheme gguf:q4_k_m"
    loaders = "llama.cpp and what is built on it"
    library = "gguf"


LAYOUTS: Final = (Gguf(),)
