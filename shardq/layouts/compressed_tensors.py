"""compressed-tensors layout, for vLLM, SGLang and transformers (compressed-tensors 0.20, vLLM 0.32, transformers 5.23).

One format for each kind of scheme, named in the configuration; see `format_of`. Integers are a dense little-endian bit
stream of codes (0 to 2^b - 1) along the columns, except for 8 bits with 8-bit activations, which are plain int8.
Scales have the weight's own type, but those that are small floats themselves: see small_floats.py. A symmetric scheme
has no zero point tensor: vLLM cannot load one.

Smaller integers stay packed beside 8-bit activations, although the library would choose plain int8 by itself: that is
where vLLM 0.32 looks for W4A8 and W4AFP8. Where activations are calibrated, each matrix has a scale of them (see
input_scales.py), which the library and vLLM leave uninitialized where it is missing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from shardq.families import load_families
from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.layouts.input_scales import input_outputs, pack_input, unpack_input
from shardq.layouts.small_floats import float_outputs, pack_floats, unpack_floats
from shardq.layouts.templates import module_regexes
from shardq.roles import Role
from shardq.schemes import ACTIVATIONS, ALL_TOKENS, PLAIN_SCALES, PRESETS, WEIGHT_TYPE, WHOLE_ROW, Scheme
from shardq.stacks import expert_prefix

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized

QUANT_METHOD: Final = "compressed-tensors"
FORMAT_VERSION: Final = "0.20.0"
PACKED, INT8, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
ELEMENTS: Final = {"e8m0": ("e2m1", "e2m3", "e4m3fn"), "e4m3fn": ("e2m1",)}  # by the format of their scales
SHAPES: Final = {"e8m0": (32, "group"), "e4m3fn": (16, "fused")}  # group size and reach that the formats stand for
SCALE_DTYPES: Final = {"e8m0": "torch.uint8", "e4m3fn": "torch.float8_e4m3fn"}
MIXED: Final = "mixed-precision"
LOCAL: Final = "local"  # scales of groups are computed for each token, below one that is not
STRATEGIES: Final = {WHOLE_ROW: "token", ALL_TOKENS: "tensor"}  # by group size of activations; else there are groups
TIED_HEAD: Final = "re:.*lm_head$"


class CompressedTensors(LayoutDefaults):
    """quant_method compressed-tensors. Members as in Layout."""

    name = "compressed-tensors"
    aliases = ("compressed_tensors", "llm_compressor", "llmcompressor")
    summary = "compressed-tensors: packed integers, int8, fp8, MX, fp4"
    loaders = "vLLM, SGLang, transformers with compressed-tensors (asymmetric integers: with dequantize=True only)"
    slab_rows = 32

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        return replace(
            scheme,
            numbers="compressed_tensors",
            scale=WEIGHT_TYPE if scheme.scale in PLAIN_SCALES else scheme.scale,
            exponent="even" if scheme.scale == "e8m0" else "",
        )

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        del default, rows
        if format_of(scheme) is None:
            return Refusal(f"has no format for {scheme.name}", ragged=False)
        a = ACTIVATIONS[scheme.activation] if scheme.activation else None
        if a and a.exponent:
            return Refusal(f"cannot say how scales of activations are rounded, as {scheme.name} does", ragged=False)
        if scheme.group_rows == 1 and columns % scheme.group_columns(columns):
            return Refusal(f"group size {scheme.group_size} does not divide {columns} columns", ragged=True)
        if scheme.group_size > columns and scheme.group_rows == 1:
            return Refusal(f"group size {scheme.group_size} is more than {columns} columns", ragged=True)
        return None

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        return *_weight_outputs(scheme, dtype, rows, columns), *input_outputs(scheme, dtype)

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        import numpy as np

        from shardq.layouts.stored import store

        pack_input(part, out)
        if scheme.scale != WEIGHT_TYPE:
            pack_floats(part, row, out, scheme, kernels)
            return
        rows = len(part.codes)
        lines = slice(row, row + rows)
        if "weight_packed" in out:
            target = out["weight_packed"][lines]
            words = np.empty((rows, -(-part.codes.shape[1] * scheme.bits // 32)), np.uint32)
            kernels.pack_bits(part.codes, scheme.bits, words)
            target[:] = words.view(target.dtype)
        elif scheme.format.is_integer:
            out["weight"][lines] = (part.codes ^ 0x80).view(np.int8)
        else:
            out["weight"][lines] = part.codes
        scales = out["weight_scale"]
        first = row // scheme.group_rows
        kept = part.scales[:: scheme.group_rows]
        if scheme.reach == "tensor":
            scales[:] = store(part.scales[0, :1], scales.dtype)  # size 0 but in the first slab
        else:
            scales[first : first + len(kept)] = store(kept, scales.dtype)
        if "weight_zero_point" in out:
            assert part.zeros is not None
            packed = np.empty((part.zeros.shape[1], -(-rows * scheme.bits // 32)), np.uint32)
            kernels.pack_bits(np.ascontiguousarray(part.zeros.T), scheme.bits, packed)
            at = row * scheme.bits // 32
            out["weight_zero_point"].view(np.uint32)[at : at + packed.shape[1]] = packed.T

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        import numpy as np

        from shardq.layouts.stored import load
        from shardq.quantizers.quantized import Quantized

        if scheme.scale != WEIGHT_TYPE:
            return replace(unpack_floats(arrays, scheme, kernels), input_scale=unpack_input(arrays))
        scales = load(arrays["weight_scale"])
        if "weight_packed" in arrays:
            packed = arrays["weight_packed"]
            rows = len(packed)
            codes = np.empty((rows, int(arrays["weight_shape"][1])), np.uint8)
            kernels.unpack_bits(np.ascontiguousarray(packed).view(np.uint32), scheme.bits, codes)
        else:
            codes = arrays["weight"].view(np.uint8) ^ np.uint8(0x80 if scheme.format.is_integer else 0)
            rows = len(codes)
        zeros = None
        if "weight_zero_point" in arrays:
            words = np.ascontiguousarray(arrays["weight_zero_point"].view(np.uint32).T)
            lanes = np.empty((len(words), rows), np.uint8)
            kernels.unpack_bits(words, scheme.bits, lanes)
            zeros = np.ascontiguousarray(lanes.T)
        if scheme.reach == "tensor":
            scales = np.full((rows, 1), scales[0], np.float32)
        scales = np.ascontiguousarray(scales.repeat(scheme.group_rows, axis=0)[:rows])
        return Quantized(codes, scales, zeros, input_scale=unpack_input(arrays))

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout. The default scheme's group aims at every Linear, the others at names; what is kept is ignored by
        its full name."""
        others: dict[Scheme, list[str]] = {}
        for c in choices:
            if c.scheme is not None and c.scheme != default:
                others.setdefault(c.scheme, []).append(c.module)
        everything = [c.module for c in choices]
        # A head is no "Linear" to vLLM: it has to be named.
        heads = [c.module for c in choices if c.scheme == default and c.role == "head"]
        named = [f"re:{r}" for r in module_regexes(heads, everything)]
        found = [
            _group(scheme, [f"re:{r}" for r in module_regexes(modules, everything)])
            for scheme, modules in others.items()
        ]
        found.append(_group(default, ("Linear", *named)))  # the last: some readers take the first group that matches
        groups = {f"group_{number}": group for number, group in enumerate(found)}
        formats = {g["format"] for g in groups.values()}
        return {
            "quant_method": QUANT_METHOD,
            "version": FORMAT_VERSION,
            "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": _ignored(choices),
            "kv_cache_scheme": None,
            "quantizer": f"shardq:{version}",
        }

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        if any(re.match(i[3:], module) if i.startswith("re:") else i == module for i in config["ignore"]):
            return None
        found = None
        for group in config["config_groups"].values():
            for target in group["targets"]:
                if target.startswith("re:") and re.match(target[3:], module):
                    return _scheme(group)
                if target == "Linear":
                    found = _scheme(group)
        return found


