"""Writes hashes.json with ggml's own functions: make_golden_blocks.py PATH_OF_LIBGGML_BASE. See PROVENANCE.md."""

import ctypes
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from block_data import IMPORTANCES, KINDS, importance

IDS = {
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39,
}  # fmt: skip


def main(library: str) -> None:
    """One hash per format and kind of weights, over the bytes for each importance in turn."""
    ggml = ctypes.CDLL(library)
    ggml.ggml_quantize_chunk.restype = ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    hashes: dict[str, dict[str, str]] = {}
    for name, number in IDS.items():
        for kind, make in KINDS.items():
            x, digest = np.ascontiguousarray(make()), hashlib.sha256()
            for which in IMPORTANCES:
                out = np.zeros((len(x), ggml.ggml_row_size(number, x.shape[1])), np.uint8)
                weights = importance(which)
                where = None if weights is None else weights.ctypes.data
                ggml.ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, *x.shape, where)
                digest.update(out.tobytes())
            hashes.setdefault(name, {})[kind] = digest.hexdigest()
    Path(__file__).with_name("hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
