"""What would happen on a GPU, without one: tensors without values on the device "cuda" show devices, dtypes and shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from d2m_model.checkpoint import CONFIG_KEY, expected_tensors
from d2m_model.hosts.diffusers import FluxMoETransformer2DModel, flux_moe_tensors
from d2m_model.hosts.diffusers.tensors import load_tensors
from tests.toys.students import student_config


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
