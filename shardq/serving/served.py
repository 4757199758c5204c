"""A checkpoint as a server meets it: its modules as the headers have them, and what its configuration says of each."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from shardq.checkpoint import TensorRef
from shardq.final_config import final_values
from shardq.fused import fused_groups
from shardq.roles import Role, assign_roles
from shardq.serving.believed import Belief, Said, believe, group_of, method_of
from shardq.serving.cuts import Cut, cut_of
from shardq.version import VERSION

if TYPE_CHECKING:
    from shardq.plans import Plan

Tensor = tuple[str, tuple[int, ...]]  # dtype, shape
Parts = Mapping[str, Tensor]  # last part of a tensor's name -> tensor

GGUF: Final = "gguf"  # the method of files of llama.cpp
WHOLE_ROW: Final = -1
WHOLE_TENSOR: Final = 0
# Kept matrices that are Linear layers to a server. Embeddings, norms and convolutions are not.
LINEAR_ROLES: Final = frozenset(
    r.value
    for r in (Role.LINEAR, Role.SMALL, Role.NONTEXT, Role.OUTSIDE_BLOCK, Role.MTP, Role.ROUTER, Role.HEAD)
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stored:
    """How a quantized weight lies there."""

    kind: str  # int, fp8, mxfp4, mxfp6, mxfp8, mxint4, fp4 (with scales of 16 columns that are floats)
    bits: int
    group_columns: int  # columns of a scale; WHOLE_ROW, WHOLE_TENSOR
    group_rows: int  # rows of a scale, where blocks share it; else 1
    symmetric: bool
    activation: str  # of the configuration: "" for 16 bits, "dynamic", "static"

    @property
    def name(self) -> str:
        """Short name for messages: int4 g128, fp8 128x128."""
        if self.group_rows > 1:
            size = f" {self.group_rows}x{self.group_columns}"
        else:
            size = {WHOLE_ROW: " row", WHOLE_TENSOR: " tensor"}.get(self.group_columns, f" g{self.group_columns}")
        bits = self.bits if self.kind == "int" else ""
        activation = f" with {self.activation} activations" if self.activation else ""
        return f"{self.kind}{bits}{size}{'' if self.symmetric else ' asym'}{activation}"


@dataclass(frozen=True, slots=True)
class Module:
    """One matrix, or a stack of them."""

    name: str
    role: str
    rows: int  # of the matrix that it stands for
    columns: int
    stored: Stored | None  # None: in plain numbers
    believed: Belief
    tensor: str  # its weight or codes
    matrices: int  # 1, or those of a stack
    cut: Cut  # over several devices

    @property
    def weights(self) -> int:
        """Numbers that it stands for."""
        return self.matrices * self.rows * self.columns

    @property
    def segment(self) -> str:
        """Last segment of its name."""
        return self.name.rpartition(".")[2]

    @property
    def expert(self) -> bool:
        """One of the routed experts, or their stack."""
        return ".experts." in self.name or ".switch_mlp." in self.name


@dataclass(frozen=True)
class Served:
    """What judge needs, and no more: a plan and the output that it describes give the same."""

    config: Mapping[str, Any]
    block: Mapping[str, Any]  # quantization_config; empty where there is none
    method: str  # quant_method as believed.py spells it; "" where none is named
    tensors: Mapping[str, Tensor]
    modules: Mapping[str, Module]

    @cached_property
    def quantized(self) -> tuple[Module, ...]:
        """Modules that are not in plain numbers."""
        return tuple(m for m in self.modules.values() if m.stored)

    @cached_property
    def groups(self) -> tuple[tuple[Module, ...], ...]:
        """Fused groups of two and more modules."""
        found = dict.fromkeys(fused_groups(self.modules, self.config).values())
        return tuple(tuple(self.modules[m] for m in group) for group in found)

    @property
    def tied(self) -> bool:
        """The head is the embedding."""
        text = self.config.get("text_config")
        return bool(self.config.get("tie_word_embeddings", isinstance(text, dict) and text.get("tie_word_embeddings")))


def read_served(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Served:
    """From headers and config.json. Values of the configuration that have an unexpected type count as absent."""
    block = find_block(config)
    method = method_of(config, block)
    said = Said(block, method)
    refs = [TensorRef(n, "", d, s, 0, 0) for n, (d, s) in tensors.items()]
    roles = assign_roles(refs, config)
    modules: dict[str, Module] = {}
    for name, parts in _by_module(tensors).items():
        found = _matrix(name, parts, said)
        if found is None:
            continue
        leaf, stored, rows, columns = found
        role = roles[leaf].role.value
        if stored is None and role not in LINEAR_ROLES:
            continue
        belief = believe(said, name)
        matrices = math.prod(tensors[leaf][1][: -3 if leaf.endswith("_blocks") else -2])
        cut = cut_of(name.rpartition(".")[2], role)
        modules[name] = Module(name, role, rows, columns, stored, belief, leaf, matrices, cut)
    return Served(config, block, method, tensors, modules)


def served_of_plan(plan: "Plan") -> Served:
    """What the output of a plan will be. Empty of tensors when only an index is known, and for files of llama.cpp."""
    if plan.gguf:
        return Served({}, {}, GGUF, {}, {})
    block = plan.layout.config_block(plan.recipe.scheme, plan.choices(), VERSION)
    return read_served(
        {s.name: (s.dtype, s.shape) for f in plan.files for s in f.specs.values()}, final_values(plan, block)
    )


def find_block(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization_config, of the top or of a part; for MLX `quantization`."""
    for table in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in ("quantization_config", "quantization"):
            if isinstance(table.get(key), dict):
                found: Mapping[str, Any] = table[key]
                return found
    return {}


