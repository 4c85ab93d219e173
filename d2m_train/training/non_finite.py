"""When a loss or a gradient is NaN or infinite: which module made it so, and what can be done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import UserError
from ..parallel.parameters import local_tensor

ELSEWHERE = "it is on another rank, which names the module"


def find_non_finite(
    model: nn.Module, run_forward: Callable[[], Tensor], together: Callable[[bool], bool] = bool
) -> str:
    """What of `model` is NaN or infinite first, in words: a weight, a module's output, or a gradient.

    `run_forward` computes the loss again, of the batch that it happened in; the backward pass follows where the forward
    pass is in order, so gradients are left in the parameters. In a run of several ranks every one calls this, and
    `together` says whether something holds on any of them: a pass that all take part in is not left by one.
    """
    held = next((item for item in [*model.named_parameters(), *model.named_buffers()] if not _finite(item[1])), None)
    if together(held is not None):
        return ELSEWHERE if held is None else f"{held[0]} itself is not finite ({_which(held[1])})"
    with _watched(model) as (forward, backward):
        loss = run_forward()
        found = forward[0] if forward else None
        if found is None and not _finite(loss):
            found = f"every module's output is finite, but the loss made of them is not ({_which(loss)})"
        if together(found is not None):
            return found or ELSEWHERE
        if loss.requires_grad:
            loss.backward()
    if backward:
        return backward[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name} is not finite ({_which(parameter.grad)})"
    return "nothing in a second pass through the same batch; the first may have met a fault of the device"


def non_finite_error(found: str, *, where: str, checkpoint: str | None) -> UserError:
    """`found`: of find_non_finite. `where`: stage and step. `checkpoint`: the last good one, None before there is one."""
    kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "There is no checkpoint yet"
    return UserError(
        f"{where}: the loss or its gradient is not finite. {found[:1].upper()}{found[1:]}. {kept}; nothing was written "
        "after it. Go on with resume=latest and a lower stage learning_rate, a smaller training.max_grad_norm, or "
        "training.mixed_precision=bf16 (or no) in place of fp16; if it comes back at the same step, look at that batch's data."
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """What goes wrong during the `with`, in the order in which it does: in forward passes, and in backward passes.

    Hooks run from the innermost module outwards. So the first that turns finite inputs into something else is the
    smallest that does.
    """
    forward: list[str] = []
    backward: list[str] = []

    def reached(what: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not backward and not _finite(gradient):
                backward.append(
                    f"the gradient {what} is not finite ({_which(gradient)}), the first in the backward pass"
                )

        return hook

    def ran(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
            outputs = list(_tensors(output))
            wrong = [tensor for tensor in outputs if not _finite(tensor)]
            if wrong and not forward and all(_finite(tensor) for tensor in _tensors((arguments, keywords))):
                kind = type(module).__name__
                forward.append(f"{name or 'the model'} ({kind}) makes finite inputs into {_which(wrong[0])}")
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


def _which(tensor: Tensor) -> str:
    values = local_tensor(tensor).detach()
    counts = {"NaN": int(values.isnan().sum()), "infinite": int(values.isinf().sum())}
    parts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return f"{parts} of {values.numel()} values"
