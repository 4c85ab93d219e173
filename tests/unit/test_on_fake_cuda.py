"""What would happen on a GPU, without one: tensors without values on the device "cuda" show devices, dtypes and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model import experts
from d2m_model.checkpoint import CONFIG_KEY, expected_tensors
from d2m_model.config import Gate, paper_layout
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, flux_moe_tensors
from d2m_model.hosts.diffusers.tensors import load_tensors
from d2m_model.moe import FusedFFN, MoEFFN
from tests.toys.fake_gpu import GPU, LiveMemory
from tests.toys.students import student_config

HIDDEN_SIZE, TOKENS = 3072, 4608  # FLUX.1's, at 1024 x 1024 pixels


def test_a_student_trained_in_part_on_a_gpu_can_be_written() -> None:
    config = student_config()
    shapes = expected_tensors(config)

    def stored(name: str) -> Tensor:
        """A tensor of the student's file, which is on the CPU."""
        return torch.empty(shapes[name], dtype=torch.int32 if name.endswith("neuron_order") else torch.float32)

    with FakeTensorMode():
        with torch.device("meta"):
            model = FluxMoETransformer2DModel(config)
        load_tensors(model, config, (), stored, torch.float32, "cuda")
        # Stage `shared`: the routed weights, which share their tensors in the file with the shared ones, are frozen.
        frozen = {name for name, _ in model.named_parameters() if ".shared_" not in name}
        assert 0 < len(frozen) < len(dict(model.named_parameters()))
        written = {
            name: tuple(tensor.shape)
            for name, tensor in flux_moe_tensors(model, config, unchanged=frozen, stored=stored)
            if name != CONFIG_KEY
        }
    assert written == {name: tuple(shape) for name, shape in shapes.items() if name != CONFIG_KEY}


def peak_memory(ffn: nn.Module, x: Tensor) -> int:
    """Return the bytes that the GPU holds at most, besides x and the weights."""
    with LiveMemory() as memory:
        ffn(x)
    return memory.peak


@pytest.mark.parametrize("kernels", [False, True], ids=["torch's operators", "Triton kernels"])
def test_no_top_k_needs_more_memory_than_the_dense_ffn(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI reserves memory by image size alone, as much as a dense FLUX needs."""
    monkeypatch.setattr(experts, "has_kernels", lambda x: kernels)
    layout, bfloat16 = paper_layout(HIDDEN_SIZE), {"device": GPU, "dtype": torch.bfloat16}
    with FakeTensorMode(), torch.no_grad():
        dense = nn.Sequential(
            nn.Linear(HIDDEN_SIZE, layout.neurons, **bfloat16),
            nn.GELU(approximate="tanh"),
            nn.Linear(layout.neurons, HIDDEN_SIZE, **bfloat16),
        )
        fused = FusedFFN(
            up_weight_NH=dense[0].weight,
            up_bias_N=dense[0].bias,
            down_weight_HN=dense[2].weight,
            down_bias_H=dense[2].bias,
            router={"router.weight": torch.empty(layout.experts, HIDDEN_SIZE, **bfloat16)},
            expert_mean_EH=torch.empty(layout.experts, HIDDEN_SIZE, **bfloat16),
        )
        moe = MoEFFN(fused, layout=layout, gate=Gate(mode="normalised", scale=1.0), top_k=2).eval()
        x = torch.empty(TOKENS, HIDDEN_SIZE, **bfloat16)
        most, peaks = peak_memory(dense, x), []
        for top_k in (0, 1, 2, 3, 5, 8, 11, 12):
            moe.router_value = top_k
            peaks.append(peak_memory(moe, x))
    assert most == 2 * TOKENS * layout.neurons * x.element_size()  # before and after the GELU
    assert max(peaks) <= most
