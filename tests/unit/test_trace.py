"""A trace equals the routers' choices, and recording costs one copy off the device for each evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_model.config import BlockGroup, FFNLayout, FluxDims, FluxMoEConfig, Gate, Teacher
from d2m_model.mob import BlockRouting, SampleSubset
from d2m_model.routers import TOP_K_ROUTER, CapacityRouter, Routing
from d2m_model.routers.top_k import route_top_k
from d2m_model.trace import Evaluation, Pass, Run
from d2m_model.trace_record import SampleKey, Trace

NONE = 255  # no expert
EXPERTS, HIDDEN = 12, 32
SUM, NORMALISED = Gate(mode="sum", scale=2.0), Gate(mode="normalised", scale=2.0)
GRID, TEXT = (3, 4), 5
IMAGE = GRID[0] * GRID[1]
IMG, TXT, JOINT = "double_blocks.0.img_mlp", "double_blocks.0.txt_mlp", "single_blocks.0"
LENGTHS = {IMG: IMAGE, TXT: TEXT, JOINT: TEXT + IMAGE}
ONE, TWO = SampleKey("positive", 0, 0), SampleKey("positive", 0, 1)
NEGATIVE = SampleKey("negative", 0, 0)
GROUP = BlockGroup(kind="single", first=0, blocks=2, active=1, selection="topk")


DIMS = FluxDims(
    hidden_size=128, double_blocks=1, single_blocks=2, in_channels=64, out_channels=64,
    context_size=64, vector_size=32, guidance_embed=True,
)  # fmt: skip
LAYOUT = FFNLayout(shared=128, experts=EXPERTS, width=32)
CONFIG = FluxMoEConfig(
    dims=DIMS, ffns={JOINT: LAYOUT, TXT: LAYOUT, IMG: LAYOUT}, groups=(), gate=NORMALISED, top_k=2,
    adaln_rank=None, split_only=True, teacher=Teacher(title="t", sha256="0" * 64, licence="none"),
)  # fmt: skip


def config(**other: Any) -> FluxMoEConfig:
    return replace(CONFIG, **other)


def routed(rows: int, top_k: int = 2, gate: Gate = NORMALISED, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    x_TH, weight_EH = torch.randn(rows, HIDDEN, generator=generator), torch.randn(EXPERTS, HIDDEN, generator=generator)
    return route_top_k(x_TH, weight_EH * 0.3, None, top_k=top_k, gate=gate)


def unevenly(rows: int, seed: int = 0) -> Routing:
    """Some tokens have no expert, some have many."""
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(rows, EXPERTS, generator=generator)
    chosen_TE = torch.rand(rows, EXPERTS, generator=generator) < torch.linspace(0, 0.9, rows)[:, None]
    token_A, expert_A = chosen_TE.nonzero().unbind(1)
    gate_A = 3.5 * logits_TE.softmax(-1)[token_A, expert_A]
    return Routing(token_A=token_A, expert_A=expert_A, gate_A=gate_A, logits_TE=logits_TE)


def margins(logits_TE: Tensor) -> np.ndarray:
    best = logits_TE.softmax(-1).sort(descending=True).values
    return ((best[:, 0] - best[:, 1]) * 255).numpy()


def traced(made: FluxMoEConfig, *passes: Pass, sigma: float = 0.75) -> Trace:
    run = Run(made, GRID, 2**20)
    run.end(Evaluation(torch.tensor([sigma]), {"top_k": 2}, list(passes)))
    return run.finish()


def test_what_a_top_k_router_chose_is_read_back_for_every_sample() -> None:
    listening = Pass([ONE, TWO], TEXT, 0)
    routings = {ffn: routed(2 * length, seed=seed) for seed, (ffn, length) in enumerate(LENGTHS.items())}
    for ffn, routing in routings.items():
        listening.recorder.experts(ffn, routing, batch=2, gate=NORMALISED)
    trace = traced(config(), listening)
    assert trace.layers == [IMG, TXT, JOINT]
    for row, key in enumerate((ONE, TWO)):
        choices = trace.choices(0, key)
        for ffn, routing in routings.items():
            rows = slice(row * LENGTHS[ffn], (row + 1) * LENGTHS[ffn])
            assert np.array_equal(choices[ffn].experts_TK, routing.experts_TK[rows].numpy())
            # 255 is the scale, the most that one expert can weigh.
            assert np.abs(choices[ffn].gates_TK / 255 - routing.gates_TK[rows].numpy() / 2.0).max() <= 0.5 / 255 + 1e-6
            assert np.abs(choices[ffn].margin_T - margins(routing.logits_TE[rows])).max() <= 0.5 + 1e-3
            load = trace.described["steps"][0]["samples"][row]["load"][trace.layers.index(ffn)]
            assert load == routing.experts_TK[rows].flatten().bincount(minlength=EXPERTS).tolist()
    assert trace.described["steps"][0]["sigma"] == 0.75


def test_what_a_capacity_router_chose_is_read_back_best_first() -> None:
    made = config(router=CapacityRouter(capacity=2.0))
    listening = Pass([ONE, TWO], TEXT, 0)
    routings = {ffn: unevenly(2 * length, seed=seed) for seed, (ffn, length) in enumerate(LENGTHS.items())}
    for ffn, routing in routings.items():
        listening.recorder.experts(ffn, routing, batch=2, gate=NORMALISED)
    trace = traced(made, listening)
    for row, key in enumerate((ONE, TWO)):
        for ffn, layer in trace.choices(0, key).items():
            routing, first = routings[ffn], row * LENGTHS[ffn]
            alpha_TE = routing.probabilities_TE
            for token in range(LENGTHS[ffn]):
                chosen = routing.expert_A[routing.token_A == first + token].tolist()
                chosen.sort(key=lambda expert, at=first + token: -float(alpha_TE[at, expert]))
                found = layer.experts_TK[token]
                assert found[: len(chosen)].tolist() == chosen
                assert (found[len(chosen) :] == NONE).all()
                expected = alpha_TE[first + token, chosen].numpy() * 255
                assert np.abs(layer.gates_TK[token, : len(chosen)] - expected).max(initial=0) <= 0.5 + 1e-3
    most = max(int(routing.token_A.bincount().max()) for routing in routings.values())
    assert trace.slots == most
    assert trace.described["router"] == "capacity"


@pytest.mark.parametrize("top_k", [0, 1, EXPERTS])
def test_experts_that_count_whole_have_the_largest_gate(top_k: int) -> None:
    listening = Pass([ONE], TEXT, 0)
    routing = routed(LENGTHS[JOINT], top_k, SUM)
    listening.recorder.experts(JOINT, routing, batch=1, gate=SUM)
    layer = traced(config(), listening).choices(0, ONE)[JOINT]
    assert layer.gates_TK.shape == (LENGTHS[JOINT], top_k)
    assert (layer.gates_TK == 255).all()
    assert np.abs(layer.margin_T - margins(routing.logits_TE)).max() <= 0.5 + 1e-3


def test_blocks_of_a_group_tell_which_samples_they_ran_on() -> None:
    samples = [ONE, TWO, NEGATIVE]
    listening = Pass(samples, TEXT, 0)
    chosen_BM = torch.tensor([[True, False], [False, True], [True, False]])
    listening.recorder.blocks(0, BlockRouting(chosen_BM=chosen_BM, logits_BM=chosen_BM.float(), active=1))
    some = SampleSubset.of(2, torch.tensor([0, 2, 1]))
    routing = routed(2 * LENGTHS[JOINT])
    listening.recorder.part(some, whole=False).experts(JOINT, routing, batch=2, gate=NORMALISED)
    trace = traced(config(groups=(GROUP,)), listening)
    assert [trace.steps[0].blocks(0, row)[0] for row in range(3)] == chosen_BM.tolist()
    assert JOINT not in trace.choices(0, TWO)
    for part, key in enumerate((ONE, NEGATIVE)):
        rows = slice(part * LENGTHS[JOINT], (part + 1) * LENGTHS[JOINT])
        assert np.array_equal(trace.choices(0, key)[JOINT].experts_TK, routing.experts_TK[rows].numpy())


def test_a_block_that_is_shown_the_whole_batch_counts_for_those_who_chose_it() -> None:
    """This happens when another pack changes the attention."""
    listening = Pass([ONE, TWO, NEGATIVE], TEXT, 0)
    routing = routed(3 * LENGTHS[JOINT])
    some = SampleSubset.of(1, torch.tensor([1, 0, 2]))
    listening.recorder.part(some, whole=True).experts(JOINT, routing, batch=3, gate=NORMALISED)
    trace = traced(config(), listening)
    assert [JOINT in trace.choices(0, key) for key in (ONE, TWO, NEGATIVE)] == [False, True, False]
    rows = slice(LENGTHS[JOINT], 2 * LENGTHS[JOINT])
    assert np.array_equal(trace.choices(0, TWO)[JOINT].experts_TK, routing.experts_TK[rows].numpy())


def test_a_block_that_another_pack_runs_on_an_unknown_part_of_the_batch_is_left_out() -> None:
    listening = Pass([ONE, TWO, NEGATIVE], TEXT, 0)
    part = SampleSubset.of(1, torch.tensor([1, 0]))
    listening.recorder.part(part, whole=False).experts(JOINT, routed(LENGTHS[JOINT]), batch=1, gate=NORMALISED)
    listening.recorder.experts(IMG, routed(2 * IMAGE), batch=2, gate=NORMALISED)
    trace = traced(config(), listening)
    assert all(not trace.choices(0, key) for key in (ONE, TWO, NEGATIVE))


def test_prompts_of_different_length_are_filled_up_to_the_longest() -> None:
    """One after the other, as they are evaluated when they do not fit each other."""
    short, long = Pass([ONE], TEXT, 0), Pass([NEGATIVE], TEXT + 3, 0)
    routings = {}
    for listening, text in ((short, TEXT), (long, TEXT + 3)):
        for ffn, length in ((TXT, text), (JOINT, text + IMAGE)):
            routings[text, ffn] = routed(length, seed=length)
            listening.recorder.experts(ffn, routings[text, ffn], batch=1, gate=NORMALISED)
    trace = traced(config(), short, long)
    assert (trace.text_tokens, trace.image_tokens) == (TEXT + 3, IMAGE)
    assert trace.samples == [NEGATIVE, ONE]
    for sample, text in ((0, TEXT + 3), (1, TEXT)):
        bytes_ = np.frombuffer(trace.step_bytes(0, sample), np.uint8)
        joint = bytes_[(TEXT + 3) * 5 :]
        experts_TK = joint[: (TEXT + 3 + IMAGE) * 2].reshape(-1, 2)
        expected_TK = routings[text, JOINT].experts_TK.numpy()
        assert np.array_equal(experts_TK[:text], expected_TK[:text])
        assert (experts_TK[text : TEXT + 3] == NONE).all()
        assert np.array_equal(experts_TK[TEXT + 3 :], expected_TK[text:])


def test_tokens_that_other_packs_add_to_the_image_count_as_references() -> None:
    listening = Pass([ONE], TEXT, 0)
    for ffn, length in ((IMG, IMAGE + 4), (JOINT, TEXT + IMAGE + 4)):
        listening.recorder.experts(ffn, routed(length, seed=length), batch=1, gate=NORMALISED)
    trace = traced(config(), listening)
    assert trace.reference_tokens == 4
    of_image = trace.of_image(0, ONE, JOINT)
    assert of_image is not None
    expected = routed(TEXT + IMAGE + 4, seed=TEXT + IMAGE + 4).experts_TK[TEXT : TEXT + IMAGE]
    assert np.array_equal(of_image.experts_TK, expected.numpy())


def test_the_bytes_of_a_step_are_as_long_as_the_description_says() -> None:
    listening = Pass([ONE, NEGATIVE], TEXT, 0)
    for ffn, top_k in ((IMG, 1), (JOINT, 3)):
        listening.recorder.experts(ffn, routed(2 * LENGTHS[ffn], top_k), batch=2, gate=NORMALISED)
    trace = traced(config(), listening)
    said = trace.described
    tokens = {"img": said["image_tokens"], "txt": said["text_tokens"], "joint": said["text_tokens"] + IMAGE}
    for sample in range(2):
        ran = said["steps"][0]["samples"][sample]["ran"]
        assert ran == [True, False, True]
        length = sum(
            tokens[layer["stream"]] * (2 * said["slots"] + 1)
            for layer, is_in in zip(said["layers"], ran, strict=True)
            if is_in
        )
        assert len(trace.step_bytes(0, sample)) == length


def test_a_run_that_grows_too_large_stops_recording_and_says_so() -> None:
    run = Run(config(), GRID, limit=400)
    for _ in range(5):
        listening = Pass([ONE], TEXT, 0)
        listening.recorder.experts(JOINT, routed(LENGTHS[JOINT]), batch=1, gate=NORMALISED)
        if not run.full:
            run.end(Evaluation(torch.tensor([0.5]), {}, [listening]))
    trace = run.finish()
    assert 0 < len(trace.steps) < 5
    assert trace.size <= 400
    assert f"stopped at evaluation {len(trace.steps)}" in trace.described["notes"][0]


def test_a_sample_that_a_guidance_method_runs_again_is_recorded_as_it_ran_first() -> None:
    passes, routings = [], []
    for seed in (1, 2):
        listening, routing = Pass([ONE], TEXT, 0), routed(LENGTHS[JOINT], seed=seed)
        listening.recorder.experts(JOINT, routing, batch=1, gate=NORMALISED)
        passes.append(listening)
        routings.append(routing)
    trace = traced(config(), *passes)
    assert np.array_equal(trace.choices(0, ONE)[JOINT].experts_TK, routings[0].experts_TK.numpy())


class Leaving(TorchDispatchMode):
    """A device without numbers: counts what leaves it, and refuses whatever a host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            self.left.append(args[0].numel())
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


