"""Routed experts inside a graph of torch.compile.

torch.compile makes a graph anew for every value that it reads: a graph that read Top-K would be made again for each
Top-K, for each gate mode and for a mask. After eight graphs torch stops compiling. Values that packs leave out of their
graphs' guards (TorchCompileModel leaves out all of transformer_options) would even stay as they were when the graph was
traced. Therefore settings enter a graph as tensors, which the two operators below read. Where a pack calls blocks
without transformer_options, these tensors say so (`RoutingSettings.replaced`), and the operators look for the settings of
the current evaluation when the graph runs. Shapes in a graph cannot depend on settings then: tensors that one operator
hands to the other have room for every expert.

Shapes: T tokens, H hidden size, E experts, F expert width, K top_k, A = T K assignments, R = T E rows, L routed FFNs,
C chunks.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...d2m_model.blocks import blocks_of
from ...d2m_model.experts import Dispatch, expert_down, expert_up, mean_compensation, plan_dispatch
from ...d2m_model.kernels.choice import has_kernels
from ...d2m_model.routers import RouterTensors, Routing, router_from_text
from .settings import GraphSettings, RoutingSettings, current_graph_settings


def may_compile(flux: nn.Module) -> bool:
    """Return whether torch.compile may have been applied to this FLUX or to its blocks.

    Packs do so by a module in place of the block's, by nn.Module.compile, or by another forward.
    """
    if torch.compiler.is_compiling():
        return True
    parts = (flux, *blocks_of(flux).values())
    return any(
        "_orig_mod" in part._modules or part._compiled_call_impl is not None or "forward" in vars(part)
        for part in parts
    )


def without_graphs(model: nn.Module) -> AbstractContextManager[None]:
    """Run the compiled parts of `model` without compilation. Raises RuntimeError if this torch cannot."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing torch._dynamo takes seconds
        return nullcontext()
    if hasattr(torch.compiler, "set_stance"):
        stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return stance
    if any(hasattr(part, "_orig_mod") for part in model.modules()):
        raise RuntimeError(
            f"Tracing runs a model without torch.compile, which torch {torch.__version__} cannot set aside. "
            "Bypass the node that compiles, or update torch to 2.6 or later."
        )
    return nullcontext()


class PlanSizes(NamedTuple):
    """Sizes of a Dispatch. They go from one operator to the other at the head of `Handed.host_N`."""

    rows: int  # A
    per_token: int  # K; _UNEVEN where tokens differ
    chunks: int  # C


_UNEVEN = -1


class Handed(NamedTuple):
    """Tensors that W1's side hands to W2's side.

    Of tensors of R rows the first A are in use, of ends_TE the first C. host_N (int64, on the host, N = T + 4) has
    PlanSizes and then the first rows of the chunks, C + 1 numbers. first_T is used by uneven routings only.
    """

    hidden_RF: Tensor
    gate_R: Tensor
    token_R: Tensor
    expert_R: Tensor
    slot_R: Tensor
    first_T: Tensor
    ends_TE: Tensor
    host_N: Tensor


def up_in_graph(
    x_TH: Tensor,
    router: str,
    tensors: RouterTensors,
    settings: GraphSettings,
    row: Tensor,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    scale: Tensor | None,
) -> Handed:
    """Route, and run W1's side of the chosen experts.

    `router` is the file's, as router_to_text gives it; `row` (on the host) is the FFN's row of weights_LE. `scale` is
    given if W1 is in float8.
    """
    outputs: list[Tensor] = torch.ops.d2m.routed_up(
        x_TH, router, list(tensors), list(tensors.values()), *settings, row, up_EFH, up_bias_EF, scale
    )
    return Handed(*outputs)


def down_in_graph(handed: Handed, down_HEF: Tensor, scale: Tensor | None, expert_mean_EH: Tensor | None) -> Tensor:
    """Run W2's side of the chosen experts, for every token: [T, H]. `scale` is given if W2 is in float8."""
    y_TH: Tensor = torch.ops.d2m.routed_down(*handed, down_HEF, scale, expert_mean_EH)
    return y_TH


# The operators


def _room(values: Tensor, rows: int) -> Tensor:
    """Return a tensor of so many rows that begins with `values`."""
    room = values.new_empty(rows, *values.shape[1:])
    room[: values.shape[0]] = values
    return room


