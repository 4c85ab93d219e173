"""The plan of a run, held against the run's own student, gradients, optimizer and saved tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model.config import FluxMoEConfig
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, save_flux_moe, untrained_transformer
from d2m_train import UserError
from d2m_train.__main__ import main
from d2m_train.data.batch import Batch
from d2m_train.distillation.stages import plan_stage, prepare_student
from d2m_train.distillation.step import Distillation
from d2m_train.flow.noise import NoisyBatch
from d2m_train.parallel.ranks import Ranks
from d2m_train.plan.activations import optional_names
from d2m_train.plan.estimate import choose_strategy, parse_gpu_memory, plan_run, student_config
from d2m_train.plan.memory import loading_memory, shared_memory, teacher_bytes
from d2m_train.plan.run_plan import RunPlan, StageEstimate
from d2m_train.plan.speed import stage_seconds
from d2m_train.plan.text import plan_text
from d2m_train.run_config import RunConfig, Stage
from d2m_train.teacher.frozen import open_frozen_teacher
from d2m_train.training.optimizers import WeightAverage, new_optimizer
from d2m_train.training.parameter_sizes import ParameterSize
from d2m_train.training.student_file import fill_student, meta_student
from tests.toys import files
from tests.toys.live_storages import LiveStorages
from tests.toys.runs import DIMS, write_inputs

IMAGE, TEXT = 16, 6  # tokens of a sample of write_latents


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_inputs(folder)
    return folder


def run_of(inputs: Path, stage: Stage = "experts", **sections: dict[str, Any]) -> RunConfig:
    fields: dict[str, Any] = {
        "output_dir": inputs / "run",
        "stages": ["convert", stage, "export"],
        "teacher": {"path": inputs / "teacher.safetensors", "dtype": "float32"},
        "student": {"preset": "S"},
        "data": {"source": "latents", "path": inputs / "latents.safetensors"},
    }
    for name, values in sections.items():
        fields[name] = {**fields.get(name, {}), **values}
    return RunConfig.model_validate(fields)


class Real:
    """The stage's real student, of random weights, after one real step."""

    def __init__(self, run: RunConfig, stage: Stage) -> None:
        config: FluxMoEConfig = student_config(run, DIMS)
        self.core = FluxMoETransformer2DModel(config, optional_names(run, config))
        with torch.no_grad():
            for parameter in self.core.parameters():
                parameter.normal_(std=0.1)
        section = getattr(run.stage, stage)
        self.plan = plan_stage(stage, self.core.flux_moe, section)
        prepare_student(self.core, self.plan, run.student.frozen_dtype)
        if run.training.gradient_checkpointing:
            self.core.enable_gradient_checkpointing()
        self.core.train()
        self.trained = {name: p for name, p in self.core.named_parameters() if p.requires_grad}
        self.optimizer, _ = new_optimizer(list(self.trained.values()), section, run.training)
        self.saved = self._step(run)

    def _step(self, run: RunConfig) -> int:
        """Forward, losses, backward and update; bytes that saved-tensor hooks see but for the weights."""
        teacher = untrained_transformer(DIMS).requires_grad_(False).eval()
        student = self.core
        if run.training.mixed_precision != "no":
            from accelerate.utils.operations import convert_outputs_to_fp32

            forward = torch.autocast("cpu", torch.bfloat16)(self.core.forward)
            self.core.forward = convert_outputs_to_fp32(forward)  # type: ignore[method-assign]
        distillation = Distillation(teacher=teacher, student=student, core=self.core, plan=self.plan, run=run)
        size = run.training.batch_size
        batch = Batch(
            tokens_BTC=torch.randn(size, IMAGE, 64),
            context_BLD=torch.randn(size, TEXT, DIMS.context_size),
            pooled_BV=torch.randn(size, DIMS.vector_size),
            guidance_B=torch.full((size,), 3.5),
            image_ids_T3=torch.rand(IMAGE, 3).round(),
            text_ids_L3=torch.zeros(TEXT, 3),
            words_BL=torch.ones(size, TEXT, dtype=torch.bool),
        )
        noisy = NoisyBatch(tokens_BTC=torch.randn(size, IMAGE, 64), t_B=torch.rand(size), target_BTC=None)
        weights = {t.untyped_storage().data_ptr() for t in (*self.core.parameters(), *self.core.buffers())}
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage().data_ptr()
            if storage not in weights:
                kept.setdefault(storage, tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            losses = distillation.compare(batch, noisy)
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        losses.total.backward()
        self.optimizer.step()
        return saved

    def sizes(self) -> dict[str, int]:
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        everything: list[Tensor] = [*self.core.parameters(), *self.core.buffers()]
        return {
            "student's weights": sum(tensor.nbytes for tensor in everything),
            "gradients": sum(p.grad.nbytes for p in self.core.parameters() if p.grad is not None),
            "optimizer": sum(value.nbytes for value in states if isinstance(value, Tensor)),
        }


CASES: dict[str, tuple[Stage, dict[str, dict[str, Any]]]] = {
    "shared": ("shared", {}),
    "experts": ("experts", {"training": {"batch_size": 4}}),
    "blocks": ("blocks", {}),
    "shared, checkpointed": ("shared", {"training": {"gradient_checkpointing": True, "batch_size": 4}}),
    "experts, checkpointed": ("experts", {"training": {"gradient_checkpointing": True}}),
    "blocks, checkpointed": ("blocks", {"training": {"gradient_checkpointing": True, "batch_size": 4}}),
    "experts, mixed precision": (
        "experts",
        {"training": {"mixed_precision": "bf16", "batch_size": 4}, "student": {"frozen_dtype": "bfloat16"}},
    ),
    "experts, capacity": ("experts", {"student": {"router": "capacity"}, "training": {"batch_size": 4}}),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_real_step_takes(case: str, inputs: Path) -> None:
    stage, sections = CASES[case]
    run = run_of(inputs, stage, **sections)
    (planned,) = plan_run(run).stages
    torch.manual_seed(0)
    real = Real(run, stage)
    assert {name: planned.memory[name] for name in real.sizes()} == real.sizes()
    assert planned.trained == sum(parameter.numel() for parameter in real.trained.values())
    assert planned.memory["activations"] == pytest.approx(real.saved, rel=0.01)


def test_the_average_and_the_file_of_a_stage_are_what_they_take(inputs: Path, tmp_path: Path) -> None:
    run = run_of(inputs, "experts", training={"ema": 0.99})
    planned = plan_run(run)
    real = Real(run, "experts")
    average = WeightAverage(real.trained, 0.99)
    assert planned.stages[0].memory["average"] == sum(tensor.nbytes for tensor in average.averages.values())
    save_flux_moe(real.core, real.core.flux_moe, tmp_path / "student.safetensors", dtype=torch.float32)
    written = (tmp_path / "student.safetensors").stat().st_size
    assert planned.disk["student after experts"] == pytest.approx(written, rel=0.01)


@pytest.fixture
def second_of_three() -> Iterator[None]:
    """A process group without others, which exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("second_of_three")
def test_fsdp2_shares_weights_gradients_and_state_as_planned() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))  # 5 rows on 3 processes: 2, 2 and 1
    model[0].requires_grad_(False)
    weights = [ParameterSize.of(name, parameter) for name, parameter in model.named_parameters()]
    run = RunConfig.model_validate({**MINIMAL, "training": {"optimizer": "adamw"}})
    planned = shared_memory(run, weights, 0, 3, "fsdp2")
    fully_shard(model)
    model(torch.ones(1, 8)).sum().backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()

    def local(tensor: Tensor) -> int:
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes

    assert planned["student's weights"] == sum(local(parameter) for parameter in model.parameters())
    assert planned["gradients"] == sum(local(p.grad) for p in model.parameters() if p.grad is not None)
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert planned["optimizer"] == sum(map(local, states))


class _Block(nn.Module):
    """Four stacked experts, which three ranks do not share evenly, behind a layer that they do."""

    def __init__(self) -> None:
        super().__init__()
        self.routed_up, self.before = nn.Parameter(torch.zeros(4, 96, 96)), nn.Linear(96, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.before(x)[:, :96] + (x @ self.routed_up.transpose(1, 2)).sum(0)
        return out


@pytest.mark.usefixtures("second_of_three")
@pytest.mark.parametrize("trained", ["transformer_blocks.*", "*.routed_up"])
def test_fsdp2_gathers_no_more_at_once_than_planned(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    model.transformer_blocks = nn.ModuleList(_Block() for _ in range(3))
    model.forward = lambda x: (
        x + model.transformer_blocks[2](model.transformer_blocks[1](model.transformer_blocks[0](x)))
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(name, trained))
    weights = [ParameterSize.of(name, parameter) for name, parameter in model.named_parameters()]
    planned = shared_memory(RunConfig.model_validate(MINIMAL), weights, 0, 3, "fsdp2")
    monkeypatch.setattr("d2m_train.parallel.ranks.blocks_of", lambda model: dict(enumerate(model.transformer_blocks)))
    ranks = object.__new__(Ranks)
    ranks.sharded, ranks.count, ranks.device = True, 3, torch.device("cpu")
    ranks.accelerator = SimpleNamespace(mixed_precision="no")
    ranks.shard(model)
    assert {tuple(block.routed_up.to_local().shape) for block in model.transformer_blocks} == {(4, 32, 96)}
    assert planned["student's weights"] == sum(parameter.to_local().nbytes for parameter in model.parameters())
    x = torch.ones(1, 96, requires_grad=True)
    model(x).sum().backward()  # the first pass sets buffers up
    with LiveStorages() as live:
        model(x).sum().backward()
    assert planned["gathered blocks"] <= live.peak <= planned["gathered blocks"] + planned["gradients"]


def test_fsdp2_is_refused_weights_of_another_dtype_than_the_routers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fail in the first forward pass, hours into the run: all that one block trains must have one dtype."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    student = {"preset": "L", "dtype": "bfloat16"}
    with pytest.raises(UserError, match=r"student\.dtype is bfloat16; expected float32 with FSDP2"):
        Ranks(RunConfig.model_validate({**MINIMAL, "student": student}))


def test_a_student_is_loaded_in_the_memory_that_it_keeps(inputs: Path, tmp_path: Path) -> None:
    """Frozen weights are never in the dtype of trained ones, nor is the file in memory."""
    stored = {name: tensor.contiguous() for name, tensor in files.split(files.dense_flux(DIMS), DIMS).items()}
    save_file(stored, tmp_path / "student.safetensors")
    training = {"mixed_precision": "bf16"}
    run = run_of(inputs, "experts", student={"frozen_dtype": "bfloat16"}, training=training)
    stage_run: Any = SimpleNamespace(
        run=run,
        stage="experts",
        section=run.stage.experts,
        source=tmp_path / "student.safetensors",
        dtype=torch.float32,
        ranks=SimpleNamespace(device=torch.device("cpu")),
    )
    core, _ = meta_student(stage_run)
    with LiveStorages() as live:
        fill_student(core, stage_run)
    kept = sum(tensor.nbytes for tensor in (*core.parameters(), *core.buffers()))
    assert {p.dtype for p in core.parameters() if not p.requires_grad} == {torch.bfloat16}
    largest = max(tensor.nbytes for tensor in stored.values())  # of the file, which is read tensor by tensor
    assert kept <= live.peak <= kept + largest < sum(tensor.nbytes for tensor in stored.values()) - largest


def test_on_a_gpu_the_optimizer_takes_nothing_beside_its_state() -> None:
    """torch's default there, `foreach`, takes a copy of all trained weights; the plan counts none."""
    run = RunConfig.model_validate(MINIMAL)
    with FakeTensorMode():
        for device, fused in (("cuda", True), ("cpu", False)):
            weight = nn.Parameter(torch.empty(4, device=device))
            optimizer, _ = new_optimizer([weight], run.stage.shared, run.training)
            assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (fused, False)


@pytest.mark.parametrize("form", [None, "int8", "fp8", "nf4"])
def test_the_teachers_bytes_are_those_it_holds(form: str | None, inputs: Path) -> None:
    run = run_of(inputs, teacher={"quantise": form, "dtype": "bfloat16"})

    def held(tensor: Tensor) -> int:
        if type(tensor) in (Tensor, nn.Parameter):
            return tensor.nbytes
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(held(getattr(tensor, name)) for name in names)

    teacher = open_frozen_teacher(run.teacher)
    found = sum(held(parameter.data) for parameter in teacher.parameters())
    assert teacher_bytes(run, DIMS)[0] == found


MINIMAL: dict[str, Any] = {
    "output_dir": "runs/x",
    "teacher": {"path": "models/flux1-dev.safetensors"},
    "student": {"preset": "L"},
    "data": {"source": "prompts", "path": "prompts.txt", "text_encoders": "flux"},
    "stages": ["convert", "shared", "export"],
}


def dev_plan(gpu_memory: str | None, **training: Any) -> RunPlan:
    teacher = {"path": "models/flux1-dev.safetensors", "dims": "flux1-dev"}
    run = RunConfig.model_validate({**MINIMAL, "teacher": teacher, "training": training})
    return plan_run(run, processes=2, strategy="ddp", gpu_memory=gpu_memory)


def test_flux1_dev_is_planned_without_its_file_and_what_does_not_fit_is_said() -> None:
    found = dev_plan("24GB", gradient_checkpointing=True, mixed_precision="bf16", accumulation=4)
    text = plan_text(found)
    assert found.student.total == pytest.approx(8.94e9, rel=0.002)
    assert found.student.paper == pytest.approx(5.13e9, rel=0.002)
    (stage,) = found.stages
    assert stage.samples == 1000 * 4 * 2
    assert stage.tokens == stage.samples * (4096 + 512)
    assert stage.memory["teacher's weights"] == pytest.approx(2 * 11.90e9, rel=0.001)
    assert not found.fits
    assert re.search(r"It does not fit: stage shared needs [\d.]+ GiB on each GPU of 24\.00 GiB\. Most of it is", text)
    assert "models/flux1-dev.safetensors is not here: taken for flux1-dev" in text


def test_a_missing_teacher_without_dims_is_an_error_that_says_how_to_plan_without() -> None:
    with pytest.raises(UserError, match=r"there is no such file.*teacher\.dims \(flux1-dev, flux1-schnell"):
        plan_run(RunConfig.model_validate(MINIMAL))


@pytest.mark.parametrize(("text", "size"), [("24GB", 24), ("80 GiB", 80), ("1.5", 1.5)])
def test_gpu_memory_is_given_as_gpus_are_sold(text: str, size: float) -> None:
    assert parse_gpu_memory(text) == size * 2**30


def test_what_no_run_can_have_is_refused() -> None:
    with pytest.raises(UserError, match="expected gigabytes"):
        parse_gpu_memory("much")
    with pytest.raises(UserError, match="fsdp3 is no strategy of 4 processes; expected ddp"):
        choose_strategy("fsdp3", 4)
    assert choose_strategy(None, 1) == "single"
    assert choose_strategy(None, 8) == "ddp"


def test_time_is_known_from_the_steps_that_the_run_has_logged(inputs: Path, tmp_path: Path) -> None:
    def estimate(stage: Stage, flops: float) -> StageEstimate:
        return StageEstimate(
            stage=stage, steps=50, trained=1, samples=100, tokens=60_000, flops=flops, memory={"a": 1}, checkpoint=0
        )

    stages = (estimate("shared", 1e12), estimate("experts", 3e12))
    run = run_of(inputs).model_copy(update={"stages": ("convert", "export"), "output_dir": tmp_path})
    plan = replace(plan_run(run), stages=stages)
    assert "Time: not known. Start the run" in plan_text(plan)
    assert stage_seconds(run.output_dir, stages) == {}
    log = run.output_dir / "shared" / "log.jsonl"
    log.parent.mkdir(parents=True)
    rates = (10.0, 2000.0, 2000.0, 2100.0)  # the first step compiles
    log.write_text("".join(f'{{"step": {step}, "tokens_per_second": {rate}}}\n' for step, rate in enumerate(rates, 1)))
    seconds = stage_seconds(run.output_dir, stages)
    assert seconds == pytest.approx({"shared": 30, "experts": 90})
    assert "Time: shared 30 s, experts 1 min 30 s; 2 min 0 s together" in plan_text(replace(plan, seconds=seconds))


def test_a_dry_run_writes_nothing(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(run_of(inputs, "shared").to_yaml())
    assert main(["distill", str(tmp_path / "run.yaml"), "--dry-run", "--gpu-memory", "24GB"]) == 0
    assert "It fits: stage shared needs" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]
    assert not (inputs / "run").exists()


def test_the_plan_says_that_fsdp2_reduces_gradients_at_each_microbatch(inputs: Path) -> None:
    run = run_of(inputs, training={"accumulation": 4})
    said = "gradients are reduced at each of a step's 4 microbatches"
    assert any(said in note for note in plan_run(run, processes=2, strategy="fsdp2").notes)
    assert not any(said in note for note in plan_run(run, processes=2, strategy="ddp").notes)
    assert not plan_run(run_of(inputs), processes=2, strategy="fsdp2").notes


def test_zero_3_loads_a_student_that_each_gpu_has_whole() -> None:
    weight = ParameterSize(name="transformer_blocks.0.linear.weight", shape=(8, 4), dtype=torch.float32, trained=True)
    assert loading_memory([weight, weight], "zero3") == 2 * weight.nbytes
    assert loading_memory([weight, weight], "fsdp2") == 0


def test_fsdp2_reduces_a_blocks_gradients_from_a_second_copy_in_float32(inputs: Path) -> None:
    """Under mixed precision, weights are gathered in the dtype in which they are stored."""
    linear = ParameterSize(name="transformer_blocks.0.linear.weight", shape=(8, 4), dtype=torch.bfloat16, trained=True)
    frozen = ParameterSize(name="transformer_blocks.0.frozen.weight", shape=(8, 4), dtype=torch.bfloat16, trained=False)
    for precision, gradients in (("no", 64 + 64), ("bf16", 64 + 128)):
        run = run_of(inputs, training={"mixed_precision": precision})
        planned = shared_memory(run, [linear, frozen], 0, 2, "fsdp2")
        assert planned["gathered blocks"] == 2 * (64 + 64) + gradients