def _by_module(tensors: Mapping[str, Tensor]) -> Mapping[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        for suffix in ("_blocks", "_scales"):  # gpt-oss writes no dot
            if leaf.endswith(suffix):
                module, leaf = f"{module}.{leaf.removesuffix(suffix)}", suffix
        modules.setdefault(module, {})[leaf] = tensor
    return modules


def _matrix(name: str, parts: Parts, said: Said) -> tuple[str, Stored | None, int, int] | None:
    """Name of the tensor that tells the role, how it is stored, rows and columns; None for what is no matrix."""
    if "qweight" in parts and "scales" in parts and _flat(parts["qweight"], parts["scales"]):
        return f"{name}.qweight", *_from_qweight(name, parts, said)
    if "weight_packed" in parts and "weight_scale" in parts and len(parts["weight_packed"][1]) >= 2:
        return f"{name}.weight_packed", *_from_packed(name, parts, said)
    if "_blocks" in parts and "_scales" in parts and len(parts["_blocks"][1]) == 4:
        rows, groups = parts["_blocks"][1][1], parts["_blocks"][1][2]
        return f"{name}_blocks", Stored("mxfp4", 4, 32, 1, True, ""), rows, groups * 32
    dtype, shape = parts.get("weight", ("", ()))
    if len(shape) < 2:
        return None
    rows, columns = shape[-2:]
    if dtype == "U32" and "scales" in parts:
        return f"{name}.weight", *_from_mlx(name, parts, Said(said.block, "mlx"))
    if dtype in ("I8", "U8", "F8_E4M3", "F8_E5M2"):
        return f"{name}.weight", *_from_weight(name, parts, said)
    return (f"{name}.weight", None, rows, columns) if len(shape) == 2 else None


def _flat(*tensors: Tensor) -> bool:
    return all(len(shape) == 2 for _, shape in tensors)


def _from_qweight(name: str, parts: Parts, said: Said) -> tuple[Stored, int, int]:
    (_, (first, second)), (_, (groups, width)) = parts["qweight"], parts["scales"]
    own = group_of(said, name)
    symmetric = bool(own.get("sym", not own.get("zero_point", False)))
    if said.method == "awq" or second != width:  # GPTQ packs rows and keeps the columns, AWQ packs columns
        return Stored("int", 4, _share(first, groups, own.get("group_size")), 1, symmetric, ""), width, first
    bits = _count(own.get("bits"), 4)
    columns = parts["g_idx"][1][0] if "g_idx" in parts and parts["g_idx"][1] else first * 32 // bits
    return Stored("int", bits, _share(columns, groups, own.get("group_size")), 1, symmetric, ""), second, columns


def _from_packed(name: str, parts: Parts, said: Said) -> tuple[Stored, int, int]:
    dtype, (*_, rows, packed) = parts["weight_packed"]
    scale_dtype, scale_shape = parts["weight_scale"]
    own, activation = group_of(said, name), _activation(said, name)
    groups = scale_shape[-1] if len(scale_shape) >= 2 else 1
    if "weight_global_scale" in parts:
        return Stored("fp4", 4, 16, 1, True, activation), rows, packed * 2
    if scale_dtype in ("U8", "F8_E8M0"):
        size = _count(own.get("group_size"), 32)
        columns = groups * size
        bits = packed * 8 * (4 if dtype == "I32" else 1) // columns if columns else 4
        kind = "fp4" if size == 16 else f"mxint{bits}" if own.get("data_type") == "mx_int" else f"mxfp{bits}"
        return Stored(kind, bits, size, 1, True, activation), rows, columns
    bits = _count(own.get("num_bits"), 4)
    columns = packed * (32 if dtype == "I32" else 8) // bits
    declared = _count(own.get("group_size"), 0)
    if declared and groups > 1:
        columns = min(columns, groups * declared)  # the last word may be padded
    symmetric = "weight_zero_point" not in parts and bool(own.get("symmetric", True))
    return Stored("int", bits, _share(columns, groups, declared), 1, symmetric, activation), rows, columns


def _from_weight(name: str, parts: Parts, said: Said) -> tuple[Stored | None, int, int]:
    dtype, (*_, rows, columns) = parts["weight"]
    activation = _activation(said, name)
    scale = parts.get("weight_scale_inv") or parts.get("weight_scale") or parts.get("scale")
    if dtype == "U8" and "weight_scale_2" in parts:
        return Stored("fp4", 4, 16, 1, True, activation), rows, columns * 2
    if scale is None:
        return Stored("fp8" if dtype.startswith("F8") else "int", 8, WHOLE_TENSOR, 1, True, activation), rows, columns
    scale_dtype, shape = scale
    kind = "int" if dtype in ("I8", "U8") else "fp8"
    lines, groups = (shape[-2], shape[-1]) if len(shape) >= 2 else (shape[0] if shape else 1, 1)
    if kind == "fp8" and scale_dtype in ("U8", "F8_E8M0") and groups == -(-columns // 32):
        return Stored("mxfp8", 8, 32, 1, True, activation), rows, columns
    if lines == 1 and groups == 1 and rows > 1:
        return Stored(kind, 8, WHOLE_TENSOR, 1, True, activation), rows, columns
    if lines != rows:  # blocks, the last of which may be cut short
        tall, wide = _block_shape(said.block.get("weight_block_size") or group_of(said, name).get("block_structure"))
        return Stored(kind, 8, wide, tall, True, activation), rows, columns
    size = _share(columns, groups, group_of(said, name).get("group_size"))
    return Stored(kind, 8, size, 1, "weight_zero_point" not in parts, activation), rows, columns


def _from_mlx(name: str, parts: Parts, said: Said) -> tuple[Stored, int, int]:
    (_, (*_, rows, words)), (_, (*_, groups)) = parts["weight"], parts["scales"]
    own = group_of(said, name)
    size = _count(own.get("group_size"), 64)
    columns = groups * size
    bits = words * 32 // columns if columns else 4
    mode = str(own.get("mode", "affine"))
    if "biases" in parts:
        return Stored("int", bits, size, 1, False, ""), rows, columns
    return Stored(mode if mode.startswith(("mxfp", "nvfp")) else f"mxfp{bits}", bits, size, 1, True, ""), rows, columns


def _share(columns: int, groups: int, declared: object) -> int:
    """Columns of a scale. One scale for a row may be a group as wide as the row, if the configuration says so."""
    if groups <= 1:
        return columns if declared == columns else WHOLE_ROW
    return columns // groups


def _block_shape(value: object) -> tuple[int, int]:
    """Rows and columns of a block; 128 x 128 where nothing else is said."""
    tall, wide = value if isinstance(value, list) and len(value) == 2 else (None, None)
    return _count(tall, 128), _count(wide, 128)


def _count(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _activation(said: Said, name: str) -> str:
    """ "" for 16 bits, "dynamic" or "static" as the configuration says."""
    if said.method == "fp8":
        return "static" if said.block.get("activation_scheme") == "static" else "dynamic"
    declared = group_of(said, name).get("input_activations")
    if not isinstance(declared, dict):
        return ""
    return "static" if declared.get("dynamic") is False else "dynamic"


def tensors_of(refs: Iterable[TensorRef]) -> dict[str, Tensor]:
    """Headers of a checkpoint in the form that read_served wants; tensors whose shape is unknown are left out."""
    return {t.name: (t.dtype, t.shape) for t in refs if t.dtype is not None and t.shape is not None}
