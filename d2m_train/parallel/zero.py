"""A student trained by DeepSpeed's ZeRO: its engine, and its state for checkpoints.

Stage 2 shards gradients and optimizer state, stage 3 the weights too. Weights are float32 and mixed precision is
autocast's, as with every other strategy: DeepSpeed's own bf16 would cast routers and U. Parameters are gathered one by one
for a checkpoint, so that it is like any other run's and another number of processes can resume from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2m_model.hosts.diffusers.modules import GroupRouter
from d2m_model.moe import MoEFFN, RouterLinear

from .student_state import UNTRAINED_BUFFERS

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
_SHARED_MEMORY = "deepspeed_shm_comm"  # an exchange for a CPU's ranks that would have to be compiled; gloo does it
_READ_AT_ONCE = 1 << 28  # elements of parameters; a checkpoint has three or four values for each


@dataclass(kw_only=True, slots=True, frozen=True)
class OptimizedSlice:
    """The part of a parameter that this rank optimizes: `count` elements of `flat`, which many parameters share."""

    flat: Tensor
    start: int  # in `flat`
    first: int  # in the parameter
    count: int

    def of_flat(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.start, self.count)

    def of_parameter(self, parameter: Tensor) -> Tensor:
        return parameter.flatten().narrow(0, self.first, self.count)


class Zero:
    """One stage's student in a DeepSpeed engine, and its optimizer. All methods are called on every rank alike."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> None:
        """`config`: deepspeed.configuration's."""
        import deepspeed

        deepspeed.utils.logger.setLevel("WARNING")
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY] = False
        self.stage: int = config["zero_optimization"]["stage"]
        self.adam = optimizer
        self.model = model
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))[0]
        if self.stage == 3:
            # A parameter is gathered while its module runs, but a router's module hands its weight to another module.
            for user in model.modules():
                if isinstance(user, MoEFFN | GroupRouter):
                    for router in (module for module in user.modules() if isinstance(module, RouterLinear)):
                        for parameter in router.parameters(recurse=False):
                            deepspeed.zero.register_external_parameter(user, parameter)

    # A step

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass. `last`: this is the last microbatch of its step."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def gradient_norm(self) -> Tensor:
        """Return the norm of the gradients, after the last backward pass and before the step, which clips them."""
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for parameter in self.trained.values():
            if (gradient := self._gradient(parameter)) is not None:
                total += gradient.double().square().sum().to(total.device)
        torch.distributed.all_reduce(total)
        return total.sqrt()

    def _gradient(self, parameter: Any) -> Tensor | None:
        """Return the gradient of this rank's slice of a parameter; None if it has none."""
        if (own := self._own_slice(parameter)) is None:
            return None
        gradient: Tensor
        if self.stage == 3:
            gradient = self.engine.optimizer.get_local_fp32_grad_for_param(parameter)
        else:
            gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return gradient.flatten()[: own.count]  # without the padding that makes all ranks' parts equally long

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """Do nothing: the engine's step clears gradients."""

    def release_gathered(self) -> None:
        """Free weights that a forward pass has gathered: stage 3 would go on using them in place of its shards."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def close(self) -> None:
        self.engine.destroy()

    # State

    def collect(self, averages: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the state as StudentState says, on the CPU: full tensors, those of each parameter on one rank, so that
        all ranks together hold and write each once."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        full: dict[str, dict[str, Tensor]] = {}
        for number, (name, parameter) in enumerate(self.trained.items()):
            own = self._own_slice(parameter)
            views = {} if own is None else self._views(own, averages.get(name))
            for kind in _kinds(averages):
                tensor = torch.zeros(_shape(parameter), device=self.engine.device)
                if own is not None:
                    own.of_parameter(tensor).copy_(views[kind])
                torch.distributed.all_reduce(tensor)
                if number % ranks == rank:
                    full.setdefault(name, {})[kind] = tensor.cpu()
            if number % ranks == rank:
                full[name]["step"] = self._step_count()
        state = _as_state(full)
        options = {key: value for key, value in self.adam.param_groups[0].items() if key != "params"}
        state["optimizer"]["param_groups"] = [{**options, "params": list(self.trained)}]
        state["model"] |= self._buffers()
        return state

    def restore(self, averages: Mapping[str, Tensor], read: Callable[[dict[str, Any]], object]) -> None:
        """Take over a state that any strategy has saved. `read` fills a state in place from the checkpoint."""
        for names in _batches(self.trained):
            full = {
                name: {kind: torch.empty(_shape(self.trained[name])) for kind in _kinds(averages)}
                | {"step": torch.zeros(())}
                for name in names
            }
            read(_as_state(full))
            for name in names:
                self._fill(self.trained[name], averages.get(name), full[name])
        if buffers := self._buffers():
            read({"model": buffers})

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that files have too, alike on every rank: a capacity router's."""
        stored = self.model.state_dict()
        names = (name for name, _ in self.model.named_buffers())
        return {name: stored[name] for name in names if name in stored and not name.endswith(UNTRAINED_BUFFERS)}

    @torch.no_grad()
    def _fill(self, parameter: Any, average: Tensor | None, full: Mapping[str, Tensor]) -> None:
        """Fill a parameter twice: the optimizer works on a copy of the weights that the model runs with."""
        own = self._own_slice(parameter)
        if own is not None:
            for kind, view in self._views(own, average).items():
                view.copy_(own.of_parameter(full[kind]))
            self.adam.state[own.flat]["step"].copy_(full["step"])
        if self.stage == 2:
            parameter.copy_(full["weight"])
            if average is not None:
                average.copy_(full["average"])
        elif own is not None:
            parameter.ds_tensor[: own.count].copy_(own.of_parameter(full["weight"]))

    def _views(self, own: OptimizedSlice, average: Tensor | None) -> dict[str, Tensor]:
        """Views, by kind, of this rank's slice of a parameter, to read and write; stage 2's average is only to be read."""
        state = self.adam.state[own.flat]
        if not state:  # before its first step
            state["step"] = torch.zeros((), device=own.flat.device if self.adam.defaults["fused"] else "cpu")
            state |= {key: torch.zeros_like(own.flat) for key in _MOMENTS}
        views = {"weight": own.of_flat(own.flat)} | {key: own.of_flat(state[key]) for key in _MOMENTS}
        if average is not None:
            views["average"] = average[: own.count] if self.stage == 3 else own.of_parameter(average)
        return views

    def _step_count(self) -> Tensor:
        """The step count of AdamW, the same for all parameters."""
        steps: Tensor = next(iter(self.adam.state.values()))["step"]
        return steps.detach().cpu().clone()

    def _own_slice(self, parameter: Any) -> OptimizedSlice | None:
        """Return the slice of a parameter that this rank optimizes; None if it has no part of it."""
        optimizer = self.engine.optimizer
        if self.stage == 3:
            group, start, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = min(torch.distributed.get_rank() * part, parameter.ds_numel)
            count = min(part, parameter.ds_numel - first)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return OptimizedSlice(flat=flat, start=start, first=first, count=count) if count else None
        if (mapping := parameter._hp_mapping) is None:
            return None
        return OptimizedSlice(
            flat=optimizer.single_partition_of_fp32_groups[mapping.param_group_index],
            start=mapping.hp_fragment_address.start,
            first=mapping.lp_fragment_address.start,
            count=mapping.lp_fragment_address.numel,
        )


def _shape(parameter: Any) -> torch.Size:
    """The shape of the full parameter; stage 3 leaves a parameter empty while it is not in use."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _kinds(averages: Mapping[str, Tensor]) -> tuple[str, ...]:
    return ("weight", *_MOMENTS, *(["average"] if averages else []))


def _as_state(full: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Arrange tensors by parameter and kind as a checkpoint's state."""
    state: dict[str, Any] = {
        "model": {name: kinds["weight"] for name, kinds in full.items()},
        "optimizer": {"state": {name: {k: kinds[k] for k in ("step", *_MOMENTS)} for name, kinds in full.items()}},
    }
    if averages := {name: kinds["average"] for name, kinds in full.items() if "average" in kinds}:
        state["average"] = averages
    return state


def _batches(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Yield parameter names in batches of about _READ_AT_ONCE elements."""
    names: list[str] = []
    elements = 0
    for name, parameter in parameters.items():
        names.append(name)
        elements += _shape(parameter).numel()
        if elements >= _READ_AT_ONCE:
            yield names
            names, elements = [], 0
    if names:
        yield names
