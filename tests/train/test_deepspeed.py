"""DeepSpeed configurations held against a run, read by accelerate's own loader and launcher."""

from __future__ import annotations

from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from d2m_train import UserError
from d2m_train.parallel.deepspeed import check_deepspeed, complete_config, configuration
from d2m_train.run_config import RunConfig
from tests.toys.runs import ROOT

FOLDER = ROOT / "configs" / "accelerate"
FILES = {
    "ddp.yaml": DistributedType.MULTI_GPU,
    "fsdp2.yaml": DistributedType.FSDP,
    "zero2.yaml": DistributedType.DEEPSPEED,
    "zero3.yaml": DistributedType.DEEPSPEED,
}


def run_of(student: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "out",
            "teacher": {"path": "teacher.safetensors"},
            "student": {"preset": "L", **(student or {})},
            "data": {"source": "emoji"},
            "training": {"mixed_precision": "bf16", "accumulation": 8, "batch_size": 2, **training},
        }
    )


def deepspeed_of(file: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the plugin's settings from a file, which `accelerate launch` passes in the environment."""
    arguments = ["--config_file", str(FOLDER / file), "-m", "d2m_train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    arguments.deepspeed_fields_from_accelerate_config = ""  # which the command adds next
    _, environment = prepare_deepspeed_cmd_env(arguments)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    plugin.set_mixed_precision(environment["ACCELERATE_MIXED_PRECISION"])
    config: dict[str, Any] = plugin.deepspeed_config
    return config


def valid() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 8,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
    }


def test_every_file_for_accelerate_is_read_by_its_loader() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(FILES)
    for name, kind in FILES.items():
        config = load_config_from_file(str(FOLDER / name))
        assert config.distributed_type == kind, name
        assert config.mixed_precision == "bf16", name


@pytest.mark.parametrize(("file", "stage"), [("zero2.yaml", 2), ("zero3.yaml", 3)])
def test_the_files_for_zero_fit_any_batch_and_say_their_stage(
    file: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = deepspeed_of(file, monkeypatch)
    assert config["zero_optimization"]["stage"] == stage
    check_deepspeed(config, run_of())
    check_deepspeed(config, run_of(accumulation=1, batch_size=5, optimizer="adamw_fused"))
    with pytest.raises(UserError, match=r"bf16\.enabled is True; expected False, as training\.mixed_precision is no"):
        check_deepspeed(config, run_of(mixed_precision="no"))


def test_a_configuration_that_says_what_the_run_says_is_good() -> None:
    check_deepspeed(valid(), run_of())
    unclipped = valid()
    del unclipped["gradient_clipping"]
    check_deepspeed(unclipped, run_of(max_grad_norm=None))
    check_deepspeed({**valid(), "gradient_clipping": "auto"}, run_of())


@pytest.mark.parametrize(
    ("change", "training", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, {}, "zero_optimization.stage is 1; expected 2 or 3"),
        ({"zero_optimization": {}}, {}, "zero_optimization.stage is None; expected 2 or 3"),
        (
            {"gradient_accumulation_steps": 4},
            {},
            "gradient_accumulation_steps is 4; expected auto, or training.accumulation, which is 8",
        ),
        (
            {"train_micro_batch_size_per_gpu": 1},
            {},
            "train_micro_batch_size_per_gpu is 1; expected auto, or training.batch_size, which is 2",
        ),
        ({"optimizer": {"type": "Adam"}}, {}, "optimizer section is {'type': 'Adam'}; expected none"),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "scheduler section is {'type': 'WarmupLR'}; expected none"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled is False; expected True"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled is True; expected False"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5; expected training.max_grad_norm, 1.0"),
        ({"gradient_clipping": 1.0}, {"max_grad_norm": None}, "gradient_clipping is 1.0; expected 0"),
        # accelerate makes 1.0 of it.
        (
            {"gradient_clipping": "auto"},
            {"max_grad_norm": 2.0},
            "gradient_clipping is auto (with accelerate that is 1.0)",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            {},
            "zero_optimization.offload_param.device is nvme; expected none or cpu",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}},
            {},
            "zero_optimization.zero_hpz_partition_size is 8; expected none",
        ),
        ({}, {"optimizer": "adamw_8bit"}, "training.optimizer is adamw_8bit; expected adamw or adamw_fused"),
        (
            {"bf16": {"enabled": False}, "fp16": {"enabled": True}},
            {"mixed_precision": "fp16"},
            "training.mixed_precision is fp16; expected bf16 or no",
        ),
        ({}, {"student": {"dtype": "bfloat16"}}, "student.dtype is bfloat16; expected float32"),
        ({}, {"student": {"frozen_dtype": "bfloat16"}}, "student.frozen_dtype is bfloat16; expected float32"),
    ],
)
def test_what_does_not_fit_the_run_is_named(change: dict[str, Any], training: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_deepspeed({**valid(), **change}, run_of(**training))
    (line,) = str(caught.value).splitlines()
    assert said in line
    assert ": " in line.partition("expected")[2]  # what to do


def test_all_that_does_not_fit_is_said_at_once() -> None:
    with pytest.raises(UserError) as caught:
        check_deepspeed({"zero_optimization": {"stage": 0}, "gradient_accumulation_steps": 3}, run_of())
    names = [line.split()[1] for line in str(caught.value).splitlines()]
    assert names == [
        "zero_optimization.stage",
        "gradient_accumulation_steps",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
    ]


@pytest.mark.parametrize("file", ["zero2.yaml", "zero3.yaml"])
def test_what_the_engine_is_given_leaves_nothing_open(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = complete_config(deepspeed_of(file, monkeypatch), run_of(max_grad_norm=None))
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 8
    assert found["gradient_clipping"] == 0.0
    assert not found["bf16"]["enabled"], "routers and U would be cast; autocast does it"
    assert "auto" not in str(found)


def test_a_run_that_asks_for_deepspeed_where_it_is_not_installed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2m_train.parallel.deepspeed.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"DeepSpeed, which is not installed: pip install deepspeed, or use .*fsdp2\.yaml"
    ):
        configuration(run_of())
