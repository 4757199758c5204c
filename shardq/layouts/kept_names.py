"""Lists of modules that stay in source precision, for configurations that know one list and no exceptions from it.

vLLM 0.32 compares whole names (fp8) or looks for an entry anywhere in a name (awq, mxfp8); where it fuses matrices, it
asks for the names of all of them. transformers 5.23 takes an entry for a regular expression that matches a name from
its start up to a dot or its end, or for the end of a name. Entries are full names, so that all of them find it.
"""

import re
from collections.abc import Sequence
from typing import Final

from shardq.errors import LayoutRefuses
from shardq.layouts.base import ModuleChoice

HEAD: Final = "lm_head"


def is_head(module: str) -> bool:
    """True for the module that readers call the head; one of another name is a module like others."""
    return module.rpartition(".")[2] == HEAD


def kept_names(choices: Sequence[ModuleChoice], layout: str, *, anywhere: bool) -> list[str]:
    """What stays, by full name, and the head unless it is quantized: a tied one has no tensor, but is a Linear of the
    model.

    `anywhere`: a reader looks for entries anywhere in a name. Raises LayoutRefuses where an entry would take a
    quantized module with it.
    """
    quantized = [c.module for c in choices if c.scheme is not None]
    kept = [c.module for c in choices if c.scheme is None]
    if not any(is_head(m) for m in (*quantized, *kept)):
        kept.append(HEAD)
    text = "\n".join(quantized)  # one search for each entry: a large model has tens of thousands of names
    for entry in kept:
        found = _literal_hit(entry, quantized, anywhere) if entry in text else _regex_hit(entry, text)
        if found:
            raise LayoutRefuses(
                f"layout {layout} cannot keep {entry} beside {found}, which is quantized: its readers would take the "
                "name of the former for both; keep both, quantize both, or choose another --format"
            )
    return kept


def _literal_hit(entry: str, quantized: Sequence[str], anywhere: bool) -> str:
    """The first quantized module that an entry names as it stands."""
    for module in quantized:
        if (anywhere and entry in module) or module.endswith(entry) or module.startswith(f"{entry}."):
            return module
    return ""


def _regex_hit(entry: str, text: str) -> str:
    """The first line that an entry names as an expression. Dots stand for themselves: no name has anything else in
    their place, and a search for each entry would take minutes."""
    if re.fullmatch(r"[\w.-]*", entry):
        return ""
    try:
        found = re.search(rf"^(?:{entry})(?=\.|$).*$", text, re.MULTILINE)
    except re.error:
        return ""  # transformers fails at it; readers that compare names do not
    return found[0] if found else ""
