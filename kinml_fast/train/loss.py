"""The terms of the loss and their factors: given, or learned while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kinml_fast.errors import ConfigError
from kinml_fast.nn import EnergyModel
from kinml_fast.train.config import LossConfig

ENERGY, FORCES, STRESS, HESSIAN = "energy", "forces", "stress", "hessian"


@dataclass(frozen=True)
class LossBatch:
    """What a further term of the loss is computed from: the structures of a training batch.

    `structures` [n] int64 are indices into the structures that the trainer was given. `coordinates` [n_atoms, 3] in Å
    (of the model's dtype), `species` [n_atoms] and `offsets` [n + 1] are a ragged batch, as the model takes it. There
    are no coordinates where only stored descriptors are known. `cells` [n, 3, 3] and `periodic` [n, 3] are None where
    all structures of the data are molecules; `ops.surroundings` makes of them what the model takes.
    """

    structures: Tensor
    coordinates: Tensor | None
    species: Tensor
    offsets: Tensor
    cells: Tensor | None = None
    periodic: Tensor | None = None


ExtraLoss = Callable[[EnergyModel, LossBatch], Tensor]
"""A further term of the loss: a scalar that autograd can differentiate with respect to the model's parameters."""


class TaskWeights:
    """The factors of the terms of the loss in each step.

    The energy, force and stress terms are the sums of those of the levels of theory, where there are several.

    Static: 1 − fw and fw for energies and forces, given numbers for stresses and further ones. Learned: e^(−σ) for each
    term, where total = Σ e^(−σ_t) L_t + σ_t (Kendall, Gal, Cipolla, CVPR 2018, DOI 10.1109/CVPR.2018.00781) and the
    optimizer moves the σ_t, with dtotal/dσ_t = 1 − e^(−σ_t) L_t. A term that stands alone has the factor 1, and no σ
    moves.

    Parameters
    ----------
    config
        Weighting and static factors.
    extra
        Names of the terms besides energy, forces and stress.
    device
        Of the model.

    Attributes
    ----------
    names : tuple of str
        The T terms: energy, forces, stress if it is in the loss, further ones.
    fused : int
        How many of them the fused step computes.
    scales, losses : Tensor
        float64 [T]: the factors of the present step, and the values of the terms, which the step writes.
    log_sigma : torch.nn.Parameter or None
        float64 [T], σ; None if the factors are static.
    learning : bool
        Whether the σ move now.
    """

    def __init__(self, config: LossConfig, extra: Sequence[str], device: torch.device) -> None:
        fused = (ENERGY, FORCES, STRESS) if config.stresses else (ENERGY, FORCES)
        self.names, self.fused = (*fused, *extra), len(fused)
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"the terms of the loss are called {', '.join(self.names)}: give each its own name")
        if unknown := sorted(set(config.extra_weights) - set(extra)):
            raise ConfigError(
                f"training.loss.extra_weights names {', '.join(unknown)}, but the loss has no such term: give it to "
                "the Trainer as one of its extra_losses, or leave it out"
            )
        self._config = config
        self.scales = torch.ones(len(self.names), dtype=torch.float64, device=device)
        self.losses = torch.zeros_like(self.scales)
        self._gradient = torch.zeros_like(self.losses)
        self.log_sigma = None
        if config.weighting == "learned":
            self.log_sigma = torch.nn.Parameter(torch.zeros_like(self.losses))
        self.learning = False

    def begin(self, with_forces: bool) -> None:
        """Set the factors for an epoch whose loss has a force term, and one of stresses, or not."""
        self._active = torch.ones_like(self.losses)
        self._active[1 : self.fused] = float(with_forces)
        self.losses.zero_()
        several = len(self.names) > self.fused or with_forces
        self.learning = self.log_sigma is not None and several
        if self.log_sigma is not None:
            self.log_sigma.grad = self._gradient if self.learning else None
            self._sigma = self.log_sigma.detach()
        if self.learning:
            self.refresh()
        elif self.log_sigma is not None:
            self.scales.fill_(1)
        else:
            share = self._config.force_weight if with_forces else 0.0
            stress = [self._config.stress_weight if with_forces else 0.0] * (self.fused - 2)
            given = {HESSIAN: self._config.hessian_weight, **self._config.extra_weights}
            extra = [given.get(name, 1.0) for name in self.names[self.fused :]]
            self.scales.copy_(torch.tensor([1 - share, share, *stress, *extra], dtype=torch.float64))

    def terms(self, counts: Tensor) -> list[Tensor]:
        """Which terms each batch has, 1 or 0 [T], when the factors are learned.

        Parameters
        ----------
        counts
            [n_batches, 2 or 3, K], of `ops.count_weights`: a term without any weight is no term.
        """
        rows = torch.ones(len(counts), len(self.names), dtype=torch.float64, device=counts.device)
        rows[:, : counts.shape[1]] = counts.any(dim=-1)
        return list((rows * self._active).unbind(0))

    def differentiate(self, terms: Tensor) -> None:
        """Set the gradient of the σ from the losses of a step, and from its `terms`."""
        torch.addcmul(terms, self.scales, self.losses, value=-1, out=self._gradient)

    def refresh(self) -> None:
        """Take the factors from the σ that the optimizer has moved."""
        torch.neg(self._sigma, out=self.scales).exp_()

    def row(self) -> dict[str, float]:
        """What metrics.csv says: a column log_sigma_NAME for each term, if they are learned."""
        if self.log_sigma is None:
            return {}
        return dict(zip(self.columns(), self.log_sigma.tolist(), strict=True))

    def columns(self) -> list[str]:
        """Names of those columns."""
        return [] if self.log_sigma is None else [f"log_sigma_{name}" for name in self.names]

    def state_dict(self) -> dict:
        """Names of the terms, and the σ."""
        return {"names": list(self.names), "log_sigma": None if self.log_sigma is None else self.log_sigma.detach()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        ValueError
            It is of a loss with other terms.
        """
        if tuple(state["names"]) != self.names:
            raise ValueError(f"the loss had the terms {', '.join(state['names'])}, here {', '.join(self.names)}")
        if self.log_sigma is not None:
            with torch.no_grad():
                self.log_sigma.copy_(state["log_sigma"])


class ExtraLosses:
    """Adds the gradients of further terms, by autograd, to those that a fused step has written.

    Parameters
    ----------
    terms
        By name, in the order of `TaskWeights.names` behind those of the fused step.
    model
        Its parameters get the gradients.
    weights
        Gives the factors and takes the values.
    """

    def __init__(self, terms: Mapping[str, ExtraLoss], model: EnergyModel, weights: TaskWeights) -> None:
        self._terms, self._model, self._weights = dict(terms), model, weights
        # The fused steps write the gradient of the networks' weights anew; a larger model may have more parameters.
        self._others = [p for p in model.parameters() if p is not model.networks.weights]

    def add(self, batch: LossBatch) -> None:
        """Evaluate the terms for a batch.

        Raises
        ------
        InputError
            A term is no scalar tensor that depends on the model's parameters.
        """
        for parameter in self._others:
            parameter.grad = None
        for place, (name, term) in enumerate(self._terms.items(), start=self._weights.fused):
            with torch.enable_grad():
                loss = term(self._model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ConfigError(
                    f"the term {name} of the loss must return one number as a tensor that depends on the model's "
                    f"parameters, not {type(loss).__name__}{list(loss.shape) if isinstance(loss, Tensor) else ''}"
                )
            self._weights.losses[place] = loss.detach()
            loss.backward(self._weights.scales[place].to(loss.dtype).reshape(loss.shape))

    def results(self) -> list[Tensor]:
        """What `add` has written: the terms of the loss, and the gradients of all parameters."""
        gradients = (parameter.grad for parameter in self._model.parameters())
        return [self._weights.losses, *(gradient for gradient in gradients if gradient is not None)]
