"""Validation losses, sample grids and what is said of routers, on small models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from d2m_model.mob import BlockRouting
from d2m_model.routers import Routing
from d2m_train.data.batch import Batch
from d2m_train.data.emoji import EmojiData
from d2m_train.distillation.losses import balance_loss
from d2m_train.flow.sampling import SampleGrid, draw_grid, new_sample_grid, noise_for, pil_image, sample
from d2m_train.flow.velocity import evaluating
from d2m_train.monitor.router_statistics import (
    RouterStatistics,
    entropy,
    error_sums,
    group_sums,
    layer_sums,
    summary,
)
from d2m_train.monitor.stage_log import StageLog, read_stage_log
from d2m_train.monitor.validation import Validation
from d2m_train.run_config import EyesSection, TimestepsSection
from tests.toys.students import DIMS, LAYOUT, dense_flux, student

SECTION = EyesSection(validation_batches=2, validation_timesteps=4, samples=2, sample_steps=2, log_every=1)


@pytest.fixture(scope="module")
def data() -> EmojiData:
    return EmojiData()


@pytest.fixture(scope="module")
def validation(data: EmojiData) -> Validation:
    return Validation(data, dense_flux(), SECTION, TimestepsSection(), batch_size=2, seed=3)


# Validation


def test_the_teacher_itself_has_no_loss_and_another_model_has_the_mean_of_its_strata(validation: Validation) -> None:
    assert validation(dense_flux())["validation/loss"] == 0
    found = validation(dense_flux(seed=5))
    assert sorted(found) == [
        "validation/data",
        "validation/loss",
        *(f"validation/t{t}" for t in (0.12, 0.38, 0.62, 0.88)),
    ]
    strata = [value for name, value in found.items() if name.startswith("validation/t")]
    assert found["validation/loss"] == pytest.approx(sum(strata) / 4)
    assert min(strata) > 0.01


def test_every_stratum_is_asked_over_its_whole_width(validation: Validation) -> None:
    levels: dict[str, list[float]] = {}
    for question in validation.batches:
        levels.setdefault(question.stratum, []).extend(question.t_B.tolist())
    lowest = sorted(levels["t0.12"])
    assert lowest == pytest.approx([0.03125, 0.09375, 0.15625, 0.21875])
    assert all(question.batch.guidance_B.min() >= 1.5 for question in validation.batches)


def test_the_questions_are_the_same_every_time_and_not_what_the_run_trains_on(
    data: EmojiData, validation: Validation
) -> None:
    again = Validation(data, dense_flux(), SECTION, TimestepsSection(), batch_size=2, seed=3)
    torch.manual_seed(99)
    other = dense_flux(seed=5)
    assert again(other) == validation(other) == validation(other)
    trained_on = data.batch(0, 2, 3).images()
    assert not torch.equal(trained_on, validation.batches[0].batch.images())


def test_what_is_trained_does_not_notice_the_validation(validation: Validation) -> None:
    model = student()
    model.train()
    model.transformer_blocks[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    validation(model)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_few_step_teacher_is_asked_at_its_own_levels(data: EmojiData) -> None:
    timesteps = TimestepsSection(sampling="teacher_grid", grid_steps=4, shift=1.15)
    asked = Validation(data, dense_flux(), SECTION, timesteps, batch_size=2, seed=3)
    levels = sorted({round(float(t), 4) for question in asked.batches for t in question.t_B})
    e = math.exp(1.15)
    assert levels == pytest.approx([e / (e + 1 / t - 1) for t in (0.25, 0.5, 0.75, 1)], abs=1e-4)


class PromptsOnly(EmojiData):
    def batch(self, index: int, size: int, seed: int, *, held_out: bool = False) -> Batch:
        return replace(super().batch(index, size, seed), tokens_BTC=None)


def test_prompts_alone_are_asked_on_the_teachers_own_way_from_noise_to_image(data: EmojiData) -> None:
    teacher, timesteps = dense_flux(), TimestepsSection(grid_steps=3)
    asked = Validation(PromptsOnly(), teacher, SECTION, timesteps, batch_size=2, seed=3)
    first, second, third = [question for question in asked.batches if question.batch is asked.batches[0].batch]
    for here, following in ((first, second), (second, third)):
        step = (following.t_B - here.t_B)[:, None, None]
        torch.testing.assert_close(following.noisy_BTC, here.noisy_BTC + step * here.teacher_BTC)
    found = asked(dense_flux(seed=5))
    assert "validation/data" not in found
    assert found["validation/loss"] > 0


def test_ranks_of_a_sharded_run_all_run_every_block_of_a_group() -> None:
    model = student()
    runs: list[int] = []
    for index in (1, 2):
        model.transformer_blocks[index].attn.register_forward_hook(lambda *_, index=index: runs.append(index))
    batch, noise = question_of(model)
    model.train()
    found = []
    for every_block in (False, True):
        runs.clear()
        with evaluating(model, every_block), torch.no_grad():
            assert not model.transformer_blocks[1].ff.training
            found.append(sample(model, batch, noise, steps=1, mu=1.15))
        assert len(runs) == (2 if every_block else 1)
    torch.testing.assert_close(*found)


# Samples


def question_of(model: Any, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    batch = EmojiData().batch(0, 1, 0)
    return batch, noise_for([seed], batch.image_ids_T3, DIMS.in_channels)


def test_samples_are_those_of_diffusers_own_pipeline() -> None:
    """Schedule, shift by resolution, scaling of timestep and guidance, packing of latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from d2m_train.flow.noise import time_shift

    model = dense_flux()
    batch, noise = question_of(model)
    batch.guidance_B = torch.tensor([3.5])
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    pipeline = FluxPipeline(scheduler, None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=batch.context_BLD, pooled_prompt_embeds=batch.pooled_BV, latents=noise, height=128, width=128,
        num_inference_steps=3, guidance_scale=3.5, output_type="latent",
    ).images  # fmt: skip
    found = sample(model, batch, noise, steps=3, mu=time_shift(64, TimestepsSection()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_noise_of_an_image_depends_on_its_seed_alone_and_is_the_demos() -> None:
    from demo.sample import emoji_noise as demo_noise
    from demo.train import patchify

    ids = EmojiData().batch(0, 1, 0).image_ids_T3
    assert torch.equal(noise_for([7], ids, 64)[0], noise_for([3, 7], ids, 64)[1])
    assert torch.equal(noise_for([3, 7], ids, 64), patchify(demo_noise([3, 7])))


@pytest.fixture(scope="module")
def grid(data: EmojiData) -> SampleGrid:
    section = SECTION.model_copy(update={"prompts": ("fox in the left on blue", "cat in the top on red")})
    return new_sample_grid(data, dense_flux(), section, TimestepsSection(), seed=3)


def test_a_grid_shows_the_student_below_the_teacher_at_the_same_noise(grid: SampleGrid, tmp_path: Path) -> None:
    same, other = grid.draw(dense_flux()), grid.draw(dense_flux(seed=5))
    assert same is not None
    assert other is not None
    rows = 128 + 4
    teacher, below = ((72, 4 + row * rows, same.width, 4 + row * rows + 128) for row in (0, 1))
    assert same.size == (72 + 2 * rows, 4 + 2 * rows + 42), "with the prompts below"
    assert same.crop(teacher).tobytes() == same.crop(below).tobytes() == other.crop(teacher).tobytes()
    assert other.crop(below).tobytes() != other.crop(teacher).tobytes()


def test_a_wrapped_student_is_sampled_too(grid: SampleGrid) -> None:
    """DDP hides the model's configuration."""

    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return self.module(*arguments, **keywords)

    bare, wrapped = grid.draw(dense_flux(5)), grid.draw(Wrapped(dense_flux(5)))
    assert bare is not None
    assert wrapped is not None
    assert bare.tobytes() == wrapped.tobytes()


def test_without_an_autoencoder_there_is_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    data = EmojiData()
    monkeypatch.setattr(data, "decode", lambda tokens, ids: None)
    assert new_sample_grid(data, dense_flux(), SECTION, TimestepsSection(), seed=3).draw(student()) is None


def test_captions_stand_below_their_columns() -> None:
    plain = draw_grid({"a": torch.zeros(2, 3, 64, 64)})
    captioned = draw_grid({"a": torch.zeros(2, 3, 64, 64)}, ["a fox at the left , blue background", "cat"])
    assert captioned.height > plain.height
    assert captioned.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    assert isinstance(pil_image(torch.zeros(3, 4, 4)), Image.Image)


# Routers


def routing(experts: list[list[int]], logits: torch.Tensor) -> Routing:
    chosen = torch.tensor(experts)
    return Routing.even(experts_TK=chosen, gates_TK=torch.ones(chosen.shape), logits_TE=logits)


def test_load_and_entropy_of_a_layer_by_hand() -> None:
    logits = torch.zeros(4, 6)
    logits[2] = torch.tensor([100.0, 0, 0, 0, 0, 0])  # sure of expert 0
    sums = layer_sums(routing([[0, 1], [0, 2], [0, 1], [5, 4]], logits), torch.tensor([[True, True, True, False]]))
    found = summary({"a": sums}, {"a": student(groups=False).moe_ffns()["single_blocks.0"]})
    assert found.load["a"] == pytest.approx([3 / 6, 2 / 6, 1 / 6, 0, 0, 0])
    assert found.scalars["a/dead_experts"] == 3, "the padding token's experts count for nobody"
    assert found.scalars["a/largest_load"] == pytest.approx(0.5)
    assert found.scalars["a/load_entropy"] == pytest.approx(entropy([3, 2, 1, 0, 0, 0]))
    assert found.scalars["a/load_entropy"] == pytest.approx(1.0114043 / math.log(6))
    assert found.scalars["a/probability_entropy"] == pytest.approx(2 / 3, abs=1e-5)
    assert found.scalars["a/experts_per_token"] == 2
    assert found.scalars["largest_load"] == found.scalars["a/largest_load"]


def test_balance_is_given_with_and_without_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 6, generator=generator)
    kept = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    found = routing(logits.topk(2).indices.tolist(), logits)
    sums = layer_sums(found, kept)
    by_sequence = found.probabilities_TE.view(2, 5, 6), found.experts_TK.view(2, 5, 2)
    assert float(sums[-2]) == pytest.approx(float(balance_loss(*by_sequence, kept)))
    assert float(sums[-1]) == pytest.approx(float(balance_loss(*by_sequence)))
    assert float(sums[-1]) != float(sums[-2])


def test_a_capacity_router_counts_what_each_expert_took() -> None:
    uneven = Routing(
        token_A=torch.tensor([0, 0, 0, 2]), expert_A=torch.tensor([0, 1, 2, 0]), gate_A=torch.ones(4),
        logits_TE=torch.zeros(3, 6),
    )  # fmt: skip
    found = summary({"a": layer_sums(uneven, None)}, {"a": student(capacity=True).moe_ffns()["single_blocks.0"]})
    assert found.load["a"] == [0.5, 0.25, 0.25, 0, 0, 0]
    assert found.scalars["a/experts_per_token"] == pytest.approx(4 / 3)
    assert "a/balance" not in found.scalars


def test_block_choices_are_counted() -> None:
    chosen = torch.tensor([[True, False], [True, False], [True, False], [False, True]])
    sums = group_sums(BlockRouting(chosen_BM=chosen, logits_BM=torch.zeros(4, 2), active=1))
    found = summary({"block_groups.0": sums}, {})
    assert found.blocks == [[0.75, 0.25]]
    assert found.scalars["block_groups.0/block_0"] == 0.75
    assert found.scalars["block_groups.0/probability_entropy"] == pytest.approx(1)


def test_a_groups_error_is_compared_with_other_ways_to_choose() -> None:
    chosen = torch.tensor([[True, False], [False, True], [True, False], [True, False]])
    errors = torch.tensor([[0.5, 0.1], [0.9, 0.2], [0.3, 0.4], [0.3, 0.5]])
    sums = error_sums(BlockRouting(chosen_BM=chosen, logits_BM=torch.zeros(4, 2), active=1), errors)
    found = summary({"block_groups.0 errors": sums}, {}).scalars
    assert found["block_groups.0/error"] == pytest.approx((0.5 + 0.2 + 0.3 + 0.3) / 4)
    assert found["block_groups.0/error_random"] == pytest.approx(0.4)
    assert found["block_groups.0/error_fixed"] == pytest.approx(0.3)
    assert found["block_groups.0/error_best"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.3) / 4)


