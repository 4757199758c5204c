import numpy as np
from numpy.typing import NDArray

from shardq.kernels.raw import Bytes, RawWeights

__version__: str

class NativeSet:
    @property
    def name(self) -> str: ...
    def widen(self, src: RawWeights, dtype: str, out: NDArray[np.float32]) -> None: ...
    def group_minmax(
        self, x: NDArray[np.float32], group: int, out_min: NDArray[np.float32], out_max: NDArray[np.float32]
    ) -> None: ...
    def rtn_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        symmetric: bool,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
    ) -> int: ...
    def rtn_error_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        symmetric: bool,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        stats: NDArray[np.float64],
    ) -> int: ...
    def pack_bits(self, codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint32]) -> None: ...
    def unpack_bits(self, words: NDArray[np.uint32], bits: int, out: NDArray[np.uint8]) -> None: ...
    def transpose_u32(self, src: NDArray[np.uint32], out: NDArray[np.uint32], row0: int) -> None: ...
    def pack_columns(self, codes: NDArray[np.uint8], bits: int, out: NDArray[np.uint32], row0: int) -> None: ...
    def split_words(self, words: NDArray[np.uint32], bits: int, out: NDArray[np.uint8]) -> None: ...
    def dequantize_int(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        group: int,
        out: NDArray[np.float32],
    ) -> None: ...
    def error_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8],
        group: int,
        stats: NDArray[np.float64],
    ) -> None: ...
    def group_absmax(self, src: RawWeights, dtype: str, group: int, out: NDArray[np.float32]) -> int: ...
    def group_range(
        self, src: RawWeights, dtype: str, group: int, out_min: NDArray[np.float32], out_max: NDArray[np.float32]
    ) -> int: ...
    def encode_scaled(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
    ) -> None: ...
    def encode_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        rule: str,
        codes: NDArray[np.uint8],
    ) -> None: ...
    def decode_scaled(
        self,
        codes: NDArray[np.uint8],
        element: str,
        scales: NDArray[np.float32],
        group: int,
        out: NDArray[np.float32],
    ) -> None: ...
    def decode_affine(
        self,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        group: int,
        rule: str,
        out: NDArray[np.float32],
    ) -> None: ...
    def error_scaled(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        group: int,
        stats: NDArray[np.float64],
    ) -> None: ...
    def error_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        group: int,
        rule: str,
        stats: NDArray[np.float64],
    ) -> None: ...
    def narrow_columns(self, src: NDArray[np.float32], out: NDArray[np.uint16], row0: int) -> None: ...
    def sum_errors(self, stats: NDArray[np.float64]) -> tuple[float, float, float, float, float, float]: ...
    def weigh_squares(
        self,
        src: RawWeights,
        dtype: str,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        out: NDArray[np.float64],
    ) -> None: ...
    def search_int(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        factors: NDArray[np.float32],
        signs: str,
        sweeps: int,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None: ...
    def center_groups(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        rule: str,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        out: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None: ...
    def center_ladder(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        importance: NDArray[np.float32] | None,
        spread: NDArray[np.float32],
        means: NDArray[np.float32],
        ladder: NDArray[np.float32],
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        chosen: NDArray[np.uint8],
        out: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> None: ...
    def search_affine(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        factors: NDArray[np.float32],
        rule: str,
        sweeps: int,
        scale: str,
        least: float,
        scales: NDArray[np.float32],
        offsets: NDArray[np.float32],
        losses: NDArray[np.float64],
    ) -> None: ...
    def search_ladder(
        self,
        src: RawWeights,
        dtype: str,
        element: str,
        group: int,
        importance: NDArray[np.float32] | None,
        objective: str,
        ladder: NDArray[np.float32],
        first: NDArray[np.uint8],
        last: NDArray[np.uint8],
        chosen: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> None: ...
    def search_grid(
        self,
        src: RawWeights,
        dtype: str,
        bits: int,
        group: int,
        importance: NDArray[np.float32] | None,
        factors: NDArray[np.float32],
        scales: NDArray[np.float32],
        codes: NDArray[np.uint8],
        losses: NDArray[np.float64],
    ) -> int: ...
    def quantize_blocks(
        self,
        src: RawWeights,
        dtype: str,
        block_type: str,
        importance: NDArray[np.float32] | None,
        out: NDArray[np.uint8],
    ) -> int: ...
    def dequantize_blocks(self, blocks: NDArray[np.uint8], block_type: str, out: NDArray[np.float32]) -> None: ...
    def error_values(
        self, src: RawWeights, dtype: str, values: NDArray[np.float32], group: int, stats: NDArray[np.float64]
    ) -> None: ...
    def checksum(self, data: Bytes) -> int: ...

def hash_blocks(states: list[NDArray[np.uint32]], data: list[memoryview]) -> None: ...
def native_sets() -> list[tuple[NativeSet, bool, str]]: ...
