"""A third kind of token router needs one class and one entry of KINDS; everything else asks the seam."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from d2m_model import cost
from d2m_model.checkpoint import CheckpointError, check_state_dict
from d2m_model.config import ConfigError, FluxMoEConfig
from d2m_model.conversion.ffn import Recipe, plan_with_data
from d2m_model.conversion.interfaces import FFNWeights
from d2m_model.fields import expect
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel
from d2m_model.hosts.diffusers.tensors import flux_moe_tensors
from d2m_model.moe import FusedFFN, MoEFFN
from d2m_model.routers import (
    KINDS,
    Gate,
    RouterCompanion,
    RouterTensors,
    Routing,
    TokenRouter,
    router_from_text,
    router_to_text,
)
from d2m_model.routers.routing import float32_linear
from d2m_model.routers.token_router import BIAS, WEIGHT
from d2m_model.trace import Evaluation, Pass, Run
from d2m_model.trace_record import SampleKey
from d2m_train.distillation.stages import plan_stage, trainable_stages
from d2m_train.run_config import StageSection
from tests.toys import files, pairs

LAYOUT = files.LAYOUT
SUM = Gate(mode="sum", scale=1.0)


class Turns(RouterCompanion):
    """The order of the experts, a buffer."""

    turns: Tensor

    def __init__(self, turns_E: Tensor) -> None:
        super().__init__()
        self.register_buffer("turns", turns_E.detach().clone())

    def forward(self) -> dict[str, Tensor]:
        return {"turns": self.turns}

    def reset_parameters(self) -> None:
        self.turns.copy_(torch.arange(len(self.turns)))


@dataclass(kw_only=True, frozen=True)
class RoundRobin(TokenRouter):
    """Every token goes to one expert after the other, in the order of the file's `turns` [E], from `first` on."""

    first: int = 0

    kind: ClassVar[str] = "round_robin"
    named: ClassVar[str] = "round-robin routers"
    setting: ClassVar[str] = "top_k"
    label: ClassVar[str] = "Top-K"
    option: ClassVar[str] = "--top-k"
    steering: ClassVar[str] = "its routers deal experts out in turn. Set `top_k` instead."
    whole: ClassVar[bool] = True
    needs_data: ClassVar[bool] = False
    balanced: ClassVar[bool] = False
    companion_name: ClassVar[str | None] = "order"
    names_in_model: ClassVar[Mapping[str, str]] = {"turns": "order.turns"}

    def check(self, experts: int) -> None:
        expect(self.first >= 0, "round_robin_router.first", self.first, "0 or more")

    def shapes(self, hidden_size: int, experts: int) -> dict[str, tuple[int, ...]]:
        return {**super().shapes(hidden_size, experts), "turns": (experts,)}

    def problems(self, ffn: str, tensor: Callable[[str], Tensor]) -> Iterator[str]:
        if len(tensor(f"{ffn}.turns").unique()) < len(tensor(f"{ffn}.turns")):
            yield f"{ffn}.turns has an expert twice."

    def route(self, x_TH: Tensor, tensors: RouterTensors, *, gate: Gate, value: float) -> Routing:
        logits_TE = float32_linear(x_TH, tensors[WEIGHT], tensors.get(BIAS))
        tokens, experts = logits_TE.shape
        turns_T1 = self.first + torch.arange(tokens)[:, None]
        experts_TK = tensors["turns"].long()[(turns_T1 + torch.arange(int(value))) % experts]
        return Routing.even(experts_TK, torch.ones(experts_TK.shape), logits_TE)

    def companion(self, tensors: RouterTensors) -> Turns:
        return Turns(tensors["turns"])

    def own_value(self, top_k: int) -> float:
        return top_k

    def checked(self, value: float, experts: int) -> float:
        return value

    def highest(self, experts: int) -> int:
        return experts

    def described(self, top_k: int) -> str:
        return f"{top_k} experts in turn"

    def experts_per_token(self, value: float, experts: int) -> float:
        return value

    @classmethod
    def for_conversion(cls, *, top_k: int, predictor_width: int) -> RoundRobin:
        return cls()

    def fit(self, x_TH: Tensor, tensors: RouterTensors, generator: torch.Generator) -> dict[str, Tensor]:
        return {"turns": torch.randperm(len(tensors[WEIGHT]), generator=generator).float()}


ROUTER = RoundRobin(first=1)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, RoundRobin.kind, RoundRobin)


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """A small FLUX-MoE with round-robin routers."""
    split = files.split(files.dense_flux(pairs.DIMS), pairs.DIMS)
    config = replace(FluxMoEConfig.from_json(bytes(split["d2m_config"].numpy())), router=ROUTER)
    turns = {f"{ffn}.turns": torch.arange(layout.experts).flip(0).float() for ffn, layout in config.ffns.items()}
    return split | turns | {"d2m_config": files.config_tensor(config.to_json())}


def test_its_configuration_is_written_read_and_checked(tensors: dict[str, Tensor]) -> None:
    config = check_state_dict(tensors)
    assert config.router == ROUTER
    written = json.loads(config.to_json())
    assert written["round_robin_router"] == {"first": 1}
    assert written["capacity_router"] is None
    assert router_from_text(router_to_text(ROUTER)) == ROUTER
    with pytest.raises(ConfigError, match=r"round_robin_router\.first is -1; expected 0 or more"):
        replace(config, router=RoundRobin(first=-1))
    written["capacity_router"] = {"capacity": 2.0, "width": 8}
    with pytest.raises(ConfigError, match="capacity_router and round_robin_router'; expected one of them"):
        FluxMoEConfig.from_json(json.dumps(written))


