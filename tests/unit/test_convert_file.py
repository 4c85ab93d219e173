"""Dense FLUX -> FLUX-MoE: which neurons go where, that nothing is lost, and that memory does not grow (promises 2 and 5)."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from d2m_model.checkpoint import CheckpointError, TensorFile, check_file
from d2m_model.config import FFNLayout, FluxMoEConfig, Gate, preset_layouts
from d2m_model.conversion.convert import convert_file, describe_teacher
from d2m_model.conversion.importance import TaylorImportance, weight_norm_importance
from d2m_model.conversion.interfaces import FFNPlan, FFNWeights
from d2m_model.conversion.router_init import centroid_router, random_router
from d2m_model.conversion.split import generator_for, neuron_order
from d2m_model.routers.token_router import WEIGHT
from d2m_model.teacher import DenseTeacher, open_teacher
from tests.toys.teachers import METADATA, dense_flux, save_flux

LAYOUT = FFNLayout(shared=128, experts=12, width=32)


# Splitting


@given(st.integers(0, 5), st.integers(1, 6), st.integers(1, 5), st.sampled_from(["dealt", "random"]), st.integers(0, 9))
def test_every_neuron_has_one_place_and_the_most_important_are_shared(
    shared: int, experts: int, width: int, dealing: str, seed: int
) -> None:
    layout = FFNLayout(shared=shared, experts=experts, width=width)
    importance = torch.randint(0, 4, (layout.neurons,), generator=torch.Generator().manual_seed(seed)).float()
    order = neuron_order(importance, layout, dealing, generator_for(seed, "x"))  # type: ignore[arg-type]
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(layout.neurons))
    least_shared = importance[order[:shared].long()].min() if shared else torch.inf
    assert importance[order[shared:].long()].max() <= least_shared
    assert torch.equal(order, neuron_order(importance, layout, dealing, generator_for(seed, "x")))  # type: ignore[arg-type]


def test_dealing_gives_every_expert_nearly_the_same_importance() -> None:
    importance = torch.rand(LAYOUT.neurons, generator=torch.Generator().manual_seed(0)) ** 4

    def spread(dealing: str) -> float:
        order = neuron_order(importance, LAYOUT, dealing, generator_for(0, "x"))  # type: ignore[arg-type]
        sums = importance[order[LAYOUT.shared :].long()].view(LAYOUT.experts, LAYOUT.width).sum(1)
        return float((sums.max() - sums.min()) / sums.mean())

    assert spread("dealt") < 0.05 < spread("random")


def test_random_dealing_depends_on_the_seed_and_on_the_ffn() -> None:
    importance = torch.ones(LAYOUT.neurons)
    orders = [
        neuron_order(importance, LAYOUT, "random", generator_for(seed, ffn))
        for seed, ffn in ((0, "single_blocks.0"), (1, "single_blocks.0"), (0, "single_blocks.1"))
    ]
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_importance_of_the_wrong_length_or_not_finite_is_refused() -> None:
    for importance in (torch.ones(5), torch.full((LAYOUT.neurons,), float("nan"))):
        with pytest.raises(ValueError, match=r"expected \[512\] finite"):
            neuron_order(importance, LAYOUT, "dealt", generator_for(0, "x"))


def test_centroid_router_is_the_mean_up_row_of_each_expert() -> None:
    up = torch.randn(LAYOUT.neurons, 128).bfloat16()
    order = torch.randperm(LAYOUT.neurons, dtype=torch.int32)
    router = centroid_router(up, order, LAYOUT)
    neurons_of_expert_5 = order[LAYOUT.shared + 5 * 32 : LAYOUT.shared + 6 * 32].long()
    torch.testing.assert_close(router[5], up[neurons_of_expert_5].float().mean(0))
    assert router.shape == (12, 128)
    assert router.dtype == torch.float32


def test_random_routers_are_never_zero_and_their_logits_of_order_one() -> None:
    router = random_router(LAYOUT, 128, generator_for(0, "x"))
    assert router.shape == (12, 128)
    assert 0.8 < (router @ torch.randn(128, 1000)).std() < 1.2


# Importance


def test_weight_norm_is_the_product_of_what_a_neuron_reads_and_writes() -> None:
    up, bias, down = torch.randn(2500, 8), torch.randn(2500), torch.randn(6, 2500)
    read = torch.cat([up, bias[:, None]], 1).norm(dim=1)
    torch.testing.assert_close(weight_norm_importance(up, bias, down), read * down.norm(dim=0))


def test_weight_norm_does_not_depend_on_how_it_is_cut() -> None:
    up, bias, down = torch.randn(1 << 11, 1 << 9), torch.randn(1 << 11), torch.randn(1 << 9, 1 << 11)
    read = torch.cat([up, bias[:, None]], 1).norm(dim=1)
    torch.testing.assert_close(weight_norm_importance(up, bias, down), read * down.norm(dim=0))


def test_an_ffn_is_shown_its_own_part_of_the_fused_weights(tmp_path: Path) -> None:
    tensors = save_flux(tmp_path / "flux.safetensors", dtype=torch.float32)
    seen: dict[str, FFNWeights] = {}
    with open_teacher(tmp_path / "flux.safetensors") as teacher:
        config = config_of(teacher)

        def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
            seen[ffn] = weights
            return plan_of(config)(ffn, weights)

        convert_file(teacher, tmp_path / "moe.safetensors", config, plan)
        for ffn, up, first_row, down, first_column in (
            ("single_blocks.0", "single_blocks.0.linear1", 384, "single_blocks.0.linear2", 128),
            ("double_blocks.1.txt_mlp", "double_blocks.1.txt_mlp.0", 0, "double_blocks.1.txt_mlp.2", 0),
        ):
            assert torch.equal(seen[ffn].up_NH, tensors[f"{up}.weight"][first_row:])
            assert torch.equal(seen[ffn].up_bias_N, tensors[f"{up}.bias"][first_row:])
            assert torch.equal(seen[ffn].down_HN, tensors[f"{down}.weight"][:, first_column:])
            assert torch.equal(seen[ffn].down_bias_H, tensors[f"{down}.bias"])


class TwoFFNs(nn.Module):
    """One FFN with its own down-projection, one whose down-projection also reads 3 other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 5), nn.Linear(5, 3)
        self.other_up, self.other_down = nn.Linear(3, 5), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = x + self.down(torch.tanh(self.up(x)))
        loss: torch.Tensor = self.other_down(torch.cat([x, torch.tanh(self.other_up(x))], -1)).square().mean()
        return loss

    def ffns(self) -> list[tuple[str, nn.Linear, nn.Linear, int]]:
        return [("a", self.up, self.down, 0), ("b", self.other_up, self.other_down, 3)]


