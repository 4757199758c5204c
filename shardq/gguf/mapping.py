"""Source tensors of a checkpoint -> tensors of a GGUF file, in the order of llama.cpp's converter."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

from shardq.errors import CheckpointIncomplete
from shardq.gguf.architectures import Architecture
from shardq.gguf.names import TensorNames, is_float, plain_name
from shardq.gguf.parameters import Parameters
from shardq.gguf.rules import Piece, whole
from shardq.gguf.tensors import OutputTensor, SourceTensor
from shardq.regrouping import Regrouping

EXPERT: Final = re.compile(r"((?:.*\.)?layers\.(\d+)\..*experts)\.(\d+)\.(\w+)\.weight")


def map_tensors(
    arch: Architecture, parameters: Parameters, sources: Iterable[SourceTensor]
) -> tuple[OutputTensor, ...]:
    """All tensors of the file for `sources`, in their order; a stack comes with the last of its experts.

    Raises UnsupportedSource for a tensor that the architecture has no place for, CheckpointIncomplete for experts that
    are not all there, MissingPackage without the gguf package.
    """
    named = list(_named(arch, parameters, sources))
    names = TensorNames(arch.name, arch.blocks(parameters, (name for _, name in named)))
    found = list(arch.computed(parameters))
    for piece in _pieces(arch, parameters, named):
        name = names.find(piece.name)
        kind = piece.type or ("F32" if is_float(name, piece.shape) else None)
        found.append(OutputTensor(name, piece.shape, kind, piece.parts, piece.added, piece.negative_exp))
    return tuple(sorted(found, key=lambda tensor: tensor.type != "MXFP4"))  # codes are written before all others


def find_inputs(
    arch: Architecture, parameters: Parameters, source: SourceTensor
) -> tuple[tuple[str, Regrouping | None], ...]:
    """The tensors of the file that multiply what a matrix of the source multiplies, each with the order in which it has
    the columns; none of those that are turned.

    Raises UnsupportedSource for a matrix that the architecture has no place for, MissingPackage without gguf.
    """
    made = (t for t in map_tensors(arch, parameters, (source,)) if t.parts and t.parts[0].source == source.name)
    return tuple((t.name, t.parts[0].column_order) for t in made if not t.parts[0].turned)


def _named(
    arch: Architecture, parameters: Parameters, sources: Iterable[SourceTensor]
) -> Iterator[tuple[SourceTensor, str]]:
    """What a file does not do without, under plain names."""
    for source in sources:
        name = plain_name(source.name)
        if name is not None:
            yield source, arch.further_name(name, parameters) if arch.further_name else name


def _pieces(arch: Architecture, parameters: Parameters, named: Iterable[tuple[SourceTensor, str]]) -> Iterator[Piece]:
    waiting: dict[str, dict[tuple[str, int], SourceTensor]] = defaultdict(dict)
    for source, name in named:
        pieces = _by_rule(arch, parameters, name, source)
        expert = EXPERT.fullmatch(name) if arch.expert_order else None
        if pieces is not None or expert is None:
            yield from (whole(name, source),) if pieces is None else pieces
            continue
        layer = waiting[expert[1]]
        layer[expert[4], int(expert[3])] = source
        count = arch.experts(parameters)
        if len(layer) == count * len(arch.expert_order):
            yield from _stacks(arch, expert[1], expert[2], count, layer)
            del waiting[expert[1]]
    for prefix, layer in waiting.items():
        raise CheckpointIncomplete(
            f"{prefix} has {len(layer)} tensors of experts, expected {arch.experts(parameters)} experts with "
            f"{', '.join(arch.expert_order)}"
        )


def _by_rule(arch: Architecture, parameters: Parameters, name: str, source: SourceTensor) -> tuple[Piece, ...] | None:
    """What the first rule that concerns a tensor makes of it; also of experts, as of layers that are left out."""
    found = (rule(name, source, parameters) for rule in arch.rules)
    return next((pieces for pieces in found if pieces is not None), None)


def _stacks(
    arch: Architecture, prefix: str, block: str, count: int, layer: dict[tuple[str, int], SourceTensor]
) -> Iterator[Piece]:
    base = arch.expert_base.format(block=block)
    for projection in arch.expert_order:
        own = [layer.get((projection, number)) for number in range(count)]
        present = [source for source in own if source is not None]
        if len(present) < count or len({source.shape for source in present}) != 1:
            raise CheckpointIncomplete(
                f"{prefix}: {projection} is there for {len(present)} of {count} experts, in shapes "
                f"{sorted({source.shape for source in present})}; expected all, in one shape"
            )
        parts = tuple(part for source in present for part in whole(source.name, source).parts)
        yield Piece(f"{base}.{projection}.weight", (count, *present[0].shape), parts)
