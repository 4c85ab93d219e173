"""Report of a conversion without training: a summary for people, and all figures as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean

from d2m_model.atomic import atomic_file
from d2m_model.config import FluxMoEConfig
from d2m_model.conversion.block_routers import BlockChange, GroupReport
from d2m_model.conversion.ffn import FFNReport

_WAYS = ("random", "fixed", "ridge", "oracle")  # ways to choose blocks: see GroupReport


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """Measurements of a conversion, by name; empty if there are none. Filled during the conversion.

    ffns         errors of each FFN
    modulations  |compressed - dense| / |dense| of each modulation's outputs
    blocks       how every block of the teacher changes its input (Fig. 3)
    groups       how each block group's routers choose
    stand_ins    |change - stand-in| / |change| of the streams of each block of a group
    """

    ffns: dict[str, FFNReport] = field(default_factory=dict)
    modulations: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, BlockChange] = field(default_factory=dict)
    groups: dict[str, GroupReport] = field(default_factory=dict)
    stand_ins: dict[str, float] = field(default_factory=dict)


def summarise(report: Report, config: FluxMoEConfig, out: Path, say: Callable[[str], object]) -> None:
    """Tell the user the most important figures through `say`."""
    bytes_written = f"{os.path.getsize(out):,} bytes"
    if config.ffns:
        layout = next(iter(config.ffns.values()))
        say(
            f"{out}: {len(config.ffns)} FFNs, each {layout.shared} shared neurons and {layout.experts} experts of "
            f"{layout.width}; top-{config.top_k}, {bytes_written}."
        )
    else:
        say(f"{out}: FFNs dense, {bytes_written}.")
    if kept := config.provenance.get("teacher_blocks"):
        for kind, blocks in kept.items():
            say(f"Its {len(blocks)} {kind} blocks are the teacher's {', '.join(map(str, blocks))}.")
    if report.ffns:
        errors = {name: ffn.to_dict() for name, ffn in report.ffns.items()}
        averages = {kind: mean(error[kind] for error in errors.values()) for kind in next(iter(errors.values()))}
        agrees, experts = averages.pop("agrees", None), averages.pop("experts", None)
        say(f"Mean relative error of the FFNs' outputs at top-{config.top_k}, on tokens that no fit has seen:")
        say("  " + ", ".join(f"{kind} {value:.3f}" for kind, value in averages.items()))
        worst = max(errors, key=lambda name: errors[name]["converted"])
        say(f"  worst: {worst}, {errors[worst]['converted']:.3f}")
        if agrees is not None:
            say(
                f"  The capacity predictors agree with the experts' selection by {agrees:.1%}; {experts:.2f} experts per token."
            )
    if report.modulations:
        worst = max(report.modulations, key=report.modulations.__getitem__)
        say(
            f"Relative error of the modulations' outputs at rank {config.adaln_rank}: "
            f"{mean(report.modulations.values()):.3f}; worst: {worst}, {report.modulations[worst]:.3f}"
        )
    if config.groups:
        _summarise_groups(report, config, say)


def _summarise_groups(report: Report, config: FluxMoEConfig, say: Callable[[str], object]) -> None:
    for group in config.groups:
        last = group.indices[-1]
        say(f"{group.active} of the {group.kind} blocks {group.first} to {last} run at a time ({group.selection}).")
    if not report.groups:
        say("Block routers are random, as in the paper, and have to be trained. With data they are fitted.")
        return
    ways = {way: [getattr(group, way) for group in report.groups.values()] for way in _WAYS}
    say(
        "Block routers, on samples that no fit has seen: the change of the blocks left out, as a fraction of the group's,"
    )
    say("and how often the choice is that of the oracle, which knows the changes. Averages over the groups:")
    for way, choices in ways.items():
        skipped, agreement = (
            mean(getattr(choice, figure) for choice in choices) for figure in ("skipped", "agreement")
        )
        say(f"  {way:<8}left out {skipped:.3f}, as the oracle {agreement:.1%}")
    if report.stand_ins:
        worst = max(report.stand_ins, key=report.stand_ins.__getitem__)
        say(
            f"Relative error of the stand-ins of skipped blocks, on tokens that no fit has seen: "
            f"{mean(report.stand_ins.values()):.3f}; worst: {worst}, {report.stand_ins[worst]:.3f}"
        )


def write_report(report: Report, config: FluxMoEConfig, file: Path, say: Callable[[str], object]) -> None:
    """Write all figures to `file`, if there are any."""
    if not (report.ffns or report.modulations or report.blocks):
        return
    content = {
        "options": config.provenance,
        "ffns": {name: ffn.to_dict() for name, ffn in report.ffns.items()},
        "modulations": report.modulations,
        "blocks": {name: asdict(change) for name, change in report.blocks.items()},
        "groups": {name: group.to_dict() for name, group in report.groups.items()},
        "stand_ins": report.stand_ins,
    }
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    say(f"All figures: {file}")
