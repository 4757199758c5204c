"""Plain weights: what `shardq dequantize` writes. It holds no scheme, and its loaders find nothing in config.json."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from shardq.errors import LayoutRefuses
from shardq.layouts import PLAIN_LAYOUT
from shardq.layouts.base import LayoutDefaults, ModuleChoice, OutSpec, Refusal
from shardq.schemes import Scheme

if TYPE_CHECKING:
    from shardq.kernels import KernelSet
    from shardq.layouts.base import Arrays
    from shardq.quantizers.quantized import Quantized


class Plain(LayoutDefaults):
    """Nothing is quantized. Members as in Layout."""

    name = PLAIN_LAYOUT
    reason = "holds no quantized weights: it is what `shardq dequantize` writes"
    aliases: tuple[str, ...] = ()
    summary = "weights as they are, none of them quantized"
    loaders = "whatever loads the unquantized model"
    slab_rows = 1
    fuses = False
    config_key = ""

    def settle(self, scheme: Scheme) -> Scheme:
        """See Layout. Raises LayoutRefuses: there is nothing that could be settled."""
        raise LayoutRefuses(f"layout {self.name} {self.reason}; {scheme.name} needs another --format")

    def refuse(self, scheme: Scheme, default: Scheme, rows: int, columns: int) -> Refusal | None:
        """See Layout."""
        del scheme, default, rows, columns
        return Refusal(self.reason, ragged=False)

    def outputs(self, scheme: Scheme, dtype: str, rows: int, columns: int) -> tuple[OutSpec, ...]:
        """See Layout."""
        del scheme, dtype, rows, columns
        raise LayoutRefuses(f"layout {self.name} {self.reason}")

    def pack(self, part: "Quantized", row: int, out: "Arrays", scheme: Scheme, kernels: "KernelSet") -> None:
        """See Layout."""
        del part, row, out, scheme, kernels
        raise LayoutRefuses(f"layout {self.name} {self.reason}")

    def unpack(self, arrays: "Arrays", scheme: Scheme, kernels: "KernelSet") -> "Quantized":
        """See Layout."""
        del arrays, scheme, kernels
        raise LayoutRefuses(f"layout {self.name} {self.reason}")

    def config_block(self, default: Scheme, choices: Sequence[ModuleChoice], version: str) -> dict[str, Any]:
        """See Layout."""
        del default, choices, version
        return {}

    def config_keys(self, block: Mapping[str, Any]) -> Mapping[str, Any]:
        """See Layout."""
        del block
        return {}

    def scheme_of(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """See Layout."""
        del config, module
        return None


LAYOUTS: Final = (Plain(),)
