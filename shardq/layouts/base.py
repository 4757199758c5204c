"""What a layout is: names and bytes on disk for the canonical result of a quantizer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from shardq.schemes import Scheme

if TYPE_CHECKING:  # planning needs no arrays, and numpy takes a tenth of a second to load
    from numpy.typing import NDArray

    from shardq.kernels import KernelSet
    from shardq.quantizers.quantized import Quantized

    Arrays = Mapping[str, NDArray[Any]]  # suffix -> array of the slab


@dataclass(frozen=True, slots=True)
class OutSpec:
    """One tensor that a layout writes for a module, named `<module>.<suffix>`."""

    suffix: str
    dtype: str  # safetensors tag
    shape: tuple[int, ...]  # of the whole tensor
    slab_axis: Literal[0, 1] | None  # axis along the weight's rows; None: written once, with the first slab
    per_rows: tuple[int, int] = (1, 1)  # so many indices of that axis stand for so many rows of the weight
    values: tuple[int, ...] = ()  # its content, where shapes alone decide it; `pack` leaves it alone then

    def slab_range(self, row: int, end_row: int) -> tuple[int, int]:
        """Indices of the slab axis that hold weight rows `row` to `end_row`; a slab ends on a whole index, or with the
        weight, whose last index may stand for fewer rows."""
        assert self.slab_axis is not None
        indices, rows = self.per_rows
        return row * indices // rows, -(-end_row * indices // rows)

    def slab_shape(self, row: int, end_row: int) -> tuple[int, ...]:
        """Shape of what a slab writes of this tensor; (0,) when it is written with another slab."""
        if self.slab_axis is None:
            return self.shape if row == 0 else (0,)
        begin, end = self.slab_range(row, end_row)
        return (end - begin, *self.shape[1:]) if self.slab_axis == 0 else (self.shape[0], end - begin)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a layout cannot hold a tensor."""

    reason: str
    ragged: bool  # True: another group size may fit


@dataclass(frozen=True, slots=True)
class ModuleChoice:
    """What the plan decided for one module, as far as a config block tells it."""

    module: str
    role: str
    scheme: Scheme | None  # None: kept in source precision


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's tensors go when not under its own name: slice `index` of stacks of `count`, first axis."""

    module: str
    index: int
    count: int  # 0: no stack

    def stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor that holds one of this shape."""
        return (self.count, *shape) if self.count else shape

    def slice_of(self, begin: int, end: int) -> tuple[int, int]:
        """The part of these bytes that is this module's."""
        size = (end - begin) // max(1, self.count)
        return begin + self.index * size, begin + (self.index + 1) * size


class Layout(Protocol):
    """One way to lay a quantized module on disk. ADDING.md says how to write one."""

    @property
    def name(self) -> str:
        """Key of LAYOUTS, and what `--format` takes."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names that users know, and the quant_method of its config block."""

    @property
    def summary(self) -> str:
        """What it is, one line."""

    @property
    def loaders(self) -> str:
        """Who reads it, one line."""

    @property
    def slab_rows(self) -> int:
        """Slabs are cut at multiples of this many rows, and of the scheme's own."""

    def settle(self, scheme: Scheme) -> Scheme:
        """`scheme` with the arithmetic and the scale format of this layout's own library."""

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """Why this layout cannot hold a [rows, columns] weight under `scheme` beside `default`, or None."""

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """The tensors that a [rows, columns] weight of storage type `dtype` becomes."""

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """Write rows `row`.. of a slab into the slab's arrays."""

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """The inverse of pack, for whole tensors, or for the same rows of all of them."""

    def unpacks_to(self, scheme: Scheme) -> Scheme:
        """The scheme by which the result of `unpack` is to be read: `scheme`, except where codes are not kept."""

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """The `quantization_config` that the loaders read. Raises LayoutRefuses for what it cannot say."""

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """The scheme that a config block gives a module: what a loader would believe."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """`__metadata__` of the weight files."""

    @property
    def file_names(self) -> str:
        """What the names of weight files must match for its readers to find them, as a shell's pattern."""

    @property
    def library(self) -> str:
        """What the Hub calls the library that loads it, for the model card; empty: what the source's card says."""

    @property
    def also_roles(self) -> frozenset[str]:
        """Roles besides Linear whose matrices are quantized by default, as the layout's own library does."""

    @property
    def fuses(self) -> bool:
        """Its readers run some modules as one matrix (`fused.py`), which then need one scheme."""

    @property
    def halves_experts(self) -> bool:
        """Of a stack in which rows of gate and up take turns, its readers take the first half of the rows as they lie
        for gate_proj, the second for up_proj."""

    def places(self, modules: Sequence[str], config: Mapping[str, Any] | None) -> Mapping[str, Place]:
        """Those of the quantized modules that go into stacks, which its readers want."""

    @property
    def config_key(self) -> str:
        """The key of config.json under which the block of `config_block` stands."""

    def config_keys(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """What is set in config.json: key -> value."""

    def config_files(self, block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """Further JSON files that the loaders read: file name -> content."""


class LayoutDefaults:
    """What most layouts answer. Members as in Layout."""

    metadata: Mapping[str, str] = MappingProxyType({"format": "pt"})
    file_names: str = "*"
    library: str = ""
    also_roles: frozenset[str] = frozenset()
    fuses: bool = True
    halves_experts: bool = False
    config_key: str = "quantization_config"

    def unpacks_to(self, scheme: Scheme) -> Scheme:
        """See Layout."""
        return scheme

    def places(self, modules: Sequence[str], config: Mapping[str, Any] | None) -> Mapping[str, Place]:
        """See Layout."""
        del modules, config
        return {}

    def config_keys(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Layout."""
        return {self.config_key: block}

    def config_files(self, block: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """See Layout."""
        del block
        return {}


def unit_rows(layout: Layout, scheme: Scheme) -> int:
    """Rows of a slab are a multiple of this, so that neither a word nor a shared scale is cut."""
    return math.lcm(layout.slab_rows, max(1, scheme.group_rows))
