"""Trace Routing in ComfyUI: it hears what the routers choose, whichever way ComfyUI runs the model, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import BATCH, DIMS, GROUPS, Grouped, active, evaluate, inputs
from tests.toys import files

LAYERS = ["double_blocks.1.img_mlp", "double_blocks.1.txt_mlp", "single_blocks.0", "single_blocks.1", "single_blocks.2"]
NONE = 255


@dataclass
class Heard:
    """One call of the transformer: which prompts (0 positive, 1 negative) its batch holds, and what was chosen."""

    prompts: list[int]
    batch: int
    choices: dict[str, Tensor] = field(
        default_factory=dict
    )  # by FFN, experts as [rows, T, K]; NONE where there is none

    def of(self, prompt: int, image: int, images: int) -> dict[str, np.ndarray]:
        row = self.prompts.index(prompt) * images + image
        return {ffn: experts_BTK[row].numpy() for ffn, experts_BTK in self.choices.items()}


@pytest.fixture
def heard(host: Comfy, monkeypatch: pytest.MonkeyPatch) -> list[Heard]:
    """Every call of the transformer since, told by other means than the trace's."""
    calls: list[Heard] = []
    blocks, flux = host.module("nodes.model.blocks"), host.module("nodes.model.flux_moe")
    begin_routing, apply_model = blocks.ExpertLayer.begin_routing, flux.FluxMoEModel._apply_model

    def listening(layer: Any, x_BTH: Tensor, choice: Any) -> Any:
        routing = begin_routing(layer, x_BTH, choice)()
        chosen_TE = routing.gates_TE > 0
        alpha_TE = routing.probabilities_TE.masked_fill(~chosen_TE, -1)
        order_TE = alpha_TE.argsort(dim=-1, descending=True, stable=True)
        experts_TE = order_TE.masked_fill(~chosen_TE.gather(1, order_TE), NONE)
        calls[-1].choices[layer.name] = experts_TE.view(*x_BTH.shape[:2], -1)
        return lambda: routing

    def calling(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = kwargs.get("transformer_options") or args[4]
        calls.append(Heard(list(options["cond_or_uncond"]), x.shape[0]))
        return apply_model(model, x, *args, **kwargs)

    monkeypatch.setattr(blocks.ExpertLayer, "begin_routing", listening)
    monkeypatch.setattr(flux.FluxMoEModel, "_apply_model", calling)
    return calls


@dataclass
class Traced:
    """A MODEL with a trace."""

    model: Any
    handle: Any
    store: Any

    @property
    def trace(self) -> Any:
        return self.store._stored[self.handle.runs[-1]].trace


def traced(host: Comfy, model: Any) -> Traced:
    clone, handle = host.execute("D2MTraceRouting", model=model).result
    return Traced(clone, handle, host.module("nodes.expert_map.trace_store").STORE)


def same(layer: Any, experts_TE: np.ndarray) -> bool:
    """Return True if a layer of a trace holds these experts and no others."""
    slots = layer.experts_TK.shape[1]
    return np.array_equal(layer.experts_TK, experts_TE[:, :slots]) and bool((experts_TE[:, slots:] == NONE).all())


def sample(
    model: Any, positive: Any, negative: Any, *, size: tuple[int, int, int] = (1, 8, 8), cfg: float = 2.0, steps: int = 2,
    sampler: str = "euler", **rest: Any,
) -> Tensor:  # fmt: skip
    import comfy.sample

    batch, height, width = size
    noise = torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(0))
    found: Tensor = comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, negative, torch.zeros_like(noise), seed=0, **rest
    )
    return found


@pytest.fixture(params=["top_k", "capacity"])
def moe(request: pytest.FixtureRequest, host: Comfy, pair: Pair, tmp_path: Path) -> Any:
    """A FLUX-MoE with either router."""
    if request.param == "top_k":
        return host.with_settings(pair.moe, gate="normalised")
    tensors = files.split(pair.dense, capacity=CapacityRouter(capacity=2.0, width=16))
    return host.load(files.save(tensors, tmp_path / "capacity.safetensors"))


