"""How what is learned moves."""

import pytest
import torch

from shardq.tune.steps import LOSS_SCALE, Moved, Steps, make_steps


def _pair() -> tuple[list[Moved], torch.Tensor, torch.Tensor]:
    v, factor = torch.zeros(3, requires_grad=True), torch.ones(2, requires_grad=True)
    return [Moved((v,), 0.5, bounded=False), Moved((factor,), 0.25, bounded=True)], v, factor


def _move(steps: Steps, tensor: torch.Tensor, grad: list[float], share: float = 1.0) -> list[float]:
    tensor.grad = torch.tensor(grad)
    steps.move(share)
    assert tensor.grad is None
    found: list[float] = tensor.tolist()
    return found


def test_signs_move_by_the_rate_and_factors_stay_in_range() -> None:
    moved, v, factor = _pair()
    steps = make_steps(moved, adam=False, momentum=0)
    assert steps.loss_scale == LOSS_SCALE
    assert _move(steps, v, [3.0, -1e-9, 0.0]) == [-0.5, 0.5, 0.0]
    assert _move(steps, v, [3.0, 2.0, 0.0], share=0.5) == [-0.75, 0.25, 0.0]
    assert factor.tolist() == [1.0, 1.0]
    assert _move(steps, factor, [1.0, -1.0]) == [0.75, 1.0]


def test_momentum_remembers_gradients() -> None:
    moved, v, _ = _pair()
    steps = make_steps(moved, adam=False, momentum=0.5)
    assert _move(steps, v, [4.0, 4.0, 0.0]) == [-0.5, -0.5, 0.0]
    assert _move(steps, v, [-1.0, -3.0, 0.0]) == [-1.0, 0.0, 0.0]  # 1 and -1 are left of them


def test_adam_takes_losses_as_they_are_and_has_a_step_of_its_own() -> None:
    moved, v, factor = _pair()
    steps = make_steps(moved, adam=True, momentum=0)
    assert steps.loss_scale == 1
    assert _move(steps, v, [2.0, -8.0, 0.0]) == pytest.approx([-0.5, 0.5, 0.0])  # the first step is the rate
    assert _move(steps, factor, [-1.0, 5.0], share=0.5) == pytest.approx([1.0, 0.875])
