"""The Replay node: applies the log of an image (metadata_log.py) again, evaluation by evaluation."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from PIL import Image

from ...d2m_model.foreign import MessageError, read_json
from ..model.flux_moe import require_flux_moe
from .control_node import ControlNode
from .effects import Moment, apply_replay
from .kinds import GATES
from .metadata_log import LOG_KEY, NEGATIVE, RunLog

_EXPECTED = (
    "Give this node an image that Save Image (or Save Animated WEBP) wrote when the model was sampled with FLUX-MoE "
    "controls, or the JSON of a log"
)
_MAX_RUN = 1000
_MAX_LOG = 20_000_000  # characters
_MAX_EVALUATIONS = 100_000  # of one run
_LISTED, _SHOWN = 20, 200  # runs, and characters of a wrong value, in a message

# Reading logs, which may have come from anywhere


def parse_log(text: str) -> list[RunLog]:
    """Parse a log: an image's `d2m_log`, the answer of GET /d2m/log, one run, or the evaluations of one run.

    Raises ValueError for anything else.
    """
    if len(text) > _MAX_LOG:
        raise ValueError(f"The log has {len(text)} characters; expected {_MAX_LOG} at most.")
    try:
        data = read_json(text)
    except ValueError as error:
        raise ValueError(f"The log is not JSON ({error}). {_EXPECTED}.") from None
    if isinstance(data, dict):
        data = data.get("runs", [data])
    if isinstance(data, list) and data and isinstance(data[0], dict) and "evaluation" in data[0]:
        data = [{"evaluations": data}]
    if not isinstance(data, list):
        raise ValueError(f"The log is {repr(data)[:_SHOWN]}; expected a list of runs. {_EXPECTED}.")
    return [_check_run(run, number) for number, run in enumerate(data, 1)]


def _check_run(data: Any, number: int) -> RunLog:
    run = {"node": "", "masks": [], "allotments": [], **data} if isinstance(data, dict) else {}
    evaluations, masks, allotments = run.get("evaluations"), run.get("masks"), run.get("allotments")
    if not isinstance(evaluations, list) or not isinstance(masks, list) or not isinstance(allotments, list):
        raise ValueError(f"Run {number} of the log has no evaluations; expected a list of them. {_EXPECTED}.")
    if len(evaluations) > _MAX_EVALUATIONS:
        raise ValueError(
            f"Run {number} of the log has {len(evaluations)} evaluations; expected {_MAX_EVALUATIONS} at most."
        )
    for mask in masks:
        if not isinstance(mask, dict) or not all(_are_weights(weights) for weights in mask.values()):
            raise ValueError(
                f"Run {number} of the log has the mask {repr(mask)[:_SHOWN]}; expected weights of experts by FFN. {_EXPECTED}."
            )
    for allotment in allotments:
        if not isinstance(allotment, dict) or not all(map(_is_count, allotment.values())):
            raise ValueError(
                f"Run {number} of the log has the allotment {repr(allotment)[:_SHOWN]}; expected numbers of experts by FFN. "
                f"{_EXPECTED}."
            )
    for index, entry in enumerate(evaluations):
        where = f"Evaluation {index} of run {number} of the log"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} is {repr(entry)[:_SHOWN]}; expected an object. {_EXPECTED}.")
        for name, is_valid in _ENTRY_CHECKS.items():
            if name in entry and not is_valid(entry[name]):
                raise ValueError(f"{where} has {name} {repr(entry[name])[:_SHOWN]}. {_EXPECTED}.")
        if "mask" in entry and not entry["mask"] < len(masks):
            raise ValueError(f"{where} has mask {entry['mask']} of {len(masks)}.")
        if "allotment" in entry and not entry["allotment"] < len(allotments):
            raise ValueError(f"{where} has allotment {entry['allotment']} of {len(allotments)}.")
    return run


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(
        expert.isdecimal() and len(expert) < 10 and _is_weight(weight) for expert, weight in value.items()
    )


_ENTRY_CHECKS: dict[str, Callable[[Any], bool]] = {
    "top_k": _is_count,
    "capacity": _is_weight,
    "gate": GATES.__contains__,
    "active_blocks": lambda value: isinstance(value, list) and all(_is_count(blocks) for blocks in value),
    "mask": _is_count,
    "allotment": _is_count,
}


def choose_run(runs: list[RunLog], number: int) -> RunLog:
    """Return the run with this number, from 1. The number 0 stands for the only one."""
    sampled = [run for run in runs if run["evaluations"]]
    if not sampled:
        raise ValueError(f"The log has no evaluations: no FLUX-MoE was sampled with FLUX-MoE controls. {_EXPECTED}.")
    if number == 0 and len(sampled) == 1:
        return sampled[0]
    if not 1 <= number <= len(sampled):
        listed = ", ".join(
            f"{i} (node {str(run['node'] or '?')[:_SHOWN]}{', negative model' if run.get('model') == NEGATIVE else ''}, "
            f"{len(run['evaluations'])} evaluations)"
            for i, run in enumerate(sampled[:_LISTED], 1)
        )
        problem = "has several runs" if number == 0 else f"has no run {number}"
        more = f", and {len(sampled) - _LISTED} more" if len(sampled) > _LISTED else ""
        raise MessageError(f"The log {problem}. Choose one with the widget `run`: {listed}{more}.")
    return sampled[number - 1]


def image_path(image: str) -> Path:
    """Return the path of an image in ComfyUI's input folder or, if annotated, its output or temp folder.

    Raises ValueError for any other.
    """
    folders = (
        folder_paths.get_input_directory(),
        folder_paths.get_output_directory(),
        folder_paths.get_temp_directory(),
    )
    if not isinstance(image, str):
        raise ValueError(f"image is {repr(image)[:_SHOWN]}; expected the name of an image in ComfyUI's input folder.")
    try:
        path = Path(folder_paths.get_annotated_filepath(image)).resolve()
        exists = any(path.is_relative_to(Path(folder).resolve()) for folder in folders) and path.is_file()
    except (ValueError, OSError):  # newer hosts refuse paths out of the folder, and systems names that are too long
        exists = False
    if not exists:
        raise ValueError(f"There is no image {image!r} in ComfyUI's input folder. Upload it, or choose another.")
    return path


def log_text(image: str | None, log: str) -> str:
    """Return `log`, or if that is empty the log in the metadata of `image`. Raises ValueError if there is none."""
    if log.strip():
        return log
    if not image:
        raise ValueError(f"There is no image and no log to replay. {_EXPECTED}.")
    path = image_path(image)
    try:
        with Image.open(path) as opened:
            text = opened.info.get(LOG_KEY) or _log_in_exif(opened)
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = (
            getattr(error, "strerror", None) or "it is none, or damaged"
        )  # Pillow's own texts speak of its decoders
        raise MessageError(f"{image} cannot be read as an image ({reason}). {_EXPECTED}.") from None
    if not isinstance(text, str):
        raise MessageError(
            f"{image} has no FLUX-MoE log in its metadata: it was not sampled with FLUX-MoE controls, or another program "
            f"has saved it again. Logs are read from PNG text and from EXIF (WEBP). {_EXPECTED}."
        )
    return text


def _log_in_exif(image: Image.Image) -> str | None:
    """Find the log where Save Animated WEBP writes it: as `key:JSON` in whichever tag was free."""
    start = f"{LOG_KEY}:"
    texts = (text for text in image.getexif().values() if isinstance(text, str))
    return next((text.removeprefix(start) for text in texts if text.startswith(start)), None)


class Replay(ControlNode):
    node_id, title = "D2MReplay", "FLUX-MoE Replay"

    @classmethod
    def define_schema(cls) -> io.Schema:
        folder = folder_paths.get_input_directory()
        files = [name for name in os.listdir(folder) if os.path.isfile(os.path.join(folder, name))]
        return cls.control_schema(
            description=(
                "Repeats the settings that an image was made with, evaluation by evaluation, including sliders that were "
                "moved during sampling. With the same seed, prompt and sampler the result is the same image."
            ),
            search_aliases=["reproduce", "live log", "d2m_log", "repeat", "image metadata", "dense2moe"],
            model_tooltip="The FLUX-MoE that the image was made with.",
            output_tooltip="The same weights with the log's settings.",
            widgets=[
                io.Combo.Input(
                    "image",
                    options=sorted(folder_paths.filter_files_content_types(files, ["image"])),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    optional=True,  # a log replaces it
                    tooltip="A PNG from Save Image or a WEBP from Save Animated WEBP, sampled with FLUX-MoE controls.",
                ),
                io.Int.Input(
                    "run",
                    default=0,
                    min=0,
                    max=_MAX_RUN,
                    optional=True,
                    tooltip=(
                        "Number of the run, if the image's workflow sampled several times, from 1. 0 stands for the only "
                        "one; if there are several, the error message lists them."
                    ),
                ),
                io.String.Input(
                    "log",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="A log as JSON, such as the d2m_log metadata of an image, to use instead of the image.",
                    advanced=True,
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, image: str | None = None) -> bool:
        """Accept any image. ComfyUI's own list lacks uploads to subfolders; `execute` checks what it needs."""
        return True

    @classmethod
    def fingerprint_inputs(cls, image: str | None = None, log: str | None = None, **inputs: Any) -> Any:
        revision = super().fingerprint_inputs()
        try:
            path = image_path(image) if image and not (log or "").strip() else None
            return [revision, path and hashlib.sha256(path.read_bytes()).hexdigest()]
        except (ValueError, OSError):
            return [revision, None]

    @classmethod
    def execute(cls, model: Any, image: str | None = None, run: int = 0, log: str = "") -> io.NodeOutput:
        config = require_flux_moe(model, cls.title).moe_config
        values = {"log": choose_run(parse_log(log_text(image, log)), run)}
        for index in range(len(values["log"]["evaluations"])):  # refuse a log that does not fit before sampling
            apply_replay({}, values, config, Moment(evaluation=index, sigma=0.0, sigma_at=float))
        return cls.add_to(model, **values)
