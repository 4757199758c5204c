"""A causal LM of transformers of which one block at a time has weights, made straight from the shards."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from shardq.checkpoint import Checkpoint, TensorRef
from shardq.errors import CheckpointIncomplete, UnsupportedSource
from shardq.gguf.headers import holds_gguf
from shardq.headers import read_checkpoint
from shardq.kernels import load
from shardq.sources.base import Source
from shardq.tune.activations import (
    Batch,
    Call,
    call_block,
    catch_input,
    join_calls,
    record_calls,
    replace_blocks,
)
from shardq.tune.conversions import Conversion, Conversions, convert
from shardq.tune.matching import Matched, match_model
from shardq.tune.reading import BlockReader, Fetched
from shardq.tune.skeleton import Skeleton, compute_buffers, make_skeleton, set_content
from shardq.tune.spool import Hidden, in_memory

SHOWN: Final = 4
FEW: Final = 4  # an embedding is read whole for more than the 4th part of its rows
FLOATS: Final = ("BF16", "F16", "F32")


class BlockModel:
    """The model. Beside the present block these have content: norms and other small parameters outside the blocks, the
    embedding while `embed` runs, and the head from the first call of `logits` on until `free_head`."""

    def __init__(self, source: Source, checkpoint: Checkpoint, skeleton: Skeleton, matched: Matched) -> None:
        """See `open`."""
        self.source, self.checkpoint, self.skeleton, self.matched = source, checkpoint, skeleton, matched
        self._reader = BlockReader(source, load())
        self._fetched: dict[int, Fetched] = {}
        self._waiting: tuple[Path, int | None] | None = None
        self._head_is_there = self._embedding_is_there = self._as_tuple = False
        self._fill(self.skeleton.model, matched.small, "")

    @classmethod
    def open(
        cls,
        source: Source,
        *,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attention: str | None = None,
    ) -> "BlockModel":
        """A model whose weights are computed with in `dtype`, None: in that of its configuration. Any source kind:
        encoded weights are decoded in fp32 and rounded once. `attention`: as transformers' attn_implementation.

        Reads headers, side files and the small parameters outside the blocks. Raises UnsupportedSource for GGUF files,
        for models that transformers does not know, and for parameters of which the checkpoint has no tensor, or tensors
        of a block of which the model has no parameter; BadOption, MissingPackage, and what reading raises.
        """
        if holds_gguf(source.files()):
            raise UnsupportedSource(
                f"{source.label} is in GGUF: transformers does not compute with its blocks; use llama.cpp's own "
                "llama-imatrix and llama-perplexity, or the checkpoint that it was made of"
            )
        checkpoint = read_checkpoint(source)
        skeleton = make_skeleton(source, dtype, trust_remote_code, attention)
        return cls(source, checkpoint, skeleton, match_model(checkpoint, skeleton))

    def __enter__(self) -> "BlockModel":
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of files, threads and content."""
        self._fetched.clear()
        self._reader.close()
        self.free_head()

    @property
    def block_names(self) -> tuple[str, ...]:
        """Modules of the blocks, in their order."""
        return tuple(self.skeleton.block_name(i) for i in range(self.skeleton.count))

    @property
    def config(self) -> Any:
        """transformers' configuration, with the type that is computed with."""
        return self.skeleton.config

    @property
    def dtype(self) -> torch.dtype:
        """What is computed with."""
        return self.skeleton.dtype

    # --- the parts of the model ------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed(self, ids: torch.Tensor, make: Callable[[tuple[int, ...], torch.dtype], Hidden] = in_memory) -> Batch:
        """Samples of token ids [samples, tokens], int64, as they enter the first block, and what each block is called
        with. The embedding is read for it, and freed. `make`: room for hidden states of a shape."""
        hidden: Hidden | None = None
        calls: list[Call] = []
        with self.embedding(ids):
            for index in range(len(ids)):
                found = record_calls(self._blocks, self._forward(ids[index : index + 1]), self.checkpoint.label)
                if found.hidden.shape[:2] != (1, ids.shape[1]):
                    raise UnsupportedSource(
                        f"{self.checkpoint.label}: its blocks get {list(found.hidden.shape)} for a sample of "
                        f"{ids.shape[1]} tokens, expected [1, tokens, ...]: no block mode for this model"
                    )
                calls = join_calls(calls, found.calls, index) if index else found.calls
                if hidden is None:
                    hidden = make((len(ids), *found.hidden.shape[1:]), found.hidden.dtype)
                hidden[index : index + 1] = found.hidden
                self._as_tuple = found.as_tuple
        assert hidden is not None
        return Batch(hidden, tuple(calls))

    @contextmanager
    def embedding(self, ids: torch.Tensor | None = None) -> Iterator[None]:
        """A context in which the embedding has content, for several calls of `embed` or `embed_next`, or only the rows
        of some ids; at its end the head, which may be the same parameter, is given back, too."""
        if self._embedding_is_there:
            yield
            return
        self.free_head()
        self._fill_front(ids)
        self._embedding_is_there = True
        try:
            yield
        finally:
            self.free_head()
            self._empty(self.matched.front)
            self._embedding_is_there = False

    @torch.no_grad()
    def embed_next(self, ids: torch.Tensor, cache: Any) -> Batch:
        """The next ids of samples, [samples, tokens], behind those that a cache of transformers has seen: as `embed`,
        but all samples in one call, and the blocks that `run` calls put what they compute into the cache."""
        with self.embedding():
            forward = partial(self.skeleton.model, input_ids=ids, past_key_values=cache, use_cache=True)
            found = record_calls(self._blocks, forward, self.checkpoint.label)
            self._as_tuple = found.as_tuple
            return Batch(found.hidden.clone(), tuple(found.calls))

    def prefetch(self, index: int) -> None:
        """Begin to read a block in the background; nothing for one that does not exist or is under way."""
        if index < self.skeleton.count and index not in self._fetched:
            self._fetched[index] = self._reader.fetch(self._tensors_of(index), whole=True)

    def let_wait(self, folder: Path, most_bytes: int | None) -> None:
        """Allow `prefetch_beside` a file in a folder, of so many bytes, None: of any size."""
        self._waiting = folder, most_bytes

    def prefetch_beside(self, index: int) -> None:
        """`prefetch` while all memory is needed for something else: a block that is not on this machine comes into a
        file, if `let_wait` has said where and there is room."""
        if self._waiting and index < self.skeleton.count and index not in self._fetched:
            fetched = self._reader.fetch_beside(self._tensors_of(index), *self._waiting)
            if fetched is not None:
                self._fetched[index] = fetched

    def _tensors_of(self, index: int) -> list[TensorRef]:
        blanks = [self.matched.tensors[name] for name in self.matched.blanks[index]]
        return [*self._tensors(self.matched.blocks[index]), *blanks]

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """A block with its weights, as a copy of the skeleton's module, without gradients; its content is given back at
        the end. Raises what reading and decoding raise."""
        self.prefetch(index)
        fetched, name = self._fetched.pop(index), self.skeleton.block_name(index)
        module = self._copied(name)
        self._fill(module, self.matched.blocks[index], f"{name}.", fetched)
        for blank in self.matched.blanks[index]:
            if fetched.take(blank, torch.float32).any():
                raise UnsupportedSource(
                    f"{self.checkpoint.label} has {blank}, which {type(self.skeleton.model).__name__} has no place "
                    "for, and it is not zero: transformers cannot compute with it"
                )
        del fetched  # and with it the file that it may have waited in
        try:
            yield module
        finally:
            module.to("meta")

    def run(self, module: nn.Module, batch: Batch, index: int) -> torch.Tensor:
        """Hidden states behind a block, [samples, tokens, width]. Records gradients as torch is told to."""
        return call_block(module, batch, index)

    @torch.no_grad()
    def advance(self, module: nn.Module, batch: Batch, index: int) -> None:
        """`run` sample by sample, without gradients; the batch's hidden states are replaced, where they lie."""
        for sample, part in enumerate(batch.split(1)):
            batch.hidden[sample : sample + 1] = self.run(module, part, index)

    @torch.no_grad()
    def before_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head gets of hidden states behind the last block; it is not read. Raises UnsupportedSource for a
        model without one."""
        head = self.head_module
        if head is None:
            raise UnsupportedSource(f"{self.checkpoint.label}: {type(self.skeleton.model).__name__} has no head")
        with replace_blocks(self._blocks, hidden, self._as_tuple):
            return catch_input(head, lambda: self._end(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states behind the last block, [samples, tokens, width], by the model's own last norm, head and
        whatever it does there: [samples, tokens, vocabulary]. Reads the head if it is not there. Records gradients of
        hidden states that ask for them."""
        self._fill_head()
        with replace_blocks(self._blocks, hidden, self._as_tuple):
            found: torch.Tensor = self._end(hidden).logits
        return found

    def _fill_head(self) -> None:
        if not self._head_is_there:
            self._fill(self.skeleton.model, self._own_head, "")
            self._head_is_there = True

    def free_head(self) -> None:
        """Give back what `logits` has read."""
        if self._head_is_there:
            self._empty(self._own_head)
            self._head_is_there = False

    @property
    def head_module(self) -> nn.Module | None:
        """The output projection, without content but in `head`; None for a model without one."""
        found: nn.Module | None = self.skeleton.model.get_output_embeddings()
        return found

    @contextmanager
    def head(self) -> Iterator[nn.Module]:
        """The output projection with its weights, which are given back at the end: a tied one must not be in use as the
        embedding. Raises as `logits`."""
        if self.head_module is None:
            raise UnsupportedSource(f"{self.checkpoint.label}: {type(self.skeleton.model).__name__} has no head")
        self._fill_head()
        try:
            yield self.head_module
        finally:
            self.free_head()

    @property
    def _own_head(self) -> tuple[str, ...]:
        """Of the head, what the embedding does not have here already."""
        return tuple(n for n in self.matched.head if not (self._embedding_is_there and n in self.matched.front))

    # --- content ---------------------------------------------------------------------------------------------------

    @property
    def _blocks(self) -> list[nn.Module]:
        return [self.skeleton.block(i) for i in range(self.skeleton.count)]

    def _end(self, hidden: torch.Tensor) -> Any:
        """The model's forward, whose blocks are replaced: what it embeds has no say."""
        width = self.config.get_text_config().hidden_size
        embedded = torch.zeros(*hidden.shape[:2], width, dtype=self.dtype)
        return self.skeleton.model(inputs_embeds=embedded, use_cache=False)

    def _forward(self, ids: torch.Tensor) -> Callable[[], Any]:
        return lambda: self.skeleton.model(input_ids=ids, use_cache=False)

    def _fill_front(self, ids: torch.Tensor | None) -> None:
        rows = None if ids is None else sorted(set(ids.flatten().tolist()))
        table = None if rows is None else self._table(len(rows))
        if rows is None or table is None:
            self._fill(self.skeleton.model, self.matched.front, "")
            return
        (name,) = self.matched.front
        value = self._reader.fetch_rows(table, rows, self.matched.conversions.dtypes[name])
        for own in self.matched.tied.get(name, (name,)):
            set_content(self.skeleton.model, own, value)

    def _table(self, rows: int) -> TensorRef | None:
        """The embedding as a tensor of which few rows can be read for themselves; None where that is not so."""
        if len(self.matched.front) != 1:
            return None
        (name,) = self.matched.front
        (c,) = self.matched.conversions.find((name,))
        t = self.matched.tensors[c.sources[0][0]]
        plain = c.converter is None and not t.encoded and t.dtype in FLOATS and t.shape == self.matched.shapes[name]
        return t if plain and t.shape and rows * FEW < t.shape[0] else None

    def _copied(self, name: str) -> nn.Module:
        module = self.skeleton.model.get_submodule(name)
        shared = {id(m.config): m.config for m in self.skeleton.model.modules() if hasattr(m, "config")}
        made: nn.Module = copy.deepcopy(module, dict(shared))
        for inner, part in made.named_modules():
            compute_buffers(self.skeleton.model, part, f"{name}.{inner}" if inner else name)
        return made

    def _tensors(self, parameters: Sequence[str]) -> list[TensorRef]:
        wanted = self.matched.conversions.find(parameters)
        names = dict.fromkeys(name for c in wanted for name, _ in c.sources)
        return [self.matched.tensors[name] for name in names]

    def _fill(self, module: nn.Module, parameters: Sequence[str], prefix: str, fetched: Fetched | None = None) -> None:
        """Give parameters of the model, whose names in `module` lack the prefix, their content."""
        conversions: Conversions = self.matched.conversions
        fetched = fetched or self._reader.fetch(self._tensors(parameters), whole=False)
        left = set(parameters)
        for c in conversions.find(parameters):
            for name, value in self._made(c, fetched):
                if name in left:
                    left.discard(name)
                    for own in self.matched.tied.get(name, (name,)):
                        set_content(module, own.removeprefix(prefix), value)
        if left:
            raise CheckpointIncomplete(f"{_listed(sorted(left))}: no conversion of transformers has made them")

    def _made(self, c: Conversion, fetched: Fetched) -> Iterator[tuple[str, torch.Tensor]]:
        state = self.matched.shapes
        for name, value in convert(c, self.skeleton.model, self.matched.conversions.dtypes, fetched.take):
            if (expected := state.get(name)) is not None and expected != tuple(value.shape):
                raise UnsupportedSource(
                    f"{c.sources[0][0]} of {self.checkpoint.label} makes {name} {list(value.shape)}: the model has "
                    f"{list(expected)}; does config.json belong to these weights?"
                )
            yield name, value

    def _empty(self, parameters: Sequence[str]) -> None:
        for name in parameters:
            for own in self.matched.tied.get(name, (name,)):
                value = self.skeleton.model.get_parameter_or_buffer(own)
                set_content(self.skeleton.model, own, torch.empty_like(value, device="meta"))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
