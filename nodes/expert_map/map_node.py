"""The expert map: FLUX-MoE Expert Map, and what its widget gets.

ui = {"d2m_map": [{"traces": [id, …], "images": [{"filename", "subfolder", "type"} | None, …], "batches": [[…], …]}]}

- `traces`: one id, or two where `compare` is connected. GET /d2m/traces/{id} describes one (routes.py).
- `images`: of each trace the first image (temporary file, without overlay), None where no image is connected.
- `batches`: of each trace all images of its batch; sample["image"] of the trace's description is the index.

Beyond the description that was agreed on: samples have "prompt" (which of several combined prompts) and "image" (index
in the batch), steps' samples have "evaluated" (false: this sample was not evaluated in this step), and there is "notes",
a list of texts for the user. "cond" may be another word than positive and negative: the guider's own. Where prompts or
references differ in length, every sample is filled up to the longest with tokens that have no expert (255, margin 0), so
that text_tokens and reference_tokens hold for all. "slots" is at least 1. Of "prompt" single samples may be null. T*K is
token by token: experts[token * K + slot].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...d2m_model.blocks import FFN, Block
from ...d2m_model.trace_record import SampleKey, Trace
from .map_image import Panel, draw
from .trace_node import TraceType
from .trace_store import STORE, TraceHandle

LAST = -1
NAME = "FLUX-MoE Expert Map"


class ExpertMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        image_of = "It is what the map lies over, and what tells the map to wait for the sampler."
        latent_of = "In place of the image, or beside it: tells which run of the traced MODEL it is."
        return io.Schema(
            node_id="D2MExpertMap",
            display_name=NAME,
            category="FLUX-MoE",
            description=(
                "Shows which expert painted what: the image under a translucent map (hue: best expert, opacity: how "
                "clearly it won), for any step and block, on the node and as an IMAGE."
            ),
            search_aliases=["expert map", "heatmap", "routing", "visualize experts", "mixture of experts", "dense2moe"],
            inputs=[
                TraceType.Input("trace", tooltip="From FLUX-MoE Trace Routing."),
                io.Image.Input(
                    "image", optional=True, tooltip=f"The image that was sampled with the traced MODEL. {image_of}"
                ),
                io.Latent.Input("latent", optional=True, tooltip=f"The sampler's latent. {latent_of}"),
                TraceType.Input(
                    "compare",
                    optional=True,
                    tooltip="A second trace, shown beside the first: another prompt, another Top-K.",
                ),
                io.Image.Input("compare_image", optional=True, tooltip="The image of the second trace."),
                io.Latent.Input("compare_latent", optional=True, tooltip="The latent of the second trace."),
                io.Int.Input(
                    "step",
                    default=LAST,
                    min=LAST,
                    max=9999,
                    tooltip="Evaluation of the model that the IMAGE shows, from 0. -1 is the last.",
                ),
                io.Int.Input(
                    "block",
                    default=LAST,
                    min=LAST,
                    max=999,
                    tooltip=(
                        "Block that the IMAGE shows, from 0: the double blocks (their image FFN), then the single blocks. "
                        "-1 is the last with experts."
                    ),
                ),
                io.Combo.Input(
                    "prompt",
                    options=["positive", "negative"],
                    default="positive",
                    tooltip="Whose routing the IMAGE shows: the prompt's, or the negative prompt's, if it was evaluated.",
                    advanced=True,
                ),
                io.Float.Input(
                    "opacity",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Of the map over the image, where a patch's best expert is clearly ahead.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "numbers", default=True, tooltip="Write experts' numbers into their regions.", advanced=True
                ),
                io.Boolean.Input(
                    "legend", default=True, tooltip="Colours and shares of the experts, beneath.", advanced=True
                ),
            ],
            outputs=[
                io.Image.Output(display_name="IMAGE", tooltip="The map of the chosen step and block, one per image.")
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        trace: TraceHandle,
        step: int,
        block: int,
        prompt: str,
        opacity: float,
        numbers: bool,
        legend: bool,
        image: Tensor | None = None,
        latent: dict[str, Any] | None = None,
        compare: TraceHandle | None = None,
        compare_image: Tensor | None = None,
        compare_latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        given = [(trace, image, latent, "")]
        if compare is not None:
            given.append((compare, compare_image, compare_latent, "compare_"))
        keys = [key_of(handle, picture, latents, prefix) for handle, picture, latents, prefix in given]
        shown = STORE.show(keys, cls.hidden.unique_id or "")
        pictures = [picture for _, picture, _, _ in given]
        sides = [panels(it, picture, step, block, prompt) for (_, it), picture in zip(shown, pictures, strict=True)]
        experts = max((layout.experts for _, it in shown for layout in it.config.ffns.values()), default=0)
        # Of a batch beside a single image, that one comes again and again.
        count = max(len(side) for side in sides)
        maps = [
            draw([side[i % len(side)] for side in sides], experts, opacity, labels=numbers, legend=legend)
            for i in range(count)
        ]
        batches = [saved(picture) for picture in pictures]
        found = {
            "traces": [it for it, _ in shown],
            "images": [batch[0] if batch else None for batch in batches],
            "batches": batches,
        }
        return io.NodeOutput(torch.from_numpy(np.stack(maps)), ui={"d2m_map": [found]})

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        """Shows a trace anew that was freed."""
        return STORE.losses(cls.hidden.unique_id)


def key_of(handle: TraceHandle, image: Tensor | None, latent: dict[str, Any] | None, prefix: str) -> str:
    """Which trace is meant. Raises ValueError if none can be: nothing waits for the sampler, or nothing was sampled."""
    if image is None and latent is None:
        raise ValueError(
            f"{NAME} has to wait for the sampler: connect {prefix}image (the image that was sampled with the traced MODEL) "
            f"or {prefix}latent (the sampler's latent)."
        )
    return handle.key(None if latent is None else latent["samples"], image)


def saved(image: Tensor | None) -> list[dict[str, Any]]:
    """Temporary files for the widget."""
    return [] if image is None else [dict(it) for it in ui.PreviewImage(image[..., :3]).as_dict()["images"]]


def panels(trace: Trace, image: Tensor | None, step: int, block: int, prompt: str) -> list[Panel]:
    """One for each image of the batch. Raises ValueError for a step, block or prompt that the trace does not have."""
    at, ffn = step_of(trace, step), ffn_of(trace, block)
    keys = [key for key in trace.samples if key.condition == prompt and key.entry == 0]
    if not keys:
        kinds = ", ".join(dict.fromkeys(key.condition for key in trace.samples))
        raise ValueError(
            f"The trace has nothing of the {prompt} prompt, which was not evaluated (CFG 1); it has: {kinds}."
        )
    if image is not None and len(image) not in (1, len(keys)):
        raise ValueError(
            f"There are {len(image)} images, but {len(keys)} in the trace. Connect those that were sampled with it."
        )
    return [panel(trace, key, image, at, ffn) for key in keys]


def panel(trace: Trace, key: SampleKey, image: Tensor | None, at: int, ffn: str | None) -> Panel:
    choice = None if ffn is None else trace.of_image(at, key, ffn)
    step = trace.steps[at]
    settings = [f"{name} {step.settings[name]}" for name in ("top_k", "capacity") if name in step.settings]
    words = [
        f"step {at} of 0-{len(trace.steps) - 1}",
        f"sigma {step.sigma:.2f}",
        "no experts" if ffn is None else FFN.parse(ffn).block.name,
        *settings,
    ]
    if ffn is not None and choice is None:
        words.append("skipped" if key in step.places() else "not evaluated")
    picture = None if image is None else image[key.image % len(image)][..., :3].float().cpu().numpy()
    return Panel(
        title="  ·  ".join(words),
        grid=trace.grid,
        best_hw=None if choice is None else best(choice.experts_TK).reshape(trace.grid),
        margin_hw=None if choice is None else choice.margin_T.reshape(trace.grid) / 255,
        image_HW3=picture,
    )


def best(experts_TK: Any) -> Any:
    """[T]; of Top-K 0 and of tokens without an expert 255."""
    return experts_TK[:, 0] if experts_TK.shape[1] else np.full(len(experts_TK), 255, np.uint8)


def step_of(trace: Trace, step: int) -> int:
    count = len(trace.steps)
    if count == 0:
        raise ValueError(" ".join(["The trace has no evaluation of the model.", *trace.notes]))
    if step >= count:
        raise ValueError(
            " ".join(
                [f"step is {step}, but the trace has {count}: 0 to {count - 1}, or -1 for the last.", *trace.notes]
            )
        )
    return count - 1 if step == LAST else step


def ffn_of(trace: Trace, block: int) -> str | None:
    """The FFN that routes the image's patches in a block; None of a file that has block groups and no experts."""
    number: dict[Block, int] = {one: number for number, one in enumerate(trace.config.dims.blocks)}
    ffns = [FFN.parse(ffn) for ffn in trace.layers]
    by_block = {number[ffn.block]: ffn.name for ffn in ffns if ffn.stream != "txt"}
    if not by_block:
        return None
    if block != LAST and block not in by_block:
        raise ValueError(f"Block {block} has no experts. Those that have: {spans(sorted(by_block))}.")
    return by_block[max(by_block) if block == LAST else block]


def spans(numbers: Sequence[int]) -> str:
    """1, 3-7 and so on."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