def _as_taken(weight: Tensor, scale: Tensor | None, plan: Dispatch, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return a weight and its scale as the products of `plan` take them: in float8 as stored, or converted."""
    if scale is None or plan.fused:
        return weight, scale
    return weight.to(dtype) * scale.to(dtype), None


def _up(
    x_TH: Tensor,
    router: str,
    names: list[str],
    tensors: list[Tensor],
    settings: Tensor,
    values_L: Tensor,
    weights_LE: Tensor,
    row: Tensor,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    scale: Tensor | None,
) -> Handed:
    numbers, by_name = RoutingSettings.unpacked(settings), dict(zip(names, tensors, strict=True))
    if numbers.replaced and (current := current_graph_settings(x_TH.device)) is not None:
        numbers, values_L, weights_LE = RoutingSettings.unpacked(current.settings), *current[1:]
    value = float(values_L[int(row)])
    routing = router_from_text(router).route(x_TH, by_name, gate=numbers.gate, value=value)
    tokens, experts = routing.logits_TE.shape
    if numbers.masked:
        routing = routing.weighed(weights_LE[int(row), :experts])
    plan = plan_dispatch(routing, x_TH)
    rows, chunks = tokens * experts, plan.ends_CE.shape[0]
    per_token = _UNEVEN if routing.per_token is None else routing.per_token
    sizes = PlanSizes(rows=plan.chunk_rows[-1], per_token=per_token, chunks=chunks)
    up_EFH, scale = _as_taken(up_EFH, scale, plan, x_TH.dtype)
    return Handed(
        hidden_RF=_room(expert_up(x_TH, plan, up_EFH, up_bias_EF, scale), rows),
        gate_R=_room(plan.gate_A, rows),
        token_R=_room(plan.token_A, rows),
        expert_R=_room(plan.expert_A, rows),
        slot_R=_room(plan.slot_A, rows),
        first_T=plan.token_A.new_empty(tokens) if plan.first_T is None else plan.first_T,
        ends_TE=_room(plan.ends_CE, tokens),
        host_N=_room(torch.tensor([*sizes, *plan.chunk_rows]), tokens + 4),
    )


def _up_shapes(
    x_TH: Tensor,
    router: str,
    names: list[str],
    tensors: list[Tensor],
    settings: Tensor,
    values_L: Tensor,
    weights_LE: Tensor,
    row: Tensor,
    up_EFH: Tensor,
    up_bias_EF: Tensor,
    scale: Tensor | None,
) -> Handed:
    tokens, (experts, width, _) = x_TH.shape[0], up_EFH.shape
    rows = tokens * experts
    return Handed(
        hidden_RF=x_TH.new_empty(rows, width),
        gate_R=x_TH.new_empty(rows, dtype=torch.float32),
        token_R=x_TH.new_empty(rows, dtype=torch.int64),
        expert_R=x_TH.new_empty(rows, dtype=torch.int64),
        slot_R=x_TH.new_empty(rows, dtype=torch.int64),
        first_T=x_TH.new_empty(tokens, dtype=torch.int64),
        ends_TE=x_TH.new_empty(tokens, experts, dtype=torch.int32),
        host_N=x_TH.new_empty(tokens + 4, dtype=torch.int64, device="cpu"),
    )


def _down(
    hidden_RF: Tensor,
    gate_R: Tensor,
    token_R: Tensor,
    expert_R: Tensor,
    slot_R: Tensor,
    first_T: Tensor,
    ends_TE: Tensor,
    host_N: Tensor,
    down_HEF: Tensor,
    scale: Tensor | None,
    expert_mean_EH: Tensor | None,
) -> Tensor:
    sizes, (tokens, experts) = PlanSizes(*host_N[: len(PlanSizes._fields)].tolist()), ends_TE.shape
    rows, uneven = sizes.rows, sizes.per_token == _UNEVEN
    gate_A, token_A, expert_A, slot_A = gate_R[:rows], token_R[:rows], expert_R[:rows], slot_R[:rows]
    plan = Dispatch(
        tokens=tokens,
        token_A=token_A,
        expert_A=expert_A,
        gate_A=gate_A,
        slot_A=slot_A,
        first_T=first_T if uneven else None,
        ends_CE=ends_TE[: sizes.chunks],
        chunk_tokens=-(-tokens // sizes.chunks),
        chunk_rows=host_N[len(sizes) : len(sizes) + sizes.chunks + 1].tolist(),
        fused=has_kernels(hidden_RF),
    )
    y_TH = expert_down(hidden_RF[:rows], plan, *_as_taken(down_HEF, scale, plan, hidden_RF.dtype))
    if expert_mean_EH is None:
        return y_TH
    logits_TE = gate_A.new_empty(tokens, experts)  # only the shape is read
    routing = Routing(token_A=token_A, expert_A=expert_A, gate_A=gate_A, logits_TE=logits_TE)
    return y_TH + mean_compensation(routing, expert_mean_EH, y_TH.dtype)


def _down_shapes(
    hidden_RF: Tensor,
    gate_R: Tensor,
    token_R: Tensor,
    expert_R: Tensor,
    slot_R: Tensor,
    first_T: Tensor,
    ends_TE: Tensor,
    host_N: Tensor,
    down_HEF: Tensor,
    scale: Tensor | None,
    expert_mean_EH: Tensor | None,
) -> Tensor:
    return hidden_RF.new_empty(ends_TE.shape[0], down_HEF.shape[0])


_HANDED = ", ".join(f"Tensor {name}" for name in Handed._fields)
torch.library.custom_op(
    "d2m::routed_up",
    _up,
    mutates_args=(),
    schema=(
        "(Tensor x_TH, str router, str[] names, Tensor[] tensors, Tensor settings, Tensor values_L, Tensor weights_LE, "
        f"Tensor row, Tensor up_EFH, Tensor up_bias_EF, Tensor? scale) -> ({', '.join('Tensor' for _ in Handed._fields)})"
    ),
).register_fake(_up_shapes)
torch.library.custom_op(
    "d2m::routed_down",
    _down,
    mutates_args=(),
    schema=f"({_HANDED}, Tensor down_HEF, Tensor? scale, Tensor? expert_mean_EH) -> Tensor",
).register_fake(_down_shapes)