@pytest.fixture
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no memory for two prompts in one batch."""
    import comfy.model_patcher

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *args: 0)


# What is heard


@pytest.mark.parametrize("memory", ["plenty", "little"])
def test_prompts_and_negative_prompts_of_a_batch_are_heard_as_they_were_routed(
    host: Comfy, moe: Any, heard: list[Heard], request: pytest.FixtureRequest, memory: str
) -> None:
    if memory == "little":
        request.getfixturevalue("one_after_the_other")
    it = traced(host, moe)
    host.sample(it.model, (2, 8, 12), cfg=2.0, steps=2)
    trace = it.trace
    assert [tuple(key) for key in trace.samples] == [(kind, 0, i) for kind in ("positive", "negative") for i in (0, 1)]
    assert trace.layers == LAYERS
    assert len(heard) == (2 if memory == "plenty" else 4)
    for step in range(2):
        calls = heard[step : step + 1] if memory == "plenty" else heard[2 * step : 2 * step + 2]
        for key in trace.samples:
            prompt = ("positive", "negative").index(key.condition)
            (call,) = (call for call in calls if prompt in call.prompts)
            expected = call.of(prompt, key.image, images=2)
            found = trace.choices(step, key)
            assert list(found) == LAYERS
            assert all(same(found[ffn], expected[ffn]) for ffn in LAYERS)


def test_samples_that_chose_other_blocks_are_told_apart(host: Comfy, grouped: Grouped, watched: list) -> None:
    it = traced(host, grouped.moe)
    host.sample(it.model, BATCH, steps=1)
    described = it.trace.described
    alone = []
    for i in range(BATCH[0]):
        sample_of = described["steps"][0]["samples"][i]
        assert sample_of["blocks"] == [[i in samples for samples in group] for group in watched]
        for layer, ran in zip(described["layers"], sample_of["ran"], strict=True):
            kind, index, *_ = layer["name"].split(".")
            group = next(
                (
                    g
                    for g, of in enumerate(GROUPS)
                    if f"{of.kind}_blocks" == kind and of.first <= int(index) < of.first + of.blocks
                ),
                None,
            )
            assert ran == (group is None or i in watched[group][int(index) - GROUPS[group].first])
        alone.append(sample_of["ran"])
    assert len({tuple(ran) for ran in alone}) > 1


def test_a_sample_of_a_batch_is_recorded_as_if_it_were_alone(
    host: Comfy, grouped: Grouped, loaded: Callable[[Any], Any]
) -> None:
    """Blocks that see a part of the batch only, and blocks that are shown all of it (patched attention)."""
    looking = grouped.moe.clone()
    looking.set_model_attn1_patch(lambda q, k, v, **rest: {"q": q})
    batch = inputs(4)
    for model in (grouped.moe, looking):
        together = choices_of(host, loaded(model), *batch)
        for i in range(4):
            (alone,) = choices_of(host, model, *(it[i : i + 1] for it in batch))
            assert together[i].keys() == alone.keys()
            agree = [np.mean(together[i][ffn] == alone[ffn]) for ffn in alone]
            assert min(agree) >= 0.95  # sums in another order may turn a near tie


def choices_of(host: Comfy, model: Any, *batch: Tensor) -> list[dict[str, np.ndarray]]:
    """Return the experts of every sample in one evaluation, by FFN."""
    trace_of, record = host.module("d2m_model.trace"), host.module("d2m_model.trace_record")
    keys = [record.SampleKey("positive", 0, i) for i in range(len(batch[0]))]
    listening = trace_of.Pass(keys, batch[2].shape[1], 0)
    recorded = model.clone()
    recorded.model_options["transformer_options"]["d2m"] = {"trace": listening.recorder}
    evaluate(recorded, *batch)
    run = trace_of.Run(model.model.diffusion_model.config, (4, 4), 2**20)
    run.end(trace_of.Evaluation(torch.zeros(1), {}, [listening]))
    trace = run.finish()
    return [{ffn: layer.experts_TK for ffn, layer in trace.choices(0, key).items()} for key in keys]


def test_reference_latents_come_after_the_images_tokens(host: Comfy, pair: Pair, heard: list[Heard]) -> None:
    """Kontext's, and on the prompt alone: the negative prompt has none, and is evaluated by itself."""
    (context, rest), = host.conditioning(pair.moe, 1)  # fmt: skip
    reference = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(3))
    it = traced(host, pair.moe)
    sample(it.model, [[context, {**rest, "reference_latents": [reference]}]], host.conditioning(pair.moe, 2), steps=1)
    trace = it.trace
    assert (trace.text_tokens, trace.image_tokens, trace.reference_tokens) == (7, 16, 15)
    for prompt, key in enumerate(trace.samples):
        (call,) = (call for call in heard if call.prompts == [prompt])
        assert all(same(layer, call.of(prompt, 0, 1)[ffn]) for ffn, layer in trace.choices(0, key).items())
        joint = call.of(prompt, 0, 1)["single_blocks.2"]
        assert same(trace.of_image(0, key, "single_blocks.2"), joint[7 : 7 + 16])
        length = trace.choices(0, key)["single_blocks.2"].margin_T
        assert len(length) == (7 + 16 + 15 if key.condition == "positive" else 7 + 16)


