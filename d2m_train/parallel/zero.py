"""A student trained by DeepSpeed's ZeRO: its engine, and what of its state is where.

Stage 2 shares out gradients and optimizer state, stage 3 the weights too. Weights are float32 and mixed precision is
autocast's, as with every other strategy: DeepSpeed's own bf16 would cast routers and U. For a checkpoint parameters are
put together one by one, so that it is like any other run's, and another number of processes can go on from it.
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

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
SHARED_MEMORY = "deepspeed_shm_comm"  # what a CPU's ranks could exchange by, if it were compiled first; gloo does
READ_AT_ONCE = 1 << 28  # elements of parameters, of which a checkpoint has three or four each


@dataclass(kw_only=True, slots=True, frozen=True)
class OptimizedSlice:
    """What this rank optimizes of a parameter: `count` elements of `flat`, which many parameters share."""

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
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY] = False
        self.stage: int = config["zero_optimization"]["stage"]
        self.adam = optimizer
        self.model = model
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=dict(config))[0]
        if self.stage == 3:
            # A parameter is there while its module runs. A router's own module gives its weight to another.
            for user in model.modules():
                if isinstance(user, MoEFFN | GroupRouter):
                    for router in (module for module in user.modules() if isinstance(module, RouterLinear)):
                        for parameter in router.parameters(recurse=False):
                            deepspeed.zero.register_external_parameter(user, parameter)

    # A step

    def backward(self, loss: Tensor, last: bool) -> None:
        """`last`: of the step's microbatches."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss)

    def gradient_norm(self) -> float:
        """After the last backward pass and ahead of the step, which clips."""
        total = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        for parameter in self.trained.values():
            if (gradient := self._gradient(parameter)) is not None:
                total += gradient.double().square().sum().to(total.device)
        torch.distributed.all_reduce(total)
        return float(total.sqrt())

    def _gradient(self, parameter: Any) -> Tensor | None:
        """Of this rank's own."""
        if (own := self._own_slice(parameter)) is None:
            return None
        gradient: Tensor
        if self.stage == 3:
            gradient = self.engine.optimizer.get_local_fp32_grad_for_param(parameter)
        else:
            gradient = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
        return gradient.flatten()[: own.count]  # without what fills it up, so that all ranks' are as long

    def step(self) -> None:
        self.engine.step()

    def zero_grad(self) -> None:
        """The step has done it."""

    def let_go(self) -> None:
        """Of weights that are still whole after a forward pass: stage 3 would take them for the parts that it has."""
        if self.stage == 3:
            self.engine.empty_partition_cache()

    def close(self) -> None:
        self.engine.destroy()

    # State

    def collect(self, averages: Mapping[str, Tensor]) -> dict[str, Any]:
        """Weights, optimizer state and averages in the form of torch.distributed.checkpoint.state_dict, on the CPU: whole
        tensors, each parameter's on one rank, so that all ranks together hold and write them once."""
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        whole: dict[str, dict[str, Tensor]] = {}
        for number, (name, parameter) in enumerate(self.trained.items()):
            own = self._own_slice(parameter)
            held = {} if own is None else self._held(own, averages.get(name))
            for kind in _kinds(averages):
                tensor = torch.zeros(_shape(parameter), device=self.engine.device)
                if own is not None:
                    own.of_parameter(tensor).copy_(held[kind])
                torch.distributed.all_reduce(tensor)
                if number % ranks == rank:
                    whole.setdefault(name, {})[kind] = tensor.cpu()
            if number % ranks == rank:
                whole[name]["step"] = self._step_count()
        state = _as_state(whole)
        options = {key: value for key, value in self.adam.param_groups[0].items() if key != "params"}
        state["optimizer"]["param_groups"] = [{**options, "params": list(self.trained)}]
        state["model"] |= self._buffers()
        return state

    def restore(self, averages: Mapping[str, Tensor], read: Callable[[dict[str, Any]], object]) -> None:
        """What a run has saved, by whatever strategy. `read` fills a state in place with what the checkpoint has of it."""
        for names in _batches(self.trained):
            whole = {
                name: {kind: torch.empty(_shape(self.trained[name])) for kind in _kinds(averages)}
                | {"step": torch.zeros(())}
                for name in names
            }
            read(_as_state(whole))
            for name in names:
                self._fill(self.trained[name], averages.get(name), whole[name])
        if buffers := self._buffers():
            read({"model": buffers})

    def _buffers(self) -> dict[str, Tensor]:
        """The buffers that files have too, alike on every rank: a capacity router's."""
        stored = self.model.state_dict()
        names = (name for name, _ in self.model.named_buffers())
        return {name: stored[name] for name in names if name in stored and not name.endswith(UNTRAINED_BUFFERS)}

    @torch.no_grad()
    def _fill(self, parameter: Any, average: Tensor | None, whole: Mapping[str, Tensor]) -> None:
        """What is optimized is a copy of what the model runs with: both."""
        own = self._own_slice(parameter)
        if own is not None:
            for kind, held in self._held(own, average).items():
                held.copy_(own.of_parameter(whole[kind]))
            self.adam.state[own.flat]["step"].copy_(whole["step"])
        if self.stage == 2:
            parameter.copy_(whole["weight"])
            if average is not None:
                average.copy_(whole["average"])
        elif own is not None:
            parameter.ds_tensor[: own.count].copy_(own.of_parameter(whole["weight"]))

    def _held(self, own: OptimizedSlice, average: Tensor | None) -> dict[str, Tensor]:
        """By kind, what this rank has of a parameter, to be read and written; of stage 2's averages to be read."""
        state = self.adam.state[own.flat]
        if not state:  # before its first step
            state["step"] = torch.zeros((), device=own.flat.device if self.adam.defaults["fused"] else "cpu")
            state |= {key: torch.zeros_like(own.flat) for key in MOMENTS}
        held = {"weight": own.of_flat(own.flat)} | {key: own.of_flat(state[key]) for key in MOMENTS}
        if average is not None:
            held["average"] = average[: own.count] if self.stage == 3 else own.of_parameter(average)
        return held

    def _step_count(self) -> Tensor:
        """Of all parameters alike."""
        steps: Tensor = next(iter(self.adam.state.values()))["step"]
        return steps.detach().cpu().clone()

    def _own_slice(self, parameter: Any) -> OptimizedSlice | None:
        """None: nothing of this parameter is this rank's."""
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
    """Of the whole; stage 3 leaves a parameter empty where it is not in use."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _kinds(averages: Mapping[str, Tensor]) -> tuple[str, ...]:
    return ("weight", *MOMENTS, *(["average"] if averages else []))


def _as_state(whole: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """A checkpoint's state of tensors by parameter and kind."""
    state: dict[str, Any] = {
        "model": {name: kinds["weight"] for name, kinds in whole.items()},
        "optimizer": {"state": {name: {k: kinds[k] for k in ("step", *MOMENTS)} for name, kinds in whole.items()}},
    }
    if averages := {name: kinds["average"] for name, kinds in whole.items() if "average" in kinds}:
        state["average"] = averages
    return state


def _batches(parameters: Mapping[str, nn.Parameter]) -> Iterator[list[str]]:
    """Names, of about READ_AT_ONCE elements at a time."""
    names: list[str] = []
    elements = 0
    for name, parameter in parameters.items():
        names.append(name)
        elements += _shape(parameter).numel()
        if elements >= READ_AT_ONCE:
            yield names
            names, elements = [], 0
    if names:
        yield names