@pytest.fixture
def model(data: EmojiData) -> Any:
    """A student in training, a layer of which sends every token to the same experts."""
    model = student()
    moe = model.moe_ffns()["single_blocks.1"]
    nn.init.zeros_(moe.router.weight)
    return model.train()


def run(model: Any, batch: Batch) -> None:
    noise = noise_for(range(len(batch.pooled_BV)), batch.image_ids_T3, DIMS.in_channels)
    sample(model, batch, noise, steps=1, mu=1.15)


def test_a_run_logs_its_routers_and_warns_once_of_dead_experts(model: Any, data: EmojiData, tmp_path: Path) -> None:
    statistics = RouterStatistics(model)
    batch = data.batch(0, 2, 0)
    with StageLog(tmp_path / "experts", tmp_path / "tensorboard", SECTION, stage="experts", steps=9, start=0, main=True,
              run_name="run") as eyes:  # fmt: skip
        for step in (1, 2):
            run(model, batch)
            statistics.add(batch)
            statistics.report(eyes, step)
        statistics.report(eyes, 3)
    lines = read_stage_log(tmp_path / "experts" / "log.jsonl")
    assert [(line["step"], line.get("event")) for line in lines] == [
        (1, None), (1, "expert_load"), (1, "warning"), (2, None), (2, "expert_load"),
    ]  # fmt: skip
    scalars, load, warning = lines[:3]
    assert scalars["router/single_blocks.1/load_entropy"] == pytest.approx(math.log(2) / math.log(LAYOUT.experts))
    assert load["load"]["single_blocks.1"] == [0.5, 0.5, 0, 0, 0, 0]
    assert warning["dead"]["single_blocks.1"] == [2, 3, 4, 5]
    first = next(iter(warning["dead"]))
    assert f"({first}: {', '.join(map(str, warning['dead'][first]))}" in warning["message"]
    assert scalars["router/block_groups.0/block_0"] + scalars["router/block_groups.0/block_1"] == 1
    assert all(sum(shares) == pytest.approx(1, abs=1e-4) for shares in load["load"].values())