def test_prompts_of_other_lengths_are_heard_one_by_one(
    host: Comfy, pair: Pair, heard: list[Heard], one_after_the_other: None
) -> None:
    (context, rest), = host.conditioning(pair.moe, 2)  # fmt: skip
    it = traced(host, pair.moe)
    sample(it.model, host.conditioning(pair.moe, 1), [[torch.cat([context, context[:, :3]], 1), rest]], steps=1)
    trace = it.trace
    assert trace.text_tokens == 10
    for prompt, key in enumerate(trace.samples):
        (call,) = (call for call in heard if call.prompts == [prompt])
        found = trace.choices(0, key)
        assert list(found) == LAYERS
        assert all(same(layer, call.of(prompt, 0, 1)[ffn]) for ffn, layer in found.items())


def test_combined_prompts_are_samples_of_their_own_and_areas_are_said_to_be_missing(host: Comfy, pair: Pair) -> None:
    first, second = host.conditioning(pair.moe, 1)[0], host.conditioning(pair.moe, 3)[0]
    it = traced(host, pair.moe)
    sample(it.model, [first, second], host.conditioning(pair.moe, 2), steps=1)
    assert [tuple(key) for key in it.trace.samples] == [("positive", 0, 0), ("positive", 1, 0), ("negative", 0, 0)]
    area = [second[0], {**second[1], "area": (4, 4, 0, 0)}]
    sample(it.model, [first, area], host.conditioning(pair.moe, 2), steps=1)
    assert ("positive", 0, 0) in it.trace.samples
    assert ("positive", 1, 0) not in it.trace.samples
    assert "area" in it.trace.described["notes"][0]


def test_a_sampler_that_evaluates_twice_a_step_gives_an_entry_for_each(
    host: Comfy, pair: Pair, heard: list[Heard]
) -> None:
    it = traced(host, pair.moe)
    prompts = host.conditioning(pair.moe, 1), host.conditioning(pair.moe, 2)
    sample(it.model, *prompts, sampler="heun", cfg=1.0, steps=3)
    trace = it.trace
    assert len(trace.steps) == len(heard) == 5
    sigmas = [step.sigma for step in trace.steps]
    assert sigmas == sorted(sigmas, reverse=True)
    for step, call in enumerate(heard):
        assert all(same(layer, call.of(0, 0, 1)[ffn]) for ffn, layer in trace.choices(step, trace.samples[0]).items())


def test_controlnets_and_blocks_left_out_are_recorded_as_they_ran(host: Comfy, grouped: Grouped) -> None:
    from comfy.patcher_extension import WrappersMP

    residual = torch.randn(4, 16, 128, generator=torch.Generator().manual_seed(7))

    def controlled(
        executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, *args: Any, **kwargs: Any
    ) -> Any:
        control = {"input": [residual] * 4, "output": [residual] * 6}
        return executor(x, t, c_concat, c_crossattn, control, *args, **kwargs)

    model = active(host, grouped.moe, [0, 5])
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "a pack", controlled)
    expected = host.sample(model, BATCH, steps=2)
    it = traced(host, model)
    assert torch.equal(host.sample(it.model, BATCH, steps=2), expected)
    for step in it.trace.described["steps"]:
        assert step["settings"]["active_blocks"] == [0, 5]
        assert step["samples"][0]["blocks"] == [[False] * 3, [True] * 5]
        ran = dict(zip(it.trace.layers, step["samples"][0]["ran"], strict=True))
        assert not any(ran[f"double_blocks.{i}.{stream}_mlp"] for i in (1, 2, 3) for stream in ("img", "txt"))
        assert all(ran[f"single_blocks.{i}"] for i in range(DIMS.single_blocks))


