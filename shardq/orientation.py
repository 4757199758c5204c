"""Which axis of an expert's matrix are the outputs: inferred from all stacks of a layer and the sizes in the config."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardq.errors import UnsupportedSource
from shardq.families import StackRow, load_families


@dataclass(frozen=True, slots=True)
class Slice:
    """The two axes of a slice. `second` is None where codes are packed: then the first axis are the outputs."""

    first: int
    second: int | None

    def outputs(self, *, transposed: bool) -> int:
        """Outputs of the slice if it is [in, out], else of [out, in]."""
        return self.second if transposed and self.second is not None else self.first

    def inputs(self, *, transposed: bool) -> int | None:
        """Inputs likewise; None where they are packed."""
        return self.first if transposed else self.second


def find_orientation(row: StackRow, slices: Mapping[str, Slice], config: Mapping[str, Any] | None, where: str) -> bool:
    """True where the slices are [in, out], false where they are [out, in].

    Of a fused pair the shapes alone decide: gate_up [2I, H] with down [H, I], or [H, 2I] with [I, H], and not both.
    Separate matrices fit both ways; hidden and intermediate sizes of the config decide. Raises UnsupportedSource where
    neither or both orders fit.
    """
    if any(s.second is None for s in slices.values()):
        if row.fused and slices[row.members[0]].first % 2:
            raise UnsupportedSource(f"expert stack {where}: an odd number of gate and up rows")
        return False
    if row.orientation != "infer":
        return row.orientation == "io"
    fitting = [transposed for transposed in (False, True) if _fits(row, slices, transposed=transposed)]
    if len(fitting) == 2:
        hidden = _sizes(config, load_families().config.hidden_size)
        inner = _sizes(config, load_families().config.expert_size)
        fitting = [t for t in fitting if _agrees(row, slices, hidden, inner, transposed=t)] or fitting
    if len(fitting) != 1:
        shapes = ", ".join(f"{name} [.., {s.first}, {s.second}]" for name, s in slices.items())
        problem = "fit no expert" if not fitting else "fit as [out, in] and as [in, out]"
        raise UnsupportedSource(
            f"expert stack {where}: {shapes} {problem}, and the sizes in config.json do not decide; keep it with "
            "--ignore"
        )
    return fitting[0]


def _fits(row: StackRow, slices: Mapping[str, Slice], *, transposed: bool) -> bool:
    """Down reads as many values as each half of gate and up makes, and makes as many as they read."""
    down = slices[row.down]
    for name in row.members:
        if name == row.down:
            continue
        made = slices[name].outputs(transposed=transposed)
        halves = len(row.written[name])
        if made % halves or made // halves != down.inputs(transposed=transposed):
            return False
        if slices[name].inputs(transposed=transposed) != down.outputs(transposed=transposed):
            return False
    return True


def _agrees(
    row: StackRow, slices: Mapping[str, Slice], hidden: frozenset[int], inner: frozenset[int], *, transposed: bool
) -> bool:
    down = slices[row.down]
    made, read = down.outputs(transposed=transposed), down.inputs(transposed=transposed)
    return made in hidden and (not inner or read in inner)


def _sizes(config: Mapping[str, Any] | None, keys: frozenset[str]) -> frozenset[int]:
    return frozenset(_find_sizes(config or {}, keys))


def _find_sizes(table: Mapping[str, Any], keys: frozenset[str]) -> Iterator[int]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _find_sizes(value, keys)
        elif key in keys and isinstance(value, int):
            yield value
