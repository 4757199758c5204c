"""The ledger of a GGUF output, read: what became of weights, and the tensors of the files."""

from collections.abc import Mapping
from typing import Any, Final

from shardq.errors import VerifyFailed
from shardq.ledger import LEDGER, TABLE
from shardq.outputs import Output

TABLE_KEYS: Final = {"type": str, "shape": list, "file": str}
WEIGHT_KEYS: Final = {"outcome": str, "role": str, "outputs": list}

Entries = Mapping[str, Mapping[str, Any]]


def read_weights(output: Output) -> Entries:
    """What became of each weight. Raises VerifyFailed for an entry that does not say what every entry says."""
    found = _read(output, "tensors", WEIGHT_KEYS)
    for name, entry in found.items():
        if not all(isinstance(t, str) for t in entry["outputs"]):
            raise _broken(output, name)
    return found


def read_table(output: Output) -> Entries:
    """The tensors of the files. Raises as read_weights."""
    return _read(output, TABLE, TABLE_KEYS)


def _read(output: Output, part: str, keys: Mapping[str, type]) -> Entries:
    found = output.ledger.get(part)
    if not isinstance(found, dict):
        raise VerifyFailed(f"{LEDGER} of {output.where} has no {part}: get it again or quantize again")
    for name, entry in found.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), kind) for k, kind in keys.items()):
            raise _broken(output, name)
    return found


def _broken(output: Output, name: str) -> VerifyFailed:
    return VerifyFailed(f"{LEDGER} of {output.where} has a broken entry for {name}: quantize again")