def test_a_compiled_model_is_recorded_as_it_is_uncompiled(host: Comfy, pair: Pair) -> None:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    compiled = TorchCompileModel.execute(pair.moe, "eager").result[0]  # its own backends need a C++ compiler
    try:
        host.sample(compiled, (1, 8, 8), steps=1)  # there is a graph already
        for top_k in (2, 3):
            bare, graph = (traced(host, host.top_k(model, top_k)) for model in (pair.moe, compiled))
            for it in (bare, graph):
                host.sample(it.model, (1, 8, 8), steps=1)
            key = bare.trace.samples[0]
            expected, found = bare.trace.choices(0, key), graph.trace.choices(0, key)
            assert list(found) == LAYERS
            assert all(np.array_equal(found[ffn].experts_TK, expected[ffn].experts_TK) for ffn in LAYERS)
            assert found[LAYERS[0]].experts_TK.shape[1] == top_k
    finally:
        torch.compiler.reset()


# What it says of the run


def test_every_step_says_what_it_was_sampled_with(host: Comfy, pair: Pair) -> None:
    weights = torch.ones(12)
    weights[3] = 0.0
    model = host.with_settings(pair.moe, top_k=3, gate="normalised", mask={"single_blocks.1": weights})
    it = traced(host, model)
    host.sample(it.model, (1, 8, 8), steps=1)
    assert it.trace.described["steps"][0]["settings"] == {
        "top_k": 3,
        "gate": "normalised",
        "mask": {ffn: weights.tolist() if ffn == "single_blocks.1" else [1.0] * 12 for ffn in LAYERS},
    }
    plain = traced(host, pair.moe)
    host.sample(plain.model, (1, 8, 8), steps=1)
    assert plain.trace.described["steps"][0]["settings"] == {"top_k": 2, "gate": "sum"}


def test_a_setting_that_another_wrapper_resolves_for_a_step_is_the_one_that_is_said(host: Comfy, pair: Pair) -> None:
    """A schedule or a live slider does this, whichever of the nodes comes first."""
    from comfy.patcher_extension import WrappersMP

    def falling(executor: Any, x: Tensor, timestep: Tensor, model_options: dict, seed: Any) -> Any:
        options = dict(model_options["transformer_options"])
        options["d2m"] = {**options.get("d2m", {}), "top_k": 4 if float(timestep[0]) > 0.9 else 1}
        return executor(x, timestep, {**model_options, "transformer_options": options}, seed)

    before, after = pair.moe.clone(), traced(host, pair.moe)
    before.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "a latch", falling)
    after.model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "a latch", falling)
    for it in (traced(host, before), after):
        host.sample(it.model, (1, 8, 8), steps=2)
        trace = it.trace
        assert [step.settings["top_k"] for step in trace.steps] == [4, 1]
        assert [trace.choices(i, trace.samples[0])[LAYERS[0]].experts_TK.shape[1] for i in (0, 1)] == [4, 1]
        assert trace.slots == 4


def test_the_emoji_prompts_words_are_told_for_every_text_token(host: Comfy, tmp_path: Path) -> None:
    from dataclasses import replace

    dims = replace(files.DIMS, context_size=128, vector_size=128)
    moe = host.load(files.save(files.split(files.dense_flux(dims), dims), tmp_path / "emoji.safetensors"))
    positive = host.run("D2MEmojiPrompt", text="a fox, on blue", guidance=3.5)
    it = traced(host, moe)
    sample(it.model, positive, host.conditioning(moe, 2), size=(2, 8, 8), steps=1)
    described = it.trace.described
    words = ["a", "fox", ",", "on", "blue"]
    assert described["text_tokens"] >= 12
    for sample_of, pieces in zip(described["samples"], described["prompt"], strict=True):
        if sample_of["cond"] == "positive":
            assert pieces == words + [""] * (described["text_tokens"] - len(words))
        else:
            assert pieces is None


# Runs


def test_sampling_again_replaces_the_trace(host: Comfy, pair: Pair) -> None:
    it = traced(host, pair.moe)
    host.sample(it.model, (1, 8, 8), steps=3)
    host.sample(it.model, (1, 8, 12), steps=2)
    assert len(it.trace.steps) == 2
    assert it.trace.grid == (4, 6)


