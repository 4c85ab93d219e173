"""What would happen on a GPU, without one: tensors without values on the device "cuda" show devices, dtypes and shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model import experts
from d2m_model.checkpoint import CONFIG_KEY, expected_tensors
from d2m_model.config import Gate, paper_layout
from d2m_model.hosts.diffusers import flux_moe_tensors
from d2m_model.moe import FusedFFN, MoEFFN
from d2m_model.routers import Routing
from d2m_model.trace import Evaluation, Pass, Run
from d2m_model.trace_record import SampleKey
from tests.toys import gpu_programs
from tests.toys.fake_gpu import GPU, HOST_WAITS, HostWaits, LiveMemory
from tests.toys.students import inputs_on, stored_tensors, student_config, student_on

HIDDEN_SIZE, TOKENS = 3072, 4608  # FLUX.1's, at 1024 x 1024 pixels


def test_a_student_trained_in_part_on_a_gpu_can_be_written() -> None:
    config = student_config()
    shapes = expected_tensors(config)
    stored = stored_tensors(config)
    with FakeTensorMode():
        model = student_on(GPU, config)
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


@pytest.mark.parametrize(
    ("capacity", "training"), [(False, False), (True, False), (True, True)], ids=["top-k", "capacity", "training"]
)
def test_the_host_waits_for_what_is_listed_only(
    capacity: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "computes_every_expert", lambda *sizes: False)
    config = student_config(capacity=capacity)
    with FakeTensorMode(), torch.no_grad():
        model = student_on(GPU, config).train(training)
        with HostWaits() as recorded:
            output = model(**inputs_on(GPU)).sample
    assert output.device.type == GPU.type
    blocks, predicted = ("d2m_model/mob.py", "item"), ("d2m_model/routers/capacity_routing.py", "event")
    expected = {blocks, predicted} if capacity else {blocks}
    assert recorded.waits == (set() if training else expected)
    assert recorded.waits <= set(HOST_WAITS)
    assert recorded.idle_waits() == 0


def test_a_trace_waits_for_its_copy_on_the_gpu_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream in which the event is recorded is that of the buffer's GPU, which is not the current one."""
    recorded = []

    class Event:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def record(self, stream: object) -> None:
            recorded.append((self.device, stream))

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: ("stream of", device))
    config = student_config()
    ffn, layout = next(iter(config.ffns.items()))
    with FakeTensorMode():
        evaluation = Evaluation(torch.empty(1, device=GPU), passes=[Pass([SampleKey("positive", 0, 0)], 7, 0)])
        logits_TE = torch.empty(16, layout.experts, device=GPU)
        routing = Routing.even(logits_TE.argsort()[:, :2], logits_TE[:, :2], logits_TE, gate_unit=1.0)
        evaluation.passes[0].recorder.experts(ffn, routing, 1, config.gate)
        Run(config, (4, 4), limit=1 << 20).end(evaluation)
    assert recorded == [(GPU, ("stream of", GPU))]


@pytest.mark.slow
def test_a_training_step_gives_gradients_on_the_gpu_without_a_wait() -> None:
    gpu_programs.run(gpu_programs.training_step)
