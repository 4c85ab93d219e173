"""FLUX-MoE files in ComfyUI's own samplers, in float32, against the dense teacher and a literal reference."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.toys import files
from tests.toys.compare import distance
from tools.host import ROOT

ALL = files.LAYOUT.experts
SIZES = [(1, 16, 16), (3, 15, 17), (2, 8, 24), (1, 2, 2)]


def test_opened_without_this_pack_a_split_file_is_the_teacher(host: Comfy, pair: Pair, without_pack: None) -> None:
    opened = host.load(pair.moe_file)
    assert type(opened.model).__name__ == "Flux"
    assert distance(host.sample(opened), host.sample(pair.teacher)) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_all_experts_paint_what_the_teacher_paints(host: Comfy, pair: Pair, size: tuple[int, int, int]) -> None:
    moe = host.top_k(pair.moe, ALL)
    assert distance(host.sample(moe, size), host.sample(pair.teacher, size)) <= 1e-5


def test_all_experts_paint_what_the_teacher_paints_with_a_negative_prompt(host: Comfy, pair: Pair) -> None:
    moe = host.top_k(pair.moe, ALL)
    found, expected = host.sample(moe, (2, 16, 16), cfg=3.0), host.sample(pair.teacher, (2, 16, 16), cfg=3.0)
    assert distance(found, expected) <= 1e-5
    assert distance(host.sample(pair.teacher, (2, 16, 16)), expected) >= 1e-2


def test_all_experts_in_sorted_rows_paint_what_the_teacher_paints(
    host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where few experts are chosen; so tiny a model computes every expert at once otherwise."""
    experts, seen = host.module("d2m_model.experts"), []

    def counted(hidden: Tensor, plan: SimpleNamespace, *weights: Tensor) -> Tensor:
        seen.append((plan.tokens, len(plan.token_A)))
        return expert_down(hidden, plan, *weights)

    blocks = host.module("nodes.model.blocks")
    expert_down = blocks.expert_down
    monkeypatch.setattr(experts, "computes_every_expert", lambda *_: False)
    monkeypatch.setattr(blocks, "expert_down", counted)
    found = host.sample(host.top_k(pair.moe, ALL), steps=1)
    image, text = 8 * 8, 7
    every_ffn = [image, text, *[image + text] * files.DIMS.single_blocks]
    assert seen == [(tokens, tokens * ALL) for tokens in every_ffn]
    assert distance(found, host.sample(pair.teacher, steps=1)) <= 1e-5


@pytest.mark.parametrize(("size", "every_expert"), [(SIZES[0], False), (SIZES[1], True)])
@pytest.mark.parametrize("top_k", [0, 1, 2, ALL - 1])
@pytest.mark.parametrize("gate", ["sum", "normalised"])
def test_chosen_experts_follow_the_paper(
    host: Comfy,
    pair: Pair,
    without_pack: None,
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    gate: str,
    size: tuple[int, int, int],
    every_expert: bool,
) -> None:
    monkeypatch.setattr(host.module("d2m_model.experts"), "computes_every_expert", lambda *_: every_expert)
    reference = host.load(pair.moe_file)
    route_literally(reference.model.diffusion_model, pair.split, top_k, gate)
    found = host.sample(host.top_k(pair.moe, top_k, gate), size)
    assert distance(found, host.sample(reference, size)) <= 1e-5
    assert distance(found, host.sample(pair.teacher, size)) >= 1e-2


@pytest.mark.parametrize("top_k", [0, 2, ALL])
def test_experts_not_chosen_leave_their_mean(
    host: Comfy, pair: Pair, tmp_path: Path, request: pytest.FixtureRequest, top_k: int
) -> None:
    split = files.split(pair.dense, mean=True)
    file = files.save(split, tmp_path / "mean.safetensors")
    found = host.sample(host.top_k(host.load(file), top_k))
    request.getfixturevalue("without_pack")
    reference = host.load(file)
    route_literally(reference.model.diffusion_model, split, top_k, "sum")
    assert distance(found, host.sample(reference)) <= 1e-5
    without_mean = host.sample(host.top_k(pair.moe, top_k))
    assert (distance(found, without_mean) >= 1e-2) == (top_k < ALL)


