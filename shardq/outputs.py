"""The records of a finished output, in a folder or a repo: where it came from, its ledger, its configuration."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zstandard

from shardq.errors import BadFold, VerifyFailed
from shardq.fold import FOLD, Fold, unpack_fold
from shardq.layouts import GGUF_LAYOUT, find_layout
from shardq.layouts.base import Layout, Place
from shardq.ledger import LEDGER, decode_ledger
from shardq.recipe import Recipe
from shardq.schemes import Scheme
from shardq.sources import open_source
from shardq.sources.base import Source, SourceFile
from shardq.staging import CONFIG, PROVENANCE, WORK

MAX_RECORD_BYTES: Final = 1 << 29


@dataclass(frozen=True, slots=True)
class Output:
    """A finished output and its records."""

    source: Source  # what its bytes are read from
    where: str  # as the user named it
    files: Mapping[str, SourceFile]
    provenance: Mapping[str, Any]
    ledger: Mapping[str, Any]
    config: Mapping[str, Any]  # empty of GGUF files, which say it themselves
    fold: Fold | None = None  # that its weights have

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decided the output's bytes, key by key."""
        identity: Mapping[str, Any] = self.provenance["identity"]
        return identity

    @property
    def rounded(self) -> bool:
        """True if decoded rows were rounded to the type of their weight before they were quantized."""
        return self.identity.get("recipe.decode") == "rounded"

    @property
    def layout(self) -> Layout:
        """The layout that the output was written in."""
        return find_layout(self.identity["recipe.layout"])

    def believed_scheme(self, name: str) -> Scheme | None:
        """What a loader would take from config.json for the module of a source tensor."""
        block = self.config.get(self.layout.config_key)
        module = target_of(name, self.ledger["tensors"].get(name, {})).module
        return self.layout.scheme_of(block, module) if isinstance(block, dict) else None


def open_result(text: str) -> Source:
    """The folder or repo that holds a finished output. Raises VerifyFailed when it is unfinished, and what open_source
    raises."""
    if (Path(text).expanduser() / WORK).exists():
        raise VerifyFailed(f"{text} is unfinished: run the command that began it again to resume")
    return open_source(text)


def read_output(source: Source, where: str) -> Output:
    """The records of an output. Raises VerifyFailed when one is missing or cannot be read, HubAccess, HubTransfer."""
    files = {f.name: f for f in source.files()}
    if any(name.startswith(f"{WORK}/") for name in files):
        raise VerifyFailed(f"{where} is unfinished: run the command that began it again to resume")
    try:
        provenance = json.loads(_read(source, files, PROVENANCE))
        ledger = decode_ledger(_read(source, files, LEDGER))
        is_gguf = provenance["identity"]["recipe.layout"] == GGUF_LAYOUT
        config = {} if is_gguf else json.loads(_read(source, files, CONFIG))
        _check_keys(provenance, ledger, config)
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError, zstandard.ZstdError) as e:
        raise VerifyFailed(
            f"{where} has no readable {PROVENANCE}, {LEDGER} and, where the output is no GGUF file, {CONFIG} ({e}): "
            "expected the output of `shardq quantize`"
        ) from e
    return Output(source, where, files, provenance, ledger, config, _read_fold(source, where, files, provenance))


def _read_fold(
    source: Source, where: str, files: Mapping[str, SourceFile], provenance: Mapping[str, Any]
) -> Fold | None:
    """The fold that an output records, if it has one. Raises VerifyFailed for another one, or none."""
    recorded = provenance["identity"].get("recipe.fold")
    if recorded is None:
        return None
    try:
        fold = unpack_fold(_read(source, files, FOLD), FOLD)
    except (LookupError, ValueError, BadFold) as e:
        raise VerifyFailed(f"{where} was folded, and has no readable {FOLD} ({e}): get it again") from e
    if fold.sha256 != recorded:
        raise VerifyFailed(f"{where}: {FOLD} has sha256 {fold.sha256}, and {PROVENANCE} says {recorded}: get it again")
    return fold


def target_of(name: str, entry: Mapping[str, Any]) -> Place:
    """Where the result has what became of a source tensor: under its own name, or in a stack as the ledger says."""
    if place := entry.get("place"):
        return Place(place["module"], place["index"], place["count"])
    return Place(name.removesuffix(".weight"), 0, 0)


def identity_sha256(identity: Mapping[str, Any]) -> str:
    """The fingerprint that a plan of this identity has."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_of_recipe(identity: Mapping[str, Any], recipe: Recipe) -> bool:
    """True if an output of this identity was made by `recipe`, whatever its source."""
    return all(identity.get(f"recipe.{k}") == v for k, v in recipe.as_dict().items())


def _check_keys(provenance: Any, ledger: Any, config: Any) -> None:
    """Raise LookupError or TypeError when the records lack what is read of every output."""
    objects = (config, ledger["tensors"], provenance["files"], provenance["identity"])
    objects += (ledger.get("source", {}), *ledger.get("source", {}).values())
    texts = (ledger["fingerprint"], provenance["fingerprint"], provenance["identity"]["recipe.layout"])
    if not all(isinstance(x, dict) for x in objects) or not all(isinstance(x, str) for x in texts):
        raise TypeError("a key has a value of another kind")


def _read(source: Source, files: Mapping[str, SourceFile], name: str) -> bytes:
    if name not in files:
        raise LookupError(f"no {name}")
    if files[name].size_bytes > MAX_RECORD_BYTES:
        raise ValueError(f"{name} has {files[name].size_bytes} bytes")
    return source.read(name, 0, files[name].size_bytes)
