"""The controls of a MODEL: what each sets, how they compose, and what they say to a file that cannot follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2m_model.config import BlockGroup
from d2m_model.layout import ffn_tensors
from d2m_model.routers import CapacityRouter
from demo.in_process import Comfy
from tests.comfyui.conftest import Pair
from tests.comfyui.grouped import GROUPS, Grouped, active
from tests.toys import files
from tests.toys.compare import distance
from tools.host import ROOT

ALL = files.LAYOUT.experts
SMALL = (1, 8, 8)
FFNS = ("double_blocks.1.img_mlp", "double_blocks.1.txt_mlp", *(f"single_blocks.{i}" for i in range(3)))


@pytest.fixture(scope="module")
def both(host: Comfy, pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A FLUX-MoE with block groups for each kind of token router."""
    group = BlockGroup(kind="single", first=0, blocks=3, active=1, selection="topk")
    folder, found = tmp_path_factory.mktemp("both"), {}
    for name, capacity in (("top_k", None), ("capacity", CapacityRouter(capacity=2.0, width=16))):
        tensors = files.split(pair.dense, groups=(group,), capacity=capacity)
        found[name] = host.load(files.save(tensors, folder / f"{name}.safetensors"))
    return found


@pytest.fixture
def evaluations() -> Callable[[Any], tuple[Any, list[tuple[float, Mapping[str, Any]]]]]:
    """A clone of a MODEL, and what the model is then called with: sigma and settings."""
    from comfy.patcher_extension import WrappersMP

    def watch(model: Any) -> tuple[Any, list[tuple[float, Mapping[str, Any]]]]:
        clone, seen = model.clone(), []

        def look(executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
            options = next(value for value in (*args, *kwargs.values()) if isinstance(value, dict) and "d2m" in value)
            seen.append((float(t[0]), options["d2m"]))
            return executor(x, t, *args, **kwargs)

        clone.add_wrapper(WrappersMP.APPLY_MODEL, look)
        return clone, seen

    return watch


def mask(host: Comfy, model: Any, text: str) -> Any:
    return host.control("D2MExpertMask", model, mask=text)


def schedule(host: Comfy, model: Any, pieces: str, setting: str = "top_k", unit: str = "percent") -> Any:
    return host.control("D2MSchedule", model, setting=setting, unit=unit, pieces=pieces)


# Active blocks


@pytest.mark.parametrize(
    ("widgets", "blocks"),
    [({"active_blocks": 2}, [2, 2]), ({"active_blocks": 4, "per_group": ""}, [3, 4]),
     ({"active_blocks": 1, "per_group": " 0, 5"}, [0, 5])],
)  # fmt: skip
def test_active_blocks_are_set_for_all_groups_or_for_each(
    host: Comfy, grouped: Grouped, widgets: dict[str, Any], blocks: list[int]
) -> None:
    found = host.sample(host.control("D2MActiveBlocks", grouped.moe, **widgets), SMALL)
    assert torch.equal(found, host.sample(active(host, grouped.moe, blocks), SMALL))
    assert distance(found, host.sample(grouped.moe, SMALL)) >= 1e-2
    assert len(blocks) == len(GROUPS)


# Top-K


def test_a_later_top_k_replaces_an_earlier_one_and_its_gate(host: Comfy, pair: Pair) -> None:
    found = host.sample(host.top_k(host.top_k(pair.moe, 5, "normalised"), 2), SMALL)
    assert torch.equal(found, host.sample(host.top_k(pair.moe, 2), SMALL))
    assert distance(found, host.sample(host.top_k(pair.moe, 2, "normalised"), SMALL)) >= 1e-2


# Expert mask


def test_a_muted_expert_is_an_expert_of_zeros(host: Comfy, pair: Pair, tmp_path: Path) -> None:
    """The reference file has zeros in one expert of an FFN of each kind, and the same routers."""
    muted = {"double_blocks.1.img_mlp": 3, "single_blocks.2": 7}
    tensors = dict(pair.split)
    for ffn, expert in muted.items():
        places, (shared, width) = ffn_tensors(ffn, files.DIMS.hidden_size), (files.LAYOUT.shared, files.LAYOUT.width)
        first = places.first_column + shared + expert * width
        down = f"{places.down}.weight"
        tensors[down] = tensors[down].index_fill(1, torch.arange(first, first + width), 0)
    silenced = host.load(files.save(tensors, tmp_path / "silenced.safetensors"))
    masked = mask(host, host.top_k(pair.moe, ALL), "\n".join(f"{ffn}: {expert}=0" for ffn, expert in muted.items()))
    found = host.sample(masked)
    assert distance(found, host.sample(host.top_k(silenced, ALL))) <= 1e-5
    assert distance(found, host.sample(host.top_k(pair.moe, ALL))) >= 1e-3


@pytest.mark.parametrize("router", ["top_k", "capacity"])
def test_with_every_expert_muted_the_shared_ones_paint_alone(host: Comfy, both: dict[str, Any], router: str) -> None:
    silent = mask(host, active(host, both[router], 3), "*: *=0")
    alone = host.top_k(active(host, both["top_k"], 3), 0)
    assert distance(host.sample(silent, SMALL), host.sample(alone, SMALL)) <= 1e-6


def test_masks_multiply_and_within_one_the_later_rule_holds(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    first = mask(host, pair.moe, "*: *=0.5  # everywhere\nsingle_blocks.*: 3=4, 4=0\n\nsingle_blocks.0: 3=2")
    model, seen = evaluations(mask(host, first, "*_mlp: 0=3"))
    host.sample(model, SMALL, steps=1)
    ((_, settings),) = seen
    half = [0.5] * ALL
    expected = {ffn: list(half) for ffn in FFNS}
    for ffn in FFNS[:2]:
        expected[ffn][0] = 1.5
    for ffn in FFNS[2:]:
        expected[ffn][3:5] = [4.0, 0.0]
    expected["single_blocks.0"][3] = 2.0
    assert {ffn: weights.tolist() for ffn, weights in settings["mask"].items()} == expected


def test_rules_weigh_as_the_expert_map_reads_them(host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]) -> None:
    """The widget in the browser reads the same cases in tests/web/rules.test.mjs."""
    for text, ffn, weights in json.loads((ROOT / "tests" / "web" / "mask_rules.json").read_text()):
        model, seen = evaluations(mask(host, pair.moe, text))
        host.sample(model, SMALL, steps=1)
        ((_, settings),) = seen
        assert settings["mask"][ffn][:3].tolist() == weights, (text, ffn)


def test_a_mask_is_put_on_the_device_once_a_run(host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]) -> None:
    model, seen = evaluations(mask(host, pair.moe, "*: 0=0"))
    host.sample(model, SMALL)
    first, *later = (settings["mask"] for _, settings in seen)
    assert len(later) == 2
    assert all(other[ffn] is first[ffn] for other in later for ffn in FFNS)


