"""How the scales of an output are chosen, and why: for the summary, and for whoever reads `shardq.json` later."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shardq.schemes import BLOCKS
from shardq.search import kind_of

if TYPE_CHECKING:
    from shardq.gguf.planned import PlannedGguf
    from shardq.plans import Plan


@dataclass(frozen=True, slots=True)
class ScaleChoice:
    """Counts of matrices that get codes, but for carried ones."""

    search: str  # as --search has it
    quantized: int
    searched: int
    weighed: int  # of those, by importance
    importance: str | None  # the file's name, that it is the sizes of columns, or both
    folded: int  # weights and vectors whose scales were moved
    left: dict[str, int]  # why others have round-to-nearest's scales -> how many
    blocks: int = 0  # in ggml's blocks, whose scales are searched as llama.cpp does
    tuned: int = 0  # whose codes were tuned before
    algorithm: str = ""  # by which

    def describe(self) -> dict[str, Any]:
        """Plain values, `text` among them."""
        return {**asdict(self), "text": self.text}

    @property
    def text(self) -> str:
        """One line."""
        parts = [f"{n} by round-to-nearest ({reason})" for reason, n in self.left.items()]
        if self.blocks:
            by = f", errors of {self.weighed} weighed by {self.importance}" if self.importance else ""
            return f"{self.blocks} as llama.cpp chooses them{by}"
        if self.searched:
            by = f", errors weighed by {self.importance}" if self.weighed else ""
            by += f" in {self.weighed}" if 0 < self.weighed < self.searched else ""
            parts.insert(0, f"{self.searched} searched{by}")
        if self.tuned:
            parts.insert(0, f"{self.tuned} tuned by {self.algorithm}")
        if self.folded:
            parts.append(f"{self.folded} tensors folded")
        return "; ".join(parts)


def choose_scales(plan: "Plan") -> ScaleChoice:
    """What a plan does. Raises nothing."""
    recipe, searches = plan.recipe, plan.searches
    if plan.gguf:
        return _choose_blocks(plan, plan.gguf)
    wanted = [d for d in plan.decisions if d.scheme and not d.carried and d.tensor.name not in plan.tuned]
    left: Counter[str] = Counter()
    for d in wanted:
        if d.tensor.name not in searches.searches:
            assert d.scheme
            nothing = kind_of(d.scheme) is None
            left["nothing to search" if nothing else _why_not(recipe.search)] += 1
    sizes = "the sizes of columns" if plan.weights.importance else ""
    label = recipe.importance.label if recipe.importance else ""
    by = " and ".join(filter(None, (label, sizes)))
    return ScaleChoice(
        search=recipe.search,
        quantized=len(wanted) + len(plan.tuned),
        searched=len(searches.searches),
        weighed=len(searches.vectors),
        importance=by if searches.vectors else None,
        folded=sum(any(e.scaling for e in d.tensor.encoded) for d in plan.decisions),
        left=dict(left),
        tuned=len(plan.tuned),
        algorithm=recipe.tuned.algorithm if recipe.tuned else "",
    )


def _choose_blocks(plan: "Plan", gguf: "PlannedGguf") -> ScaleChoice:
    blocks = [t for t in gguf.tensors if t.type in BLOCKS]
    given = plan.recipe.importance
    return ScaleChoice(
        search="none",
        quantized=len(blocks),
        searched=0,
        weighed=sum(t.weighed for t in blocks),
        importance=given.label if given else None,
        folded=0,
        left={},
        blocks=len(blocks),
    )


def _why_not(search: str) -> str:
    return "--search none" if search == "none" else "without importance a search would lose"
