"""What llama_model_quantize of a libllama makes of cases: the names and types of its tensors, in the file's order."""

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf_mixtures_made as made
import numpy as np

from shardq.files.gguf import GgufSpec, plan_gguf
from shardq.files.gguf_read import read_gguf
from shardq.ggml import GGML

UNSET = 43  # GGML_TYPE_COUNT


class Weights(ctypes.Structure):
    """llama_model_imatrix_data"""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class Override(ctypes.Structure):
    """llama_model_tensor_override"""

    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


class Parameters(ctypes.Structure):
    """llama_model_quantize_params"""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(Weights)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(Override)),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
SILENT = LOG(lambda _level, _text, _data: None)


def quantized(
    library: str, case: made.Case, runs: Iterable[made.Run]
) -> Iterator[tuple[made.Run, list[tuple[str, str]]]]:
    """Raises ValueError where the library refuses."""
    llama = ctypes.CDLL(library)
    llama.llama_log_set(SILENT, None)
    llama.llama_model_quantize_default_params.restype = Parameters
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source.gguf"), Path(folder, "target.gguf")
        write(source, case)
        for run in runs:
            parameters, kept = settle(llama.llama_model_quantize_default_params(), case, run)
            if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
                raise ValueError(f"{run.name}: refused")
            del kept  # what the parameters point to lives until here
            yield run, [(tensor.name, tensor.type) for tensor in read_gguf(target).tensors]


def write(path: Path, case: made.Case) -> None:
    """The case as the converter writes it, all zeros, its tensors in the order of their names."""
    specs = [GgufSpec(t.name, t.type or "BF16", t.shape) for t in made.wanted(case, False)]
    plan = plan_gguf(made.pairs(case), specs)
    path.write_bytes(plan.header + bytes(plan.size_bytes - len(plan.header)))


def settle(parameters: Parameters, case: made.Case, run: made.Run) -> tuple[Parameters, list[object]]:
    """The parameters of a run, and what they point to."""
    options = run.options
    parameters.nthread = 1
    parameters.ftype = options.file_type.number
    parameters.output_tensor_type = type_id(options.output_type)
    parameters.token_embedding_type = type_id(options.embedding_type)
    parameters.allow_requantize = options.requantize
    parameters.pure = options.pure
    # llama-quantize lowers patterns before it gives them to the library
    rows = [(pattern.lower().encode(), type_id(kind)) for pattern, kind in options.overrides]
    overrides = (Override * (len(rows) + 1))(*rows, (None, UNSET))
    vectors = {t.name: np.ones(t.shape[0] * (*t.shape, 1, 1)[2], np.float32) for t in made.wanted(case, True)}
    pointers = [
        (name.encode(), vector.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), vector.size)
        for name, vector in vectors.items()
    ]
    weights = (Weights * (len(pointers) + 1))(*pointers, (None, None, 0))
    if rows:
        parameters.tt_overrides = overrides
    if run.weighed:
        parameters.imatrix = weights
    return parameters, [overrides, weights, vectors]


def type_id(name: str | None) -> int:
    return GGML[name.upper()].id if name else UNSET
