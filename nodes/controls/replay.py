"""The Replay node: an image's log (metadata_log.py) applied again, evaluation by evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from PIL import Image

from .control import Control, flux_moe
from .metadata_log import LOG_KEY, NEGATIVE
from .transforms import GATES, KINDS, Moment

WHAT = (
    "Give it an image that Save Image (or Save Animated WEBP) wrote of a run under FLUX-MoE controls, or the log's JSON"
)
MOST_RUNS = 1000

# Reading logs, which may have come from anywhere


def runs_of(said: str) -> list[dict[str, Any]]:
    """The runs of a log: an image's `d2m_log`, what GET /d2m/log answers, one run, or the evaluations of one.
    Raises ValueError for anything else."""
    try:
        data = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The log is not JSON ({error}). {WHAT}.") from None
    if isinstance(data, dict):
        data = data.get("runs", [data])
    if isinstance(data, list) and data and isinstance(data[0], dict) and "evaluation" in data[0]:
        data = [{"evaluations": data}]
    if not isinstance(data, list):
        raise ValueError(f"The log is {type(data).__name__}; expected a list of runs. {WHAT}.")
    return [run_of(run, number) for number, run in enumerate(data, 1)]


def run_of(data: Any, number: int) -> dict[str, Any]:
    run = {"node": "", "masks": [], **data} if isinstance(data, dict) else {}
    evaluations, masks = run.get("evaluations"), run.get("masks")
    if not isinstance(evaluations, list) or not isinstance(masks, list):
        raise ValueError(f"Run {number} of the log has no evaluations; expected a list of them. {WHAT}.")
    for mask in masks:
        if not isinstance(mask, dict) or not all(weighs(weights) for weights in mask.values()):
            raise ValueError(
                f"Run {number} of the log has the mask {mask!r}; expected weights of experts by FFN. {WHAT}."
            )
    for index, entry in enumerate(evaluations):
        if not isinstance(entry, dict):
            raise ValueError(f"Evaluation {index} of run {number} of the log is {entry!r}; expected an object. {WHAT}.")
        for name, right in RIGHT.items():
            if name in entry and not right(entry[name]):
                raise ValueError(f"Evaluation {index} of run {number} of the log has {name} {entry[name]!r}. {WHAT}.")
        if "mask" in entry and not entry["mask"] < len(masks):
            raise ValueError(f"Evaluation {index} of run {number} of the log has mask {entry['mask']} of {len(masks)}.")
    return run


def natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def weighs(weights: Any) -> bool:
    return isinstance(weights, dict) and all(expert.isdecimal() and weight(value) for expert, value in weights.items())


RIGHT = {
    "top_k": natural,
    "capacity": weight,
    "gate": GATES.__contains__,
    "active_blocks": lambda value: isinstance(value, list) and all(natural(blocks) for blocks in value),
    "mask": natural,
}


def chosen(runs: list[dict[str, Any]], number: int) -> dict[str, Any]:
    """The run that the node asks for: 0 is the only one."""
    made = [run for run in runs if run["evaluations"]]
    if not made:
        raise ValueError(f"The log has no evaluations: no FLUX-MoE was sampled under controls. {WHAT}.")
    if number == 0 and len(made) == 1:
        return made[0]
    if not 1 <= number <= len(made):
        listed = ", ".join(
            f"{i} (node {run['node'] or '?'}{', negative model' if run.get('model') == NEGATIVE else ''}, "
            f"{len(run['evaluations'])} evaluations)"
            for i, run in enumerate(made, 1)
        )
        found = "has several runs" if number == 0 else f"has no run {number}"
        raise ValueError(f"The log {found}. Choose one by the widget `run`: {listed}.")
    return made[number - 1]


def image_path(image: str) -> Path:
    """Of an image in ComfyUI's input (or, annotated, its output or temp) folder. Raises ValueError for any other."""
    wrong = ValueError(f"There is no image {image!r} in ComfyUI's input folder. Upload it, or choose another.")
    try:
        path = Path(folder_paths.get_annotated_filepath(image)).resolve()
    except ValueError:  # newer hosts refuse a way out of the folder
        raise wrong from None
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    if not any(path.is_relative_to(Path(folder).resolve()) for folder in folders) or not path.is_file():
        raise wrong
    return path


def log_of(image: str | None, log: str) -> str:
    if log.strip():
        return log
    if not image:
        raise ValueError(f"There is no image and no log to replay. {WHAT}.")
    with Image.open(image_path(image)) as opened:
        found = opened.info.get(LOG_KEY) or in_exif(opened)
    if not isinstance(found, str):
        raise ValueError(
            f"{image} has no FLUX-MoE log in its metadata: it was not sampled under FLUX-MoE controls, or another program "
            f"has written it again. Logs are read from PNG text and from EXIF (WEBP). {WHAT}."
        )
    return found


def in_exif(image: Image.Image) -> str | None:
    """Where Save Animated WEBP puts it: `key:JSON` in a tag of its own, whichever is free."""
    begins = f"{LOG_KEY}:"
    texts = (text for text in image.getexif().values() if isinstance(text, str))
    return next((text.removeprefix(begins) for text in texts if text.startswith(begins)), None)


class Replay(Control):
    node_id, title = "D2MReplay", "FLUX-MoE Replay"

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = folder_paths.get_input_directory()
        files = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
        return io.Schema(
            node_id=cls.node_id,
            display_name=cls.title,
            category="FLUX-MoE",
            description=(
                "Uses at every evaluation of the model what an image's run used at it, sliders that were moved while it "
                "sampled included. With the same seed, prompt and sampler it paints that image again."
            ),
            search_aliases=["reproduce", "live log", "d2m_log", "repeat", "image metadata", "dense2moe"],
            inputs=[
                io.Model.Input("model", tooltip="The FLUX-MoE that the image was made with."),
                io.Combo.Input(
                    "image",
                    options=sorted(folder_paths.filter_files_content_types(files, ["image"])),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    optional=True,  # a log will do
                    tooltip="A PNG of Save Image, or a WEBP of Save Animated WEBP, of a run under FLUX-MoE controls.",
                ),
                io.Int.Input(
                    "run",
                    default=0,
                    min=0,
                    max=MOST_RUNS,
                    optional=True,
                    tooltip=(
                        "Which run, where the image's workflow sampled several times: 1 is the first. 0 is the only one; if "
                        "there are several, the message lists them."
                    ),
                ),
                io.String.Input(
                    "log",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="A log as JSON in place of the image's, such as its d2m_log metadata.",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output(display_name="MODEL", tooltip="The same weights under the log's settings.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool:
        """Not ComfyUI's check against the list, which has no uploads to subfolders. A log may stand in for the image, so
        that it is execute that says what is wrong with one."""
        return True

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None, log: str | None = None, **inputs: Any) -> Any:
        revision = super().fingerprint_inputs()
        try:
            used = image_path(image) if image and not (log or "").strip() else None
        except ValueError:
            used = None
        return [revision, used and hashlib.sha256(used.read_bytes()).hexdigest()]

    @classmethod
    def execute(cls, model: Any, image: str | None = None, run: int = 0, log: str = "") -> io.NodeOutput:
        config = flux_moe(model, cls.title).diffusion_model.config
        values = {"log": chosen(runs_of(log_of(image, log)), run)}
        for index in range(len(values["log"]["evaluations"])):
            KINDS[cls.node_id].fold({}, values, config, Moment(evaluation=index, sigma=0.0, sigma_at=float))
        return cls.put_on(model, **values)