def test_a_file_runs_at_its_own_top_k_and_gate(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    assert torch.equal(host.sample(pair.moe), host.sample(host.top_k(pair.moe, 2, "sum")))
    normalised = files.split(pair.dense, gate=files.Gate(mode="normalised", scale=2.0))
    moe = host.load(files.save(normalised, tmp_path / "normalised.safetensors"))
    assert torch.equal(host.sample(moe), host.sample(host.top_k(pair.moe, 2, "normalised")))


def test_clones_with_different_top_k_do_not_disturb_each_other(host: Comfy, pair: Pair) -> None:
    few, all_experts = host.top_k(pair.moe, 1), host.top_k(pair.moe, ALL)
    twice = host.top_k(all_experts, 3)
    first = [host.sample(model) for model in (few, all_experts, twice, pair.moe)]
    again = [host.sample(model) for model in (pair.moe, twice, all_experts, few)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(latents.flatten().tolist()) for latents in first}) == 4
    assert few.model is all_experts.model is pair.moe.model
    assert "d2m" not in pair.moe.model_options["transformer_options"]


def test_a_used_process_paints_what_a_fresh_one_paints(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    """And that one, before it loads this pack (without a warning), paints a split file as the teacher."""
    out = tmp_path / "latents.pt"
    command = [sys.executable, "-m", "tests.comfyui.stock_then_pack", str(pair.moe_file), str(out), "--top-k", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fresh = torch.load(out)
    host.sample(host.top_k(pair.moe, ALL), (2, 8, 24))
    assert torch.equal(fresh["moe"], host.sample(host.top_k(pair.moe, 2)))
    assert fresh["stock class"] == "Flux"
    assert distance(fresh["stock"], host.sample(pair.teacher)) <= 1e-5


# A literal reference: the dense FLUX with, for each token, the neurons of experts that it did not choose zeroed


def gates_of(x: Tensor, split: dict[str, Tensor], ffn: str, top_k: int, gate: str) -> Tensor:
    """Eq. 3: of every token and expert its weight [B, T, E], zero if it is not chosen."""
    logits = F.linear(x.double(), split[f"{ffn}.router.weight"].double(), split[f"{ffn}.router.bias"].double())
    alpha = logits.softmax(-1)
    chosen = alpha.topk(top_k, dim=-1)
    normalised = 2.0 * chosen.values / chosen.values.sum(-1, keepdim=True)
    values = torch.ones_like(normalised) if gate == "sum" else normalised
    return torch.zeros_like(alpha).scatter(-1, chosen.indices, values).to(x.dtype)


def of_neurons(gates: Tensor) -> Tensor:
    """Return the weight of every neuron's activation, [B, T, N], the shared expert's neurons first."""
    shared = gates.new_ones(*gates.shape[:-1], files.LAYOUT.shared)
    return torch.cat((shared, gates.repeat_interleave(files.LAYOUT.width, dim=-1)), dim=-1)


def route_literally(flux: torch.nn.Module, split: dict[str, Tensor], top_k: int, gate: str) -> None:
    """Change a stock Flux that holds the reordered weights so that it follows Eq. 1-3."""

    def missed(gates: Tensor, ffn: str) -> Tensor | float:
        mean = split.get(f"{ffn}.expert_mean")
        return 0.0 if mean is None else (1 - gates) @ mean

    def double(mlp: torch.nn.Module, ffn: str) -> None:
        def forward(x: Tensor) -> Tensor:
            gates = gates_of(x, split, ffn, top_k, gate)
            return mlp[2](mlp[1](mlp[0](x)) * of_neurons(gates)) + missed(gates, ffn)

        mlp.forward = forward

    def single(block: torch.nn.Module, ffn: str) -> None:
        linear1, act, linear2 = block.linear1.forward, block.mlp_act.forward, block.linear2.forward
        gates: list[Tensor] = []

        def first(x: Tensor) -> Tensor:
            gates[:] = [gates_of(x, split, ffn, top_k, gate)]
            return linear1(x)

        block.linear1.forward = first
        block.mlp_act.forward = lambda x: act(x) * of_neurons(gates[0])
        block.linear2.forward = lambda x: linear2(x) + missed(gates[0], ffn)

    for i in range(1, files.DIMS.double_blocks):
        for stream in ("img_mlp", "txt_mlp"):
            double(getattr(flux.double_blocks[i], stream), f"double_blocks.{i}.{stream}")
    for i in range(files.DIMS.single_blocks):
        single(flux.single_blocks[i], f"single_blocks.{i}")
