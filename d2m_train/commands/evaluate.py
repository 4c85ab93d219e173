"""Sample prompts with a FLUX, dense or MoE, and score the images.

Writes images in GenEval's folder layout to OUT/images (the teacher's to OUT/teacher, the other file's to OUT/against) and
scores to OUT/report.json: the emoji scores with --data emoji, CLIPScore with --clip, and with --teacher the distance of
latents to the teacher's from the same noise. Every mean has its 95 % interval over prompts. --against compares two files
prompt by prompt, from the same noise. An interrupted evaluation keeps its images and goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from d2m_model.atomic import atomic_file

from ..evaluation.image_folder import ImageFolder, sample_missing
from ..evaluation.open_model import Sparsity, is_flux_moe, load_flux
from ..evaluation.prompts import (
    Encoders,
    Prompt,
    add_prompt_arguments,
    add_sampling_arguments,
    check_counts,
    model_dtype,
    open_encoders,
    read_prompts,
    sampling_shift,
)
from ..evaluation.scores import LEVEL, Clip, Scores, interval, score_images
from ..fingerprint import fingerprint
from ..progress import progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="a FLUX-MoE, or a dense FLUX")
    parser.add_argument("--out", type=Path, metavar="OUT", help="default: a folder of FILE in runs/evaluation")
    parser.add_argument("--teacher", type=Path, metavar="F", help="the dense FLUX to measure the distance to")
    parser.add_argument("--against", type=Path, metavar="OTHER", help="another file, for a paired comparison")
    parser.add_argument("--clip", type=Path, metavar="FOLDER", help="a local CLIP model with its processor")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="images per prompt (default: 1; GenEval: 4)")
    add_prompt_arguments(parser)
    add_sampling_arguments(parser)
    sparsity = parser.add_argument_group("sparsity of FILE and OTHER (default: the files' own)")
    sparsity.add_argument("--top-k", type=int, metavar="K", help="experts per token")
    sparsity.add_argument("--active-blocks", type=int, metavar="N", help="blocks of a group that run")
    sparsity.add_argument(
        "--capacity-factor", type=float, metavar="C", help="factor on a capacity router's capacity; 1 is the file's own"
    )


def run(args: argparse.Namespace) -> int:
    check_counts(args, "seeds", "every", "steps", "batch", "text_tokens")
    out = args.out or default_folder(args.file)
    report = evaluate(args, out)
    print(score_table(report))
    print(f"{out / 'report.json'}: written.")
    return 0


def default_folder(file: Path) -> Path:
    """Return the folder of a file's evaluation: every run's file is called student.safetensors, so its path tells."""
    path = file.absolute()
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]
    return Path("runs/evaluation") / f"{path.parent.name}-{path.stem}-{digest}"


def evaluate(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Sample missing images, score all, and write and return the report."""
    prompts, encoders = read_prompts(args.data, args.every), open_encoders(args)
    clip = None if args.clip is None else Clip(args.clip, args.device)
    sparsity = Sparsity(top_k=args.top_k, active_blocks=args.active_blocks, capacity_factor=args.capacity_factor)
    folders: dict[str, ImageFolder] = {}
    asked = {"images": (args.file, sparsity), "teacher": (args.teacher, Sparsity())}
    if args.against is not None:
        asked["against"] = (args.against, sparsity if is_flux_moe(args.against) else Sparsity())
    for name, (file, own) in asked.items():
        if file is not None:
            folders[name] = _sample(args, out / name, file, own, prompts, encoders)
    reference = folders.get("teacher")
    scores = {
        name: score_images(folder, None if name == "teacher" else reference, clip) for name, folder in folders.items()
    }
    report = _report(args, prompts, scores)
    for name, values in scores.items():
        _write(out / name / "scores.json", {key: value.tolist() for key, value in values.items()})
    _write(out / "report.json", report)
    return report


