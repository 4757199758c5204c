"""The table of readers: what each source kind of families.toml, and a slice of plain floats, needs to become rows."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from shardq.dequantize.awq import AwqWords
from shardq.dequantize.base import PLAIN, Reader
from shardq.dequantize.bnb4 import Bnb4
from shardq.dequantize.gptq import GptqWords
from shardq.dequantize.int_pack import IntPack
from shardq.dequantize.mlx import MlxWords
from shardq.dequantize.nibbles import NUMBERS, POWERS, Nibbles
from shardq.dequantize.plain import PlainFloats
from shardq.dequantize.scaled_bytes import SCB_STEP, ScaledBytes

GRID: Final = ScaledBytes()
MX4: Final = Nibbles(32, POWERS)
NV4: Final = Nibbles(16, NUMBERS)

KINDS: Final[Mapping[str, Reader]] = MappingProxyType(
    {
        "fp8_block": GRID,
        "fp8_block_ue8m0": GRID,
        "fp8_v4": GRID,
        "fp8_3d": GRID,
        "fp8_static": GRID,
        "fp8_channel": GRID,
        "mxfp8": ScaledBytes(columns_per_scale=32),
        "int8_channel": GRID,
        "bnb8": ScaledBytes(step=SCB_STEP),
        "mxfp4_ct": MX4,
        "mxfp6_ct": Nibbles(32, POWERS, "e2m3"),
        "mxfp4_gptoss": Nibbles(32, POWERS, blocks=True),
        "mxfp4_v4": MX4,
        "nvfp4_modelopt": NV4,
        "nvfp4_ct": NV4,
        "nvfp4_bare": NV4,
        "int_pack": IntPack(),
        "gptq": GptqWords(),
        "awq": AwqWords(),
        "bnb4": Bnb4(),
        "mlx": MlxWords(),
        PLAIN: PlainFloats(),
    }
)
