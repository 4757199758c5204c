"""--target: engines that the output must load in. A verdict "no" becomes a refusal before any weight is read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardq.errors import BadOption, TargetRefuses
from shardq.serving.facts import Engine, load_facts

if TYPE_CHECKING:
    from shardq.serving.served import Served


@dataclass(frozen=True, slots=True)
class Target:
    """One engine, and how it is to be run."""

    engine: str
    tp: int = 1
    device: str = ""  # "" or "cpu"

    @property
    def text(self) -> str:
        """As the option is written."""
        parts = [f"tp={self.tp}"] if self.tp > 1 else []
        parts += [f"device={self.device}"] if self.device else []
        return f"{self.engine}:{','.join(parts)}" if parts else self.engine


def parse_target(text: str) -> Target:
    """From `vllm`, `vllm:tp=8`, `vllm:tp=2,device=cpu`. Raises BadOption."""
    name, _, rest = text.strip().lower().partition(":")
    _find(name, text)
    tp, device = 1, ""
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key == "tp" and value.isdecimal() and int(value) > 0:
            tp = int(value)
        elif key == "device" and value in ("cpu", "gpu"):
            device = value if value == "cpu" else ""
        else:
            raise BadOption(f"--target {text!r}: {part!r} is not known; expected tp=N or device=cpu")
    return Target(name, tp, device)


def may_split(targets: Sequence[Target]) -> bool:
    """True if none of the targets runs fused groups as one matrix, so that their members may differ."""
    return bool(targets) and not any(_find(t.engine, t.engine).fuses for t in targets)


def check_targets(served: "Served", targets: Sequence[Target]) -> None:
    """Raises TargetRefuses with the reasons of the first target that will not load what is served."""
    for target in targets:
        if refusal := find_refusal(served, target):
            raise TargetRefuses(
                f"--target {target.text}: {refusal}; change --scheme, --format or --ignore, or leave the target out"
            )


def find_refusal(served: "Served", target: Target) -> str | None:
    """Why a target will not load what is served; None if it does, perhaps with limits."""
    from shardq.serving.judge import judge

    verdict = next((v for v in judge(served, target.tp, target.device) if v.engine == target.engine), None)
    if verdict is None:
        return "it is not known to load GGUF files"
    if verdict.answer != "no":
        return None
    told = "; ".join(f"{r.told} ({r.source})" for r in verdict.reasons if r.answer == "no")
    return f"{verdict.engine} {verdict.version} will not load this: {told}"


def _find(name: str, text: str) -> Engine:
    engines = load_facts().engines
    found = next((e for e in engines if e.id == name), None)
    if found is None:
        raise BadOption(f"--target {text!r}: expected one of {', '.join(e.id for e in engines)}")
    return found
