"""A model without its weights: what GGUF metadata is made from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from shardq.errors import SourceUnreadable

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
