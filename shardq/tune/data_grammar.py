"""How calibration data is named: AutoRound's grammar, plus `random` and `self`.

    NAME[:option[=value]]...[,NAME[:option[=value]]...]...

Source: AutoRound 0.16.1, `calib_dataset._get_dataset_impl`. An option that it does not know, it skips; here it is an
error. `system_prompt` holds for its own set only, there also for those behind it.
"""

from dataclasses import dataclass
from typing import Final

from shardq.errors import BadOption

RANDOM: Final = "random"  # uniform ids
SELF: Final = "self"  # tokens sampled by the model itself
SYSTEM_PROMPT: Final = "You are a helpful assistant."  # AutoRound's, used where a chat template is
OPTIONS: Final = {
    "num": "num=N takes N samples of the set",
    "split": "split=NAME[+NAME] of a set of the Hub",
    "concat": "concat joins short samples",
    "apply_chat_template": "apply_chat_template makes each sample a user's message",
    "system_prompt": "system_prompt=TEXT, with a chat template",
}


@dataclass(frozen=True, slots=True)
class DataSet:
    """One named set, and what is wanted of it."""

    name: str
    samples: int | None = None  # None: its share of what all sets are asked for
    splits: tuple[str, ...] = ()  # () is the set's own default
    concat: bool = False
    chat: bool = False
    system_prompt: str = SYSTEM_PROMPT


def parse_datasets(text: str) -> tuple[DataSet, ...]:
    """The sets that a text names, in its order. Raises BadOption."""
    found = tuple(_parse_set(part.strip(), text) for part in text.split(","))
    for one in found:
        if one.name in (RANDOM, SELF) and (one.splits or one.concat or one.chat):
            raise BadOption(f"dataset {one.name!r} has no texts; the only option that it takes is num=N")
    return found


def _parse_set(part: str, text: str) -> DataSet:
    name, *options = (piece.strip() for piece in part.split(":"))
    if not name:
        raise BadOption(f"dataset {text!r}: a name is missing; expected NAME[:option=value]...[,NAME...]")
    values: dict[str, str | None] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if key not in OPTIONS:
            raise BadOption(f"dataset {name!r}: unknown option {option!r}; known are: {'; '.join(OPTIONS.values())}")
        if key in values:
            raise BadOption(f"dataset {name!r}: {key} is there twice")
        values[key] = value.strip() if equals else None
    prompt = values.get("system_prompt")
    if "system_prompt" in values and prompt is None:
        raise BadOption(f"dataset {name!r}: expected system_prompt=TEXT")
    return DataSet(
        name,
        _parse_samples(values, name),
        _parse_splits(values, name),
        _parse_flag(values, "concat", name),
        _parse_flag(values, "apply_chat_template", name) or prompt is not None,
        SYSTEM_PROMPT if prompt is None else prompt,
    )


def _parse_samples(values: dict[str, str | None], name: str) -> int | None:
    if "num" not in values:
        return None
    value = values["num"] or ""
    if not (value.isascii() and value.isdecimal() and len(value) <= 9 and int(value)):
        raise BadOption(f"dataset {name!r}: expected num=N with N of at least 1, found {value!r}")
    return int(value)


def _parse_splits(values: dict[str, str | None], name: str) -> tuple[str, ...]:
    if "split" not in values:
        return ()
    splits = tuple((values["split"] or "").split("+"))
    if not all(splits):
        raise BadOption(f"dataset {name!r}: expected split=NAME[+NAME]..., found {values['split']!r}")
    return splits


def _parse_flag(values: dict[str, str | None], key: str, name: str) -> bool:
    """True for `key` and `key=true`, False for `key=false` and where it is not there."""
    if key not in values:
        return False
    value = values[key]
    if value is not None and value.lower() not in ("true", "false"):
        raise BadOption(f"dataset {name!r}: expected {key}, {key}=true or {key}=false, found {value!r}")
    return value is None or value.lower() == "true"
