"""Checks of a FLUX file's tensors: dense FLUX.1, or FLUX-MoE v1 (see `expected_tensors`).

Shapes and dtypes are enough for most checks, so they work on a file's header as well as on a state dict.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor

from .blocks import BFL_BLOCKS, DIFFUSERS_BLOCKS, is_modulation
from .config import MAX_DEPTH, FluxDims, FluxMoEConfig
from .fields import ConfigError
from .keys import (
    DIFFUSERS,
    HEAD,
    dense_shapes,
    diffusers_shapes,
    landmarks_of,
    prefix_of,
    strip_prefix,
)
from .quantised import COMPANIONS, description_of, is_companion, quantisation_problems, quantised_layers
from .stand_ins import stand_in_shapes
from .tensor_file import CheckpointError, Shape, TensorFile

__all__ = [
    "CONFIG_KEY",
    "CheckpointError",
    "TensorFile",
    "check_dense",
    "check_depths",
    "check_file",
    "check_moe",
    "check_opened",
    "check_state_dict",
    "check_values",
    "config_tensor",
    "dims_of",
    "expected_tensors",
    "optional_tensors",
    "parse_config",
    "prefix_of",
    "strip_prefix",
]

CONFIG_KEY = "d2m_config"
_MAX_CONFIG = 1 << 24  # bytes
_CONVERT = "the node Convert FLUX to MoE, or python -m d2m_train convert --teacher F --out G"

# An unexpected tensor whose name begins so is an error; others may have been added by other software.
_BLOCKS = tuple(f"{name}." for name in (*BFL_BLOCKS.values(), *DIFFUSERS_BLOCKS.values(), "block_groups"))

# Key patterns of other models that are mistaken for FLUX.1, and what these models are.
_OTHERS = (
    (r"lora_|\.lora\.|\.alpha$|\.lokr_|\.hada_", "a LoRA"),
    (r"double_stream_modulation_img\.", "FLUX.2"),
    (r"distilled_guidance_layer\.", "Chroma"),
    (r"^controlnet_|^input_hint_block|^pos_embed_input", "a ControlNet"),
    (
        rf"^{DIFFUSERS_BLOCKS['single']}\.",
        "a FLUX in diffusers' key names; d2m_train convert takes it as a teacher",
    ),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"^txt_in\.individual_token_refiner", "HunyuanVideo"),
    (r"input_blocks\.", "a Stable Diffusion UNet"),
    (rf"^{DIFFUSERS_BLOCKS['double']}\.", "another diffusion transformer"),
    (r"^(encoder|decoder)\.(conv_in|down|up|mid)|taesd_", "an autoencoder (VAE)"),
    (r"^(text_model|text_encoders|encoder\.block|shared)\b", "a text encoder"),
)


def dims_of(shapes: Mapping[str, Shape]) -> FluxDims:
    """Read the dimensions of a FLUX.1 (dense or MoE) off its tensors' shapes, in BFL or diffusers names.

    Raises CheckpointError for another model: what it looks like, or which key is missing.
    """
    names = landmarks_of(shapes)
    sizes = {}
    for key in (names.img_in, names.txt_in, names.vector_in, names.final):
        shape = shapes.get(key)
        if shape is None or len(shape) != 2 or 0 in shape:
            problem = "has no" if shape is None else f"has shape {list(shape)} for"
            raise CheckpointError(f"This is not a FLUX.1 transformer: it {problem} {key}.{_guess(shapes)}")
        sizes[key] = shape
    for pattern, what in _OTHERS[1:3]:
        if any(re.search(pattern, name) for name in shapes):
            raise CheckpointError(f"This is {what}, not FLUX.1.")
    depths = {}
    for kind, blocks in names.blocks.items():
        numbers = {match[1] for name in shapes if (match := re.match(rf"{blocks}\.([0-9]+)\.", name))}
        if not numbers:
            raise CheckpointError(f"This is not a FLUX.1 transformer: it has no {blocks}.0.{_guess(shapes)}")
        last = max(numbers, key=lambda number: (len(number), number))
        if len(last) > 6 or int(last) >= min(len(shapes), MAX_DEPTH):
            raise CheckpointError(
                f"This is not a FLUX.1 transformer: it has {blocks}.{last[:20]}; expected block numbers below "
                f"{min(len(shapes), MAX_DEPTH)} in a file of {len(shapes)} tensors."
            )
        depths[kind] = int(last) + 1
    hidden = sizes[names.img_in][0]
    if hidden % HEAD:
        raise CheckpointError(f"{names.img_in} has {hidden} rows; FLUX.1's hidden size is a multiple of {HEAD}.")
    return FluxDims(
        hidden_size=hidden,
        double_blocks=depths["double"],
        single_blocks=depths["single"],
        in_channels=sizes[names.img_in][1],
        out_channels=sizes[names.final][0],
        context_size=sizes[names.txt_in][1],
        vector_size=sizes[names.vector_in][1],
        guidance_embed=names.guidance in shapes,
    )


def _guess(shapes: Mapping[str, Shape]) -> str:
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in shapes):
            return f" It looks like {what}."
    return ""


def config_tensor(config: FluxMoEConfig) -> Tensor:
    """Return the configuration as stored in the file: its JSON in a uint8 tensor."""
    return torch.frombuffer(bytearray(config.to_json().encode()), dtype=torch.uint8)


def parse_config(tensor: Tensor) -> FluxMoEConfig:
    """Parse a `d2m_config` tensor. Raises CheckpointError, which names the problem."""
    if tensor.numel() > _MAX_CONFIG:
        raise CheckpointError(f"{CONFIG_KEY} has {tensor.numel():,} bytes; expected {_MAX_CONFIG:,} at most.")
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise CheckpointError(
            f"{CONFIG_KEY} is {tensor.dtype} {list(tensor.shape)}; expected torch.uint8 with one axis. "
            "A tool has cast every tensor of this file; convert the teacher again."
        )
    try:
        return FluxMoEConfig.from_json(bytes(tensor.cpu().numpy()))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def check_depths(dims: FluxDims, tensors: int) -> None:
    """Raise CheckpointError for more blocks than a file with this number of tensors can have."""
    for kind, depth in dims.depths.items():
        if depth > tensors:
            raise CheckpointError(f"{CONFIG_KEY} states {depth} {kind} blocks; this file has {tensors} tensors in all.")


def expected_tensors(config: FluxMoEConfig) -> dict[str, Shape]:
    """Return the tensors that a FLUX-MoE file must have besides `d2m_config`: dense FLUX's, routers, neuron orders, and
    the stand-ins of skipped blocks if the configuration has a rank of them."""
    h, rank = config.dims.hidden_size, config.adaln_rank
    shapes = dense_shapes(config.dims)
    if rank is not None:
        for name, shape in shapes.items():
            if is_modulation(name.removesuffix(".weight")):
                shapes[name] = (shape[0], rank)
        shapes["adaln_in.weight"] = (rank, h)
    for ffn, layout in config.ffns.items():
        shapes |= {f"{ffn}.{name}": shape for name, shape in config.router.shapes(h, layout.experts).items()}
        shapes[f"{ffn}.neuron_order"] = (layout.neurons,)
    for index, group in enumerate(config.groups):
        for router in ("router_x", "router_y"):
            shapes[f"block_groups.{index}.{router}.weight"] = (group.blocks, h)
        if config.stand_in_rank is not None:
            shapes |= stand_in_shapes(index, group, h, config.stand_in_rank)
    return shapes


def optional_tensors(config: FluxMoEConfig) -> dict[str, Shape]:
    """Return the tensors that a FLUX-MoE file may have in addition: router biases and the experts' mean outputs."""
    shapes: dict[str, Shape] = {}
    h = config.dims.hidden_size
    for ffn, layout in config.ffns.items():
        shapes |= {f"{ffn}.{name}": shape for name, shape in config.router.optional_shapes(h, layout.experts).items()}
        shapes[f"{ffn}.expert_mean"] = (layout.experts, h)
    return shapes


