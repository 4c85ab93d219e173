"""A capacity router that is to work without training: its predictor and thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from d2m_model.config import Gate
from d2m_model.routers.capacity_fit import fitted_tensors, selection
from d2m_model.routers.capacity_routing import CapacityTensors, predict, route_by_threshold, share_of

H, E, CAPACITY = 32, 6, 2.0


def inputs(tokens: int, seed: int) -> Tensor:
    """Return activations like FLUX's, with some channels a thousand times larger than the others."""
    x_TH = torch.randn(tokens, H, generator=torch.Generator().manual_seed(seed))
    return x_TH * torch.logspace(-1, 2, H) + 3


def router() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(E, H, generator=generator) / torch.logspace(-1, 2, H) / H**0.5, torch.randn(
        E, generator=generator
    )


def predicted(x_TH: Tensor, tensors: CapacityTensors) -> Tensor:
    """bool [T, E]: the experts that take a token by their prediction."""
    return predict(x_TH, tensors) > tensors.threshold_E.logit()


def agreement(found_TE: Tensor, wanted_TE: Tensor) -> float:
    return float(2 * (found_TE & wanted_TE).sum() / (found_TE.sum() + wanted_TE.sum()))


def test_the_predictor_finds_what_the_experts_would_take_of_tokens_it_has_not_seen() -> None:
    seen_TH, fresh_TH = inputs(3000, 0), inputs(1000, 1)
    weight_EH, bias_E = router()
    tensors = fitted_tensors(
        seen_TH, weight_EH, bias_E, capacity=CAPACITY, width=64, generator=torch.Generator().manual_seed(0)
    )
    wanted_TE = selection(fresh_TH, weight_EH, bias_E, CAPACITY)
    assert wanted_TE.sum(0).tolist() == [share_of(1000, E, CAPACITY)] * E
    found_TE = predicted(fresh_TH, tensors)
    assert agreement(found_TE, wanted_TE) > 0.85  # by chance it would be CAPACITY / E, a third
    assert float(found_TE.sum() / 1000) == pytest.approx(CAPACITY, rel=0.1)

    routing = route_by_threshold(fresh_TH, weight_EH, bias_E, tensors, gate=Gate(mode="sum", scale=1.0))
    read_TE = torch.zeros(1000, E, dtype=torch.bool)
    read_TE[routing.token_A, routing.expert_A] = True
    assert torch.equal(read_TE, found_TE)  # what is reported is what a reader of the file gets


def test_thresholds_give_every_expert_its_share_of_the_calibration_tokens() -> None:
    seen_TH = inputs(600, 0)
    tensors = fitted_tensors(seen_TH, *router(), capacity=1.0, width=16, generator=torch.Generator().manual_seed(0))
    assert predicted(seen_TH, tensors).sum(0).tolist() == [100] * E
    assert tensors.threshold_E.min() > 0
    assert tensors.threshold_E.max() < 1


def test_the_same_seed_fits_the_same_predictor() -> None:
    def fit(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fitted_tensors(inputs(200, 0), *router(), capacity=1.0, width=8, generator=generator).in_weight_DH

    assert torch.equal(fit(0), fit(0))
    assert not torch.equal(fit(0), fit(1))