def test_taylor_importance_is_equation_6_summed_over_batches() -> None:
    torch.manual_seed(0)
    model, batches = TwoFFNs(), torch.randn(4, 7, 3)
    expected = {"a": torch.zeros(5), "b": torch.zeros(5)}
    for batch in batches:
        model.zero_grad()
        model(batch).backward()
        for name, up, down, first in model.ffns():
            scores = [(p.grad * p).abs().detach() for p in (up.weight, up.bias, down.weight) if p.grad is not None]
            expected[name] += scores[0].sum(1) + scores[1] + scores[2][:, first:].sum(0)
    model.zero_grad()

    taylor = TaylorImportance.of(model, model.ffns())
    for batch in batches:
        model(batch).backward()
        assert all(p.grad is None for p in model.parameters()), "a gradient was kept"
    scores_by_name = taylor.close()
    for name in expected:
        torch.testing.assert_close(scores_by_name[name], expected[name])
    model(batches[0]).backward()
    assert model.up.weight.grad is not None, "still watching after close"


# Whole files


def config_of(teacher: DenseTeacher) -> FluxMoEConfig:
    return FluxMoEConfig(
        dims=teacher.dims,
        ffns=preset_layouts(teacher.dims),
        groups=(),
        gate=Gate(mode="sum", scale=1.0),
        top_k=2,
        adaln_rank=None,
        split_only=True,
        teacher=describe_teacher(teacher),
    )


def plan_of(config: FluxMoEConfig, seed: int = 0) -> Callable[[str, FFNWeights], FFNPlan]:
    """Weight norm, dealt, centroid: what the command line does without options."""

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        layout = config.ffns[ffn]
        importance = weight_norm_importance(weights.up_NH, weights.up_bias_N, weights.down_HN)
        order = neuron_order(importance, layout, "dealt", generator_for(seed, ffn))
        return FFNPlan(order_N=order, router={WEIGHT: centroid_router(weights.up_NH, order, layout)})

    return plan


