"""diffusers' quantisation (torchao, bitsandbytes, …) of a FLUX-MoE while its file is read, one weight at a time.

The linear layers that a dense FLUX.1 has too are quantised. Routers and U keep their precision, so that the same experts
are chosen; routed experts, which are no linear layers, keep the model's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Quantising:
    """Quantises the parameters of a model without values as they come."""

    def __init__(
        self,
        model: Any,
        quantization_config: Any,
        dtype: torch.dtype | None,
        device: str | torch.device,
    ) -> None:
        """`quantization_config` is diffusers'. Raises its errors where the package is missing or the device does not do."""
        from diffusers.quantizers import DiffusersAutoQuantizer

        self.model, self.device = model, torch.device(device)
        self.quantizer: Any = DiffusersAutoQuantizer.from_config(quantization_config, pre_quantized=False)
        self.quantizer.validate_environment(torch_dtype=dtype, device_map=None)
        self.dtype: torch.dtype = self.quantizer.update_torch_dtype(dtype)
        self.quantizer.preprocess_model(
            model=model, device_map=None, keep_in_fp32_modules=list(model._keep_in_fp32_modules)
        )

    def put(self, name: str, values: Tensor) -> bool:
        """Quantise a parameter into the model; return False for one that is not quantised."""
        if not self.quantizer.check_if_quantized_param(self.model, values, name, {}, param_device=self.device):
            return False
        self.quantizer.create_quantized_param(
            self.model, values, name, self.device, {name: values}, [], dtype=self.dtype
        )
        return True

    def finish(self) -> None:
        """Tell the model that it is quantised, as from_pretrained does."""
        self.quantizer.postprocess_model(self.model)
        self.model.hf_quantizer = self.quantizer
        self.model.register_to_config(quantization_config=self.quantizer.quantization_config)
