"""A training step on a GPU, without one: tensors without values on the device "cuda" show for what the host waits."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model.checkpoint import expected_tensors
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, untrained_transformer
from d2m_model.hosts.diffusers.tensors import load_tensors
from d2m_train import UserError
from d2m_train.blockwise import part
from d2m_train.blockwise.feature_store import Conditions, Features
from d2m_train.blockwise.part import Part, PartBlocks, PartObjective, StoredMicrobatch
from d2m_train.data import copying
from d2m_train.data.batch import Batch
from d2m_train.distillation.losses import StepLosses
from d2m_train.distillation.stages import StagePlan, plan_stage, prepare_student
from d2m_train.flow.noise import NoisyBatch
from d2m_train.monitor.router_statistics import RouterStatistics
from d2m_train.monitor.student_monitor import StudentMonitor
from d2m_train.run_config import RunConfig, Stage
from d2m_train.training.end_to_end import EndToEnd, NumberedBatch
from d2m_train.training.loop import TrainingLoop
from d2m_train.training.one_ahead import OneAhead
from tests.toys.fake_gpu import GPU, HOST_WAITS, HostWaits
from tests.toys.students import DIMS, student_config

RUN = RunConfig.model_validate(
    {
        "output_dir": "out",
        "teacher": {"path": "teacher.safetensors"},
        "student": {"preset": "L"},
        "data": {"source": "emoji"},
        "eyes": {"routers_every": 1},
    }
)
PIXELS, WORDS = 16, 6
CPU = torch.device("cpu")


class TrainingWaits(HostWaits):
    """Host waits, and none for a copy from memory that copying.pinned has pinned. The host reads zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[Tensor] = []
        self.copies = 0

    def pin(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.pinned.append(tensor)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_cuda:
            self._wait("item", True)
            return 0.0
        if func is aten._to_copy.default and kwargs.get("non_blocking") and any(args[0] is one for one in self.pinned):
            self.copies += 1
            return func(*args, **kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainingWaits]:
    recorded = TrainingWaits()
    for module in (copying, part):
        monkeypatch.setattr(module, "pinned", recorded.pin)
    with FakeTensorMode():
        yield recorded


def ranks_on(device: torch.device, **changes: Any) -> Any:
    """One rank, without the backward pass, which needs a CUDA runtime."""
    return SimpleNamespace(
        **{
            "device": device,
            "count": 1,
            "average": lambda tensor: tensor,
            "averages": dict,
            "any": bool,
            "accumulate": lambda model: nullcontext(),
            "backward": lambda loss: None,
            "synchronising": True,
            "clip": lambda parameters, maximum: torch.zeros((), device=device),
            "scaler": None,
            "stop_request": lambda: torch.zeros((), device=device),
            **changes,
        }
    )


def student_on_gpu(stage: Stage, capacity: bool) -> tuple[FluxMoETransformer2DModel, StagePlan]:
    config = student_config(capacity=capacity)
    shapes = expected_tensors(config)

    def stored(name: str) -> Tensor:
        return torch.empty(shapes[name], dtype=torch.int32 if name.endswith("neuron_order") else torch.float32)

    with torch.device("meta"):
        core = FluxMoETransformer2DModel(config)
    load_tensors(core, config, (), stored, torch.float32, GPU)
    plan = plan_stage(stage, config, getattr(RUN.stage, stage))
    prepare_student(core, plan)
    return core.train(), plan


def loop_of(objective: Any, trainee: Any, ranks: Any) -> TrainingLoop[Any]:
    loop: TrainingLoop[Any] = object.__new__(TrainingLoop)
    loop.run, loop.ranks, loop.steps, loop.trainee, loop.objective = RUN, ranks, 1, trainee, objective
    return loop


@pytest.mark.parametrize(
    ("stage", "capacity"), [("shared", False), ("experts", False), ("experts", True), ("blocks", False)]
)
def test_the_host_waits_once_a_step(stage: Stage, capacity: bool, waits: TrainingWaits) -> None:
    core, plan = student_on_gpu(stage, capacity)
    with GPU:
        teacher = untrained_transformer(DIMS).requires_grad_(False)
    ranks = ranks_on(GPU)
    trainee: Any = SimpleNamespace(called=core, core=core, trained={})
    objective = EndToEnd(SimpleNamespace(run=RUN, stage=stage, ranks=ranks, teacher=teacher), trainee, plan)  # type: ignore[arg-type]
    objective.monitor = object.__new__(StudentMonitor)
    objective.monitor.distillation, objective.monitor.steps = objective.distillation, 1
    objective.monitor.statistics = RouterStatistics(core)
    batch = Batch(
        tokens_BTC=torch.empty(2, PIXELS, DIMS.in_channels),
        context_BLD=torch.empty(2, WORDS, DIMS.context_size),
        pooled_BV=torch.empty(2, DIMS.vector_size),
        guidance_B=torch.empty(2),
        image_ids_T3=torch.empty(PIXELS, 3),
        text_ids_L3=torch.empty(WORDS, 3),
        words_BL=torch.ones(2, WORDS, dtype=torch.bool),
    )
    assert batch.tokens_BTC is not None
    noisy = NoisyBatch(tokens_BTC=batch.tokens_BTC, t_B=torch.empty(2), target_BTC=None)
    microbatch = NumberedBatch(batch=batch, number=0, noisy=noisy)
    objective.microbatches = lambda step: iter([microbatch, microbatch])  # type: ignore[method-assign]
    with waits:
        result = loop_of(objective, trainee, ranks)._step(1)
        objective.routers.end_step()
    assert {tensor.device.type for tensor in result.losses.values()} == {GPU.type}
    assert waits.waits == {("d2m_train/training/loop.py", "item")} <= set(HOST_WAITS)
    masks = {"shared": 0, "experts": 3 if capacity else 6, "blocks": 3}[
        stage
    ]  # for statistics, and for the balance loss
    assert waits.copies == 2 * (8 + masks), "of each input, and of each stream's mask"


def test_a_blockwise_step_moves_features_as_they_are_stored_and_waits_once(waits: TrainingWaits) -> None:
    core, plan = student_on_gpu("experts", False)
    block = Part(name="double_blocks.1", kind="double", blocks=(1,), start=1, end=2, group=None)
    blocks, ranks = PartBlocks(core, block, checkpointing=False), ranks_on(GPU)
    trainee: Any = SimpleNamespace(called=blocks, core=blocks, trained={})
    bfloat16, hidden_size = {"dtype": torch.bfloat16}, DIMS.hidden_size
    rotary = (torch.empty(WORDS + PIXELS, 128, device=GPU), torch.empty(WORDS + PIXELS, 128, device=GPU))
    features = Features(
        image_BTH=torch.empty(2, PIXELS, hidden_size, **bfloat16),
        text_BLH=torch.empty(2, WORDS, hidden_size, **bfloat16),
    )
    conditions = Conditions(
        temb_BH=torch.empty(2, hidden_size, **bfloat16),
        rotary=rotary,
        image_ids_T3=torch.empty(PIXELS, 3),
        words_BL=torch.ones(2, WORDS, dtype=torch.bool),
    )
    store: Any = SimpleNamespace(features=lambda depth, index: features)
    stage_run: Any = SimpleNamespace(
        run=RUN, stage="experts", ranks=ranks, section=RUN.stage.experts, dtype=torch.float32
    )
    objective = PartObjective(stage_run, trainee, block, 0, plan, store)
    microbatch = StoredMicrobatch(index=0, following=None, conditions=conditions)
    objective.microbatches = lambda step: iter([microbatch])  # type: ignore[method-assign]
    with waits:
        loop_of(objective, trainee, ranks)._step(1)
        objective.routers.end_step()
    assert waits.waits == {("d2m_train/training/loop.py", "item")}
    assert waits.copies == 5 + 4, "input, target and conditions; masks of two streams for the loss and for statistics"


def test_on_a_gpu_inputs_are_made_one_ahead() -> None:
    made: dict[int, str] = {}

    def make(number: int) -> int:
        made[number] = threading.current_thread().name
        return number

    ahead = OneAhead(make, GPU)
    assert [ahead.take(number, following) for number, following in ((3, 5), (5, None), (9, None))] == [3, 5, 9]
    main = threading.current_thread().name
    assert made[3] == made[9] == main, "the first, and one that was not announced"
    assert made[5] != main
    assert OneAhead(make, CPU).take(7, 8) == 7
    assert 8 not in made


class Lines:
    """An objective of three microbatches, of which the second has a loss that is not finite."""

    name, steps_before = "Stage shared", 0
    routers = SimpleNamespace(after_backward=lambda: None)

    def __init__(self, model: nn.Module) -> None:
        self.model, self.recorded = model, 0

    def microbatches(self, step: int) -> Iterator[Any]:
        return iter([SimpleNamespace(x=torch.full((2,), x), tokens=1) for x in (1.0, torch.inf, torch.nan)])

    def losses(self, microbatch: Any) -> StepLosses:
        loss = self.model(microbatch.x).sum()
        return StepLosses(total=loss, parts={"total": loss.detach()})

    def record(self, microbatch: Any, step: int) -> None:
        self.recorded += 1


def test_the_first_microbatch_that_is_not_finite_is_looked_into() -> None:
    """All of the step's losses are read together; the step ends ahead of the optimizer."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(dim=0))
    objective = Lines(model)
    ranks = ranks_on(
        CPU, backward=lambda loss: loss.backward(), clip=lambda parameters, maximum: torch.tensor(torch.nan)
    )
    loop = loop_of(objective, SimpleNamespace(called=model, trained={}), ranks)
    loop.checkpoints = SimpleNamespace(steps=lambda: [])  # type: ignore[assignment]
    looked_into: list[float] = []
    losses = objective.losses
    objective.losses = lambda microbatch: looked_into.append(float(microbatch.x[0])) or losses(microbatch)  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(UserError, match=r"Stage shared, step 7: the loss or its gradient is not finite\."):
        loop._step(7)
    assert looked_into[:3] == pytest.approx([1.0, torch.inf, torch.nan], nan_ok=True)
    assert looked_into[3:] == [torch.inf]
    assert objective.recorded == 3
