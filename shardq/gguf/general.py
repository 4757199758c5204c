"""The keys `general.*` that say what a model is called, where it comes from, and how it wants to be sampled.

Names are guessed from the model card, config.json and the folder by the grammar of the gguf package (`Metadata`,
0.19.0); repetition_penalty, which that release does not read yet, is as in llama.cpp of llama-cpp-python 0.3.36.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, Final

import yaml

from shardq.errors import SourceUnreadable
from shardq.gguf.model_files import CARD, GENERATION, ModelFiles
from shardq.gguf.packages import import_gguf
from shardq.gguf.pairs import Pairs
from shardq.gguf.tensors import OutputTensor, parameter_counts

# Of generation_config.json: key, type, and what it is called there, the first that is there.
SAMPLING: Final = (
    ("sequence", "text", ("sequence",)),
    ("top_k", "i32", ("top_k",)),
    ("top_p", "f32", ("top_p",)),
    ("min_p", "f32", ("min_p",)),
    ("xtc_probability", "f32", ("xtc_probability",)),
    ("xtc_threshold", "f32", ("xtc_threshold",)),
    ("temp", "f32", ("temperature",)),
    ("penalty_last_n", "i32", ("penalty_last_n",)),
    ("penalty_repeat", "f32", ("penalty_repeat", "repetition_penalty")),
    ("mirostat", "i32", ("mirostat",)),
    ("mirostat_tau", "f32", ("mirostat_tau",)),
    ("mirostat_eta", "f32", ("mirostat_eta",)),
)
BEFORE_SIZE: Final = (
    "name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by", "size_label",
)  # fmt: skip
BEHIND_LICENSE: Final = (
    ("license_name", "license.name"), ("license_link", "license.link"), ("url", "url"), ("doi", "doi"),
    ("uuid", "uuid"), ("repo_url", "repo_url"), ("source_url", "source.url"), ("source_doi", "source.doi"),
    ("source_uuid", "source.uuid"), ("source_repo_url", "source.repo_url"),
)  # fmt: skip
ORIGIN: Final = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


def add_general(pairs: Pairs, model: ModelFiles, tensors: Sequence[OutputTensor]) -> None:
    """Add them in the converter's order. Raises MissingPackage, SourceUnreadable."""
    gguf = import_gguf()
    total, shared, experts, expert_count = parameter_counts(tensors)
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), _card(model), model.config(), PurePath(model.name), total
    )
    if found.name is None:
        found.name = model.name
    if found.size_label is None and total:
        found.size_label = gguf.size_label(total, shared, experts, expert_count)
    pairs.text("general.type", "model")
    _add_sampling(pairs, model)
    for key in BEFORE_SIZE:
        _add_text(pairs, f"general.{key}", getattr(found, key))
    if found.license is not None:
        licenses = found.license if isinstance(found.license, list) else [found.license]
        pairs.text("general.license", ",".join(licenses))
    for name, key in BEHIND_LICENSE:
        _add_text(pairs, f"general.{key}", getattr(found, name))
    _add_origins(pairs, "base_model", found.base_models)
    _add_origins(pairs, "dataset", found.datasets)
    pairs.array("general.tags", found.tags or ())
    pairs.array("general.languages", found.languages or ())


def _add_text(pairs: Pairs, key: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise SourceUnreadable(f"{CARD}: {key} is {str(value)[:80]!a}, expected text; put it in quotes")
    pairs.text(key, value)


def _add_origins(pairs: Pairs, what: str, entries: Sequence[Mapping[str, Any]] | None) -> None:
    if entries is None:
        return
    pairs.u32(f"general.{what}.count", len(entries))
    for number, entry in enumerate(entries):
        for key in ORIGIN:
            if key in entry:
                _add_text(pairs, f"general.{what}.{number}.{key}", entry[key])


def _add_sampling(pairs: Pairs, model: ModelFiles) -> None:
    try:
        config = json.loads(model.files.get(GENERATION, b"{}"))
    except ValueError:  # as in the converter: not all models have one that is JSON
        return
    if not isinstance(config, dict):
        return
    for key, kind, names in SAMPLING:
        value = next((config[name] for name in names if name in config), None)
        if value is None:
            continue
        full = f"general.sampling.{key}"
        if kind == "text":
            pairs.text(full, value)
        elif kind == "i32":
            pairs.i32(full, value)
        else:
            pairs.f32(full, value)


def _card(model: ModelFiles) -> dict[str, Any]:
    """What stands before the text of the model card; empty where there is nothing."""
    lines = (model.text(CARD) or "").splitlines()
    if not lines or lines[0] != "---":
        return {}
    rest = lines[1:]
    end = rest.index("---") if "---" in rest else len(rest)
    text = "\n".join(rest[:end]) + "\n"
    try:
        found = yaml.safe_load(text.replace("- no\n", '- "no"\n').replace("\t", "  "))
    except yaml.YAMLError as error:
        what = " ".join(str(error).split())
        raise SourceUnreadable(f"{CARD} of {model.name}: no YAML between its first lines: {what}") from error
    return found if isinstance(found, dict) else {}