def _sample(
    args: argparse.Namespace, folder: Path, file: Path, sparsity: Sparsity, prompts: list[Prompt], encoders: Encoders
) -> ImageFolder:
    images = ImageFolder(
        folder,
        prompts,
        seeds=args.seeds,
        keep_latents=args.teacher is not None,
        made=_made(args, file, sparsity, prompts, encoders),
    )
    missing = len(images.missing())
    total = len(prompts) * args.seeds
    with progress_bar(desc=f"{folder.name}: {file.name}", total=total, initial=total - missing, unit="image") as bar:
        sample_missing(
            images,
            lambda: load_flux(file, model_dtype(args), args.device, sparsity),
            encoders,
            steps=args.steps,
            guidance=args.guidance,
            shift=lambda guided: sampling_shift(args, encoders, guided),
            seed=args.seed,
            batch=args.batch,
            progress=bar.update,
        )
    return images


def _made(
    args: argparse.Namespace, file: Path, sparsity: Sparsity, prompts: list[Prompt], encoders: Encoders
) -> dict[str, Any]:
    """Return everything that an image depends on, except the number of images."""
    stat = file.stat() if file.is_file() else None
    texts = "\n".join(f"{prompt.index} {prompt.text}" for prompt in read_prompts(args.data))
    return {
        "file": file.name,
        "bytes": stat and stat.st_size,
        "fingerprint": fingerprint([file]) if file.is_file() else None,
        "top_k": sparsity.top_k,
        "active_blocks": sparsity.active_blocks,
        "capacity_factor": sparsity.capacity_factor,
        "prompts": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "encoders": hashlib.sha256(f"{encoders.texts.identity} {encoders.autoencoder.identity}".encode()).hexdigest()[
            :16
        ],
        "size": list(encoders.size),
        "steps": args.steps,
        "guidance": args.guidance,
        "shift": args.shift,
        "seed": args.seed,
        "dtype": str(model_dtype(args)),
    }


def _report(args: argparse.Namespace, prompts: list[Prompt], scores: dict[str, Scores]) -> dict[str, Any]:
    means = {name: {key: interval(values).as_dict() for key, values in found.items()} for name, found in scores.items()}
    report: dict[str, Any] = {
        "file": str(args.file),
        "data": args.data,
        "prompts": len(prompts),
        "seeds": args.seeds,
        "steps": args.steps,
        "guidance": args.guidance,
        "top_k": args.top_k,
        "active_blocks": args.active_blocks,
        "capacity_factor": args.capacity_factor,
        "level": LEVEL,
        "scores": means["images"],
    }
    if "teacher" in scores:
        report["teacher"] = {"file": str(args.teacher), "scores": means["teacher"]}
    if "against" in scores:
        own, other = scores["images"], scores["against"]
        report["against"] = {
            "file": str(args.against),
            "scores": means["against"],
            "difference": {key: interval(own[key] - other[key]).as_dict() for key in own},
        }
    return report


def _write(file: Path, content: dict[str, Any]) -> None:
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def score_table(report: dict[str, Any]) -> str:
    """Format a report as a table: a line per score, a column per file."""
    columns = {Path(report["file"]).name: report["scores"]}
    if "against" in report:
        columns[Path(report["against"]["file"]).name + " (other)"] = report["against"]["scores"]
        columns["difference"] = report["against"]["difference"]
    if "teacher" in report:
        columns[Path(report["teacher"]["file"]).name + " (teacher)"] = report["teacher"]["scores"]
    width = max(24, *(len(name) + 2 for name in columns))
    lines = [f"{report['prompts']} prompts, {report['seeds']} images each, {report['steps']} steps"]
    lines.append(" " * 18 + "".join(f"{name:>{width}}" for name in columns))
    for score_name in report["scores"]:
        cells = [_cell(scores.get(score_name)) for scores in columns.values()]
        lines.append(f"{score_name:<18}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _cell(found: dict[str, float] | None) -> str:
    return "" if found is None else f"{found['mean']:.3f} ({found['low']:.3f} … {found['high']:.3f})"
