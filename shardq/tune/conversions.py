"""Which tensors of a checkpoint each parameter of a model is made of, and how: transformers' own tables of renamings
and conversions (transformers 5, core_model_loading.py), applied to one block instead of a whole model."""

import re
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from shardq.errors import UnsupportedSource
from shardq.tune.joining import Joint, Load, find_joints
from shardq.tune.library import import_part


@dataclass(frozen=True, slots=True)
class Conversion:
    """What becomes one or several parameters."""

    key: str  # the first parameter
    parameters: tuple[str, ...]
    sources: tuple[tuple[str, str], ...]  # tensors of the checkpoint, and the pattern by which each is collected
    converter: Any  # of transformers, or a Joint; None for what has another name at most


@dataclass(frozen=True, slots=True)
class Conversions:
    """All of a model."""

    by_parameter: Mapping[str, Conversion]
    unexpected: Mapping[
        str, str
    ]  # tensors of the checkpoint that no parameter is made of, and their names in the model
    dtypes: Mapping[str, torch.dtype]  # of each parameter

    def find(self, parameters: Iterable[str]) -> tuple[Conversion, ...]:
        """What makes these parameters, each once. Raises KeyError."""
        return tuple({(c := self.by_parameter[p]).key: c for p in parameters}.values())


def find_conversions(model: Any, names: Iterable[str], dtype: torch.dtype, config: Any) -> Conversions:
    """The conversions of a checkpoint's tensors `names` into the parameters and buffers of `model`; `config` is its
    config.json.

    Source: `convert_and_load_state_dict_in_model` of transformers 5.23, in the order in which it collects tensors.
    """
    loading, mapping = import_part("core_model_loading"), import_part("conversion_mapping")
    state = model.state_dict()
    transforms = mapping.get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    collected: dict[str, list[tuple[str, str]]] = {}
    chosen: dict[str, Any] = {}
    unexpected: dict[str, str] = {}
    for name in sorted(names, key=loading.dot_natural_key):
        key, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if key not in state and name in state:
            key, pattern = loading.rename_source_key(name, [], [], model.base_model_prefix, state)
        if key not in state:
            unexpected[name] = key
            continue
        chosen.setdefault(key, None if pattern is None else by_pattern[pattern])
        collected.setdefault(key, []).append((name, pattern or name))
    made = (_conversion(key, chosen[key], tuple(sources)) for key, sources in collected.items())
    by_parameter = {p: c for c in made for p in c.parameters if p in state}
    keys = {key: name for name, key in unexpected.items()}
    joints = find_joints(state, [n for n in state if n not in by_parameter], keys, config)
    for parameter, joint in joints.items():
        sources = tuple((p.tensor, p.tensor) for p in joint.pieces)
        by_parameter[parameter] = Conversion(parameter, (parameter,), sources, joint)
        for p in joint.pieces:
            del unexpected[p.tensor]
    return Conversions(by_parameter, unexpected, _dtypes(model, state, dtype))


def _conversion(key: str, converter: Any, sources: tuple[tuple[str, str], ...]) -> Conversion:
    if converter is None:
        if len(sources) > 1:
            raise UnsupportedSource(
                f"{key} would be made of {sources[0][0]} and of {sources[1][0]}: expected one of them"
            )
        return Conversion(key, (key,), sources, None)
    first = converter.target_patterns[0]
    return Conversion(key, tuple(key.replace(first, p) for p in converter.target_patterns), sources, converter)


def _dtypes(model: Any, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The model's own types, and fp32 for what it keeps so."""
    plan = {re.compile(p.replace("*", ".*")): kept for p, kept in model._get_dtype_plan(dtype).items()}
    found = {}
    for name, t in state.items():
        kept = next((kept for p, kept in plan.items() if p.search(name)), None)
        found[name] = kept or t.dtype
    return found


def convert(
    c: Conversion, model: Any, dtypes: Mapping[str, torch.dtype], load: Load
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a conversion; `load` gives a tensor of the checkpoint in a type. Raises UnsupportedSource where
    tensors do not go together, and what loading raises."""
    dtype = dtypes[c.key]
    if c.converter is None:
        yield c.key, load(c.sources[0][0], dtype)
        return
    if isinstance(c.converter, Joint):
        yield c.key, c.converter.make(dtype, load)
        return
    worker = deepcopy(c.converter)
    for name, pattern in c.sources:
        worker.add_tensor(c.key, name, pattern, _Later(load, name, dtype))
    try:
        made = worker.convert(c.key, model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError) as error:
        raise UnsupportedSource(f"{c.key} cannot be made of {c.sources[0][0]} and others: {error}") from error
    for name, t in made.items():
        yield name, t[0] if isinstance(t, list) else t


@dataclass(frozen=True, slots=True)
class _Later:
    """A tensor that transformers asks for when it needs it."""

    load: Load
    name: str
    dtype: torch.dtype

    def __call__(self) -> torch.Tensor:
        return self.load(self.name, self.dtype)