@pytest.mark.parametrize("router", ["top_k", "capacity"])
def test_an_evaluation_leaves_the_device_in_one_copy(router: str) -> None:
    made = config(groups=(GROUP,), router=CapacityRouter(capacity=2.0) if router == "capacity" else TOP_K_ROUTER)
    run = Run(made, GRID, 2**20)
    with Leaving() as leaving:
        for evaluation in range(3):
            passes = []
            for key in (ONE, NEGATIVE):  # one after the other, as in low memory
                listening = Pass([key], TEXT, 0)
                for ffn, length in LENGTHS.items():
                    listening.recorder.experts(ffn, on_meta(router, length), batch=1, gate=NORMALISED)
                chosen_BM = torch.zeros(1, 2, dtype=torch.bool, device="meta")
                listening.recorder.blocks(0, BlockRouting(chosen_BM=chosen_BM, logits_BM=chosen_BM.float(), active=1))
                some = SampleSubset(batch=1, count=1, index_S=torch.zeros(1, dtype=torch.int64, device="meta"))
                listening.recorder.part(some, whole=False).experts(JOINT, on_meta(router, TEXT + IMAGE), 1, NORMALISED)
                passes.append(listening)
            run.end(Evaluation(torch.empty(1, device="meta"), {}, passes))
            assert len(leaving.left) == evaluation + 1
    assert run.finish().size == sum(leaving.left)


