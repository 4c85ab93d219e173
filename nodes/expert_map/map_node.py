"""FLUX-MoE Expert Map: the map as an IMAGE, and the data for the map on the node.

ui = {"d2m_map": [{"traces": [id, …], "images": [{"filename", "subfolder", "type"} | None, …], "batches": [[…], …]}]}

- `traces`: one id, or two if `compare` is connected. GET /d2m/traces/{id} describes a trace (routes.py).
- `images`: for each trace its first image (temporary file, without overlay); None if no image is connected.
- `batches`: for each trace all images of its batch; sample["image"] in the trace's description is the index.

Some facts about a trace's description: "cond" of a sample is positive, negative or another word of the guider; "prompt"
of a sample is the index among several combined prompts, and "image" the index in the batch. "evaluated" of a step's
sample is false if this step did not evaluate the sample. "notes" is a list of texts for the user. If prompts or
references differ in length, every sample is padded to the longest with tokens without an expert (255, margin 0), so
text_tokens and reference_tokens apply to all. "slots" (K) is at least 1. The list "prompt" may be null for a sample.
Bytes of [T*K] are in token order: experts[token * K + slot].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ...d2m_model.blocks import FFN, Block
from ...d2m_model.trace_record import NO_EXPERT, SampleKey, Trace
from ..model.flux_moe import require_link
from ..model.settings import TOP_K_BY_FFN
from .map_image import Panel, draw_panels
from .trace_node import TraceType
from .trace_store import STORE, TraceHandle

_LAST = -1
_TITLE = "FLUX-MoE Expert Map"


class ExpertMap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        image_use = "The map is drawn over it, and waits for the sampler because of it."
        latent_use = "Use it instead of the image, or with it: it tells which run of the traced MODEL is meant."
        return io.Schema(
            node_id="D2MExpertMap",
            display_name=_TITLE,
            category="FLUX-MoE",
            description=(
                "Shows which expert painted what: the image under a translucent map (hue: best expert, opacity: how "
                "clearly it won), for any step and block. The map is on the node, and an output as an IMAGE."
            ),
            search_aliases=["expert map", "heatmap", "routing", "visualize experts", "mixture of experts", "dense2moe"],
            inputs=[
                TraceType.Input("trace", tooltip="From FLUX-MoE Trace Routing."),
                io.Image.Input(
                    "image", optional=True, tooltip=f"The image that was sampled with the traced MODEL. {image_use}"
                ),
                io.Latent.Input("latent", optional=True, tooltip=f"The sampler's latent. {latent_use}"),
                TraceType.Input(
                    "compare",
                    optional=True,
                    tooltip="A second trace to show beside the first, such as of another prompt or Top-K.",
                ),
                io.Image.Input("compare_image", optional=True, tooltip="The image of the second trace."),
                io.Latent.Input("compare_latent", optional=True, tooltip="The latent of the second trace."),
                io.Int.Input(
                    "step",
                    default=_LAST,
                    min=_LAST,
                    max=9999,
                    tooltip="The evaluation of the model that the IMAGE shows, from 0. -1 is the last.",
                ),
                io.Int.Input(
                    "block",
                    default=_LAST,
                    min=_LAST,
                    max=999,
                    tooltip=(
                        "The block that the IMAGE shows, from 0: first the double blocks (their image FFN), then the single "
                        "blocks. -1 is the last block with experts."
                    ),
                ),
                io.Combo.Input(
                    "prompt",
                    options=["positive", "negative"],
                    default="positive",
                    tooltip="Show the routing for the prompt, or for the negative prompt if it was evaluated.",
                    advanced=True,
                ),
                io.Float.Input(
                    "opacity",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="Opacity of the map where a patch's best expert is clearly ahead.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "numbers", default=True, tooltip="Write the number of each expert into its regions.", advanced=True
                ),
                io.Boolean.Input(
                    "legend",
                    default=True,
                    tooltip="Show colours and shares of the experts below the image.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="IMAGE", tooltip="The map of the chosen step and block, one for each image."
                )
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
        runs = [_requested_run(handle, picture, latents, prefix) for handle, picture, latents, prefix in given]
        shown = STORE.show(runs, cls.hidden.unique_id or "")
        pictures = [picture for _, picture, _, _ in given]
        sides = [
            _make_panels(shown_trace, picture, step, block, prompt)
            for (_, shown_trace), picture in zip(shown, pictures, strict=True)
        ]
        layouts = [layout for _, shown_trace in shown for layout in shown_trace.config.ffns.values()]
        experts = max((layout.experts for layout in layouts), default=0)
        count = max(len(side) for side in sides)  # a single image is repeated beside a batch
        maps = [
            draw_panels([side[i % len(side)] for side in sides], experts, opacity, labels=numbers, legend=legend)
            for i in range(count)
        ]
        batches = [_save_previews(picture) for picture in pictures]
        widget_data = {
            "traces": [trace_id for trace_id, _ in shown],
            "images": [batch[0] if batch else None for batch in batches],
            "batches": batches,
        }
        return io.NodeOutput(torch.from_numpy(np.stack(maps)), ui={"d2m_map": [widget_data]})

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Run again if a trace that this node shows was freed."""
        return STORE.fingerprint(cls.hidden.unique_id)


