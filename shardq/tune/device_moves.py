"""A block whose matrices lie on several devices. All else is computed on the first of them: what a matrix gets goes to
its device, and what it gives comes back, forth and back for gradients, too.

transformers leaves this to accelerate, which need not be there and knows no stack of experts that is cut.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from shardq.tune.device_plan import FILLED, LEARNED_BYTES, Atom, Lot, count_devices, plan_lots
from shardq.tune.inputs import is_cuttable, is_stacks
from shardq.tune.served import run_experts
from shardq.tune.subjects import Subject

PARTS: Final = "parts"  # of experts, in the module that has their place


@dataclass(frozen=True, slots=True)
class Devices:
    """Where blocks are computed."""

    places: tuple[torch.device, ...]  # the first has hidden states, and what is no matrix
    rooms_bytes: tuple[int, ...]  # of each, for matrices
    are_all_used: bool  # or only as many as a block needs
    learned: bool  # matrices that get codes have what SignRound learns beside them


def find_devices(places: Sequence[torch.device], *, named: bool, learned: bool, taken_bytes: int) -> Devices:
    """One or several, all of which are used if they were `named`; `taken_bytes`: of the first, by hidden states. Rooms
    are of all memory that a device has, so that the same devices get the same matrices in every run."""
    rooms = [0] * len(places)
    if len(places) > 1:
        rooms = [int(torch.cuda.get_device_properties(p).total_memory * FILLED) for p in places]
        rooms[0] -= taken_bytes
    return Devices(tuple(places), tuple(rooms), named, learned)


def lay_out(
    blocks: Sequence[nn.Module], of_blocks: Sequence[tuple[Subject, ...]], devices: Devices
) -> list[tuple[Subject, ...]]:
    """Move blocks that are in memory together to their devices; returns their matrices, at the places that they have
    then: those of a stack that is cut are others. Raises UnsupportedSource for experts of a form that is not known,
    where there are several devices."""
    pairs = list(zip(blocks, of_blocks, strict=True))
    lots = _plan(pairs, devices) if len(devices.places) > 1 else {}
    return [
        _lay_block(block, own, {name: of for (number, name), of in lots.items() if number == index}, devices.places)
        for index, (block, own) in enumerate(pairs)
    ]


def _plan(
    pairs: Sequence[tuple[nn.Module, tuple[Subject, ...]]], devices: Devices
) -> Mapping[tuple[int, str], tuple[Lot, ...]]:
    """What devices get of each module, by the number of its block and its name there."""
    atoms: list[Atom] = []
    for index, (block, own) in enumerate(pairs):
        learned = {s.place.parameter.rpartition(".")[0] for s in own if devices.learned}
        atoms += (replace(a, module=f"{index}.{a.module}") for a in _atoms(block, learned))
    needed = sum(a.size_bytes for a in atoms)
    count = len(devices.places) if devices.are_all_used else count_devices(needed, devices.rooms_bytes)
    lots = plan_lots(atoms, devices.rooms_bytes[:count])
    return {(int(number), name): of for full, of in lots.items() for number, _, name in [full.partition(".")]}


def _atoms(block: nn.Module, learned: set[str]) -> Iterator[Atom]:
    """In the order of the block."""
    for name, module in block.named_modules():
        own = list(module.parameters(recurse=False))
        each = max((p.element_size() for p in own), default=0) + (LEARNED_BYTES if name in learned else 0)
        size = sum(p.numel() for p in own) * each
        if is_stacks(module, name):
            experts = range(own[0].shape[0]) if is_cuttable(module) else [None]
            yield from (Atom(name, expert, size // len(experts)) for expert in experts)
        elif isinstance(module, nn.Linear) and name:
            yield Atom(name, None, size)


def _lay_block(
    block: nn.Module,
    subjects: tuple[Subject, ...],
    lots: Mapping[str, tuple[Lot, ...]],
    places: Sequence[torch.device],
) -> tuple[Subject, ...]:
    far = {name: places[of[0].device] for name, of in lots.items() if len(of) == 1 and of[0].device}
    cut = {name: of for name, of in lots.items() if len(of) > 1}
    for name, of in cut.items():
        parent, _, leaf = name.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, leaf, CutExperts(owner.get_submodule(leaf), name, of, places))
    there = {id(t) for name in cut for t in _tensors(block.get_submodule(name))}
    elsewhere = {id(t): place for name, place in far.items() for t in _tensors(block.get_submodule(name))}
    for t in (t for t in _tensors(block) if id(t) not in there):
        t.data = t.data.to(elsewhere.get(id(t), places[0]))
    for name, place in far.items():
        module = block.get_submodule(name)
        module.register_forward_pre_hook(partial(_bring, place), with_kwargs=True)
        module.register_forward_hook(partial(_give_back, places[0]))
    return tuple(_replaced(s, cut) for s in subjects)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bring(device: torch.device, _: nn.Module, args: Any, kwargs: Any) -> Any:
    return _moved(args, device), _moved(kwargs, device)


def _give_back(device: torch.device, _: nn.Module, args: Any, made: Any) -> Any:
    del args
    return _moved(made, device)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(v, device) for v in value)
    return {k: _moved(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def _replaced(s: Subject, cut: Mapping[str, tuple[Lot, ...]]) -> Subject:
    """A matrix at its place in the part of a stack that has its expert."""
    module, _, parameter = s.place.parameter.rpartition(".")
    expert = s.place.expert
    for number, lot in enumerate(cut.get(module, ())):
        if expert is not None and lot.experts and expert in lot.experts:
            inner = f"{module}.{PARTS}.{number}.{parameter}"
            return replace(s, place=replace(s.place, parameter=inner, expert=expert - lot.experts.start))
    return s


class CutExperts(nn.Module):
    """Experts in stacks, some of them on each device: each part gets all tokens, and is told of its own experts alone.
    What parts give is added up in their order."""

    def __init__(self, experts: nn.Module, name: str, lots: Sequence[Lot], places: Sequence[torch.device]) -> None:
        """The module `experts` is called `name` in its block."""
        super().__init__()
        self.num_experts = experts.num_experts
        self._first = places[0]
        self._own = [(lot.experts, places[lot.device]) for lot in lots if lot.experts is not None]
        of = enumerate(self._own)
        parts = [_part_of(experts, f"{name}.{PARTS}.{number}", own, device) for number, (own, device) in of]
        self.add_module(PARTS, nn.ModuleList(parts))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the whole module is called: hidden states, experts of each token, and what these count."""
        out: Tensor | None = None
        for part, (own, device) in zip(self.get_submodule(PARTS).children(), self._own, strict=True):
            change = partial(_told, own, device)
            made = part(*(change(v) for v in args), **{k: change(v) for k, v in kwargs.items()}).to(self._first)
            out = made if out is None else out + made
        assert out is not None
        return out


def _told(own: range, device: torch.device, value: Any) -> Any:
    """What a part gets: experts are numbered from its first one on, and -1 where they are none of its own."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return value.to(device)
    return torch.where((value >= own.start) & (value < own.stop), value - own.start, -1).to(device)


def _part_of(experts: nn.Module, name: str, own: range, device: torch.device) -> nn.Module:
    """Some of the experts, on a device, as a module of the same kind; all else of it is copied."""
    whole = dict(experts.named_parameters(recurse=False))
    kept = [*whole.values(), *([experts.config] if hasattr(experts, "config") else [])]
    part: Any = copy.deepcopy(experts, {id(value): value for value in kept})
    part.num_experts = len(own)
    for parameter, values in whole.items():
        some = nn.Parameter(values.detach()[own.start : own.stop], requires_grad=False)
        some.data = some.data.to(device)
        part._parameters[parameter] = some
    for inner in part.children():
        inner.to(device)
    part.__dict__["forward"] = partial(run_experts, part, name, {})
    made: nn.Module = part
    return made
