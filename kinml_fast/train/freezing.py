"""Layers that training leaves as they are."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from kinml_fast.errors import ConfigError
from kinml_fast.nn import EnergyModel


class FrozenLayers:
    """Keeps the weights of some layers, to the last bit, whatever an optimizer does.

    They are put back after each step: with weight decay, momentum or a kept state of the optimizer, a gradient of zero
    would not be enough.

    Parameters
    ----------
    model
        The layers of its networks are called `C.0`, `C.1` … (element and number, from 0); of several levels of theory
        `0:C.0`, `1:C.0` …, with the fidelity in front.
    patterns
        Names, or patterns as of file names: `C.*`, `*.0`. Without a fidelity (`0:`, `*:`) they are for all levels.

    Attributes
    ----------
    names : tuple of str
        The layers that are frozen.
    count : int
        Numbers in them.

    Raises
    ------
    InputError
        A pattern that no layer has, or that all are frozen.
    """

    def __init__(self, model: EnergyModel, patterns: Sequence[str]) -> None:
        self._weights = model.networks.weights
        several = len(model.fidelities) > 1
        layers = {
            f"{fidelity}:{element}.{layer}": _range(model, species, layer, level)
            for level, fidelity in enumerate(model.fidelities)
            for species, element in enumerate(model.elements)
            for layer in range(len(model.networks.activations))
        }
        shown = {name: name if several else name.partition(":")[2] for name in layers}
        whole = {pattern: pattern if ":" in pattern else f"*:{pattern}" for pattern in patterns}
        for pattern in patterns:
            if not any(fnmatchcase(name, whole[pattern]) for name in layers):
                raise ConfigError(
                    f"start.freeze: no layer is called {pattern}: the layers are {', '.join(shown.values())}"
                )
        chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in whole.values())]
        self.names = tuple(shown[name] for name in chosen)
        if len(self.names) == len(layers):
            raise ConfigError("start.freeze: all layers are frozen, so that nothing can be trained: leave one out")
        self._ranges: list[tuple[int, int]] = []
        for first, end in sorted(layers[name] for name in chosen):
            if self._ranges and self._ranges[-1][1] == first:
                first = self._ranges.pop()[0]
            self._ranges.append((first, end))
        self.count = sum(end - first for first, end in self._ranges)
        self._views = self.parts(self._weights.detach())
        self._kept: list[Tensor] = []
        self.hold()

    def parts(self, flat: Tensor) -> list[Tensor]:
        """What belongs to the layers in a tensor that is like the weights: views."""
        return [flat[first:end] for first, end in self._ranges]

    def hold(self) -> None:
        """Keep the weights that the model has now."""
        self._kept = [view.clone() for view in self._views]

    def clear_gradient(self) -> None:
        """Set the gradient of the layers to zero, so that it counts neither for a longest gradient nor for momentum."""
        if self._views and self._weights.grad is not None:
            torch._foreach_zero_(self.parts(self._weights.grad))

    def restore(self) -> None:
        """Put the weights of the layers back."""
        if self._views:
            torch._foreach_copy_(self._views, self._kept)


def _range(model: EnergyModel, species: int, layer: int, level: int) -> tuple[int, int]:
    """Where the weights of a layer begin and end in the flat parameter."""
    weight, bias = model.networks.layer(species, layer, level)
    first = int(weight.storage_offset() - model.networks.weights.storage_offset())
    return first, first + weight.numel() + (0 if bias is None else bias.numel())