def _requested_run(handle: TraceHandle, image: Tensor | None, latent: dict[str, Any] | None, prefix: str) -> str:
    """Return the key of the run that made the image or latent.

    Raises ValueError if there is none: if neither is connected, nothing makes this node wait for the sampler.
    """
    require_link(handle, TraceHandle, _TITLE, prefix.removesuffix("_") or "trace")
    require_link(image, (Tensor, type(None)), _TITLE, f"{prefix}image")
    require_link(latent, (dict, type(None)), _TITLE, f"{prefix}latent")
    if image is None and latent is None:
        raise ValueError(
            f"{_TITLE} has to wait for the sampler: connect {prefix}image (the image that was sampled with the traced "
            f"MODEL) or {prefix}latent (the sampler's latent)."
        )
    return handle.find_run(None if latent is None else latent["samples"], image)


def _save_previews(image: Tensor | None) -> list[dict[str, Any]]:
    """Save the images as temporary files for the widget. Returns filename, subfolder and type of each."""
    return [] if image is None else [dict(it) for it in ui.PreviewImage(image[..., :3]).as_dict()["images"]]


def _make_panels(trace: Trace, image: Tensor | None, step: int, block: int, prompt: str) -> list[Panel]:
    """Return a panel for each image of the batch.

    Raises ValueError for a step, block or prompt that the trace does not have.
    """
    number, ffn = _chosen_step(trace, step), _chosen_ffn(trace, block)
    samples = [sample for sample in trace.samples if sample.condition == prompt and sample.entry == 0]
    if not samples:
        conditions = ", ".join(dict.fromkeys(sample.condition for sample in trace.samples)) or "nothing"
        why = " ".join(trace.notes) or "It was not evaluated (CFG 1)."
        raise ValueError(f"The trace has nothing of the {prompt} prompt. {why} It has: {conditions}.")
    if image is not None and len(image) not in (1, len(samples)):
        raise ValueError(
            f"There are {len(image)} images, but {len(samples)} in the trace. Connect those that were sampled with it."
        )
    return [_make_panel(trace, sample, image, number, ffn) for sample in samples]


def _make_panel(trace: Trace, sample: SampleKey, image: Tensor | None, number: int, ffn: str | None) -> Panel:
    choice = None if ffn is None else trace.of_image(number, sample, ffn)
    step = trace.steps[number]
    weights = step.settings.get("mask", {}).get(ffn, ())
    muted = [expert for expert, weight in enumerate(weights) if weight == 0]
    settings = [f"{name} {step.settings[name]}" for name in ("top_k", "capacity") if name in step.settings]
    if ffn in (by_ffn := step.settings.get(TOP_K_BY_FFN, {})):  # under a budget
        settings = [f"top_k {by_ffn[ffn]}"]
    title = [
        f"step {number} of 0-{len(trace.steps) - 1}",
        f"sigma {step.sigma:.2f}",
        "no experts" if ffn is None else FFN.parse(ffn).block.name,
        *settings,
    ]
    if ffn is not None and choice is None:
        title.append("skipped" if sample in step.places() else "not recorded" if trace.notes else "not evaluated")
    picture = None if image is None else image[sample.image % len(image)][..., :3].float().cpu().numpy()
    return Panel(
        title="  ·  ".join(title),
        grid=trace.grid,
        best_hw=None if choice is None else _best_experts(choice.experts_TK, muted).reshape(trace.grid),
        margin_hw=None if choice is None else choice.margin_T.reshape(trace.grid) / 255,
        image_HW3=picture,
    )


def _best_experts(experts_TK: Any, muted: Sequence[int]) -> Any:
    """Return the best expert of each token [T] that is not muted. It is NO_EXPERT for tokens without one."""
    best_T = np.full(len(experts_TK), NO_EXPERT, np.uint8)
    for experts_T in reversed(experts_TK.T):  # from the last choice to the best
        best_T = np.where(np.isin(experts_T, [*muted, NO_EXPERT]), best_T, experts_T)
    return best_T


def _chosen_step(trace: Trace, step: int) -> int:
    """Return the number of a step, counted from 0. Raises ValueError if the trace does not have it."""
    count = len(trace.steps)
    if count == 0:
        raise ValueError(" ".join(["The trace has no evaluation of the model.", *trace.notes]))
    if step >= count:
        message = f"step is {step}, but the trace has {count}: 0 to {count - 1}, or -1 for the last."
        raise ValueError(" ".join([message, *trace.notes]))
    return count - 1 if step == _LAST else step


def _chosen_ffn(trace: Trace, block: int) -> str | None:
    """Return the FFN that routes the image's patches in a block; None for a file without experts.

    Raises ValueError for a block without experts in a file that has some.
    """
    numbers: dict[Block, int] = {known: number for number, known in enumerate(trace.config.dims.blocks)}
    ffns = [FFN.parse(ffn) for ffn in trace.layers]
    by_block = {numbers[ffn.block]: ffn.name for ffn in ffns if ffn.stream != "txt"}
    if not by_block:
        return None
    if block != _LAST and block not in by_block:
        raise ValueError(f"Block {block} has no experts. Those that have: {_format_ranges(sorted(by_block))}.")
    return by_block[max(by_block) if block == _LAST else block]


def _format_ranges(numbers: Sequence[int]) -> str:
    """Return rising numbers as text such as 1, 3-7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in ranges)
