"""Optimizers with little Python in a step, and the moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.train.config import OptimizerConfig


class FusedAdam(torch.optim.Adam):
    """torch.optim.Adam and AdamW with the step in one op.

    Same update and same state_dict as torch's, but for the count of steps, which is float64: a float32 stays at 2^24.
    The general step of torch (grouping by device and type, lists, profiler hook) costs more than the arithmetic when
    all parameters are one small flat tensor.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is refused
        """Update the parameters from their gradients."""
        if closure is not None:
            raise ValueError("FusedAdam takes no closure: compute the gradients before step()")
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64, device=parameter.device)
                    for name in ("exp_avg", "exp_avg_sq") + (("max_exp_avg_sq",) if group["amsgrad"] else ()):
                        state[name] = torch.zeros_like(parameter)
                ops.adam_step(
                    parameter,
                    parameter.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["max_exp_avg_sq"] if group["amsgrad"] else None,
                    group["lr"],
                    beta1,
                    beta2,
                    group["eps"],
                    group["weight_decay"],
                    group["decoupled_weight_decay"],
                    state["step"],
                )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, also torch's or of before, whose counts of steps are float32."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:  # torch has made a float32 of it
                steps = torch.as_tensor(state_dict["state"][number]["step"], dtype=torch.float64)
                self.state[parameter]["step"] = steps.to(parameter.device, copy=True)

    # torch wraps `step` in a profiler hook (10 µs a call) unless it finds this mark.
    step.hooked = True  # type: ignore[attr-defined]


def make_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that the configuration names."""
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, momentum=config.momentum, dampening=config.dampening, nesterov=config.nesterov, **common
        )
    return FusedAdam(
        parameters,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        amsgrad=config.amsgrad,
        decoupled_weight_decay=config.name == "adamw",
        **common,
    )


class WeightAverage:
    """Exponential moving average of parameters.

    Step n moves the average by 1 − d of the way to the parameters, d = min(decay, (1 + n)/(10 + n)): the first steps
    count more, so that the initial weights are forgotten.
    """

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.averages = [parameter.clone() for parameter in self.parameters]
        self.decay = decay
        self.steps = 0

    def update(self) -> None:
        """Move towards the present parameters."""
        self.steps += 1
        weight = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self.parameters, weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the parameters be the averages while the block runs."""
        kept = [parameter.clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self.parameters, kept)

    def state_dict(self) -> dict:
        """Averages and number of steps."""
        return {"averages": self.averages, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave."""
        torch._foreach_copy_(self.averages, state["averages"])
        self.steps = state["steps"]