def convert(teacher_path: Path, target: Path, seed: int = 0) -> FluxMoEConfig:
    with open_teacher(teacher_path) as teacher:
        config = config_of(teacher)
        return convert_file(teacher, target, config, plan_of(config, seed))


def test_the_ffn_is_the_dense_one_with_its_neurons_in_another_order(tmp_path: Path) -> None:
    dense = save_flux(tmp_path / "dense.safetensors", dtype=torch.float32)
    convert(tmp_path / "dense.safetensors", tmp_path / "moe.safetensors")
    moe = load_file(tmp_path / "moe.safetensors")
    x = torch.randn(5, 128)

    def linear1(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return x @ tensors["single_blocks.0.linear1.weight"].T + tensors["single_blocks.0.linear1.bias"]

    def block(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        attention, hidden = linear1(tensors)[:, :128], torch.nn.functional.gelu(linear1(tensors)[:, 384:])
        return torch.cat([attention, hidden], 1) @ tensors["single_blocks.0.linear2.weight"].T

    torch.testing.assert_close(block(moe), block(dense), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(linear1(moe), linear1(dense), atol=0.1)


def test_the_neurons_that_matter_most_are_shared(tmp_path: Path) -> None:
    dense = save_flux(tmp_path / "dense.safetensors", dtype=torch.float32)
    planted = torch.randperm(512)[:128]
    dense["double_blocks.1.txt_mlp.0.weight"][planted] *= 10
    save_file(dense, tmp_path / "dense.safetensors")
    convert(tmp_path / "dense.safetensors", tmp_path / "moe.safetensors")
    order = load_file(tmp_path / "moe.safetensors")["double_blocks.1.txt_mlp.neuron_order"]
    assert set(order[:128].tolist()) == set(planted.tolist())


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    save_flux(tmp_path / "dense.safetensors")
    for name in ("a", "b"):
        convert(tmp_path / "dense.safetensors", tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_file_says_what_it_is_and_where_it_comes_from(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    save_flux(path)
    config = convert(path, tmp_path / "moe.safetensors")
    assert config.teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (config.teacher.title, config.teacher.licence) == (METADATA["modelspec.title"], "Apache-2.0")
    with TensorFile(tmp_path / "moe.safetensors") as moe:
        assert FluxMoEConfig.from_json(moe.metadata["d2m_config"]) == config
        assert moe.metadata["modelspec.title"] == "Small FLUX FLUX-MoE"
        assert moe.metadata["modelspec.license"] == "Apache-2.0"
        assert moe.metadata["modelspec.architecture"] == "Flux.1-dev"
        assert "opens and samples as the dense teacher" in moe.metadata["modelspec.description"]


def test_the_teacher_is_not_overwritten_by_any_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    save_flux(path)
    before = path.read_bytes()
    links = [tmp_path / "soft.safetensors", tmp_path / "hard.safetensors"]
    links[0].symlink_to(path)
    links[1].hardlink_to(path)
    for target in (path, tmp_path / "." / "dense.safetensors", *links):
        with pytest.raises(CheckpointError, match="this is the teacher"):
            convert(path, target)
    assert path.read_bytes() == before


def save_shards(folder: Path) -> tuple[Path, Path, Path]:
    """Index and two shards."""
    tensors = dense_flux()
    files = [folder / f"flux-{i + 1:05}-of-00002.safetensors" for i in range(2)]
    parts = [{name: tensor for name, tensor in tensors.items() if name.startswith("double") == bool(i)} for i in (0, 1)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file)
    weight_map = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    index = folder / "flux.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index, files[0], files[1]


def test_a_sharded_teacher_is_hashed_index_first_and_no_part_of_it_overwritten(tmp_path: Path) -> None:
    files = save_shards(tmp_path)
    for target in files:
        with pytest.raises(CheckpointError, match="this is the teacher"):
            convert(files[1], target)
    config = convert(files[1], tmp_path / "moe.safetensors")
    assert config.teacher.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    save_flux(tmp_path / "dense.safetensors")
    convert(tmp_path / "dense.safetensors", tmp_path / "moe-of-one.safetensors")
    sharded, whole = (load_file(tmp_path / name) for name in ("moe.safetensors", "moe-of-one.safetensors"))
    assert all(torch.equal(sharded[name], whole[name]) for name in whole if name != "d2m_config")


@pytest.mark.parametrize("biases_first", [False, True])
def test_the_teacher_is_read_once_and_forward(tmp_path: Path, biases_first: bool) -> None:
    """Also where biases have another dtype, so that safetensors lays all of them down before all weights."""
    path = tmp_path / "dense.safetensors"
    tensors = dense_flux()
    save_file({name: t.float() if biases_first and t.ndim == 1 else t for name, t in tensors.items()}, path)
    asked: list[str] = []
    planned: list[str] = []
    heard: list[int] = []
    with open_teacher(path) as teacher:
        read = teacher.tensor

        def tensor(name: str) -> torch.Tensor:
            asked.append(name)
            return read(name)

        teacher.tensor = tensor  # type: ignore[method-assign]
        config = config_of(teacher)
        plan = plan_of(config)

        def noted(ffn: str, weights: FFNWeights) -> FFNPlan:
            planned.append(ffn)
            return plan(ffn, weights)

        convert_file(teacher, tmp_path / "moe.safetensors", config, noted, progress=heard.append)
        assert sorted(asked) == sorted(teacher.shapes)
        weights = [name for name in asked if len(teacher.shapes[name]) == 2]
        places = [teacher.span(name)[0] for name in weights]
        largest = max(end - begin for begin, end in map(teacher.span, weights))
        assert all(later > earlier - 2 * largest for earlier, later in pairwise(places))
        assert sum(heard) == teacher.size
    assert planned == sorted(config.ffns)  # as they lie in the file
    assert check_file(tmp_path / "moe.safetensors").teacher.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_conversion_that_ends_early_leaves_the_old_file_and_no_thread(tmp_path: Path) -> None:
    save_flux(tmp_path / "dense.safetensors")
    target = tmp_path / "moe.safetensors"
    target.write_bytes(b"the old file")
    threads = set(threading.enumerate())

    def plan(ffn: str, weights: FFNWeights) -> FFNPlan:
        raise RuntimeError(ffn)

    with (
        open_teacher(tmp_path / "dense.safetensors") as teacher,
        pytest.raises(RuntimeError, match=r"double_blocks\.1"),
    ):
        convert_file(teacher, target, config_of(teacher), plan)
    assert target.read_bytes() == b"the old file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", "moe.safetensors"]
    assert set(threading.enumerate()) == threads


KILLED = """
import os, signal, sys
from pathlib import Path
from d2m_model.conversion.convert import convert_file
from d2m_model.teacher import open_teacher
from tests.unit.test_convert_file import config_of, plan_of

with open_teacher(Path(sys.argv[1])) as teacher:
    config = config_of(teacher)
    plan = plan_of(config)

    def dying(ffn, weights):
        if ffn == "single_blocks.1":
            os.kill(os.getpid(), signal.SIGKILL)
        return plan(ffn, weights)

    convert_file(teacher, sys.argv[2], config, dying)
"""


def test_a_conversion_that_is_killed_leaves_no_target_and_the_next_one_clears_up(tmp_path: Path) -> None:
    teacher, target = tmp_path / "dense.safetensors", tmp_path / "moe.safetensors"
    save_flux(teacher)
    done = subprocess.run([sys.executable, "-c", KILLED, str(teacher), str(target)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not target.exists()
    assert len(list(tmp_path.glob(".moe.safetensors.*.part"))) == 1
    convert(teacher, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense.safetensors", "moe.safetensors"]


MEMORY = """
import json, sys, threading, time
from dataclasses import replace
from pathlib import Path
from d2m_model.routers.token_router import WEIGHT
from d2m_model.keys import dense_shapes
from tests.toys.teachers import DIMS
from tests.unit.test_convert_file import convert

folder = Path(sys.argv[1])

def sparse_flux(dims):  # holes read as zeros, so that only the result is really written
    entries, end = {}, 0
    for name, shape in dense_shapes(dims).items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "dense.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)

sizes = []
for single_blocks in (8, 40):
    sizes.append(sparse_flux(replace(DIMS, hidden_size=512, single_blocks=single_blocks)))
    peak, done = 0, False
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(folder / "dense.safetensors", folder / "moe.safetensors")
    done = True
    watcher.join()
    sizes.append(peak)
print(json.dumps(sizes))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, small_peak, large, large_peak = json.loads(done.stdout)
    assert large - small > 200e6
    assert large_peak - small_peak < 32e6
