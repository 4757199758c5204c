"""Which element type each tensor of a GGUF file gets, and in which order they are written.

Both as `llama_model_quantize` does it with a BF16 file of llama.cpp's converter. Source: llama.cpp as in
llama-cpp-python 0.3.36, src/llama-quant.cpp; mixture_rules.py has its rows.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from shardq.errors import (
    BadImportance,
    BadOption,
    LayoutRefuses,
    PatternMatchesNothing,
    SourceUnreadable,
    UnsupportedSource,
)
from shardq.files.gguf import KeyValue, Scalar
from shardq.ggml import GGML
from shardq.gguf.file_types import FileType
from shardq.gguf.mixture_rules import (
    EIGHT,
    EMBEDDINGS,
    FALLBACKS,
    LAST_FALLBACK,
    OF_EIGHT,
    OUTPUT,
    RAISED_VALUES,
    Category,
    Place,
    find_category,
    find_rule,
    is_quantizable,
)
from shardq.gguf.overrides import OPTION, Override, compile_overrides, find_override, read_type
from shardq.kernels.contract_blocks import BLOCK_FORMATS

SOURCE_TYPE: Final = "BF16"  # what the converter writes where nothing else is fixed
SHARED_HEADS: Final = 4  # of queries to one of values, from which on values count as shared
BLOCK: Final = re.compile(r"blk\.\s*([+-]?\d+)")
EXPERTS_TYPE: Final = "MXFP4_MOE"


@dataclass(frozen=True, slots=True)
class MixtureModel:
    """What the rules look at of a model."""

    arch: str  # `general.architecture`
    blocks: int  # `{arch}.block_count`, those that predict further tokens among them
    heads: int  # `{arch}.attention.head_count`, of the first block
    kv_heads: int  # `{arch}.attention.head_count_kv`, of the first block; as many as heads where it is missing
    experts: int  # `{arch}.expert_count`; 0 where it is missing

    @property
    def shares_values(self) -> bool:
        """Four heads or more use the same keys and values."""
        return self.kv_heads > 0 and self.heads // self.kv_heads >= SHARED_HEADS

    @property
    def raises_values(self) -> bool:
        """llama.cpp calls the model 70B: it has 80 blocks, and a Llama whose values are not shared is 65B."""
        return self.blocks == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.heads != self.kv_heads))


@dataclass(frozen=True, slots=True)
class TypeOptions:
    """What a user chooses. Types are names of ggml.py, whatever their case."""

    file_type: FileType
    pure: bool = False  # no rules: the base type for all that nothing else fixes
    output_type: str | None = None  # of the output matrix; under the rules also of embeddings that serve as one
    embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()  # pattern, type: see overrides.py; the first that hits a name counts
    requantize: bool = False  # take weights of blocks (MXFP4) from these and make other blocks of them


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor before it is quantized."""

    name: str
    shape: tuple[int, ...]  # GGUF's order: the row length first
    type: str | None  # None: 16 bits
    weighed: bool  # an imatrix has an entry for it


@dataclass(frozen=True, slots=True)
class _Mixture:
    """What is the same for all tensors of a file."""

    model: MixtureModel
    options: TypeOptions  # with types that are known
    overrides: tuple[Override, ...]
    weighed: bool
    tied: bool  # embeddings serve as output
    values: int  # tensors of values


def read_model(pairs: Iterable[KeyValue]) -> MixtureModel:
    """What the rules look at, from a file's metadata. Raises SourceUnreadable where blocks or the name are missing."""
    found = {pair.key: _first(pair.value) for pair in pairs}
    arch = found.get("general.architecture")
    counts = {
        key: value
        for key in ("block_count", "attention.head_count", "attention.head_count_kv", "expert_count")
        if isinstance(value := found.get(f"{arch}.{key}"), int)
    }
    if not isinstance(arch, str) or "block_count" not in counts:
        raise SourceUnreadable("metadata of a GGUF file: general.architecture and its block_count are missing")
    heads = counts.get("attention.head_count", 0)
    kv_heads = counts.get("attention.head_count_kv", heads)
    return MixtureModel(arch, counts["block_count"], heads, kv_heads, counts.get("expert_count", 0))


def _first(value: Scalar | tuple[Scalar, ...]) -> Scalar | None:
    """Of an array what the first block has."""
    return next(iter(value), None) if isinstance(value, tuple) else value


def order_tensors(names: Iterable[str]) -> tuple[str, ...]:
    """In the order in which llama_model_quantize writes them: those of no block, then block by block, by name in each.

    Source: `llama_model_loader::weight_name_comparer`, src/llama-model-loader.h.
    """
    return tuple(sorted(names, key=_order_key))


def choose_types(
    model: MixtureModel, tensors: Sequence[Wanted], options: TypeOptions, weighed: bool
) -> tuple[str, ...]:
    """The element type of each tensor, in the order given; `weighed` says whether there is an imatrix at all.

    What cannot be quantized stays as it is, 16 bits as BF16. So does MXFP4, of which llama_model_quantize refuses to
    make other blocks, unless an override or `requantize` says otherwise. Rows that are not whole blocks get another
    type (FALLBACKS), but not where the type is that of `output_type` or `embedding_type`.
    Raises BadOption for a type that is not written, a pattern that is none, and what the file type cannot do without
    or with; PatternMatchesNothing; BadImportance for a tensor that needs weights and has none; LayoutRefuses for rows
    that are not whole blocks; UnsupportedSource for a tensor of an expert model whose block is not one of the model's.
    """
    mixture = _settle(model, tensors, options, weighed)
    seen: Counter[Category] = Counter()
    types: dict[str, str] = {}
    for tensor in sorted(tensors, key=lambda tensor: _order_key(tensor.name)):
        types[tensor.name] = _choose(mixture, tensor, seen)
        _check(mixture, tensor, types[tensor.name])
    return tuple(types[tensor.name] for tensor in tensors)


