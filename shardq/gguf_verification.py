"""Check a GGUF output against its own ledger, headers and hashes, and against its source if at hand."""

from collections.abc import Iterator

from shardq.errors import CorruptShard, SourceUnreadable, UnknownDtype, VerifyFailed
from shardq.gguf.file_types import find_file_type
from shardq.gguf.headers import FILE_TYPE, Headers, check_parts, find_models, read_gguf_headers, said_value, show
from shardq.gguf_against_source import check_gguf_source
from shardq.gguf_ledger import Entries, read_table, read_weights
from shardq.gguf_values import check_values
from shardq.importance import Importance
from shardq.kernels import load
from shardq.outputs import Output
from shardq.recorded import check_absorbed
from shardq.schemes import BLOCKS
from shardq.serving.served import GGUF, Served
from shardq.sources.base import Source
from shardq.verified import Verification, check_hashes, check_listed_hashes, check_run, listed_files


def verify_gguf(output: Output, deep: bool, source: Source | None, importance: Importance | None) -> Verification:
    """As verification.verify_output. Checked always: headers, sizes, parts, file type, every tensor against the ledger
    both ways; `deep`: hashes, and that all numbers are finite; with `source` every byte, see gguf_against_source."""
    files = listed_files(output)
    try:
        headers = read_gguf_headers(output.source, files)
    except (CorruptShard, UnknownDtype, SourceUnreadable) as e:
        raise VerifyFailed(f"{output.where}: {e}") from e
    weights, table = read_weights(output), read_table(output)
    problems = [*check_run(output), *check_absorbed(output.ledger), *_check_table(table, headers)]
    problems += (*_check_weights(weights, table), *_check_files(output, headers), *check_listed_hashes(output))
    if deep:
        problems += (p for p in check_hashes(output) if p not in problems)
        kernels = load()
        problems += (p for name, h in headers.items() for p in check_values(output.source, name, h, kernels))
    compared = 0
    if source is not None and not problems:
        problems, compared = check_gguf_source(output, source, importance)
    served = Served({}, {}, GGUF, {}, {})
    return Verification(
        output.where, output.source.commit, len(headers), len(weights), deep, compared, tuple(problems), served
    )


def _check_table(table: Entries, headers: Headers) -> Iterator[str]:
    """Every tensor that the ledger has is there, and no other."""
    there = {t.name: (f, t) for f, h in headers.items() for t in h.tensors}
    for name, entry in table.items():
        file, tensor = there.get(name, ("", None))
        if tensor is None:
            yield f"{name} is missing: the ledger promises it in {entry['file']}"
        elif (tensor.type, list(tensor.shape)) != (entry["type"], entry["shape"]):
            yield (f"{name} in {file} is {tensor.type} {list(tensor.shape)}: expected {entry['type']} {entry['shape']}")
        elif file != entry["file"]:
            yield f"{name} is in {file}: the ledger has it in {entry['file']}"
    for name in there.keys() - table.keys():
        yield f"{name} in {there[name][0]} is in no ledger entry"


def _check_weights(weights: Entries, table: Entries) -> Iterator[str]:
    """Every weight has its tensors, and every tensor its weights, or is computed."""
    claimed: set[str] = set()
    for name, entry in weights.items():
        outputs = [t for t in entry["outputs"] if t in table]
        claimed.update(outputs)
        if len(outputs) < len(entry["outputs"]) or bool(outputs) == (entry["outcome"] == "dropped"):
            yield f"{name} was {entry['outcome']} into {entry['outputs']}: the ledger does not have these tensors"
            continue
        if outputs and table[outputs[0]]["file"] != entry.get("file"):
            yield f"{name} is in {entry.get('file')}: the ledger has {outputs[0]} in {table[outputs[0]]['file']}"
        scheme = next((table[t]["type"] for t in outputs if table[t]["type"] in BLOCKS), None)
        if entry.get("scheme") != scheme:
            yield f"{name} has scheme {entry.get('scheme')}: the ledger has its tensors in {scheme or 'plain numbers'}"
    for name, entry in table.items():
        if (name in claimed) == bool(entry.get("computed")):
            yield f"{name} is made of {'no weight' if name not in claimed else 'weights, and computed'} in the ledger"


def _check_files(output: Output, headers: Headers) -> Iterator[str]:
    """The files are the parts of one model, of the recipe's file type."""
    models = find_models([output.files[name] for name in headers])
    if len(models) != 1:
        yield f"{len(models)} models are among the files of {output.where}: expected one"
        return
    yield from check_parts(models[0], headers)
    wanted = find_file_type(str(output.identity.get("recipe.preset")))
    first = headers[models[0].files[0].name]
    if wanted is None or said_value(first, FILE_TYPE) != wanted.number:
        found, expected = show(said_value(first, FILE_TYPE)), wanted.number if wanted else "one that is known"
        yield f"{models[0].files[0].name} says {FILE_TYPE} {found}: expected {expected}, as the recipe has it"