@pytest.mark.parametrize("router", ["top_k", "capacity"])
def test_prompts_that_were_evaluated_on_two_devices_are_packed_together(router: str) -> None:
    """ComfyUI splits the work over several GPUs this way."""
    run = Run(config(groups=(GROUP,)), GRID, 2**20)
    there, here = Pass([ONE], TEXT, 0), Pass([NEGATIVE], TEXT, 0)
    some = SampleSubset.of(1, torch.tensor([0]))
    for listening, routing in (
        (there, on_meta(router, LENGTHS[JOINT])),
        (here, routed(LENGTHS[JOINT]) if router == "top_k" else unevenly(LENGTHS[JOINT])),
    ):
        listening.recorder.part(some, whole=False).experts(JOINT, routing, batch=1, gate=NORMALISED)
        chosen_BM = torch.zeros(1, 2, dtype=torch.bool, device=routing.logits_TE.device)
        listening.recorder.blocks(0, BlockRouting(chosen_BM=chosen_BM, logits_BM=chosen_BM.float(), active=1))
    with Leaving() as leaving:
        run.end(Evaluation(torch.empty(1, device="meta"), {}, [there, here]))
    assert len(leaving.left) == 1
    assert [entry.number for entry in run.steps[0].entries] == [0, 1]


def on_meta(router: str, length: int) -> Routing:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    logits_TE = empty(length, EXPERTS)
    if router == "top_k":
        return Routing.even(
            experts_TK=empty(length, 2, dtype=torch.int64),
            gates_TK=empty(length, 2),
            logits_TE=logits_TE,
            gate_unit=1.0,
        )
    ids = [empty(2 * length, dtype=torch.int64) for _ in range(2)]
    return Routing(token_A=ids[0], expert_A=ids[1], gate_A=empty(2 * length), logits_TE=logits_TE)