def test_its_tensors_are_checked(tensors: dict[str, Tensor]) -> None:
    name = "single_blocks.0.turns"
    with pytest.raises(CheckpointError, match=r"single_blocks\.0\.turns is missing \(expected shape \[12\]\)"):
        check_state_dict({other: tensor for other, tensor in tensors.items() if other != name})
    with pytest.raises(CheckpointError, match=r"single_blocks\.0\.turns has an expert twice"):
        check_state_dict(tensors | {name: torch.zeros(LAYOUT.experts)})
    with pytest.raises(CheckpointError, match=r"single_blocks\.0\.turns has NaN or infinite values"):
        check_state_dict(tensors | {name: torch.full((LAYOUT.experts,), math.nan)})


def test_a_moe_ffn_runs_the_experts_that_it_chooses(tensors: dict[str, Tensor]) -> None:
    ffn, hidden = "single_blocks.0", pairs.DIMS.hidden_size
    router = {name: tensors[f"{ffn}.{name}"] for name in (WEIGHT, BIAS)} | {"turns": tensors[f"{ffn}.turns"]}
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(LAYOUT.neurons, hidden, generator=generator), torch.randn(hidden, LAYOUT.neurons)
    fused = FusedFFN(
        up_weight_NH=up, up_bias_N=torch.zeros(LAYOUT.neurons), down_weight_HN=down, down_bias_H=torch.zeros(hidden),
        router=router, expert_mean_EH=None,
    )  # fmt: skip
    layer = MoEFFN(fused, layout=LAYOUT, gate=SUM, top_k=2, router=ROUTER)
    x = torch.randn(5, hidden, generator=generator)
    assert layer.route(x).experts_TK.tolist() == [[10, 9], [9, 8], [8, 7], [7, 6], [6, 5]]
    for t, chosen in enumerate(layer.route(x).experts_TK.tolist()):
        experts = [
            LAYOUT.shared + expert * LAYOUT.width + neuron for expert in chosen for neuron in range(LAYOUT.width)
        ]
        neurons = [*range(LAYOUT.shared), *experts]
        expected = down[:, neurons] @ torch.nn.functional.gelu(up[neurons] @ x[t], approximate="tanh")
        torch.testing.assert_close(layer(x)[t], expected, rtol=1e-4, atol=1e-3)
    assert {name: tensor.shape for name, tensor in layer.fused().router.items()} == {
        name: tensor.shape for name, tensor in router.items()
    }


def test_a_model_of_the_file_samples_traces_and_saves(tensors: dict[str, Tensor]) -> None:
    model = FluxMoETransformer2DModel.from_single_file(tensors)
    few = pairs.velocity(model)
    model.set_top_k(5)
    many = pairs.velocity(model)
    assert few.isfinite().all()
    assert not torch.equal(few, many)
    saved = dict(flux_moe_tensors(model, model.flux_moe))
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())

    run = Run(model.flux_moe, (1, 4), 2**20)
    heard = Pass([SampleKey("positive", 0, 0)], 3, 0)
    routing = model.moe_ffns()["single_blocks.0"].route(torch.randn(7, pairs.DIMS.hidden_size))
    heard.recorder.experts("single_blocks.0", routing, batch=1, gate=Gate(mode="normalised", scale=1.0))
    run.end(Evaluation(torch.ones(1), {}, [heard]))
    trace = run.finish()
    assert trace.described["router"] == "round_robin"
    layer = trace.choices(0, trace.samples[0])["single_blocks.0"]
    assert layer.experts_TK.tolist() == routing.experts_TK.tolist()


def test_it_trains_by_the_distillation_alone(tensors: dict[str, Tensor]) -> None:
    model = FluxMoETransformer2DModel.from_single_file(tensors).train()
    pairs.velocity(model).square().sum().backward()
    gradient = model.get_parameter("single_transformer_blocks.0.proj_out.moe.routed_up").grad
    assert gradient is not None
    assert gradient.any()
    config = model.flux_moe
    assert "experts" in trainable_stages(config)
    assert not plan_stage("experts", config, StageSection(steps=1)).token_balance


def test_it_costs_its_tensors_and_the_experts_that_run(tensors: dict[str, Tensor]) -> None:
    hidden, config = pairs.DIMS.hidden_size, check_state_dict(tensors)
    two, five = (cost.ffn(hidden, LAYOUT, k, 7, ROUTER) for k in (2, 5))
    plain = cost.ffn(hidden, LAYOUT, 2, 7)
    assert two.total - plain.total == LAYOUT.experts  # turns
    assert two.flops == plain.flops
    assert five.touched - two.touched == pytest.approx(3 * (2 * hidden + 1) * LAYOUT.width)
    conversion = cost.Conversion.of(config, 5)
    assert (conversion.experts_per_token, conversion.router) == (5, ROUTER)


def test_a_conversion_fits_it() -> None:
    layout = replace(LAYOUT, shared=16, experts=4, width=8)
    generator = torch.Generator().manual_seed(0)
    weights = FFNWeights(
        up_NH=torch.randn(layout.neurons, 16, generator=generator),
        up_bias_N=torch.zeros(layout.neurons),
        down_HN=torch.randn(16, layout.neurons, generator=generator),
        down_bias_H=torch.zeros(16),
    )
    recipe = Recipe(
        experts="dealt", router="centroid", mean=False, refit=False, top_k=2, seed=0,
        token_router=KINDS["round_robin"].for_conversion(top_k=2, predictor_width=8),
    )  # fmt: skip
    inputs_TH = torch.randn(40, 16, generator=generator)
    plan, report = plan_with_data("x", weights, layout, torch.rand(layout.neurons), inputs_TH, recipe)
    assert set(plan.router) == {WEIGHT, "turns"}
    assert sorted(plan.router["turns"].tolist()) == [0, 1, 2, 3]
    assert report.converted > report.oracle
