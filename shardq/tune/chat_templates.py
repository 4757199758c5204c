"""Chat templates of a checkpoint: Jinja, in the sandbox and with the functions that transformers 5.23 gives them.

Other than there, `strftime_now` tells a fixed day: calibration data must not depend on the day it is made.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from shardq.errors import SourceUnreadable
from shardq.tune.packages import import_tuning_package

DAY: Final = datetime(2024, 7, 26, tzinfo=UTC)  # the one that templates of Llama 3.1 name where they have no clock


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A template and the texts of special tokens that it may use (`bos_token`, ...)."""

    text: str
    tokens: Mapping[str, str]
    label: str

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The messages as the model expects them, with the start of its answer.

        A template that refuses them gets them once more without those of the system, as in AutoRound. Raises
        SourceUnreadable where it refuses these, too, or is damaged; MissingPackage without jinja2.
        """
        jinja2 = import_tuning_package("jinja2", "a chat template")
        try:
            template = _environment().from_string(self.text)
            try:
                return self._render(template, messages)
            except jinja2.TemplateError:
                return self._render(template, [m for m in messages if m.get("role") != "system"])
        except Exception as error:  # a template may call anything that Jinja has
            raise SourceUnreadable(
                f"{self.label}: its chat template fails: {error}; leave apply_chat_template away"
            ) from error

    def _render(self, template: Any, messages: Sequence[Mapping[str, Any]]) -> str:
        values = {"messages": [dict(m) for m in messages], "tools": None, "documents": None}
        return str(template.render({**values, "add_generation_prompt": True, **self.tokens}))


def _environment() -> Any:
    jinja2 = import_tuning_package("jinja2", "a chat template")
    sandbox = import_tuning_package("jinja2.sandbox", "a chat template")
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = DAY.strftime
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As JSON, `<` and the like as they are: Jinja's own filter is for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
