"""Stacks of experts among weights: a matrix for each expert in their place, or each slice of those that readers want as
stacks."""

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import replace

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.dequantize.base import Encoded
from shardq.dequantize.plain import plain_slices
from shardq.layouts.base import Place
from shardq.stacks import ExpertStack, find_stacks
from shardq.weights import Absorbed, Weights, add_weight


def split_stacks(
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorRef],
    absorbed: Mapping[str, Absorbed],
    wanted: Container[str],
    halves: bool,
) -> Weights:
    """Weights with the matrices of experts in place of the `wanted` stacks; `halves` as find_stacks has it. Raises
    UnsupportedSource."""
    others = (t for t in tensors.values() if t.name in wanted or len(t.shape or ()) < 3)
    stacks = {s.tensor: s for s in find_stacks(others, checkpoint.config, halves=halves) if s.tensor in wanted}
    biases = {s.bias: s for s in stacks.values() if s.bias}
    made: dict[str, TensorRef] = {}
    places: dict[str, Place] = {}
    prefixes = {s.tensor: s.prefix for s in stacks.values() if s.experts is not None}
    gone = {n: replace(a, into=prefixes.get(a.into, a.into)) for n, a in absorbed.items()}
    for t in tensors.values():
        stack = stacks.get(t.name) or biases.get(t.name)
        if stack is None or stack.experts is None:
            add_weight(made, t)
            continue
        if t.name in checkpoint.tensors:
            gone[t.name] = Absorbed("split", stack.prefix, stack.row)
        if stack.emit == "stacked":
            places |= _places(stack)
        for m in _pieces(t, stack):
            add_weight(made, m)
    return Weights(made, gone, places, tuple(s for s in stacks.values() if s.experts is not None))


def _pieces(t: TensorRef, stack: ExpertStack) -> Iterable[TensorRef]:
    if t.name == stack.bias:
        return _bias_pieces(t, stack)
    return _whole_slices(t, stack) if stack.emit == "stacked" else _matrices(t, stack)


def _matrices(t: TensorRef, stack: ExpertStack) -> Iterator[TensorRef]:
    slices = t.encoded or plain_slices(t)
    for m in stack.matrices():
        e = slices[m.expert]
        e = e.turned() if m.transposed else e
        yield _matrix(m.name, t, e if m.lines == range(e.rows) else e.picked(m.lines.start, m.lines.stop, m.lines.step))


def _whole_slices(t: TensorRef, stack: ExpertStack) -> Iterator[TensorRef]:
    """Slices that go back into a stack: gate and up stay as they are."""
    for index, e in enumerate(t.encoded or plain_slices(t)):
        yield _matrix(f"{slice_module(stack, index)}.weight", t, e.turned() if stack.transposed else e)


def _bias_pieces(t: TensorRef, stack: ExpertStack) -> Iterator[TensorRef]:
    if stack.emit == "stacked":
        yield t
        return
    slices = plain_slices(t)
    for b in stack.biases():
        piece = _matrix(b.name, t, slices[b.expert].picked(b.lines.start, b.lines.stop, b.lines.step))
        yield replace(piece, shape=(len(b.lines),))


def _matrix(name: str, t: TensorRef, e: Encoded) -> TensorRef:
    """One matrix of a stack: encoded, or consecutive bytes that are its rows as they are."""
    e = replace(e, name=name, index=None)
    begin, end = e.codes_extent(0, e.rows)
    plain = not t.encoded and not e.is_strided and (e.pick is None or e.pick[2] == 1)
    return TensorRef(name, t.shard, e.dtype, (e.rows, e.columns), begin, end, () if plain else (e,))


def _places(stack: ExpertStack) -> dict[str, Place]:
    count = stack.experts or 0
    module = stack.weight.removesuffix(".weight")
    return {slice_module(stack, index): Place(module, index, count) for index in range(count)}


def slice_module(stack: ExpertStack, index: int) -> str:
    """What a slice is called that goes back into a stack."""
    return f"{stack.weight.removesuffix('.weight')}.{index}"
