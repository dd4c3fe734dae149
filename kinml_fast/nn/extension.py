"""A trained model that learns to know further elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kinml_fast.nn.aev import AEVParameters
from kinml_fast.nn.potential import EnergyModel


def extended(model: EnergyModel, elements: Sequence[str], dtype: torch.dtype | None = None) -> EnergyModel:
    """A copy of a model that also knows the given elements, behind its own.

    Parameters
    ----------
    model
        Any, also one without training.
    elements
        Those of them that the model lacks are added in this order.
    dtype
        float64 or float32; None: the model's.

    Returns
    -------
    EnergyModel
        Where no new element occurs, its predictions are those of `model`. The networks of new elements are drawn from
        torch's global generator and have the layers of the first element's; their single-atom energies are 0. The old
        networks read the parts of the descriptor that tell of new elements with weights of 0.
    """
    new = [element for element in elements if element not in model.elements]
    architecture = model.to_dict()
    architecture["descriptor"] = replace(model.descriptor, elements=(*model.elements, *new)).to_dict()
    layers = model.networks.layers
    architecture["layers"] = [*layers, *[layers[0]] * len(new)]
    if dtype is not None:
        architecture["dtype"] = str(dtype).removeprefix("torch.")
    result = EnergyModel.from_dict(architecture)
    with torch.no_grad():
        for species in range(len(model.elements)):
            result.networks.layer(species, 0)[0].zero_()
        result.networks.weights[parameter_places(model, result)] = model.networks.weights.detach().to(result.dtype)
        result.sae[: len(model.elements)] = model.sae
    return result.to(model.sae.device)


def parameter_places(old: EnergyModel, new: EnergyModel) -> Tensor:
    """Where the parameters of a model are in that of an extended one, int64 [P_old] for flat tensors of P numbers."""
    features = _feature_places(old.descriptor, new.descriptor)
    places = torch.empty(old.networks.weights.numel(), dtype=torch.int64)
    for species, element in enumerate(old.elements):
        for layer in range(len(old.networks.activations)):
            parts = [
                networks.layer(species_of, layer)
                for networks, species_of in ((old.networks, species), (new.networks, new.elements.index(element)))
            ]
            for before, after in zip(*parts, strict=True):
                if before is None:
                    continue
                there = after.storage_offset() + torch.arange(after.numel()).view(after.shape)
                if layer == 0 and before.dim() == 2:
                    there = there[:, features]
                start = before.storage_offset()
                places[start : start + before.numel()] = there.reshape(-1)
    return places.to(new.networks.weights.device)


def _feature_places(old: AEVParameters, new: AEVParameters) -> Tensor:
    """Where the features of a descriptor are in that of more elements, int64 [D_old]."""
    n_radial, n_angular = len(old.radial_shifts), len(old.angular_shifts) * len(old.sections)
    places = [new.elements.index(element) for element in old.elements]
    pairs = {pair: place for place, pair in enumerate(_pairs(len(new.elements)))}
    radial = [place * n_radial + i for place in places for i in range(n_radial)]
    first = len(new.elements) * n_radial
    angular = [
        first + pairs[tuple(sorted((places[a], places[b])))] * n_angular + i
        for a, b in _pairs(len(old.elements))
        for i in range(n_angular)
    ]
    return torch.tensor(radial + angular)


def _pairs(n: int) -> list[tuple[int, int]]:
    """The pairs of species in the order of the descriptor's angular blocks."""
    return [(a, b) for a in range(n) for b in range(a, n)]
