"""The plan of a GGUF output again, from its records and its source: with it every byte of the output can be derived."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from shardq.errors import ShardqError, VerifyFailed
from shardq.gguf.model_files import needed_texts
from shardq.gguf.options import GgufOptions
from shardq.gguf_ledger import read_table, read_weights
from shardq.headers import read_checkpoint
from shardq.importance import Importance
from shardq.ledger import LEDGER, TABLE, make_ledger
from shardq.outputs import Output
from shardq.plans import OutputFile, Plan, make_plan
from shardq.recipe import Recipe, make_recipe
from shardq.recorded import source_of
from shardq.same_source import (
    check_config,
    check_header,
    check_importance,
    check_listing,
    check_numerics,
    check_texts,
)
from shardq.sources.base import Source
from shardq.staging import PROVENANCE

_RECIPE: Final = "recipe."  # what keys of an identity begin with


def remake_plan(output: Output, source: Source, importance: Importance | None) -> Plan:
    """The plan that an output was made by, under the name that its source had then; `importance` is that of the run.
    All headers of the source and its small files are read.

    Raises BadOption and CheckpointIncomplete for another source, or other importance, than the records name;
    VerifyFailed for records of other numerics or without a recipe; what planning and reading raise.
    """
    check_numerics(output)
    check_importance(output, importance)
    recipe = recorded_recipe(output, importance)
    check_listing(output, source)
    checkpoint = read_checkpoint(source)
    for s in checkpoint.shards:
        check_header(s.name, s.header_sha256, output, source)
    check_config(checkpoint, output)
    checkpoint = needed_texts(checkpoint, source, (recipe,))
    check_texts(checkpoint, output)
    label = output.identity["source.label"]  # a name of the model that its file has comes from it
    return make_plan(replace(checkpoint, label=label), recipe)


def recorded_recipe(output: Output, importance: Importance | None) -> Recipe:
    """The recipe of a GGUF output. Raises VerifyFailed where the records have none that this version knows."""
    said = {k.removeprefix(_RECIPE): v for k, v in output.identity.items() if k.startswith(_RECIPE)}
    try:
        options = dict(said["gguf"])
        overrides = tuple((str(pattern), str(kind)) for pattern, kind in options.pop("overrides"))
        recipe = make_recipe(
            said["preset"],
            decode=said["decode"],
            requantize=said["requantize"],
            importance=importance,
            gguf=_options(options, overrides),
        )
    except (LookupError, TypeError, ValueError, AttributeError, ShardqError) as e:
        raise VerifyFailed(
            f"{output.where}: {PROVENANCE} has no recipe of a GGUF file that is known ({e}): check it with the version "
            f"that made it, {output.identity.get('version')}"
        ) from e
    made = json.loads(json.dumps(recipe.as_dict()))
    if odd := sorted(k for k in made.keys() | said.keys() if made.get(k) != said.get(k)):
        raise VerifyFailed(
            f"{output.where}: {PROVENANCE} has recipe.{odd[0]} {said.get(odd[0])!r}, which this version does not make: "
            f"expected {made.get(odd[0])!r}; check it with the version that made it, {output.identity.get('version')}"
        )
    return recipe


def _options(said: Mapping[str, Any], overrides: tuple[tuple[str, str], ...]) -> GgufOptions:
    return GgufOptions(
        pure=said["pure"],
        output_type=said["output_type"],
        embedding_type=said["embedding_type"],
        overrides=overrides,
        max_part_bytes=said["max_part_bytes"],
        tokenizer_pre=said["tokenizer_pre"],
    )


def check_sizes(output: Output, files: Mapping[str, OutputFile]) -> Iterator[str]:
    """Files of a plan that an output does not have in their size."""
    for name, file in files.items():
        if name not in output.files or output.files[name].size_bytes != file.size_bytes:
            yield f"{name} is missing or of another size than its source gives: {file.size_bytes} bytes"


def check_plan(output: Output, plan: Plan) -> Iterator[str]:
    """Where the ledger is not that of the plan, but for figures that were measured. Raises VerifyFailed for one that is
    broken."""
    made = json.loads(json.dumps(make_ledger(plan, {})))
    parts = {"tensors": read_weights(output), "source": source_of(output.ledger), TABLE: read_table(output)}
    for part, said in parts.items():
        for name in sorted(made[part].keys() ^ said.keys()):
            there, lacks = ("the ledger", "what its source gives") if name in said else ("the source", "the ledger")
            yield f"{name} is in {there} and not in {lacks}"
        for name, entry in made[part].items():
            for key in (k for k in entry if name in said and said[name].get(k) != entry[k]):
                yield f"{name}: {LEDGER} says {key} {said[name].get(key)!r}: expected {entry[key]!r}"