def test_experts_are_called_dead_after_enough_tokens_alone(model: Any, tmp_path: Path) -> None:
    """Seven experts that are chosen at random get none of a handful of tokens, and an expert without any of 600 is dead."""
    statistics = RouterStatistics(model)
    few = torch.tensor([30.0, 29, 0, 0, 0, 0])
    assert statistics._newly_dead({"a": few}) == {}
    assert statistics._newly_dead({"a": few.flip(0)}) == {}
    assert statistics._newly_dead({"a": few}) == {"a": [2, 3]}, "of three reports together"
    assert statistics._newly_dead({"a": torch.tensor([600.0, 600, 0, 0, 5, 5])}) == {}, "as before"


def test_ranks_are_taken_together(model: Any, data: EmojiData) -> None:
    both, first, second = (RouterStatistics(model) for _ in range(3))
    for index, own in enumerate((first, second)):
        batch = data.batch(index, 1, 0)
        run(model, batch)
        own.add(batch)
        both.add(batch)
    (theirs,) = [torch.cat(list(second._sums.values()))]
    reduced = first._reduced(lambda tensor: (tensor + theirs) / 2)
    ffns = model.moe_ffns()
    means, sums = (summary(found, ffns).scalars for found in (reduced, both._reduced(lambda tensor: tensor)))
    assert means == pytest.approx(sums)


def test_a_stage_without_experts_has_nothing_to_report(data: EmojiData, tmp_path: Path) -> None:
    model = student(groups=False).train()
    for moe in model.moe_ffns().values():
        moe.experts_on = False
    batch = data.batch(0, 1, 0)
    run(model, batch)
    statistics = RouterStatistics(model)
    statistics.add(batch)
    with StageLog(tmp_path, tmp_path, SECTION, stage="shared", steps=1, start=0, main=True, run_name="run") as eyes:
        statistics.report(eyes, 1)
    assert read_stage_log(tmp_path / "log.jsonl") == []
