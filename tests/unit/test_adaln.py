"""AdaLN compression against float64."""

from __future__ import annotations

import pytest
import torch

from d2m_model.adaln import (
    compress,
    dense_weight,
    lost_change,
    lost_low_rank_change,
    map_change,
    pseudo_inverse,
)

H, A, N, R = 48, 12, 96, 5


@pytest.fixture
def down() -> torch.Tensor:
    """A U whose rows are neither orthogonal nor of length one."""
    return torch.randn(A, H, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, A)[:, None]


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_compressed_modulation_is_the_dense_one_it_stands_for(down: torch.Tensor) -> None:
    lin, x = randn(N, A, seed=1), randn(2, 1, H, seed=2)
    found = compress(x, down) @ lin.T
    assert torch.allclose(found, x @ dense_weight(lin, down).T, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_are_multiplied_in_float32(down: torch.Tensor) -> None:
    x = randn(3, H, seed=2).bfloat16()
    exact = x.double() @ down.double().T
    assert compress(x, down).dtype == torch.bfloat16
    assert torch.equal(compress(x, down), exact.float().bfloat16())


def test_a_change_within_the_row_space_is_mapped_without_loss(down: torch.Tensor) -> None:
    change = randn(N, A, seed=3) @ down
    inverse = pseudo_inverse(down)
    assert torch.allclose(map_change(change, inverse) @ down, change, atol=1e-4)
    lost, whole = lost_change(change, down, inverse)
    assert lost**0.5 <= 1e-5 * whole**0.5


def test_a_mapped_change_is_the_nearest(down: torch.Tensor) -> None:
    change = randn(N, H, seed=4)
    found = map_change(change, pseudo_inverse(down))
    expected = torch.linalg.lstsq(down.double().T, change.double().T).solution.T
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_the_loss_of_a_low_rank_change_comes_from_small_matrices(down: torch.Tensor) -> None:
    up, low = randn(N, R, seed=5), randn(R, H, seed=6)
    inverse = pseudo_inverse(down)
    lost, whole = lost_low_rank_change(up, low, down, inverse)
    direct, total = lost_change(up @ low, down, inverse)
    assert lost == pytest.approx(direct, rel=1e-4)
    assert whole == pytest.approx(total, rel=1e-4)
    assert 0.1 < lost / whole < 0.99


def test_nothing_is_lost_of_no_change(down: torch.Tensor) -> None:
    assert lost_low_rank_change(torch.zeros(N, R), randn(R, H, seed=6), down, pseudo_inverse(down)) == (0, 0)


def test_a_rank_deficient_projection_has_a_pseudo_inverse(down: torch.Tensor) -> None:
    down[-1] = down[0]
    inverse = pseudo_inverse(down)
    assert torch.allclose(down @ inverse @ down, down, atol=1e-5)
