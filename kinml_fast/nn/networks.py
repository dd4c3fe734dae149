"""One multilayer perceptron per element, all in one flat parameter tensor and one fused op."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.errors import ConfigError

ACTIVATIONS = ("identity", "gaussian", "tanh", "relu", "silu", "celu", "gelu")
"""Activation functions; the place in the list is the code that the ops take.

gaussian is exp(-x²), celu has alpha 0.1 (the ANI models'), gelu is the exact one (erf).
"""


def _of_each(layers: Sequence[int] | Sequence[Sequence[int]], n_elements: int) -> list[list[int]]:
    """The layers of each element, of one list for all or one for each."""
    widths = [width for width in layers if isinstance(width, int)]
    return [list(x) for x in layers if not isinstance(x, int)] or [list(widths) for _ in range(n_elements)]


class SpeciesNetworks(torch.nn.Module):
    """Networks features -> energy, one for each element.

    Parameters
    ----------
    elements
        Names of the species, for printing.
    n_inputs
        D, the length of an atom's feature vector.
    layers
        Outputs of each layer; the last must be 1. Either one list for all elements or one list per element (all of
        the same length).
    activations
        Name of each layer's activation, see :data:`ACTIVATIONS`.
    biases
        Whether the layers have biases.
    dtype
        float64 or float32.
    levels
        Levels of theory, K, each with networks of its own, in a chain: those of level 0 take the features a, those of
        level k > 0 also the atomic energy of the level below, as their last input. Atomic energies are
        ε₀ = f₀(a), ε_k = ε_(k−1) + f_k(a, ε_(k−1)).

    Notes
    -----
    All weights are one parameter, ``weights``: level after level, element after element, layer after layer,
    W [out, in], then b [out]. They start as ``torch.nn.Linear`` starts, drawn from torch's global generator in that
    order.
    """

    def __init__(
        self,
        elements: Sequence[str],
        n_inputs: int,
        layers: Sequence[int] | Sequence[Sequence[int]],
        activations: Sequence[str],
        biases: bool = True,
        dtype: torch.dtype = torch.float64,
        levels: int = 1,
    ) -> None:
        super().__init__()
        self.levels = levels
        self.layers = _of_each(layers, len(elements))
        self.elements = tuple(elements)
        self.activations = tuple(activations)
        self._check(n_inputs, dtype)
        self.biases = bool(biases)
        first_sizes = [n_inputs + (1 if level > 0 else 0) for level in range(levels)]
        self.n_species = len(self.elements)
        # What the ops take: each level alone, and the whole chain.
        codes = [ACTIVATIONS.index(name) for name in self.activations]
        sizes = [[size for widths in self.layers for size in (first, *widths)] for first in first_sizes]
        self.packed_levels = [ops.pack_networks(self.n_species, own, codes, self.biases) for own in sizes]
        self.packed = ops.pack_networks(self.n_species, [n for own in sizes for n in own], codes, self.biases, levels)
        # Where each layer's W and b lie: [level][species][layer] -> (start, outputs, inputs).
        self._places: list[list[list[tuple[int, int, int]]]] = []
        self.level_starts = [0]
        start = 0
        for first in first_sizes:
            places_of = []
            for widths in self.layers:
                places = []
                for inputs, outputs in zip([first, *widths[:-1]], widths, strict=True):
                    places.append((start, outputs, inputs))
                    start += outputs * (inputs + (1 if self.biases else 0))
                places_of.append(places)
            self._places.append(places_of)
            self.level_starts.append(start)
        self.weights = torch.nn.Parameter(torch.empty(start, dtype=dtype))
        self.reset_parameters()

    def _check(self, n_inputs: int, dtype: torch.dtype) -> None:
        if dtype not in (torch.float64, torch.float32):
            raise ConfigError(f"Networks are float64 or float32, not {dtype}.")
        if self.levels < 1:
            raise ConfigError(f"Networks are for at least one level of theory, not {self.levels}.")
        if n_inputs < 1:
            raise ConfigError(f"Networks need at least one input, not {n_inputs}.")
        if len(self.layers) != len(self.elements):
            raise ConfigError(f"There are {len(self.elements)} elements but layers for {len(self.layers)} of them.")
        for widths in self.layers:
            if len(widths) != len(self.activations):
                raise ConfigError(
                    f"Layers {widths} need {len(widths)} activations, one for each layer, got {list(self.activations)}."
                )
            if not widths or min(widths) < 1:
                raise ConfigError(f"Every layer needs at least one output, got layers {widths}.")
            if widths[-1] != 1:
                raise ConfigError(f"The last layer gives the energy and must have 1 output, got layers {widths}.")
        for name in self.activations:
            if name not in ACTIVATIONS:
                raise ConfigError(f"Unknown activation '{name}': choose among {', '.join(ACTIVATIONS)}.")

    @torch.jit.unused
    def reset_parameters(self) -> None:
        """Draw new weights, as ``torch.nn.Linear`` does."""
        for level in range(self.levels):
            for species in range(self.n_species):
                for place in range(len(self.activations)):
                    weight, bias = self.layer(species, place, level)
                    torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                    if bias is not None:
                        bound = 1 / math.sqrt(weight.shape[1])
                        torch.nn.init.uniform_(bias, -bound, bound)

    @torch.jit.unused
    def layer(self, species: int, layer: int, level: int = 0) -> tuple[Tensor, Tensor | None]:
        """Views of W [out, in] and b [out] (None without biases) of one layer of one element's network."""
        start, outputs, inputs = self._places[level][species][layer]
        flat = self.weights.detach()
        end = start + outputs * inputs
        weight = flat[start:end].view(outputs, inputs)
        return weight, flat[end : end + outputs] if self.biases else None

    @torch.jit.export
    def energies(self, features: Tensor, rows: Tensor, owners: Tensor, starts: Tensor, n_structures: int) -> Tensor:
        """Energies [n_structures] in eV (float64), without single-atom energies, of atoms sorted by species."""
        order = [rows, owners, starts]
        return torch.ops.kinml_fast.networks(features, order, self.weights, None, self.packed, n_structures)

    def forward(self, features: Tensor, species: Tensor, offsets: Tensor, sae: Tensor) -> Tensor:
        """Energies [K, n_structures] in eV (float64) of all levels, with single-atom energies ``sae`` [K, n_species].

        Differentiable twice, like the op `networks`. With one level, ``sae`` [n_species] and [n_structures].
        """
        return self.with_weights(features, species, offsets, sae, self.weights)

    @torch.jit.export
    def with_weights(self, features: Tensor, species: Tensor, offsets: Tensor, sae: Tensor, weights: Tensor) -> Tensor:
        """What :meth:`forward` gives with other ``weights``, as long as the module's own."""
        rows, owners, starts = torch.ops.kinml_fast.species_order(species, offsets, self.n_species)
        n_structures = offsets.size(0) - 1
        if self.levels == 1:
            order = [rows, owners, starts]
            return torch.ops.kinml_fast.networks(features, order, weights, sae, self.packed, n_structures)
        # A structure for each atom: its energy is that of the atom. `of_atoms` is in the order of the atoms.
        of_atoms = torch.zeros(species.size(0), dtype=torch.float64, device=features.device)
        structures = torch.repeat_interleave(torch.arange(n_structures, device=offsets.device), offsets.diff())
        energies: list[Tensor] = []
        inputs = features
        for level in range(self.levels):
            if level > 0:
                inputs = torch.cat([features, of_atoms.to(features.dtype)[:, None]], dim=1)
            of_atoms = of_atoms + torch.ops.kinml_fast.networks(
                inputs,
                [rows, rows, starts],
                weights[self.level_starts[level] : self.level_starts[level + 1]],
                None,
                self.packed_levels[level],
                species.size(0),
            )
            sums = torch.zeros(n_structures, dtype=torch.float64, device=features.device)
            energies.append(sums.index_add(0, structures, of_atoms + sae[level][species]))
        return torch.stack(energies)

    def extra_repr(self) -> str:
        lines = []
        for level, places_of in enumerate(self._places):
            if self.levels > 1:
                lines.append(f"(level {level})")
            for element, places in zip(self.elements, places_of, strict=True):
                lines.append(f"({element}): Network(")
                for k, (activation, (_, outputs, inputs)) in enumerate(zip(self.activations, places, strict=True)):
                    lines.append(f"  ({k}): Linear({inputs} -> {outputs}, bias={self.biases}), {activation}")
                lines.append(")")
        lines.append(f"parameters: {self.weights.numel()}, {str(self.weights.dtype).removeprefix('torch.')}")
        return "\n".join(lines)
