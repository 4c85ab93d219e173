"""NaN and Inf: the message names what made them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from d2m_train.training.non_finite import find_non_finite, non_finite_error


class Root(nn.Module):
    """Its gradient at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


class Ratio(nn.Module):
    """0 / 0 where the input is 0, between two innocent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        y = self.before(x)
        out: Tensor = self.after(y * scale / y)
        return out


class Model(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 4), middle, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = self.middle(hidden, scale=x.mean()) if isinstance(self.middle, Ratio) else self.middle(hidden)
        out: Tensor = self.last(hidden)
        return out


def zeros_after_first(model: Model) -> Model:
    nn.init.zeros_(model.first.weight)
    nn.init.zeros_(model.first.bias)
    return model


def found(model: nn.Module) -> str:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    return find_non_finite(model, lambda: model(x).square().mean())


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Model(nn.ReLU())
    with torch.no_grad():
        model.last.weight[1, 2] = torch.nan
    assert found(model) == "last.weight itself is not finite (1 NaN of 8 values)"


def test_the_innermost_module_that_makes_it_is_named_not_those_that_pass_it_on() -> None:
    said = found(zeros_after_first(Model(Ratio())))
    assert said == "middle (Ratio) makes finite inputs into 20 NaN of 20 values"


def test_an_overflow_is_named_where_it_happens() -> None:
    model = Model(nn.ReLU()).to(torch.bfloat16)
    with torch.no_grad():
        model.first.weight.fill_(3e38)
    x = torch.full((1, 3), 3e38, dtype=torch.bfloat16)
    said = find_non_finite(model, lambda: model(x).sum())
    assert said == "first (Linear) makes finite inputs into 4 infinite of 4 values"


def test_a_gradient_is_named_where_the_backward_pass_meets_it_first() -> None:
    said = found(zeros_after_first(Model(nn.Sequential(Root(), nn.Identity()))))
    assert said.startswith("the gradient that reaches the output of first is not finite (")
    assert said.endswith("of 20 values), the first in the backward pass")


def test_the_loss_itself_may_be_to_blame() -> None:
    model = Model(nn.ReLU())
    x = torch.ones(1, 3)
    said = find_non_finite(model, lambda: (model(x) * 0).sum() / 0)
    assert said == "every module's output is finite, but the loss made of them is not (1 NaN of 1 values)"


def test_what_does_not_happen_again_is_said_and_no_hook_is_left() -> None:
    model = Model(nn.ReLU())
    assert found(model).startswith("nothing in a second pass")
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("checkpoint", ["checkpoints/step-000500", None])
def test_the_error_says_what_to_do(checkpoint: str | None) -> None:
    message = str(non_finite_error("first (Linear) makes …", where="Stage experts, step 512", checkpoint=checkpoint))
    assert message.startswith(
        "Stage experts, step 512: the loss or its gradient is not finite. First (Linear) makes …. "
    )
    kept = "The last good checkpoint is checkpoints/step-000500" if checkpoint else "There is no checkpoint yet"
    for part in (kept, "learning_rate", "mixed_precision=bf16", "resume=latest"):
        assert part in message
