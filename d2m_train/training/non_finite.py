"""Diagnosis of a NaN or infinite loss or gradient: the module that made it, and advice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import UserError
from ..parallel.parameters import local_tensor

_ELSEWHERE = "it is on another rank, which names the module"


def find_non_finite(
    model: nn.Module, run_forward: Callable[[], Tensor], together: Callable[[bool], bool] = bool
) -> str:
    """Describe the first NaN or infinite value of `model`: a weight, a module's output, or a gradient.

    `run_forward` computes the loss of the same batch again. If the forward pass is finite, the backward pass runs too and
    leaves gradients in the parameters. Every rank of a run calls this; `together` tells whether a condition holds on any
    rank, so that no rank leaves a pass that all ranks take part in.
    """
    weight = next((item for item in [*model.named_parameters(), *model.named_buffers()] if not _finite(item[1])), None)
    if together(weight is not None):
        return _ELSEWHERE if weight is None else f"{weight[0]} itself is not finite ({_counts(weight[1])})"
    with _watched(model) as (forward, backward):
        loss = run_forward()
        culprit = forward[0] if forward else None
        if culprit is None and not _finite(loss):
            culprit = f"every module's output is finite, but the loss made of them is not ({_counts(loss)})"
        if together(culprit is not None):
            return culprit or _ELSEWHERE
        if loss.requires_grad:
            loss.backward()
    if backward:
        return backward[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name} is not finite ({_counts(parameter.grad)})"
    return "nothing in a second pass through the same batch; the first may have met a fault of the device"


def non_finite_error(source: str, *, where: str, checkpoint: str | None) -> UserError:
    """`source` is find_non_finite's description, `where` names stage and step; `checkpoint` is the last good one, if any."""
    kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return UserError(
        f"{where}: the loss or its gradient is not finite. {source[:1].upper()}{source[1:]}. {kept}; nothing was written "
        "after it. Go on with resume=latest and a lower stage learning_rate, a smaller training.max_grad_norm, or "
        "training.mixed_precision=bf16 (or no) in place of fp16; if it comes back at the same step, look at that batch's data."
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Record non-finite values during the `with`, in order: (of forward passes, of backward passes).

    Hooks run from the innermost module outwards, so the first module that turns finite inputs into non-finite outputs is
    the smallest that does.
    """
    forward: list[str] = []
    backward: list[str] = []

    def reached(what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not backward and not _finite(gradient):
                backward.append(
                    f"the gradient {what} is not finite ({_counts(gradient)}), the first in the backward pass"
                )

        return hook

    def ran(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            outputs = list(_tensors(output))
            wrong = [tensor for tensor in outputs if not _finite(tensor)]
            if wrong and not forward and all(_finite(tensor) for tensor in _tensors((arguments, keywords))):
                kind = type(module).__name__
                forward.append(f"{name or 'the model'} ({kind}) makes finite inputs into {_counts(wrong[0])}")
            for tensor in outputs:
                if tensor.requires_grad:
                    handles.append(tensor.register_hook(reached(f"that reaches the output of {name or 'the model'}")))

        return hook

    handles: list[Any] = [
        module.register_forward_hook(ran(name), with_kwargs=True) for name, module in model.named_modules()
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_hook(reached(f"of {name}")))
    try:
        yield forward, backward
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(local_tensor(tensor)).all())


def _counts(tensor: Tensor) -> str:
    values = local_tensor(tensor).detach()
    counts = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{parts} of {values.numel()} values"
