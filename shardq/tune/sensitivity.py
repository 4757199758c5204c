"""What each scheme does to a model's predictions, measured for each matrix alone: for mixtures of a size.

KL(model || quantized model) is, for small changes D of a matrix, sum_ij F_ij D_ij^2 / 2 as far as changes of single
weights do not go together, which those of rounding do not. F is the diagonal of the Fisher information: the mean of
squared gradients of log p(y) where each y is drawn from the model's own predictions. Gradients are those of the whole
model, sums over all tokens of a sample: what tokens have to do with each other cancels on average, as every y is drawn
for itself. D is the error of the nearest codes: under round-to-nearest's scales or, for algorithms that weigh errors by
what comes in, under searched ones; a mixture by the one has a tenth to a fifth more KL with the other. Sources:
Y. LeCun et al., "Optimal brain damage" (1990) for the diagonal; J. Martens, "New insights and perspectives on the
natural gradient method" (JMLR 21, 2020), section 5, for KL and the drawn labels. In bench/README.md mixtures by this
have less KL than those by auto-round 0.16.1's AutoScheme, sum |g D| of the text's own loss.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shardq.importance_vectors import Ref, read_vector, weights_of
from shardq.kernels import load
from shardq.limits import SpoolAs
from shardq.measured import Measured, check_modules, read_measured, write_measured
from shardq.mixing import open_choice
from shardq.mixture import Option
from shardq.plans import Plan, make_plan
from shardq.quantizers.decode import decode_rows
from shardq.recipe import Recipe
from shardq.search import Search
from shardq.searching import choose_search, find_vectors
from shardq.sources.base import Source
from shardq.tune.backward import Loss, Passed, Told, block_gradients, head_gradients, pass_blocks
from shardq.tune.block_rtn import BLOCK, importance_of
from shardq.tune.blocks import BlockModel
from shardq.tune.data_random import draw_fractions
from shardq.tune.driver import Told as Report
from shardq.tune.driver import draw_samples
from shardq.tune.inputs import Inputs, recording
from shardq.tune.options import DataOptions, TuneOptions
from shardq.tune.spool import Spooling
from shardq.tune.subjects import Subject, find_subjects
from shardq.tune.tokenizing import open_tokenizer
from shardq.tune.work import quantize_alone, rows_of

if TYPE_CHECKING:
    from shardq.kernels import KernelSet

MEASURE: Final = 3  # another number where the same words give other figures
SAMPLES: Final = 16  # as many as AutoScheme takes, and of so many tokens
TOKENS: Final = 256
LABELS: Final = 1  # what the seed of labels is more than that of samples


@dataclass(frozen=True, slots=True)
class Measuring:
    """What figures are measured with."""

    options: str  # as --options
    data: DataOptions
    searched: bool = True  # scales are, by the recipe's importance or else by what comes in; else round-to-nearest's
    dtype: str = "float32"  # what is computed with; auto: the model's own
    spool: SpoolAs = "auto"  # how hidden states lie in files; changes no figure

    @classmethod
    def of(cls, options: str, tuning: TuneOptions) -> "Measuring":
        """For a tuning, and with its data, but no more of it than is needed here."""
        data = tuning.data
        less = replace(data, nsamples=min(data.nsamples, SAMPLES), seqlen=min(data.seqlen, TOKENS))
        return cls(options, less, tuning.codes != "rtn", tuning.dtype or "float32", tuning.compute.spool)


@dataclass(frozen=True, slots=True)
class Given:
    """The importance that a recipe brings along, and the searches that its own run makes with it."""

    vectors: Mapping[str, Ref]  # by tensor
    searches: tuple[Search | None, ...]  # for each option; None: round-to-nearest's scales, or no codes


def measure_damages(
    source: Source, recipe: Recipe, measuring: Measuring, path: Path, *, max_ram_bytes: int | None = None,
    max_disk_bytes: int | None = None, trust_remote_code: bool = False, report: Report | None = None,
) -> Measured:  # fmt: skip
    """The damage that each of the options does in each matrix that `recipe` quantizes in a block, in nats for a token;
    from the file `path` if that has the same figures, else measured and written there.

    In memory: a block, its gradients for one sample and the sums of their squares, and what goes into every block,
    which beyond `max_ram_bytes` lies in files beside `path`, of at most `max_disk_bytes`. Raises RecipeChanged for a
    file of other figures, BadOption, NonFiniteWeight, BudgetTooSmall, and what planning and reading raise.
    """
    dtype = None if measuring.dtype == "auto" else getattr(torch, measuring.dtype)
    with BlockModel.open(source, dtype=dtype, trust_remote_code=trust_remote_code) as model:
        plan, choice = make_plan(model.checkpoint, recipe), open_choice(model.checkpoint, recipe, measuring.options)
        offered = choice.offered
        identity = _identity(plan, measuring, offered)
        if found := read_measured(path, identity):
            return found
        subjects = find_subjects(model, plan)
        check_modules(choice.free, {s.module for own in subjects.blocks for s in own})
        tokenizer = open_tokenizer(source, trust_remote_code)
        samples = draw_samples(model, tokenizer, measuring.data, max_ram_bytes)
        given = _find_given(plan, recipe, offered) if measuring.searched else Given({}, ())
        spooling = Spooling(path.parent, max_ram_bytes, max_disk_bytes, measuring.spool)
        passed, back, told = _begin(model, samples.ids, measuring, spooling, report)
        damages: dict[str, tuple[float, ...]] = {}
        for index in reversed(range(len(model.block_names))):
            own = subjects.blocks[index]
            damages |= _measure_block(model, index, own, offered, passed, back, measuring.searched, given)
            told()
        count, tokens = samples.ids.shape
        how = f"KL in nats for a token, by gradients of {count} samples of {tokens} tokens ({samples.kind})"
        names = tuple(o.name for o in offered)
        measured = Measured(how, names, damages, samples.kind, measuring.searched)
        write_measured(path, measured, identity)
        return measured


def _identity(plan: Plan, measuring: Measuring, offered: tuple[Option, ...]) -> Mapping[str, Any]:
    schemes = {o.name: asdict(o.scheme) if o.scheme else None for o in offered}
    return {**plan.identity(), "options": schemes, "data": asdict(measuring.data), "dtype": measuring.dtype,
            "searched": measuring.searched, "measure": MEASURE}  # fmt: skip


def _find_given(plan: Plan, recipe: Recipe, offered: tuple[Option, ...]) -> Given:
    vectors, _ = find_vectors([d for d in plan.decisions if d.scheme], recipe.importance, {})
    given = recipe.importance
    return Given(vectors, tuple(choose_search(o.scheme, recipe, given, True) if o.scheme else None for o in offered))


def _begin(
    model: BlockModel, ids: Tensor, measuring: Measuring, spooling: Spooling, report: Report | None,
) -> tuple[Passed, Tensor, Told]:  # fmt: skip
    """A pass through the model, the gradients behind its last block, and what is told of each block."""
    told = _count_up(2 * len(model.block_names), report)
    passed = pass_blocks(model, ids, spooling, told)
    loss = label_loss(tuple(ids.shape), measuring.data.seed + LABELS)
    return passed, head_gradients(model, passed.batch.hidden, loss), told


def _measure_block(
    model: BlockModel, index: int, subjects: tuple[Subject, ...], offered: tuple[Option, ...], passed: Passed,
    back: Tensor, searched: bool, given: Given,
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """Of the matrices of a block, by module; `back` goes through it. Matrices without importance that is given have
    that of their inputs, which are recorded."""
    batch, tokens, kernels = passed.batch.moved(passed.inputs[index]), back[..., 0].numel(), load()
    names = tuple(dict.fromkeys(s.place.parameter for s in subjects))
    squares: dict[str, Tensor] = {}
    with model.block(index) as block:
        if index:
            model.prefetch(index - 1)
        with recording(block, BLOCK, "routed") if searched else nullcontext(Inputs({}, {})) as inputs:
            for found in block_gradients(model, block, index, batch, back, names):
                for name, gradient in found.items():
                    squared = gradient.float().square()
                    squares[name] = squares[name].add_(squared) if name in squares else squared
        found_by: dict[str, tuple[float, ...]] = {}
        for s in subjects:
            ref, sums = given.vectors.get(s.tensor), squares.get(s.place.parameter)
            importance = weights_of(read_vector(ref)) if ref else importance_of(inputs, s)
            searches = given.searches if ref else ()
            found_by[s.module] = damages_of(block, s, sums, offered, tokens, kernels, importance, searches)
        return found_by


def label_loss(shape: tuple[int, ...], seed: int) -> Loss:
    """Minus the log-probability of labels that are drawn from the predictions for samples of `shape` [samples, tokens],
    summed over tokens; the labels of a token depend on the seed and the predictions alone."""
    chances = torch.from_numpy(draw_fractions(int(np.prod(shape)), seed).reshape(shape))

    def loss(logits: Tensor, sample: int, begin: int) -> Tensor:
        bounds = logits.detach().double().softmax(-1).cumsum(-1)
        own = chances[sample, begin : begin + len(logits), None]
        labels = torch.searchsorted(bounds, own * bounds[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
        return nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum")

    return loss


@torch.no_grad()
def damages_of(
    block: nn.Module, subject: Subject, squares: Tensor | None, offered: tuple[Option, ...], tokens: int,
    kernels: "KernelSet", importance: NDArray[np.float32] | None = None, searches: tuple[Search | None, ...] = (),
) -> tuple[float, ...]:  # fmt: skip
    """Of one matrix under each option, in nats for a token, with the nearest codes, under round-to-nearest's scales or
    those searched with importance [columns], by `searches` for each option where there are any. `squares`: of gradients
    of its parameter, summed over samples, in fp32; None where no token has reached it, which nothing harms. Experts to
    which a router gives few tokens count less: a group of experts has the damage of what its tokens meet."""
    if squares is None:
        return (0.0,) * len(offered)
    weight = rows_of(block, [subject])
    counts = subject.place.of(squares).contiguous().numpy()
    found = []
    for o, search in zip(offered, searches or (None,) * len(offered), strict=True):
        if o.scheme is None:
            found.append(0.0)
            continue
        codes = quantize_alone(weight, replace(subject, scheme=o.scheme), kernels, None, importance, search)
        error = weight - decode_rows(codes, o.scheme, kernels)
        found.append(float(np.sum(counts * error * error, dtype=np.float64)) / (2 * tokens))
    return tuple(found)


def _count_up(total: int, report: Report | None) -> Told:
    done = 0

    def told() -> None:
        nonlocal done
        done += 1
        if report:
            report(done, total)

    return told
