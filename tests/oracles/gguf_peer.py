"""llama.cpp's converter and quantizer as they run here, and a comparison of two GGUF files.

The environment variable LLAMA_CPP names `vendor/llama.cpp` of the sdist of llama-cpp-python 0.3.36, which is installed
as a package too; torch, transformers and sentencepiece are there for the converter.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from shardq.files.gguf_read import GgufHeader, GgufTensor, read_gguf
from shardq.ggml import GGML

LLAMA_CPP: Final = os.environ.get("LLAMA_CPP", "")
FILE_TYPES: Final = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25,
    "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38,
}  # fmt: skip
THREADS: Final = 2
_CONVERT: Final = """
import sys
root, folder, out, *pre = sys.argv[1:]
sys.path.insert(0, root)
import convert_hf_to_gguf as converter
find = converter.get_model_class
def told(*words, **more):
    kind = find(*words, **more)
    if pre:
        kind.get_vocab_base_pre = lambda self, tokenizer: pre[0]
    return kind
converter.get_model_class = told
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", "bf16"]
converter.main()
"""


def why_absent() -> str | None:
    """What is missing here, or None."""
    from importlib.util import find_spec

    for package in ("llama_cpp", "torch", "transformers", "sentencepiece"):
        if find_spec(package) is None:
            return f"{package} is not installed here; `nox -s engine_llama_cpp` installs it"
    if not Path(LLAMA_CPP, "convert_hf_to_gguf.py").exists():
        return "LLAMA_CPP names no folder with convert_hf_to_gguf.py"
    return None


def convert(folder: Path, out: Path, pre: str | None = None) -> Path:
    """The checkpoint as one BF16 GGUF file; `pre` stands in for the pre-tokenizer's name."""
    command = [sys.executable, "-P", "-c", _CONVERT, LLAMA_CPP, str(folder), str(out), *([pre] if pre else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the converter: {done.stdout[-3000:]}")
    return out


def quantize(
    source: Path,
    out: Path,
    number: int,
    imatrix: Mapping[str, NDArray[np.float32]] | None = None,
    pure: bool = False,
    output_type: str | None = None,
    embedding_type: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
    requantize: bool = False,
) -> Path:
    """`llama_model_quantize`: `number` of the file type, divided vectors of importance by tensor, (regular expression,
    type) pairs. Unlike llama-quantize it writes no keys about an imatrix. Raises RuntimeError."""
    import llama_cpp as peer
    from llama_cpp._logger import llama_log_callback

    lines: list[str] = []

    @peer.llama_log_callback  # type: ignore[untyped-decorator, unused-ignore]
    def log(level: int, text: bytes, data: Any) -> None:
        lines.append(text.decode(errors="replace"))

    peer.llama_log_set(log, ctypes.c_void_p(0))
    parameters = peer.llama_model_quantize_default_params()
    parameters.nthread, parameters.ftype, parameters.pure = THREADS, number, pure
    parameters.allow_requantize = requantize
    if output_type:
        parameters.output_tensor_type = GGML[output_type].id
    if embedding_type:
        parameters.token_embedding_type = GGML[embedding_type].id
    if overrides:
        rows = [(pattern.encode(), GGML[kind].id) for pattern, kind in overrides]
        parameters.tt_overrides = (peer.llama_model_tensor_override * (len(rows) + 1))(*rows)
    if imatrix:
        vectors = {name: np.ascontiguousarray(values, np.float32) for name, values in imatrix.items()}
        pointer = ctypes.POINTER(ctypes.c_float)
        entries = [(name.encode(), v.ctypes.data_as(pointer), v.size) for name, v in vectors.items()]
        parameters.imatrix = (peer.llama_model_imatrix_data * (len(entries) + 1))(*entries)
    failed = peer.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    peer.llama_log_set(llama_log_callback, ctypes.c_void_p(0))
    if failed:
        raise RuntimeError("".join(lines)[-600:])
    return out


def types(path: Path) -> dict[str, str]:
    """The types of a file's tensors, in order."""
    return {tensor.name: tensor.type for tensor in read_gguf(path).tensors}


def differences(ours: Path, theirs: Path) -> list[str]:
    """Empty where the files are equal byte for byte; else what differs, in words."""
    one, two = ours.read_bytes(), theirs.read_bytes()
    if one == two:
        return []
    a, b = read_gguf(ours), read_gguf(theirs)
    found = _pairs(a, b)
    mine, other = ({t.name: t for t in header.tensors} for header in (a, b))
    found += [f"tensor {name}: in one file alone" for name in mine.keys() ^ other.keys()]
    if list(mine) != list(other):
        found.append("the order of tensors")
    for name in mine.keys() & other.keys():
        found += _tensor(mine[name], one, other[name], two)
    return sorted(found) or [f"other bytes: {len(one)} against {len(two)} in all"]


def _pairs(a: GgufHeader, b: GgufHeader) -> list[str]:
    found = [
        f"key {key}: {str(a.pairs.get(key))[:200]} against {str(b.pairs.get(key))[:200]}"
        for key in sorted(a.pairs.keys() | b.pairs.keys())
        if a.pairs.get(key) != b.pairs.get(key)
    ]
    return found or (["the order of keys"] if list(a.pairs) != list(b.pairs) else [])


def _tensor(a: GgufTensor, one: bytes, b: GgufTensor, two: bytes) -> list[str]:
    if (a.type, a.shape) != (b.type, b.shape):
        return [f"tensor {a.name}: {a.type} {list(a.shape)} against {b.type} {list(b.shape)}"]
    x = np.frombuffer(one[a.begin : a.end], np.uint8)
    y = np.frombuffer(two[b.begin : b.end], np.uint8)
    if np.array_equal(x, y):
        return []
    kind = GGML[a.type]
    blocks = (x != y).reshape(-1, kind.block_bytes).any(axis=1)
    return [f"tensor {a.name}: {a.type}, {int(blocks.sum())} of {blocks.size} blocks, first {int(blocks.argmax())}"]


def perplexity(path: Path, text: str, context: int = 256) -> float:
    """Of the text's first `context` tokens under a file's model. Raises ValueError where it does not load."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=context, n_batch=context, n_threads=THREADS, logits_all=True, verbose=False)
    tokens = model.tokenize(text.encode(), add_bos=False)[:context]
    model.eval(tokens)
    logits = np.asarray(model.scores[: len(tokens) - 1], np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(shifted)), tokens[1:]] - np.log(np.exp(shifted).sum(axis=1))
    model.close()
    return float(np.exp(-chosen.mean()))
