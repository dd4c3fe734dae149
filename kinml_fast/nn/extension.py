"""A trained model that learns to know further elements, or further levels of theory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kinml_fast.nn.aev import AEVParameters
from kinml_fast.nn.potential import EnergyModel


def extended(
    model: EnergyModel,
    elements: Sequence[str],
    dtype: torch.dtype | None = None,
    fidelities: Sequence[int] | None = None,
) -> EnergyModel:
    """A copy of a model that also knows the given elements, behind its own, and levels of theory, above its own.

    Parameters
    ----------
    model
        Any, also one without training.
    elements
        Those of them that the model lacks are added in this order.
    dtype
        float64 or float32; None: the model's.
    fidelities
        What all levels are called, lowest first, at least as many as the model has; None: its own.

    Returns
    -------
    EnergyModel
        Where no new element occurs, its predictions at the levels of `model` are those of `model`. New networks are
        drawn from torch's global generator; those of new elements have the layers of the first element's. New
        single-atom energies are 0. The old networks read the parts of the descriptor that tell of new elements with
        weights of 0.
    """
    new = [element for element in elements if element not in model.elements]
    architecture = model.to_dict()
    architecture["descriptor"] = replace(model.descriptor, elements=(*model.elements, *new)).to_dict()
    if model.repulsion is not None:
        architecture["repulsion"] = model.repulsion.with_elements((*model.elements, *new)).to_dict()
    layers = model.networks.layers
    architecture["layers"] = [*layers, *[layers[0]] * len(new)]
    if dtype is not None:
        architecture["dtype"] = str(dtype).removeprefix("torch.")
    if fidelities is not None:
        architecture["fidelities"] = list(fidelities)
    result = EnergyModel.from_dict(architecture)
    levels = len(model.fidelities)
    with torch.no_grad():
        for level in range(levels):
            for species in range(len(model.elements)):
                result.networks.layer(species, 0, level)[0].zero_()
        flat = result.networks.weights
        flat[parameter_places(model, result)] = model.networks.weights.detach().to(flat)
        old_sae = model.sae.view(levels, -1)
        result.sae.view(len(result.fidelities), -1)[:levels, : len(model.elements)] = old_sae
    return result.to(model.sae.device)


def parameter_places(old: EnergyModel, new: EnergyModel) -> Tensor:
    """Where the parameters of a model are in that of an extended one, int64 [P_old] for flat tensors of P numbers."""
    features = _feature_places(old.descriptor, new.descriptor)
    above = torch.cat([features, torch.tensor([new.descriptor.length])])  # and the energy of the level below
    places = torch.empty(old.networks.weights.numel(), dtype=torch.int64)
    for level in range(len(old.fidelities)):
        for species, element in enumerate(old.elements):
            for layer in range(len(old.networks.activations)):
                before = old.networks.layer(species, layer, level)
                after = new.networks.layer(new.elements.index(element), layer, level)
                for part, extended_part in zip(before, after, strict=True):
                    if part is None or extended_part is None:
                        continue
                    start = part.storage_offset()
                    target = torch.arange(extended_part.numel()).view(extended_part.shape)
                    target = target + int(extended_part.storage_offset())
                    if layer == 0 and part.dim() == 2:
                        target = target[:, above if level > 0 else features]
                    places[start : start + part.numel()] = target.reshape(-1)
    return places.to(new.networks.weights.device)


def _feature_places(old: AEVParameters, new: AEVParameters) -> Tensor:
    """Where the features of a descriptor are in that of more elements, int64 [D_old]."""
    n_radial, n_angular = len(old.radial_shifts), len(old.angular_shifts) * len(old.sections)
    places = [new.elements.index(element) for element in old.elements]
    pairs = {pair: place for place, pair in enumerate(_pairs(len(new.elements)))}
    radial = [place * n_radial + i for place in places for i in range(n_radial)]
    first = len(new.elements) * n_radial
    angular = [
        first + pairs[min(places[a], places[b]), max(places[a], places[b])] * n_angular + i
        for a, b in _pairs(len(old.elements))
        for i in range(n_angular)
    ]
    return torch.tensor(radial + angular)


def _pairs(n: int) -> list[tuple[int, int]]:
    """The pairs of species in the order of the descriptor's angular blocks."""
    return [(a, b) for a in range(n) for b in range(a, n)]
