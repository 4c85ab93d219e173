"""What a conversion without training reports: sentences for people, and all figures as JSON."""

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

_WAYS = ("random", "fixed", "ridge", "oracle")  # of choosing blocks: see GroupReport


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """What was measured, by name; empty where nothing was. Filled as the conversion goes.

    ffns         errors of each FFN
    modulations  |found - dense| / |dense| of each modulation's outputs
    blocks       what every block of the teacher changes (Fig. 3)
    groups       how each block group's routers choose
    """

    ffns: dict[str, FFNReport] = field(default_factory=dict)
    modulations: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, BlockChange] = field(default_factory=dict)
    groups: dict[str, GroupReport] = field(default_factory=dict)


def tell(report: Report, config: FluxMoEConfig, out: Path, say: Callable[[str], object]) -> None:
    """The few figures that a user wants to see at once."""
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
        averages = {kind: mean(of[kind] for of in errors.values()) for kind in next(iter(errors.values()))}
        agrees, experts = averages.pop("agrees", None), averages.pop("experts", None)
        say(f"Relative error of the FFNs' outputs at top-{config.top_k}, on tokens that no fit has seen, averaged:")
        say("  " + ", ".join(f"{kind} {value:.3f}" for kind, value in averages.items()))
        worst = max(errors, key=lambda name: errors[name]["converted"])
        say(f"  worst: {worst}, {errors[worst]['converted']:.3f}")
        if agrees is not None:
            say(
                f"  The capacity predictors agree with the experts' selection to {agrees:.1%}; {experts:.2f} experts a token."
            )
    if report.modulations:
        worst = max(report.modulations, key=report.modulations.__getitem__)
        say(
            f"Relative error of the modulations' outputs at rank {config.adaln_rank}: "
            f"{mean(report.modulations.values()):.3f}; worst: {worst}, {report.modulations[worst]:.3f}"
        )
    if config.groups:
        _tell_groups(report, config, say)


def _tell_groups(report: Report, config: FluxMoEConfig, say: Callable[[str], object]) -> None:
    for group in config.groups:
        last = group.indices[-1]
        say(f"Of the {group.kind} blocks {group.first} to {last} {group.active} run ({group.selection}).")
    if not report.groups:
        say(
            "Block routers are random, as the paper begins: they have to be trained. With data they begin with a preference."
        )
        return
    ways = {way: [getattr(group, way) for group in report.groups.values()] for way in _WAYS}
    say(
        "Block routers, on samples that no fit has seen: change of the blocks left out, as a part of the group's; and how"
    )
    say("often the choice is the oracle's, which knows the changes. Averaged over the groups:")
    for way, choices in ways.items():
        skipped, agreement = (
            mean(getattr(choice, figure) for choice in choices) for figure in ("skipped", "agreement")
        )
        say(f"  {way:<8}left out {skipped:.3f}, as the oracle {agreement:.1%}")


def write_report(report: Report, config: FluxMoEConfig, file: Path, say: Callable[[str], object]) -> None:
    """All figures, if there are any."""
    if not (report.ffns or report.modulations or report.blocks):
        return
    content = {
        "options": config.provenance,
        "ffns": {name: ffn.to_dict() for name, ffn in report.ffns.items()},
        "modulations": report.modulations,
        "blocks": {name: asdict(change) for name, change in report.blocks.items()},
        "groups": {name: group.to_dict() for name, group in report.groups.items()},
    }
    with atomic_file(file) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")
    say(f"All of them: {file}")