# Schedule


def sigmas(model: Any, steps: int) -> list[float]:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps).tolist()[:-1]


def test_pieces_in_percent_meet_and_reach_the_first_and_the_last_step(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    """Percent are ComfyUI's: of the timesteps, over which ten steps of `simple` are spread evenly."""
    model, seen = evaluations(schedule(host, host.top_k(pair.moe, 1), "0 - 30: 5\n30 - 60: 0\n80 - 100: 12"))
    host.sample(model, SMALL, steps=10)
    assert [settings["top_k"] for _, settings in seen] == [5] * 3 + [0] * 3 + [1] * 2 + [12] * 2


def test_percent_are_of_the_whole_schedule_also_where_sampling_begins_late_in_it(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    """Image to image: with denoise 0.5 the first half of the schedule is never sampled. The help page says so."""
    import comfy.sample

    model, seen = evaluations(schedule(host, host.top_k(pair.moe, 1), "0 - 40: 5\n40 - 60: 6\n60 - 100: 12"))
    positive, noise = host.conditioning(pair.moe, 1), torch.randn(1, 16, 8, 8)
    comfy.sample.sample(
        model, noise, 5, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise), seed=0, denoise=0.5
    )
    assert [settings["top_k"] for _, settings in seen] == [6] + [12] * 4


def test_a_step_on_an_edge_belongs_to_the_piece_that_begins_there(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    _, first, second, _ = sigmas(pair.moe, 4)
    pieces = f"{first!r} - {second!r}: 3\n{second!r} - 0: 4"
    model, seen = evaluations(schedule(host, host.top_k(pair.moe, 1), pieces, unit="sigma"))
    host.sample(model, SMALL, steps=4)
    assert [settings["top_k"] for _, settings in seen] == [1, 3, 4, 4]


def test_shares_of_the_run_are_read_as_such(host: Comfy, pair: Pair) -> None:
    """Percentages have the form of start_percent and end_percent in ComfyUI's own nodes."""
    shares, percent = (host.sample(schedule(host, pair.moe, pieces), SMALL, steps=5)
                       for pieces in ("0 - 0.4: 6\n.4 - 1: 1", "0 - 40: 6\n40 - 100: 1"))  # fmt: skip
    assert torch.equal(shares, percent)
    assert distance(shares, host.sample(pair.moe, SMALL, steps=5)) >= 1e-3


def test_where_pieces_overlap_the_later_line_holds(host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]) -> None:
    model, seen = evaluations(schedule(host, pair.moe, "0% - 100%: 2  # all\n0% - 0.1%: 6"))
    host.sample(model, SMALL)
    assert [settings["top_k"] for _, settings in seen] == [6, 2, 2]


def test_a_two_evaluation_sampler_has_the_setting_of_each_evaluations_sigma(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    model, seen = evaluations(schedule(host, host.top_k(pair.moe, 1), "1 - 0.8: 6", unit="sigma"))
    host.sample(model, SMALL, sampler="heun", steps=3)
    assert len(seen) == 5
    assert [settings["top_k"] for _, settings in seen] == [6 if sigma > 0.8 else 1 for sigma, _ in seen]
    assert {settings["top_k"] for _, settings in seen} == {1, 6}


def test_blocks_and_capacity_can_be_scheduled(
    host: Comfy, both: dict[str, Any], grouped: Grouped, evaluations: Callable[[Any], Any]
) -> None:
    model, seen = evaluations(schedule(host, both["capacity"], "0 - 10: 0.5\n10 - 100: 2", setting="capacity"))
    host.sample(model, SMALL)
    assert [settings["capacity"] for _, settings in seen] == [0.5, 2.0, 2.0]
    model, seen = evaluations(schedule(host, grouped.moe, "0 - 10: 0, 5\n10 - 100: 1", setting="active_blocks"))
    host.sample(model, SMALL)
    assert [settings["active_blocks"] for _, settings in seen] == [(0, 5), 1, 1]


# Together


@pytest.mark.parametrize("router", ["top_k", "capacity"])
def test_controls_compose_in_any_order(host: Comfy, both: dict[str, Any], router: str) -> None:
    setting, value = (("top_k", 3), ("capacity", 0.5))[router == "capacity"]
    controls: list[tuple[str, dict[str, Any]]] = [
        ("D2MTopK", {"top_k": 3, "gate": "normalised", "capacity": 0.5}),
        ("D2MActiveBlocks", {"active_blocks": 2}),
        ("D2MExpertMask", {"mask": "single_blocks.*: 1=0, 2=3"}),
        ("D2MExpertMask", {"mask": "*: 4=0.25"}),
    ]
    chains = []
    for order in (controls, controls[::-1]):
        model = both[router]
        for node_id, widgets in order:
            model = host.control(node_id, model, **widgets)
        chains.append(host.sample(model, SMALL))
    assert torch.equal(*chains)
    without = host.with_settings(both[router], **{setting: value}, gate="normalised")
    assert distance(chains[0], host.sample(without, SMALL)) >= 1e-2


def test_a_schedule_stands_over_what_is_before_it_and_under_what_is_behind_it(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    scheduled = schedule(host, host.top_k(pair.moe, 1), "0 - 10: 5")
    for chain, expected in ((scheduled, [5, 1, 1]), (host.top_k(scheduled, 7), [7, 7, 7])):
        model, seen = evaluations(chain)
        host.sample(model, SMALL)
        assert [settings["top_k"] for _, settings in seen] == expected


def test_controls_belong_to_their_clone_and_a_run_leaves_nothing_behind(host: Comfy, pair: Pair) -> None:
    from comfy.patcher_extension import WrappersMP

    before = host.sample(pair.moe, SMALL)
    one = mask(host, schedule(host, host.top_k(pair.moe, 1), "0 - 50: 4"), "*: 0=0")
    options = dict(one.model_options["transformer_options"]["d2m"])
    first = host.sample(one, SMALL)
    assert torch.equal(host.sample(pair.moe, SMALL), before)
    assert torch.equal(host.sample(one, SMALL), first)
    assert one.model_options["transformer_options"]["d2m"] == options
    assert not pair.moe.get_all_wrappers(WrappersMP.PREDICT_NOISE)
    for kind in (WrappersMP.PREDICT_NOISE, WrappersMP.OUTER_SAMPLE):
        assert len(one.get_all_wrappers(kind)) == 1


def test_prompt_and_negative_prompt_share_what_is_latched(
    host: Comfy, pair: Pair, evaluations: Callable[[Any], Any]
) -> None:
    """Also where they are called one after the other: their contexts do not fit into one batch."""
    import comfy.sample

    model, seen = evaluations(schedule(host, pair.moe, "0 - 10: 5\n10 - 100: 1"))
    (_, rest), *_ = positive = host.conditioning(pair.moe, 1)
    negative = [[torch.randn(1, 9, files.DIMS.context_size), rest]]
    noise = torch.randn(1, 16, 8, 8)
    comfy.sample.sample(model, noise, 3, 4.0, "euler", "simple", positive, negative, torch.zeros_like(noise), seed=0)
    assert [settings["top_k"] for _, settings in seen] == [5, 5, 1, 1, 1, 1]


@pytest.fixture
def fresh_compiler() -> Iterator[Any]:
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    yield counters
    torch.compiler.reset()


def test_a_compiled_model_follows_masks_without_another_graph(host: Comfy, pair: Pair, fresh_compiler: Any) -> None:
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    compiled = TorchCompileModel.execute(pair.moe, "eager").result[0]  # its own backends need a C++ compiler

    def check(text: str) -> None:
        found, expected = (host.sample(mask(host, model, text), SMALL, steps=1) for model in (compiled, pair.moe))
        assert distance(found, expected) <= 1e-6

    check("single_blocks.0: 1=0")
    graphs = fresh_compiler["stats"]["unique_graphs"]
    for text in ("single_blocks.0: 2=0", "*: *=0", "double_blocks.1.txt_mlp: 5=3"):
        check(text)
    assert fresh_compiler["stats"]["unique_graphs"] == graphs


def test_for_graphs_nothing_is_made_where_nothing_is_compiled(
    host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a mask would cost a copy for every FFN at every call of the model."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    module, made = host.module("nodes.model.flux_moe"), []
    original = module.graph_settings
    monkeypatch.setattr(module, "graph_settings", lambda *args: made.append(args) or original(*args))
    model = mask(host, pair.moe, "*: 0=0")
    expected = host.sample(model, SMALL, steps=1)
    assert not made
    compiled = TorchCompileModel.execute(model, "eager").result[0]
    assert distance(host.sample(compiled, SMALL, steps=1), expected) <= 1e-6
    assert made
    made.clear()
    assert torch.equal(host.sample(model, SMALL, steps=1), expected)
    assert not made


@pytest.mark.parametrize("how", ["a module in its place", "nn.Module.compile", "another forward"])
@pytest.mark.parametrize("part", ["", "single_blocks.1", "double_blocks.0"])
def test_every_way_of_compiling_is_seen(host: Comfy, tmp_path: Path, part: str, how: str) -> None:
    flux = host.load(files.save(files.split(files.dense_flux()), tmp_path / "moe.safetensors")).model.diffusion_model
    may_compile = host.module("nodes.model.custom_operators").may_compile
    assert not may_compile(flux)
    module = flux.get_submodule(part)
    if how == "nn.Module.compile":
        module.compile(backend="eager")
    elif how == "another forward":
        module.forward = torch.compile(module.forward, backend="eager")
    elif part:
        flux.set_submodule(part, torch.compile(module, backend="eager"))
    else:
        flux = torch.compile(flux, backend="eager")
    assert may_compile(flux)


# What is said


@pytest.mark.parametrize(
    ("node_id", "widgets", "message"),
    [
        ("D2MTopK", {"top_k": 13, "gate": "sum"}, r"has 12 experts per FFN\. Choose 0 to 12"),
        ("D2MActiveBlocks", {"active_blocks": 1}, r"no block groups"),
        ("D2MExpertMask", {"mask": "single_blocks.*: 12=0"}, r"Line 1 .* expert 12; single_blocks\.0 has 12"),
        ("D2MExpertMask", {"mask": "# x\nsingle_blocks.9: 1=0"}, r"Line 2 .* has experts in double_blocks\.1\.img_mlp"),
        ("D2MExpertMask", {"mask": "single_blocks.0 1=0"}, r"Line 1 of mask .* expected BLOCKS: EXPERT=WEIGHT"),
        ("D2MExpertMask", {"mask": "*: 1=-2"}, r"'1=-2'; expected EXPERT=WEIGHT"),
        ("D2MSchedule", {"setting": "capacity", "unit": "percent", "pieces": "0 - 1: 2"}, r"no capacity routers"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "0 - 50: 13"}, r"Line 1 .* Choose 0 to 12"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "0 - 50: 1.5"}, r"'1\.5' is not a whole number"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "50 - 20: 1"}, r"two rising numbers"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "0 - 120: 1"}, r"from 0 to 100"),
        ("D2MSchedule", {"setting": "top_k", "unit": "sigma", "pieces": "0 - 1: 1"}, r"two falling sigmas"),
        ("D2MSchedule", {"setting": "top_k", "unit": "sigma", "pieces": "50% - 0%: 1"}, r"choose the unit percent"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "0-50"}, r"expected START - END: VALUE"),
        # A pattern that tries every way to share the spaces out takes minutes for this, and the test's time runs out.
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": f"0{' ' * 9000}-"}, r"expected START - END: VALUE"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": f"0 - 1{' ' * 9000}x"}, r"expected START - END"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": f"0 - 1: {'1' * 5000}"}, r"too long for a number"),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "#" * 20_001}, r"has 20001 characters; expected"),
        ("D2MExpertMask", {"mask": "*: 1=0\n" * 3000}, r"has 21000 characters; expected 20000 at most"),
        ("D2MExpertMask", {"mask": f"*: {'1' * 5000}=0"}, r"expected EXPERT=WEIGHT"),
    ],
)  # fmt: skip
def test_what_this_file_cannot_have_is_said(
    host: Comfy, pair: Pair, node_id: str, widgets: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        host.control(node_id, pair.moe, **widgets)


@pytest.mark.parametrize(
    ("node_id", "widgets", "message"),
    [
        ("D2MActiveBlocks", {"active_blocks": 6}, r"active_blocks is 6; expected 0 to 5"),
        ("D2MActiveBlocks", {"active_blocks": 1, "per_group": "1,2,3"}, r"a list of 2, one for each block group"),
        ("D2MActiveBlocks", {"active_blocks": 1, "per_group": "4,1"}, r"active_blocks\[0\] is 4; expected 0 to 3"),
        ("D2MActiveBlocks", {"active_blocks": 1, "per_group": "a,b"}, r"'a,b' is not a list of whole numbers"),
        ("D2MSchedule", {"setting": "active_blocks", "unit": "percent", "pieces": "0 - 9: 7"}, r"Line 1 .* 0 to 5"),
    ],
)
def test_what_its_block_groups_cannot_have_is_said(
    host: Comfy, grouped: Grouped, node_id: str, widgets: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        host.control(node_id, grouped.moe, **widgets)


def test_a_file_with_capacity_routers_says_what_steers_it(host: Comfy, both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Set `capacity` instead"):
        schedule(host, both["capacity"], "0 - 50: 2")


@pytest.mark.parametrize(
    ("node_id", "widgets"),
    [
        ("D2MActiveBlocks", {"active_blocks": 1}),
        ("D2MSchedule", {"setting": "top_k", "unit": "percent", "pieces": "0 - 50: 2"}),
        ("D2MExpertMask", {"mask": "*: 1=0"}),
        ("D2MReplay", {"log": '[{"evaluation": 0, "top_k": 1}]'}),
    ],
)
def test_a_dense_flux_is_refused(host: Comfy, pair: Pair, node_id: str, widgets: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="this MODEL is a Flux without experts"):
        host.control(node_id, pair.teacher, **widgets)


def test_a_long_chain_applies_every_control_once(host: Comfy, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 450 masks took 13 seconds when every node applied all before it."""
    effects, parsed = host.module("nodes.controls.effects"), []
    parse = effects.parse_mask
    monkeypatch.setattr(effects, "parse_mask", lambda text: parsed.append(text) or parse(text))
    model = pair.moe
    for index in range(20):
        model = mask(host, host.top_k(model, index % 3), f"*: {index % ALL}=0.5")
    assert len(parsed) == 20
    settings = model.model_options["transformer_options"]["d2m"]
    assert settings["top_k"] == 1
    assert settings["mask"][FFNS[0]].tolist() == [0.25] * 8 + [0.5] * 4
