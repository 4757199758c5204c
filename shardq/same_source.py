"""Whether what an output is compared with is what its records say that it was made of, and with."""

import hashlib

from shardq.checkpoint import Checkpoint
from shardq.errors import BadOption, CheckpointIncomplete, VerifyFailed
from shardq.importance import Importance
from shardq.outputs import Output
from shardq.sources.base import Source
from shardq.tuned import TunedCodes
from shardq.version import NUMERICS


def check_numerics(output: Output) -> None:
    """This version makes the bytes that the output's made. Raises VerifyFailed."""
    made = output.identity.get("numerics")
    if made != NUMERICS:
        raise VerifyFailed(
            f"{output.where} was made with numerics {made} of shardq {output.identity.get('version')}: this version "
            f"has numerics {NUMERICS}; check it with that version"
        )


def check_listing(output: Output, source: Source) -> None:
    """The source is at the commit and has the shards that the records name. Raises BadOption, CheckpointIncomplete."""
    label, commit = output.identity["source.label"], output.identity["source.commit"]
    if commit is not None and source.commit not in {None, commit}:
        raise BadOption(
            f"{source.label} is at commit {source.commit}: {output.where} was made of {label} at {commit}; give "
            f"--source {label}@{commit}"
        )
    files = {f.name: f for f in source.files()}
    for name, size_bytes, sha256, _ in output.identity["source.shards"]:
        if name not in files:
            raise CheckpointIncomplete(f"{source.label} has no shard {name}, which {output.where} was made of")
        found = files[name]
        if found.size_bytes != size_bytes:
            raise BadOption(
                f"{source.label} is not what {output.where} was made of: shard {name} has {found.size_bytes} bytes, "
                f"the records say {size_bytes}"
            )
        if None not in {found.sha256, sha256} and found.sha256 != sha256:
            raise BadOption(
                f"{source.label} is not what {output.where} was made of: shard {name} has sha256 {found.sha256}, the "
                f"records say {sha256}"
            )


def check_importance(output: Output, given: Importance | None) -> None:
    """The file of importance is that of the run. Raises BadOption."""
    made, found = output.identity.get("recipe.importance"), given and given.sha256
    if made != found:
        raise BadOption(
            f"{output.where} was made with importance {made or 'none'} (sha256): --importance gives {found or 'none'}"
        )


def check_tuned(output: Output, given: TunedCodes | None) -> None:
    """The folder of tuned codes is that of the run. Raises VerifyFailed where none is given, BadOption for another."""
    made, found = output.identity.get("recipe.tuned"), given and given.sha256
    if made and not given:
        raise VerifyFailed(
            f"{output.where} has codes that were tuned, which its source alone does not give: name their folder with "
            "--tuned, or let `shardq verify --source` measure its errors"
        )
    if made != found:
        raise BadOption(
            f"{output.where} was made with {f'tuned codes {made}' if made else 'no tuned codes'} (sha256 of the "
            f"manifest): --tuned gives {found}"
        )


def check_header(name: str, sha256: str | None, output: Output, source: Source) -> None:
    """A shard's header has the hash that the records say. Raises BadOption."""
    recorded = {shard[0]: shard[3] for shard in output.identity["source.shards"]}
    if recorded.get(name) != sha256:
        raise BadOption(
            f"{source.label} is not what {output.where} was made of: the header of shard {name} has sha256 "
            f"{sha256}, the records say {recorded.get(name)}"
        )


def check_config(checkpoint: Checkpoint, output: Output) -> None:
    """config.json says how some kinds of codes are read, and what goes into a GGUF file. Raises BadOption."""
    said, found = output.identity.get("source.config"), hashlib.sha256(checkpoint.config_bytes or b"").hexdigest()
    if said != found:
        raise BadOption(
            f"{checkpoint.label} is not what {output.where} was made of: its config.json has sha256 {found}, the "
            f"records say {said}"
        )


def check_texts(checkpoint: Checkpoint, output: Output) -> None:
    """Nor do tokenizer, card and templates differ, which go into a GGUF file. Raises BadOption."""
    said = dict(output.identity.get("source.texts") or ())
    found = {name: hashlib.sha256(data).hexdigest() for name, data in checkpoint.texts.items()}
    for name in sorted(said.keys() | found.keys()):
        if said.get(name) != found.get(name):
            raise BadOption(
                f"{checkpoint.label} is not what {output.where} was made of: its {name} has sha256 "
                f"{found.get(name, 'of no file')}, the records say {said.get(name, 'that there was none')}"
            )
