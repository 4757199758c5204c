"""Names of Hugging Face's tensors, made to names of GGUF's through the maps of the gguf package."""

import re
from collections.abc import Sequence
from typing import Any, Final

from shardq.errors import UnsupportedSource
from shardq.gguf.packages import import_gguf

# What a language model does without; as in llama.cpp of llama-cpp-python 0.3.36, `TextModel.filter_tensors`.
OTHER_STARTS: Final = (
    "mlp", "vit.", "vpm.", "siglip2.", "conformer.", "merger.", "resampler.", "sound_encoder.", "sound_projection.",
    "speech_embeddings.",
)  # fmt: skip
OTHER_PARTS: Final = (
    "visual.", "vision.", "audio.", "talker.", "vision_", "audio_", "token2wav.", "code2wav.", "projector.",
    "pre_mm_projector_norm", "image_newline", "view_seperator", "patch_embed", "patch_embedding", "patch_merger.",
    "patch_merge_mlp.", "model.connector.",
)  # fmt: skip
BUFFERS: Final = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
SMALL: Final = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")
# Of layers behind the last one; gguf 0.19.0 does not have them for all architectures.
FURTHER: Final = {
    "eh_proj": "nextn.eh_proj", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm",
    "shared_head.norm": "nextn.shared_head_norm",
}  # fmt: skip


class TensorNames:
    """The map of one architecture and number of blocks. Raises MissingPackage, UnsupportedSource."""

    def __init__(self, arch: str, blocks: int) -> None:
        gguf = import_gguf()
        ids = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if arch not in ids:
            raise UnsupportedSource(f"package gguf does not know the architecture {arch}: install gguf>=0.19.0")
        self._arch = arch
        self._map: Any = gguf.get_tensor_name_map(ids[arch], blocks)

    def find(self, name: str) -> str:
        """GGUF's name. Raises UnsupportedSource."""
        found: str | None = self._map.get_name(key=name, try_suffixes=(".weight", ".bias")) or _further(name)
        if found is None:
            raise UnsupportedSource(f"tensor {name}: the architecture {self._arch} of GGUF has no place for it")
        return found


def _further(name: str) -> str | None:
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    return f"blk.{found[1]}.{FURTHER[found[2]]}.weight" if found and found[2] in FURTHER else None


def plain_name(name: str) -> str | None:
    """A source name as the map of names has it; None for what a GGUF file does without."""
    if name.startswith(OTHER_STARTS) or any(part in name for part in OTHER_PARTS):
        return None
    if name.endswith("e_score_correction_bias"):
        name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    name = name.replace("language_model.", "")
    return None if name.endswith(BUFFERS) else name


def block_of(name: str) -> int | None:
    """The first number in a name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def is_float(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is always F32: vectors, norms, routers and other small ones, and what is no weight."""
    short = re.sub(r"^blk\.\d+\.", "", name)
    return len(shape) <= 1 or name.endswith("_norm.weight") or short in SMALL or not name.endswith(".weight")
