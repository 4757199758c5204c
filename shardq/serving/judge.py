"""What each engine does with a checkpoint: the rows of table/ that apply."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from shardq.serving.conditions import CONDITIONS
from shardq.serving.facts import Answer, Engine, Fact, load_facts
from shardq.serving.served import GGUF, Module, Served

SHOWN: Final = 3  # places named in a reason
TP_SIZES: Final = (1, 2, 4, 8)
_WORSE: Final = {"loads": 0, "limits": 1, "no": 2}


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an engine does not simply load it."""

    fact: str  # id of the row
    answer: Answer
    text: str  # one sentence, without the places
    places: tuple[str, ...]  # the first few
    count: int  # of all places; 0 where it is about the whole
    source: str

    @property
    def told(self) -> str:
        """The sentence with its places."""
        if not self.places:
            return self.text
        more = f" and {self.count - len(self.places)} more" if self.count > len(self.places) else ""
        return f"{self.text}: {', '.join(self.places)}{more}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one engine does, as far as the way the weights are stored decides it; architectures are not looked at."""

    engine: str
    version: str
    answer: Answer
    reasons: tuple[Reason, ...]  # those with the worst answer first


def judge(served: Served, tp: int = 1, device: str = "") -> tuple[Verdict, ...]:
    """One verdict for each engine of table/, in its order, on `tp` devices.

    `device`: "" judges an engine's usual build and mentions what its CPU build lacks; "cpu" judges that build. Looks at
    headers and config.json alone, so values (such as global scales that differ) are not seen. Raises nothing.
    """
    table = load_facts()
    known = [e for e in table.engines if served.method != GGUF or GGUF in e.methods]  # of others it is not known
    return tuple(_judge_engine(e, table.facts, served, tp, device) for e in known)


def parallel_verdicts(served: Served, device: str = "") -> dict[str, dict[int, Verdict]]:
    """Engine -> tensor parallel size -> verdict, of engines that cut matrices over devices; as judge gives them."""
    table = load_facts()
    cutting = tuple(f for f in table.facts if f.parallel)
    found: dict[str, dict[int, Verdict]] = {}
    for engine in (e for e in table.engines if e.parallel):
        alone = _judge_engine(engine, table.facts, served, 1, device)
        same = [r for r in alone.reasons if r.fact not in {f.id for f in cutting}]
        found[engine.id] = {1: alone}
        for tp in TP_SIZES[1:]:
            more = _reasons(engine, cutting, served, tp, device) if served.method in engine.methods else ()
            found[engine.id][tp] = _verdict(engine, [*same, *more])
    return found


def _judge_engine(engine: Engine, facts: tuple[Fact, ...], served: Served, tp: int, device: str) -> Verdict:
    reasons: list[Reason] = []
    if served.method in engine.methods:
        reasons += _reasons(engine, facts, served, tp, device)
    elif served.quantized or served.method:
        named = served.method or "none"
        reasons.append(Reason("method", "no", f"quant_method {named}: {engine.unknown}", (), 0, engine.source))
    elif engine.methods <= {GGUF}:
        reasons.append(Reason("method", "no", engine.unknown, (), 0, engine.source))
    return _verdict(engine, reasons)


def _verdict(engine: Engine, reasons: list[Reason]) -> Verdict:
    ordered = sorted(reasons, key=lambda r: -_WORSE[r.answer])
    return Verdict(engine.id, engine.version, ordered[0].answer if ordered else "loads", tuple(ordered))


def _reasons(engine: Engine, facts: tuple[Fact, ...], served: Served, tp: int, device: str) -> Iterator[Reason]:
    for fact in facts:
        if engine.id not in fact.engines or (fact.methods and served.method not in fact.methods):
            continue
        places = _places(fact, served, tp)
        if places is None:
            continue
        answer, text = fact.answer, fact.reason
        if fact.device and fact.device != device:
            if fact.answer == "limits":
                continue  # a limit of another build limits nothing here
            answer, text = "limits", f"on {fact.device.upper()}: {text}"
        yield Reason(fact.id, answer, text, tuple(places[:SHOWN]), len(places), fact.source)


def _places(fact: Fact, served: Served, tp: int) -> list[str] | None:
    """What the row hits; [] where it is about the whole checkpoint, None where it does not apply."""
    if _selects(fact):
        chosen = [m for m in served.quantized if _fits(fact, m)]
        if not chosen:
            return None
        if not fact.check:
            whole = len(chosen) == len(served.quantized)
            return [] if whole else [m.name for m in chosen]
    if not fact.check:
        return []
    return CONDITIONS[fact.check](served, tp) or None


def _selects(fact: Fact) -> bool:
    given = (fact.symmetric, fact.activation, fact.blocks)
    return bool(fact.kinds or fact.bits or fact.groups or fact.role) or any(x is not None for x in given)


def _fits(fact: Fact, m: Module) -> bool:
    s = m.stored
    assert s is not None
    return (
        (not fact.kinds or s.kind in fact.kinds)
        and (not fact.bits or s.bits in fact.bits)
        and (not fact.groups or s.group_columns in fact.groups)
        and (fact.symmetric is None or s.symmetric == fact.symmetric)
        and (fact.activation is None or bool(s.activation) == fact.activation)
        and (fact.blocks is None or (s.group_rows > 1) == fact.blocks)
        and (not fact.role or (m.expert if fact.role == "expert" else m.role == fact.role))
    )
