"""MLX layout, for mlx-lm (mlx 0.32.4, mlx-lm 0.32.2): weight, scales, and biases of affine codes, beside each other.

Codes are a dense little-endian bit stream along the columns, in uint32 words. Affine: weight = scale * code + bias,
both in the weight's own type. mxfp4, mxfp8 and nvfp4: one byte of scale for a group (E8M0; e4m3), no biases. Experts
of a layer lie in one stack; see mlx_families. mlx-lm quantizes embeddings and the head too, and so does this layout;
routers, which it gives 8 bits, stay in source precision here.

The configuration names groups and bits once, and every module that differs: `false` for what is kept, which mlx-lm
would also see from the missing scales. Names are those of the modules inside mlx-lm.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Place, Refusal
from shardq.layouts.mlx_families import find_places, module_paths, reader_paths
from shardq.schemes import WEIGHT_TYPE, Exponent, Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

AFFINE: Final = "affine"
AFFINE_BITS: Final = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS: Final = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Mode:
    """A way of MLX to store floats: it has one group size and one scale format."""

    name: str
    element: str
    group_size: int
    scale: str


MODES: Final = (
    Mode("mxfp4", "e2m1", 32, "e8m0"),
    Mode("mxfp8", "e4m3fn", 32, "e8m0"),
    Mode("nvfp4", "e2m1", 16, "e4m3fn"),
)


class Mlx(LayoutDefaults):
    """What `mlx_lm.convert -q` writes. Members as in Layout."""

    name = "mlx"
    aliases = ("mlx-lm", "mlx_lm")
    summary = "MLX: affine integers of 2 to 6 and 8 bits, mxfp4, mxfp8, nvfp4; embeddings and head too"
    loaders = "mlx-lm"
    slab_rows = 32
    metadata = MappingProxyType({"format": "mlx"})
    file_names = "model*.safetensors"
    library = "mlx"
    also_roles = frozenset({"embedding", "head"})
    fuses = False

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout. Integers are affine, whether a scheme asks for symmetric ones or not; activations of the MX and
        NVFP4 schemes stay in 16 bits."""
        if scheme.format.is_integer:
            return replace(scheme, symmetric=False, numbers="mlx", scale=WEIGHT_TYPE)
        mode = _mode_of(scheme)
        return scheme if mode is None else _mode_scheme(mode)

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        del default, rows
        if scheme.group_size > 0 and scheme.group_rows == 1 and columns % scheme.group_size:
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=True)
        if scheme.format.is_integer and not scheme.activation:
            if scheme.bits not in AFFINE_BITS:
                return Refusal(f"holds integers of {_words(AFFINE_BITS)} bits, not {scheme.bits}", ragged=False)
            if scheme.group_size not in AFFINE_GROUPS:
                size = "whole rows" if scheme.group_size < 0 else str(scheme.group_size)
                return Refusal(f"holds groups of {_words(AFFINE_GROUPS)} columns, not {size}", ragged=False)
            return None
        if _mode_of(scheme) is None:
            return Refusal(f"holds affine integers, MXFP4, MXFP8 and NVFP4, not {scheme.name}", ragged=False)
        return None

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        weight = OutSpec("weight", "U32", (rows, columns * scheme.bits // 32), slab_axis=0)
        groups = (rows, scheme.groups(columns))
        if not scheme.format.is_integer:
            return weight, OutSpec("scales", "U8", groups, slab_axis=0)
        return weight, OutSpec("scales", dtype, groups, slab_axis=0), OutSpec("biases", dtype, groups, slab_axis=0)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        import numpy as np

        from shardq.layouts.stored import store

        lines = slice(row, row + len(part.codes))
        kernels.pack_bits(part.codes, scheme.bits, out["weight"][lines])
        if scheme.format.is_integer:
            assert part.biases is not None
            out["scales"][lines] = store(part.scales, out["scales"].dtype)
            out["biases"][lines] = store(part.biases, out["biases"].dtype)
        elif scheme.scale == "e8m0":
            out["scales"][lines] = store(part.scales, out["scales"].dtype)
        else:
            ones = np.ones((len(part.scales), 1), np.float32)
            kernels.encode_scaled(part.scales, "F32", scheme.scale, part.scales.shape[1], ones, out["scales"][lines])

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        import numpy as np

        from shardq.layouts.stored import load
        from shardq.quantizers.quantized import Quantized

        words, stored = np.ascontiguousarray(arrays["weight"]), np.ascontiguousarray(arrays["scales"])
        codes = np.empty((len(words), words.shape[1] * 32 // scheme.bits), np.uint8)
        kernels.unpack_bits(words, scheme.bits, codes)
        if scheme.format.is_integer:
            return Quantized(codes, load(stored), None, load(arrays["biases"]))
        if scheme.scale == "e8m0":
            return Quantized(codes, load(stored), None)
        scales = np.empty(stored.shape, np.float32)
        kernels.decode_scaled(stored, scheme.scale, np.ones((len(stored), 1), np.float32), stored.shape[1], scales)
        return Quantized(codes, scales, None)

    def places(self, modules: Sequence[str], config: Mapping[str, Any] | None) -> Mapping[str, Place]:
        """See Layout. Raises LayoutRefuses for a family that mlx-lm does not know or changes while it loads."""
        return find_places(modules, config)

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. Where mlx-lm may know a module by several names, an exception stands under each."""
        del version  # the library's own block has no room for it: every other key is a module
        block: dict[str, Any] = dict(_parameters(default))
        for c in choices:
            if c.scheme is None:
                block |= dict.fromkeys(module_paths(c.module), False)
            elif c.scheme != default:
                block |= dict.fromkeys(reader_paths(c.module), _parameters(c.scheme))
        return block

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        paths = (p for p in module_paths(module) if p in config)
        path = next(paths, None)
        found = config if path is None else config[path]
        return _scheme(found) if found else None

    def config_keys(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Layout. mlx-lm reads `quantization`; the Hub shows `quantization_config`."""
        return {"quantization": block, "quantization_config": block}


def _words(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def _mode_of(scheme: Scheme) -> Mode | None:
    if scheme.group_rows != 1:
        return None
    wanted = (scheme.element, scheme.group_size, scheme.scale)
    return next((m for m in MODES if (m.element, m.group_size, m.scale) == wanted), None)


def _mode_scheme(mode: Mode) -> Scheme:
    exponent: Exponent = "ceil" if mode.scale == "e8m0" else ""
    return Scheme(mode.element, mode.group_size, symmetric=True, scale=mode.scale, numbers="mlx", exponent=exponent)


def _parameters(scheme: Scheme) -> dict[str, Any]:
    """What the configuration says of a scheme, in the library's words."""
    mode = _mode_of(scheme)
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": mode.name if mode else AFFINE}


def _scheme(parameters: Mapping[str, Any]) -> Scheme:
    """The inverse of _parameters; a missing mode is affine."""
    name = parameters.get("mode", AFFINE)
    if name == AFFINE:
        return Mlx().settle(Scheme(f"int{parameters['bits']}", parameters["group_size"], symmetric=False))
    return _mode_scheme(next(m for m in MODES if m.name == name))


LAYOUTS: Final = (Mlx(),)
