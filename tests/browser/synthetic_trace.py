"""A run that never was, in the format in which the server sends a trace: written from its description alone.

Bytes of one step of one sample: for every layer that ran, in order, experts uint8 [T*K] token by token (best first,
255 none), gates uint8 [T*K], margin uint8 [T].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

NONE = 255
PROMPT = ["▁a", "▁watercolour", "▁of", "▁a", "▁red", "▁panda", "▁in", "▁the", "▁snow", ",", "▁dawn", "</s>"]


class SyntheticTrace:
    """Regions of experts that move with step and block; every choice can be asked for, to be compared with the page."""

    def __init__(
        self,
        name: str,
        *,
        height: int = 24,
        width: int = 24,
        doubles: int = 4,
        singles: int = 8,
        steps: int = 6,
        experts: int = 12,
        slots: int = 2,
        text: int = 32,
        samples: int = 2,
        seed: int = 0,
        pieces: bool = True,
        groups: bool = True,
    ) -> None:
        self.name, self.height, self.width, self.steps = name, height, width, steps
        self.experts, self.slots, self.text, self.seed = experts, slots, text, seed
        self.samples = [("positive", "negative")[i % 2] for i in range(samples)]
        self.layers: list[tuple[str, str]] = []
        for block in range(doubles):
            self.layers += [
                (f"double_blocks.{block}.img_mlp", "img"),
                (f"double_blocks.{block}.txt_mlp", "txt"),
            ]
        self.layers += [(f"single_blocks.{block}", "joint") for block in range(singles)]
        self.groups = [("double", 0, doubles), ("single", 0, singles // 2)] if groups else []
        self.pieces = [*PROMPT, *["<pad>"] * (text - len(PROMPT))] if pieces else None

    def ran(self, step: int, sample: int, layer: int) -> bool:
        """One block of each group is passed by, another at every step."""
        kind, number = self.layers[layer][0].split(".")[:2]
        for group, first, blocks in self.groups:
            if kind.startswith(group) and first <= int(number) < first + blocks:
                return bool(self.blocks(step, sample)[self.groups.index((group, first, blocks))][int(number) - first])
        return True

    def blocks(self, step: int, sample: int) -> list[list[bool]]:
        return [[(step + 2 * sample) % blocks != block for block in range(blocks)] for _, _, blocks in self.groups]

    def choices(self, step: int, sample: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """experts [T, K], gates [T, K], margin [T]."""
        stream = self.layers[layer][1]
        parts = []
        if stream != "img":
            word = np.arange(self.text)
            parts.append((np.sin(word * 1.7 + layer) * 9, np.cos(word * 0.9 + step * 0.2) * 7))
        if stream != "txt":
            y, x = np.mgrid[: self.height, : self.width].reshape(2, -1) / max(self.height, self.width)
            turn = 0.35 * layer + 0.15 * step + self.seed + 0.4 * sample
            parts.append(
                (
                    6 * np.sin(5 * x + turn) + 5 * np.cos(7 * y - turn),
                    7 * np.cos(6 * (x - y) + turn) + 3 * np.sin(9 * x * y),
                )
            )
        one = np.concatenate([part[0] for part in parts])
        other = np.concatenate([part[1] for part in parts])
        angle = 2 * np.pi * np.arange(self.experts) / self.experts
        logits_TE = one[:, None] * np.cos(angle) + other[:, None] * np.sin(angle)
        weights_TE = np.exp((logits_TE - logits_TE.max(1, keepdims=True)) / 6)
        weights_TE /= weights_TE.sum(1, keepdims=True)
        experts_TK = np.argsort(-weights_TE, axis=1, kind="stable")[:, : self.slots]
        gates_TK = np.take_along_axis(weights_TE, experts_TK, 1)
        best = np.sort(weights_TE, axis=1)[:, ::-1]
        margin_T = best[:, 0] - best[:, 1]
        return (
            experts_TK.astype(np.uint8),
            np.round(255 * gates_TK).astype(np.uint8),
            np.round(255 * margin_T).astype(np.uint8),
        )

    def step_bytes(self, step: int, sample: int) -> bytes:
        parts = []
        for layer in range(len(self.layers)):
            if self.ran(step, sample, layer):
                parts += [array.tobytes() for array in self.choices(step, sample, layer)]
        return b"".join(parts)

    def load(self, step: int, sample: int, layer: int) -> list[int]:
        if not self.ran(step, sample, layer):
            return [0] * self.experts
        experts_TK = self.choices(step, sample, layer)[0]
        return [int(count) for count in np.bincount(experts_TK[experts_TK != NONE], minlength=self.experts)]

    @cache  # noqa: B019 - a handful of traces, for as long as the tests run
    def described(self) -> dict[str, Any]:
        samples = range(len(self.samples))
        return {
            "version": 1,
            "id": self.name,
            "grid": {"height": self.height, "width": self.width},
            "text_tokens": self.text,
            "image_tokens": self.height * self.width,
            "reference_tokens": 0,
            "router": "top_k",
            "slots": self.slots,
            "samples": [
                {"index": i, "cond": cond, "prompt": 0, "image": i // 2} for i, cond in enumerate(self.samples)
            ],
            "layers": [{"name": name, "stream": stream, "experts": self.experts} for name, stream in self.layers],
            "groups": [{"kind": kind, "first": first, "blocks": blocks} for kind, first, blocks in self.groups],
            "steps": [
                {
                    "sigma": 1 - step / self.steps,
                    "settings": {"top_k": self.slots, "gate": "normalised"},
                    "samples": [
                        {
                            "evaluated": True,
                            "ran": [self.ran(step, sample, layer) for layer in range(len(self.layers))],
                            "load": [self.load(step, sample, layer) for layer in range(len(self.layers))],
                            "blocks": self.blocks(step, sample),
                        }
                        for sample in samples
                    ],
                }
                for step in range(self.steps)
            ],
            "prompt": None if self.pieces is None else [self.pieces for _ in samples],
            "notes": [],
        }
