"""Which files beside the weights a checkpoint needs in order to serve, by pattern.

Never copied: weights in any other form, the source's index, and the configuration of an earlier quantization, which
loaders would read in place of ours.
"""

import fnmatch
from collections.abc import Iterable
from typing import Final

from shardq.checkpoint import SideFile

WANTED: Final = (
    "*tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.tiktoken", "*.model",
    "spiece*", "sentencepiece*", "*preprocessor_config.json", "processor_config.json", "*image_processor*",
    "*feature_extractor*", "chat_template*", "*.jinja", "generation_config.json", "*.py", "params.json",
    "license*", "licence*", "notice*", "use_policy*", "*copying*", "modules.json", "sentence_bert_config.json",
    "config_sentence_transformers.json",
)  # fmt: skip
UNWANTED: Final = (
    "*.safetensors*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx*", "*.h5", "*.msgpack", "*.ckpt", "*.index.json",
    "quantize_config.json", "quantization_config.json", "quant_config.json", "hf_quant_config.json", "readme.md",
    "config.json", "shardq*", ".*",
)  # fmt: skip
LARGEST_BYTES: Final = 256 << 20  # a "tokenizer" above this is a weight file under a wrong name


def select_side_files(files: Iterable[SideFile]) -> tuple[SideFile, ...]:
    """The files to copy, in name order; only those at the top of the checkpoint's folder."""
    return tuple(sorted((f for f in files if _wanted(f)), key=lambda f: f.name))


def _wanted(f: SideFile) -> bool:
    name = f.name.lower()
    if "/" in name or f.size_bytes > LARGEST_BYTES or any(fnmatch.fnmatchcase(name, p) for p in UNWANTED):
        return False
    return any(fnmatch.fnmatchcase(name, p) for p in WANTED)