def _settle(model: MixtureModel, tensors: Sequence[Wanted], options: TypeOptions, weighed: bool) -> _Mixture:
    base, name = options.file_type.base, options.file_type.name
    overrides = compile_overrides(options.overrides)
    if overrides and base not in BLOCK_FORMATS:
        raise BadOption(f"{OPTION} {overrides[0].text!a}: has no meaning for {name}, which is of one type throughout")
    for override in overrides:
        if not any(override.pattern.search(tensor.name) for tensor in tensors):
            raise PatternMatchesNothing(
                f"{OPTION} {override.text!a} matches no tensor: patterns are of names in the GGUF file, as {OUTPUT}"
            )
    known = TypeOptions(
        options.file_type,
        options.pure,
        options.output_type and read_type("--output-tensor-type", options.output_type),
        options.embedding_type and read_type("--token-embedding-type", options.embedding_type),
        options.overrides,
        options.requantize,
    )
    categories = Counter(find_category(tensor.name) for tensor in tensors)
    return _Mixture(model, known, overrides, weighed, categories["output"] == 0, categories["values"])


def _choose(mixture: _Mixture, tensor: Wanted, seen: Counter[Category]) -> str:
    options, base, source = mixture.options, mixture.options.file_type.base, tensor.type or SOURCE_TYPE
    if not is_quantizable(tensor.name, tensor.shape):
        return source
    category = find_category(tensor.name)
    own = find_override(mixture.overrides, tensor.name)
    # A table of embeddings for each block is large enough that a pattern may name it against the option.
    if category == "embedding" and options.embedding_type and not (own and tensor.name != EMBEDDINGS[0]):
        return options.embedding_type
    if category == "output" and options.output_type:
        return options.output_type
    if own is None and source in BLOCK_FORMATS and not options.requantize:
        return source
    if base not in BLOCK_FORMATS:
        return base
    if own is None:
        own = base if options.pure else _mixed(mixture, tensor, category, seen)
    return _fitting(own, tensor.shape[0])


def _mixed(mixture: _Mixture, tensor: Wanted, category: Category, seen: Counter[Category]) -> str:
    """By the rules; counts the tensor among those of its category."""
    options, model, file_type = mixture.options, mixture.model, mixture.options.file_type
    if category == "output" or (category == "embedding" and mixture.tied):
        # llama.cpp has Q8_0 for rows that are not whole blocks; `_fitting` comes to the same
        return options.output_type or ("Q8_0" if file_type.name in (EXPERTS_TYPE, "Q8_0") else "Q6_K")
    if file_type.name == EXPERTS_TYPE:
        return file_type.base if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "Q8_0"
    index = seen[category]
    seen[category] += 1
    if model.experts > 1 and category in ("widen", "down"):
        index = _block(tensor.name, model.blocks)
    count = mixture.values if category == "values" else model.blocks
    place = Place(index, count, model.shares_values, model.experts, mixture.weighed)
    rule = find_rule(category, file_type.name, place)
    kind = rule.type if rule else file_type.base
    if category == "values" and model.raises_values:
        kind = RAISED_VALUES.get(kind, kind)
    return OF_EIGHT.get(category, kind) if model.experts == EIGHT else kind


def _fitting(kind: str, columns: int) -> str:
    """The type, or another one whose blocks the rows are made of."""
    if columns % GGML[kind].block_weights == 0:
        return kind
    smaller = FALLBACKS.get(kind, kind)
    return smaller if columns % GGML[smaller].block_weights == 0 else LAST_FALLBACK


def _block(name: str, blocks: int) -> int:
    found = BLOCK.match(name)
    if found is None or not 0 <= int(found[1]) < blocks:
        raise UnsupportedSource(f"tensor {name!a}: expected one of the {blocks} blocks of its model")
    return int(found[1])


def _order_key(name: str) -> tuple[int, bytes]:
    found = BLOCK.match(name)
    return int(found[1]) if found else -1, name.encode()


def _check(mixture: _Mixture, tensor: Wanted, kind: str) -> None:
    """Refuse what llama_model_quantize refuses, or stops at."""
    name, file_type = tensor.name, mixture.options.file_type.name
    if kind == tensor.type or not is_quantizable(name, tensor.shape):
        return
    if tensor.shape[0] % GGML[kind].block_weights:
        raise LayoutRefuses(
            f"tensor {name!a} has rows of {tensor.shape[0]} weights and cannot be {kind}: expected a multiple of "
            f"{GGML[kind].block_weights}; name another type for it"
        )
    if file_type == "Q2_K_S" and kind == "Q2_K" and name != OUTPUT and name not in EMBEDDINGS:
        if not mixture.weighed:
            raise BadOption(f"Q2_K_S needs an imatrix, as for tensor {name!a}: give --imatrix, or choose Q2_K")
        if not tensor.weighed:
            raise BadImportance(f"Q2_K_S needs weights for tensor {name!a}, which the imatrix lacks: complete it")
