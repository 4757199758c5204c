"""H of what comes into a matrix, and its factor, in the memory of one of them.

Source: J. Chee et al., arXiv:2307.13304, section 4 and theorem 6: what GPTQ moves by the Cholesky factor of the inverse
of H is, for the same order of columns, what the errors so far make by R of H = R R^T itself, R upper; so that no
inverse is needed. R takes the place of H above the diagonal, where H has nothing that it does not have below.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from shardq.errors import BadOption, NonFiniteWeight
from shardq.tune.settings import Order

MOST_DAMPING: Final = 1.0
LEAST_MORE: Final = 1e-4  # damping where none was not enough
STEP: Final = 256  # columns that are factored at once, and rows that are looked at


@dataclass(frozen=True, slots=True)
class Factored:
    """Columns of both are in the order in which they get codes."""

    both: torch.Tensor  # [columns, columns]: H below the diagonal, R on it and above
    own: torch.Tensor  # [columns]: the diagonal of H
    chosen: NDArray[np.int64]  # the columns of the matrix in that order
    damping: float  # share of H's mean diagonal that was added to it: more than was asked for where H needs it

    @property
    def diagonal(self) -> NDArray[np.float64]:
        """Of H, in the order of the matrix' columns."""
        found = np.empty(len(self.chosen))
        found[self.chosen] = self.own.double().numpy()
        return found

    def feedback(self, begin: int, end: int) -> torch.Tensor:
        """What the errors of all columns before `end` add to some columns before these are rounded, [end, end - begin],
        fp32: of columns among these, above the diagonal."""
        found = self.both[:end, begin:end].clone().float()
        return found.div_(found.diagonal(-begin).clone()).triu_(1 - begin)

    def weigh(self, errors: torch.Tensor) -> NDArray[np.float64]:
        """e H e^T of each row e of [rows, columns] in the chosen order."""
        return torch.cat([self._weigh(e.to(self.both.dtype)) for e in torch.split(errors, STEP)]).numpy()

    def _weigh(self, e: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(e), dtype=torch.float64)
        for begin in range(0, len(self.own), STEP):
            here = slice(begin, begin + STEP)
            by_h = e[:, begin + STEP :] @ self.both[begin + STEP :, here]
            by_h.add_(e[:, here] @ self.both[here, here].tril(-1)).mul_(2).add_(e[:, here] * self.own[here])
            found += (by_h.double() * e[:, here].double()).sum(1)
        return found


def factor_hessian(
    hessian: NDArray[Any], *, damping: float = 0.01, shrinkage: float = 0.0, order: Order = "static"
) -> Factored:
    """H [columns, columns], fp32 or fp64, symmetric: the sum or mean of x x^T over inputs x. Its memory is taken: H is
    lost. `shrinkage`, from 0 to 1, is the share of H off its diagonal that does not count in R. `damping`, from 0 to 1,
    is multiplied by 10 until H can be factored. `order` "static": columns with the largest inputs come first. H in fp64
    is factored so. Raises BadOption for damping or shrinkage beyond its range, and for an H that no damping helps,
    NonFiniteWeight for NaN or infinity in H.
    """
    if not 0 <= damping <= MOST_DAMPING:
        raise BadOption(f"GPTQ with damping {damping}: expected 0 to 1")
    if not 0 <= shrinkage <= 1:
        raise BadOption(f"GPTQ with a shrinkage of {shrinkage}: expected 0 to 1")
    columns = len(hessian)
    if not all(np.isfinite(hessian[row : row + STEP]).all() for row in range(0, columns, STEP)):
        raise NonFiniteWeight(
            f"GPTQ: H [{columns}, {columns}] holds NaN or infinity; do the model's activations overflow?"
        )
    both = torch.from_numpy(hessian)
    own = both.diagonal().clone()
    chosen = np.argsort(-own.double().numpy(), kind="stable") if order == "static" else np.arange(columns)
    if order == "static":
        _reorder(both, chosen)
        own = own[torch.from_numpy(chosen)]
    mean = own.mean().item() or 1.0
    while True:
        damped = own + damping * mean
        damped[damped == 0] = mean  # such a column has no part in anything
        _begin(both, damped, shrinkage)
        if _factor(both):
            return Factored(both, own, chosen, damping)
        if damping >= MOST_DAMPING:
            raise BadOption("GPTQ: H cannot be factored, even damped; is it symmetric, a sum of x x^T?")
        damping = min(max(damping * 10, LEAST_MORE), MOST_DAMPING)


def _reorder(square: torch.Tensor, chosen: NDArray[np.int64]) -> None:
    """Rows and columns in another order, where they lie."""
    to = torch.from_numpy(chosen)
    for row in range(0, len(square), STEP):
        square[row : row + STEP] = square[row : row + STEP][:, to]
    left = np.ones(len(chosen), bool)
    for first in range(len(chosen)):
        if not left[first]:
            continue
        kept, row = square[first].clone(), first
        while (source := int(chosen[row])) != first:
            square[row] = square[source]
            left[row], row = False, source
        square[row], left[row] = kept, False


def _begin(both: torch.Tensor, diagonal: torch.Tensor, shrinkage: float) -> None:
    """What is to be factored, on the diagonal and above, by what lies below."""
    for begin in range(0, len(both), STEP):
        here, beyond = slice(begin, begin + STEP), slice(begin + STEP, None)
        torch.mul(both[beyond, here].T, 1 - shrinkage, out=both[here, beyond])
        below = both[here, here].tril(-1)
        both[here, here] = below + below.T * (1 - shrinkage)
    both.diagonal().copy_(diagonal)


def _factor(both: torch.Tensor) -> bool:
    """R in place of H, on the diagonal and above it; False where there is none."""
    for end in range(len(both), 0, -STEP):
        begin = max(0, end - STEP)
        here, beyond = slice(begin, end), slice(end, None)
        square, right = both[here, here], both[here, beyond]
        left = square.triu() - (right @ right.T).triu_()
        lower, failed = torch.linalg.cholesky_ex(left.flip(0, 1))  # of columns from the last to the first
        if failed or not torch.isfinite(lower).all():
            return False
        upper = lower.flip(0, 1)
        square.tril_(-1).add_(upper)
        above = both[:begin, here]
        above.addmm_(both[:begin, beyond], right.T, alpha=-1)
        above.copy_(torch.linalg.solve_triangular(upper.T, above, upper=False, left=False))
    return True
