"""A model without its weights: what GGUF metadata is made from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from shardq.checkpoint import Checkpoint
from shardq.errors import SourceUnreadable
from shardq.side_files import LARGEST_BYTES
from shardq.sources.base import Source

if TYPE_CHECKING:
    from shardq.recipe import Recipe

CONFIG: Final = "config.json"
GENERATION: Final = "generation_config.json"
CARD: Final = "README.md"
TOKENIZER: Final = "tokenizer.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
SENTENCEPIECE: Final = "tokenizer.model"
ADDED_TOKENS: Final = "added_tokens.json"
MERGES: Final = "merges.txt"
TEKKEN: Final = "tekken.json"
TEMPLATE: Final = "chat_template.jinja"
TEMPLATE_JSON: Final = "chat_template.json"
MORE_TEMPLATES: Final = "additional_chat_templates/"
MODULES: Final = "modules.json"
NAMES: Final = frozenset(
    {
        CONFIG, GENERATION, CARD, TOKENIZER, TOKENIZER_CONFIG, SENTENCEPIECE, ADDED_TOKENS, MERGES, TEKKEN, TEMPLATE,
        TEMPLATE_JSON, MODULES,
    }
)  # fmt: skip


def is_wanted(name: str) -> bool:
    """True for a file of a checkpoint that says something which a GGUF file holds."""
    return name in NAMES or name.startswith(MORE_TEMPLATES)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The small files of a checkpoint, by their names in its folder; `name` is the folder's, without the path."""

    name: str
    files: Mapping[str, bytes]

    def text(self, name: str) -> str | None:
        """A file as text, line ends as text files have them; None where it is not there. Raises SourceUnreadable."""
        data = self.files.get(name)
        if data is None:
            return None
        try:
            return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise SourceUnreadable(f"{name} of {self.name}: not UTF-8: {error}") from error

    def table(self, name: str) -> dict[str, Any] | None:
        """A file that is a JSON object; None where it is not there. Raises SourceUnreadable."""
        data = self.files.get(name)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise SourceUnreadable(f"{name} of {self.name}: not JSON: {error}") from error
        if not isinstance(found, dict):
            raise SourceUnreadable(f"{name} of {self.name}: expected a JSON object, found {type(found).__name__}")
        return found

    def config(self) -> dict[str, Any]:
        """config.json. Raises SourceUnreadable, also where it is not there."""
        found = self.table(CONFIG)
        if found is None:
            raise SourceUnreadable(f"{self.name} has no {CONFIG}: GGUF metadata is made from it")
        return found


def needed_texts(checkpoint: Checkpoint, source: Source, recipes: "Sequence[Recipe]") -> Checkpoint:
    """`checkpoint`, and if one of the recipes makes a GGUF file with the content of what goes into it. Raises
    SourceUnreadable, HubAccess, HubTransfer."""
    if checkpoint.texts or not any(r.gguf for r in recipes):
        return checkpoint
    wanted = [f for f in checkpoint.side_files if is_wanted(f.name)]
    for f in wanted:
        if f.size_bytes > LARGEST_BYTES:
            raise SourceUnreadable(
                f"{checkpoint.label}, {f.name}: {f.size_bytes} bytes are too many for what its name says (at most "
                f"{LARGEST_BYTES}); remove it from the source"
            )
    return replace(checkpoint, texts={f.name: source.read(f.name, 0, f.size_bytes) for f in wanted})


def model_files(checkpoint: Checkpoint) -> ModelFiles:
    """The files of a checkpoint that has its texts, under the last part of its label."""
    config = {} if checkpoint.config_bytes is None else {CONFIG: checkpoint.config_bytes}
    return ModelFiles(checkpoint.label.rpartition("/")[2], {**checkpoint.texts, **config})
