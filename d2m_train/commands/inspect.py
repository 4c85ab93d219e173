"""Describe a FLUX file, dense or MoE, and check it: every tensor's shape and values, the neuron orders, the routers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from d2m_model.blocks import BFL_BLOCKS
from d2m_model.checkpoint import CheckpointError, check_file
from d2m_model.config import FluxDims, FluxMoEConfig, all_ffn_names
from d2m_model.cost import Conversion, Tokens, flux
from d2m_model.foreign import printable
from d2m_model.sensitivity import SENSITIVITY
from d2m_model.teacher import DenseTeacher, open_teacher
from d2m_model.tensor_file import TensorFile, is_finite

from ..evaluation.open_model import is_flux_moe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", type=Path, metavar="F", help="a .safetensors file; for a dense FLUX also the index or folder of shards"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    facts = inspect(args.file)
    print(json.dumps(facts, indent=2) if args.json else printable(facts_text(facts)))
    return 0


def inspect(path: Path) -> dict[str, Any]:
    """Return all facts about a FLUX file. Raises CheckpointError if it is damaged or not a FLUX."""
    if not is_flux_moe(path):
        with open_teacher(path) as teacher:
            teacher.check_values()
            facts = _facts(path, teacher, teacher.dims) | {"kind": "dense FLUX.1"}
            facts["title"] = teacher.metadata.get("modelspec.title")
            facts["licence"] = teacher.metadata.get("modelspec.license")
            facts["notes"] = list(teacher.notes)
            return facts
    config = check_file(path)
    with TensorFile(path) as file:
        _check_finite(file)
        facts = _facts(path, file, config.dims) | {"kind": "FLUX-MoE"}
    conversion = Conversion.of(config)
    cost = flux(config.dims, conversion, Tokens(image=1, text=1))  # the tokens do not affect the parameters
    facts["activated_parameters"] = {"touched": round(cost.touched), "paper": round(cost.paper)}
    facts["moe"] = json.loads(config.to_json())
    del facts["moe"]["dims"]
    return facts


def _check_finite(file: TensorFile) -> None:
    """Read every tensor once. Raises CheckpointError for NaN or infinity."""
    for name in file.shapes:
        if not is_finite(file.tensor(name)):
            raise CheckpointError(f"{file.path}: {name} has NaN or infinite values; the file is damaged.")
        file.release(name)


def _facts(path: Path, file: TensorFile | DenseTeacher, dims: FluxDims) -> dict[str, Any]:
    """Return facts that both kinds have. A teacher's `elements_by_dtype` are those of a conversion of it."""
    dtypes: Counter[str] = Counter()
    for name, dtype in file.dtypes.items():
        dtypes[str(dtype).removeprefix("torch.")] += prod(file.shapes[name])
    return {
        "file": str(path),
        "bytes": file.size,
        "tensors": len(file.shapes),
        "parameters": sum(prod(shape) for name, shape in file.shapes.items() if file.dtypes[name].is_floating_point),
        "elements_by_dtype": dict(dtypes.most_common()),
        "dims": dataclasses.asdict(dims),
    }


def facts_text(facts: dict[str, Any]) -> str:
    """Format the facts for people, a line each."""
    dims = facts["dims"]
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in facts["elements_by_dtype"].items())
    lines = [
        ("file", f"{facts['file']} ({facts['bytes']:,} bytes, {facts['tensors']} tensors)"),
        ("kind", facts["kind"] + (f", schema {facts['moe']['schema_version']}" if "moe" in facts else "")),
        (
            "size",
            f"{' and '.join(f'{dims[key]} {kind}' for kind, key in BFL_BLOCKS.items())} blocks, "
            f"hidden size {dims['hidden_size']}, "
            f"guidance {'embedded' if dims['guidance_embed'] else 'not embedded'}",
        ),
        ("parameters", f"{facts['parameters']:,}"),
        ("elements", dtypes),
    ]
    if "moe" in facts:
        active = facts["activated_parameters"]
        lines.append(("activated", f"{active['touched']:,} ({active['paper']:,} as the paper counts)"))
        lines += _moe_lines(FluxMoEConfig.from_json(json.dumps(facts["moe"] | {"dims": dims})))
    else:
        lines += [("title", facts["title"] or "not stated"), ("licence", facts["licence"] or "not stated")]
        lines += [("note", note) for note in facts["notes"]]
    sound = "; routers and neuron orders are sound" if "moe" in facts else ""
    lines.append(("checked", f"every tensor is present, has the right shape and finite values{sound}"))
    return "\n".join(f"{name:<12}{value}" for name, value in lines)


def _moe_lines(config: FluxMoEConfig) -> list[tuple[str, str]]:
    names = all_ffn_names(config.dims)
    lines = []
    for layout, count in Counter(config.ffns.values()).items():
        what = f"{layout.shared} shared neurons, {layout.experts} experts of {layout.width}"
        lines.append(("experts", f"{count} of {len(names)} FFNs: {what}"))
    if dense := [name for name in names if name not in config.ffns]:
        lines.append(("dense", ", ".join(dense)))
    for group in config.groups:
        blocks = f"{group.kind} blocks {group.first} to {group.indices[-1]}"
        lines.append(("group", f"{blocks}, {group.active} active ({group.selection})"))
    if config.stand_in_rank is not None:
        lines.append(("stand-ins", f"for skipped blocks, of rank {config.stand_in_rank}"))
    weights = "changed: needs the pack"
    if config.split_only:
        weights = "the teacher's, reordered: opens as the teacher without the pack"
    routing = config.router.described(config.top_k)
    provenance = {key: value for key, value in config.provenance.items() if key != SENSITIVITY}
    if (table := config.sensitivity) is not None:
        samples = f"{table.samples} samples of {table.data}"
        lines.append(("sensitivity", f"measured on {samples} in each of {table.bins} ranges of noise levels"))
    return [
        *lines,
        ("routing", f"{routing}, gate {config.gate.mode}, scale {config.gate.scale:g}"),
        ("AdaLN", "dense" if config.adaln_rank is None else f"compressed to rank {config.adaln_rank}"),
        ("weights", weights),
        ("teacher", f"{config.teacher.title}, sha256 {config.teacher.sha256}"),
        ("licence", config.teacher.licence),
        ("made by", json.dumps(provenance, sort_keys=True)),
    ]