def test_samplers_that_share_a_traced_model_are_told_apart_by_their_latents(host: Comfy, pair: Pair) -> None:
    it = traced(host, pair.moe)
    latents = [host.sample(it.model, (1, 8, 8), seed=seed, steps=1) for seed in range(3)]
    keys = [it.handle.find_run(latent) for latent in latents]
    assert keys == it.handle.runs
    assert it.handle.find_run(latents[1].to(torch.bfloat16)) == keys[1]
    assert it.handle.find_run(None) == keys[2]
    with pytest.raises(ValueError, match="was not sampled with the MODEL"):
        it.handle.find_run(host.sample(pair.moe, (1, 8, 8), seed=9, steps=1))


def test_only_the_sampler_behind_it_is_recorded(host: Comfy, pair: Pair) -> None:
    it = traced(host, pair.moe)
    host.sample(pair.moe, (1, 8, 8), steps=1)
    with pytest.raises(ValueError, match="This trace is empty"):
        it.handle.find_run(None)
    second = traced(host, it.model)
    host.sample(second.model, (1, 8, 8), steps=1)
    assert second.handle.runs
    assert not it.handle.runs


def test_a_run_that_is_interrupted_leaves_the_last_one_in_place(host: Comfy, pair: Pair) -> None:
    it = traced(host, pair.moe)
    host.sample(it.model, (1, 8, 8), steps=2)
    before = list(it.handle.runs)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    prompts = host.conditioning(pair.moe, 1), host.conditioning(pair.moe, 2)
    with pytest.raises(KeyboardInterrupt):
        sample(it.model, *prompts, callback=stop)
    assert it.handle.runs == before
    assert len(it.trace.steps) == 2


def test_a_run_past_the_bound_is_sampled_to_its_end(host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = host.sample(pair.moe, (1, 8, 8), steps=3)
    monkeypatch.setattr(host.module("nodes.expert_map.trace_node"), "_MAX_RUN_BYTES", 600)
    it = traced(host, pair.moe)
    assert torch.equal(host.sample(it.model, (1, 8, 8), steps=3), expected)
    assert len(it.trace.steps) == 2
    assert "stopped at evaluation 2" in it.trace.described["notes"][0]


# What it costs


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["experts", "groups"])
def test_within_the_model_the_same_operators_run_with_a_trace_as_without(
    host: Comfy, moe: Any, grouped: Grouped, loaded: Callable[[Any], Any], kind: str
) -> None:
    model = loaded(grouped.moe if kind == "groups" else moe)
    recorded = model.clone()
    settings = recorded.model_options["transformer_options"].get("d2m", {})
    recorded.model_options["transformer_options"]["d2m"] = {
        **settings,
        "trace": host.module("d2m_model.trace").RoutingRecorder(),
    }
    ran = []
    for it in (model, recorded):
        with Operators() as operators:
            evaluate(it, *inputs(2))
        ran.append(operators.ran)
    assert ran[0] == ran[1]
    assert len(ran[0]) > 100


def test_a_model_that_is_not_traced_runs_as_if_there_were_no_tracing(host: Comfy, pair: Pair) -> None:
    """Before and after others of the same weights were traced; images are the same with and without, bit for bit."""
    ran, images = [], []
    it = traced(host, pair.moe)
    for model in (pair.moe, it.model, pair.moe):
        host.sample(model, (1, 8, 8), steps=1)  # it is loaded, whatever ran before
        with Operators() as operators:
            images.append(host.sample(model, (1, 8, 8), cfg=2.0, steps=2))
        ran.append(operators.ran)
    assert ran[0] == ran[2]
    assert len(ran[1]) > len(ran[0])
    assert torch.equal(images[0], images[1])
    assert "d2m_trace" not in str(pair.moe.model_options)


def test_nothing_of_a_traced_run_stays_on_the_model(host: Comfy, grouped: Grouped) -> None:
    def state(module: Any) -> dict[str, Any]:
        return {name: set(vars(part)) for name, part in module.named_modules()}

    flux, it = grouped.moe.model.diffusion_model, traced(host, grouped.moe)
    host.sample(it.model, steps=1)
    before, options = state(flux), str(it.model.model_options)
    host.sample(it.model, BATCH, steps=1)
    assert state(flux) == before
    assert str(it.model.model_options) == options
