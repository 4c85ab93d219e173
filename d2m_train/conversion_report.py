"""What a conversion without training reports: sentences for people, and all figures as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from d2m_model.config import FluxMoEConfig
from d2m_model.conversion.ffn import FFNReport


@dataclass(kw_only=True, slots=True, frozen=True)
class Report:
    """Of a finished conversion: relative errors of FFNs and of modulations, by name; empty where nothing was measured."""

    config: FluxMoEConfig
    ffns: dict[str, FFNReport] = field(default_factory=dict)
    modulations: dict[str, float] = field(default_factory=dict)


def tell(report: Report, out: Path, say: Callable[[str], object]) -> None:
    """The few figures that a user wants to see at once."""
    config = report.config
    layout = next(iter(config.ffns.values()))
    say(
        f"{out}: {len(config.ffns)} FFNs, each {layout.shared} shared neurons and {layout.experts} experts of "
        f"{layout.width}; top-{config.top_k}, {os.path.getsize(out):,} bytes."
    )
    if report.ffns:
        errors = {name: ffn.to_dict() for name, ffn in report.ffns.items()}
        averages = {kind: mean(of[kind] for of in errors.values()) for kind in next(iter(errors.values()))}
        say(f"Relative error of the FFNs' outputs at top-{config.top_k}, on tokens that no fit has seen, averaged:")
        say("  " + ", ".join(f"{kind} {value:.3f}" for kind, value in averages.items()))
        worst = max(errors, key=lambda name: errors[name]["converted"])
        say(f"  worst: {worst}, {errors[worst]['converted']:.3f}")
    if report.modulations:
        worst = max(report.modulations, key=report.modulations.__getitem__)
        say(
            f"Relative error of the modulations' outputs at rank {config.adaln_rank}: "
            f"{mean(report.modulations.values()):.3f}; worst: {worst}, {report.modulations[worst]:.3f}"
        )


def write_report(report: Report, file: Path, say: Callable[[str], object]) -> None:
    """All figures, if there are any."""
    if not (report.ffns or report.modulations):
        return
    content = {
        "options": report.config.provenance,
        "ffns": {name: ffn.to_dict() for name, ffn in report.ffns.items()},
        "modulations": report.modulations,
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
    say(f"All of them: {file}")