def check_moe(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], config: FluxMoEConfig) -> None:
    """Raises CheckpointError for a missing, surplus or misshapen tensor of a FLUX-MoE, naming it and what is expected."""
    check_depths(config.dims, len(shapes))
    what = f"FLUX-MoE schema {config.schema_version}"
    _check_tensors(shapes, dtypes, expected_tensors(config), optional_tensors(config), what)


def check_dense(shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> FluxDims:
    """Return the dimensions of a dense FLUX.1 in BFL or diffusers names.

    Raises CheckpointError if it is another model, incomplete or quantised.
    """
    if CONFIG_KEY in shapes:
        raise CheckpointError("This is a FLUX-MoE already; a teacher is a dense FLUX.1.")
    dims = dims_of(shapes)
    _check_blocks(shapes, dims)
    for name in shapes:
        if name.rsplit(".", 1)[-1] in COMPANIONS or name == "scaled_fp8":
            raise CheckpointError(f"This FLUX is quantised ({name}); take its bfloat16, float16 or float32 version.")
    expected = diffusers_shapes(dims) if landmarks_of(shapes) is DIFFUSERS else dense_shapes(dims)
    _check_tensors(shapes, dtypes, expected, {}, "a dense FLUX.1")
    return dims


def _check_blocks(shapes: Mapping[str, Shape], dims: FluxDims) -> None:
    """Raises CheckpointError for a gap in the numbering of the blocks."""
    names = landmarks_of(shapes)
    for kind, blocks in names.blocks.items():
        depth = dims.depths[kind]
        present = {name.split(".")[1] for name in shapes if name.startswith(f"{blocks}.")}
        if missing := [f"{blocks}.{i}" for i in range(depth) if str(i) not in present]:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise CheckpointError(
                f"This is not a whole FLUX.1: {listed} missing, though its last block of that kind is "
                f"{blocks}.{depth - 1}. A shallower FLUX must number its blocks without gaps."
            )


def _check_tensors(
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    expected: Mapping[str, Shape],
    optional: Mapping[str, Shape],
    what: str,
) -> None:
    wrong = [
        f"{name} is missing (expected shape {list(shape)})" for name, shape in expected.items() if name not in shapes
    ]
    wrong += quantisation_problems(shapes, expected)
    for name, found in shapes.items():
        shape = expected.get(name, optional.get(name))
        module, _, kind = name.rpartition(".")
        if shape is None:
            if name.startswith(_BLOCKS) and not is_companion(name, expected):
                wrong.append(f"{name} {list(found)} does not belong to it")
            continue
        if f"{module}.comfy_quant" in shapes and kind == "weight":
            continue  # packed by ComfyUI; only ComfyUI knows its shape
        if tuple(found) != shape:
            wrong.append(f"{name} has shape {list(found)}; expected {list(shape)}")
        elif kind == "neuron_order":
            if dtypes[name] != torch.int32:
                wrong.append(f"{name} is {dtypes[name]}; expected torch.int32")
        elif not dtypes[name].is_floating_point:
            wrong.append(f"{name} is {dtypes[name]}; expected a floating-point type")
    if wrong:
        more = f" ({len(wrong) - 1} more such problems.)" if len(wrong) > 1 else ""
        raise CheckpointError(f"This is not {what}: {wrong[0]}.{more}")


def check_values(names: Container[str], tensor: Callable[[str], Tensor], config: FluxMoEConfig) -> None:
    """Raises CheckpointError for damaged values.

    These are: a neuron_order that is not a permutation; NaN or infinity in a router (of tokens or blocks), in a stand-in,
    in the experts' means or in the AdaLN compression; a threshold that is not a probability; and a gate scale that is not
    positive.
    `names` are the file's; those of the other weights are many bytes and are not read.
    """

    def finite(name: str) -> Tensor:
        values = tensor(name).float()
        if not values.isfinite().all():
            raise CheckpointError(f"{name} has NaN or infinite values; the file is damaged.")
        return values

    for ffn, layout in config.ffns.items():
        order = tensor(f"{ffn}.neuron_order").long().cpu()
        if not torch.equal(order.sort().values, torch.arange(layout.neurons)):
            raise CheckpointError(
                f"{ffn}.neuron_order is not a permutation of 0 to {layout.neurons - 1}; the file is damaged."
            )
        for name in config.router.shapes(config.dims.hidden_size, layout.experts):
            finite(f"{ffn}.{name}")
        for problem in config.router.problems(ffn, finite):
            raise CheckpointError(problem)
    for name in expected_tensors(config):
        if name.startswith("block_groups."):
            finite(name)
    for name in optional_tensors(config):
        if name in names:
            finite(name)
    if config.adaln_rank is not None:
        finite("adaln_in.weight")


def check_state_dict(state_dict: Mapping[str, Tensor], source: str = "This model") -> FluxMoEConfig:
    """Check a FLUX-MoE state dict (with any prefix) and return its configuration. `source` names it in messages."""
    tensors = strip_prefix(state_dict)
    if len(tensors) < sum(name.startswith(prefix_of(state_dict)) for name in state_dict):
        raise CheckpointError(
            f"{source}: has a norm's scale in two spellings (query_norm.scale and query_norm.weight)."
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return _check_moe(shapes, dtypes, tensors.__getitem__, source)


def check_file(path: str | os.PathLike[str]) -> FluxMoEConfig:
    """Check a FLUX-MoE file and return its configuration. Reads the header, routers and neuron orders alone."""
    with TensorFile(path) as file:
        return check_opened(file)


def check_opened(file: TensorFile) -> FluxMoEConfig:
    """Do the same as `check_file` on an open file."""
    listed = {f"{layer}.comfy_quant": (0,) for layer in quantised_layers(file.metadata)}
    return _check_moe({**file.shapes, **listed}, file.dtypes, file.tensor, str(file.path))


def _check_moe(
    shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype], tensor: Callable[[str], Tensor], source: str
) -> FluxMoEConfig:
    try:
        if CONFIG_KEY not in shapes:
            dims_of(shapes)
            raise CheckpointError(f"This is a dense FLUX, not a FLUX-MoE. Convert it: {_CONVERT}")
        config = parse_config(tensor(CONFIG_KEY))
        check_moe(shapes, dtypes, config)
        for name in dtypes:
            if name.endswith(".comfy_quant"):
                description_of(name, tensor(name))
        check_values(shapes, tensor, config)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    return config