def _weight_outputs(scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
    """All that `outputs` gives but a scale of activations."""
    kind, groups, bits = format_of(scheme), scheme.groups(columns), scheme.bits
    if kind == PACKED:
        specs: tuple[OutSpec, ...] = (
            OutSpec("weight_packed", "I32", (rows, -(-columns * bits // 32)), slab_axis=0),
            OutSpec("weight_scale", dtype, (rows, groups), slab_axis=0),
            OutSpec("weight_shape", "I64", (2,), slab_axis=None, values=(rows, columns)),
        )
        if not scheme.symmetric:
            shape = (-(-rows * bits // 32), groups)
            specs += (OutSpec("weight_zero_point", "I32", shape, slab_axis=0, per_rows=(bits, 32)),)
        return specs
    if kind not in (INT8, FLOAT8):
        return float_outputs(scheme, rows, columns)
    weight = OutSpec("weight", "I8" if kind == INT8 else "F8_E4M3", (rows, columns), slab_axis=0)
    if scheme.reach == "tensor":
        return weight, OutSpec("weight_scale", dtype, (1,), slab_axis=None)
    scales = (-(-rows // scheme.group_rows), groups)
    return weight, OutSpec("weight_scale", dtype, scales, slab_axis=0, per_rows=(1, scheme.group_rows))


def _ignored(choices: Sequence[ModuleChoice]) -> list[str]:
    """Kept modules by name, and all below kept stacks of experts: vLLM 0.32 looks for the name of each expert's matrix.
    A tied head has no tensor, but is a Linear of the model: readers would quantize it."""
    kept = [c.module for c in choices if c.scheme is None]
    quantized = "\n".join(c.module for c in choices if c.scheme is not None)
    stacks = (c.module for c in choices if c.scheme is None and c.role == Role.EXPERT_STACK)
    below = dict.fromkeys(_experts_of(stack, quantized) for stack in stacks)
    return [*kept, *below] if any(c.role == "head" for c in choices) else [*kept, *below, TIED_HEAD]


def _experts_of(stack: str, quantized: str) -> str:
    """An expression for the names of a stack's experts. It begins at the number of the layer, for engines rename what
    stands before; but with the whole name where it would take a module among the lines of `quantized`."""
    split = load_families().experts.split(f"{stack}.weight")
    prefix = expert_prefix(split[0] if split else stack)
    segments = prefix.split(".")
    layer = next((n for n, s in enumerate(segments) if s.isdecimal()), 0)
    end = ".".join(segments[layer:])
    if layer and f".{end}." not in quantized:
        return rf"re:.*\.{re.escape(end)}\."
    return rf"re:^{re.escape(prefix)}\."


def format_of(scheme: Scheme) -> str | None:
    """The library's name for how such a weight lies on the disk; None where it has none."""
    if scheme.element in ELEMENTS.get(scheme.scale, ()):
        shape = (scheme.group_rows, scheme.group_size, scheme.reach)
        named = shape == (1, *SHAPES[scheme.scale])
        return f"{scheme.stem.lower()}-{'' if scheme.bits == 8 else 'pack-'}quantized" if named else None
    if scheme.scale not in PLAIN_SCALES or (scheme.activation and not scheme.symmetric):
        return None
    if scheme.format.is_integer:
        return INT8 if scheme.activation and scheme.bits == 8 else PACKED
    return FLOAT8 if scheme.element == "e4m3fn" else None


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.format.is_integer else "float",
        "symmetric": scheme.symmetric,
        "strategy": _strategy(scheme),
        "dynamic": False,
    }
    if scheme.group_size != WHOLE_ROW and scheme.group_rows == 1:
        weights["group_size"] = scheme.group_size
    if scheme.group_rows > 1:
        weights["block_structure"] = [scheme.group_rows, scheme.group_size]
    if scheme.scale in SCALE_DTYPES:
        weights["scale_dtype"] = SCALE_DTYPES[scheme.scale]
    return {
        "targets": list(targets),
        "format": format_of(scheme),
        "weights": weights,
        "input_activations": _activation(scheme.activation),
        "output_activations": None,
    }


def _strategy(scheme: Scheme) -> str:
    if scheme.group_rows > 1:
        return "block"
    if scheme.reach != "group":
        return "tensor" if scheme.reach == "tensor" else "tensor_group"
    return "channel" if scheme.group_size == WHOLE_ROW else "group"


def _activation(name: str) -> dict[str, Any] | None:
    if not name:
        return None
    a = ACTIVATIONS[name]
    declared: dict[str, Any] = {
        "num_bits": a.bits,
        "type": "float" if a.floating else "int",
        "symmetric": True,
        "strategy": STRATEGIES.get(a.group_size, "tensor_group" if a.calibrated else "group"),
        "dynamic": True,
    }
    if a.group_size not in STRATEGIES:
        declared["group_size"] = a.group_size
    if a.calibrated:
        declared["dynamic"] = False if a.group_size == ALL_TOKENS else LOCAL
    if a.scale in SCALE_DTYPES:
        declared["scale_dtype"] = SCALE_DTYPES[a.scale]
    return declared


def _scheme(group: Mapping[str, Any]) -> Scheme:
    """The scheme that a group of a configuration stands for: the one that makes this group."""
    weights, inputs = group["weights"], group.get("input_activations")
    layout = CompressedTensors()
    for preset in PRESETS.values():
        scheme = layout.settle(preset.scheme)
        if _group(scheme, group["targets"]) == group:
            return scheme
    size = weights.get("group_size", WHOLE_ROW)
    activation = next((a for a in ACTIVATIONS if inputs and _activation(a) == inputs), "")
    return layout.settle(Scheme(f"int{weights['num_bits']}", size, bool(weights["symmetric"]), activation=activation))


LAYOUTS: Final = (CompressedTensors(),)
