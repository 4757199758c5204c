"""What llama.cpp's converter makes of a checkpoint, as JSON: python dump_converter.py LLAMA_CPP CHECKPOINT [PRE]

Needs torch, transformers, sentencepiece, and the folder with convert_hf_to_gguf.py, with gguf-py in it. PRE stands in
for the pre-tokenizer's name where the converter would not find it out.
"""

import json
import logging
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

LONG = 16  # arrays above are stored as a digest


def dump(llama_cpp: str, checkpoint: str, pre: str | None = None) -> dict[str, Any]:
    sys.path[:0] = [llama_cpp, f"{llama_cpp}/gguf-py"]
    import gguf
    import torch
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.disable(logging.WARNING)
    folder = Path(checkpoint)
    with torch.inference_mode():
        kind = get_model_class(get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT))
        if pre:
            kind.get_vocab_base_pre = lambda self, tokenizer: pre
        model = kind(folder, gguf.LlamaFileType.MOSTLY_BF16, folder / "out.gguf", dry_run=True, eager=True)
        model.prepare_tensors()
        model.prepare_metadata(vocab_only=False)
    writer = model.gguf_writer
    pairs = [[key, *entry(value, gguf)] for key, value in writer.kv_data[0].items()]
    tensors = [
        [
            name,
            info.dtype.name,
            [int(n) for n in info.shape],
            sha256(np.ascontiguousarray(info.tensor).tobytes()).hexdigest(),
        ]
        for name, info in writer.tensors[0].items()
    ]
    return {"pairs": pairs, "tensors": tensors}


def entry(value: Any, gguf: Any) -> tuple[str, Any]:
    content, kind = value.value, value.type.name
    if kind == "ARRAY":
        content = [item.decode() if isinstance(item, bytes) else item for item in content]
        kind = (value.sub_type or gguf.GGUFValueType.get_type(content[0])).name
    short = {"UINT": "u", "INT": "i", "FLOAT": "f"}
    digits = kind.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    kind = short.get(kind.removesuffix(digits), kind.lower()) + digits
    return kind, shown(kind, content)


def shown(kind: str, content: Any) -> Any:
    """A value as it is stored: f32 rounded, long arrays as their number and digest."""
    if isinstance(content, list):
        values = [shown(kind, item) for item in content]
        return (
            values
            if len(values) <= LONG
            else {"count": len(values), "sha256": sha256(json.dumps(values).encode()).hexdigest()}
        )
    if kind == "f32":
        return float(np.float32(content))
    return int(content) if kind[0] in "ui" else content


if __name__ == "__main__":
    print(json.dumps(dump(*sys.argv[1:])))
