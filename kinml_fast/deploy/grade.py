"""How far an atom's environment is from those that a model was trained on: its extrapolation grade.

Of an atom with the descriptor a, among training atoms of its element with the descriptors a_t,

    grade = a^T A a / max_t a_t^T A a_t,    A = (sum_t a_t a_t^T + r)^-1.

a^T A a is the leverage of linear regression (Hoaglin, Welsch, Am. Stat. 1978, 32, 17, DOI
10.1080/00031305.1978.10479237), with a ridge r of 1e-6 of the mean diagonal element against directions that training
data hardly know. A grade up to 1 is within what they span, above 1 is beyond, as with the grade by which Podryabinkin
and Shapeev choose training data (Comput. Mater. Sci. 2017, 140, 171, DOI 10.1016/j.commatsci.2017.08.031).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from kinml_fast import ops
from kinml_fast.data.structures import Structures
from kinml_fast.errors import DataError
from kinml_fast.nn import EnergyModel, Ensemble

_RIDGE = 1e-6
_BATCH_SIZE = 256


def fit(model: EnergyModel | Ensemble, training: Structures) -> Tensor:
    """What grades take of training data.

    Parameters
    ----------
    model
        For its descriptor; on the CPU.
    training
        The structures; the model knows their elements.

    Returns
    -------
    Tensor
        float64 [n_species, D, D]: A of each element, divided by the largest leverage in training.

    Raises
    ------
    InputError
        An element that the model does not know, or none of an element that it knows; no coordinates.
    """
    training = training.with_elements(model.elements)
    if training.coordinates is None:
        raise DataError(f"{training.labels[0]} has no coordinates, only stored descriptors: take files with both")
    counts = torch.bincount(torch.from_numpy(training.species), minlength=len(model.elements))
    for element, count in zip(model.elements, counts.tolist(), strict=True):
        if count == 0:
            raise DataError(
                f"no training structure has the element {element}, which the model knows: name all training data"
            )
    length = model.descriptor.length
    moments = torch.zeros(len(model.elements), length, length, dtype=torch.float64)
    for species, features in _features(model, training):
        for s, moment in enumerate(moments):
            of_species = features[species == s]
            moment += of_species.T @ of_species
    diagonal = moments.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(_RIDGE * diagonal.mean(dim=1, keepdim=True).expand_as(diagonal))
    # By numpy: torch factors several matrices at once, in which, after torch.set_num_threads, MKL waits for ever.
    matrices = torch.from_numpy(np.linalg.inv((moments + ridge).numpy()))
    largest = torch.zeros(len(matrices), dtype=torch.float64)
    for species, features in _features(model, training):
        largest.scatter_reduce_(0, species, _forms(matrices, species, features), "amax")
    return matrices / largest[:, None, None]


def grades(
    model: EnergyModel | Ensemble,
    matrices: Tensor,
    coordinates: Tensor,
    species: Tensor,
    offsets: Tensor,
    around: list[Tensor | None] | None = None,
) -> Tensor:
    """Extrapolation grades of atoms.

    Parameters
    ----------
    model
        As in `fit`.
    matrices
        What that returned.
    coordinates, species, offsets, around
        As the model takes them.

    Returns
    -------
    Tensor
        float64 [n_atoms]; 0 of ghosts.
    """
    with torch.inference_mode():
        return _forms(matrices, species, model.aev(coordinates, species, offsets, around).double())


def _features(model: EnergyModel | Ensemble, data: Structures) -> Iterator[tuple[Tensor, Tensor]]:
    """Species [n] and descriptors [n, D] of some structures after others."""
    coordinates = data.coordinates_in(model.dtype)
    for first in range(0, len(data), _BATCH_SIZE):
        offsets = data.offsets[first : first + _BATCH_SIZE + 1]
        atoms = slice(int(offsets[0]), int(offsets[-1]))
        species = torch.from_numpy(data.species[atoms])
        around = None
        if data.cells is not None and data.periodic is not None:
            some = slice(first, first + _BATCH_SIZE)
            around = ops.surroundings(torch.from_numpy(data.cells[some]), torch.from_numpy(data.periodic[some]))
        with torch.inference_mode():
            some_offsets = torch.from_numpy(offsets - offsets[0])
            yield species, model.aev(coordinates[atoms], species, some_offsets, around).double()


def _forms(matrices: Tensor, species: Tensor, features: Tensor) -> Tensor:
    """a^T M a [n] with the matrix of each atom's species."""
    forms = torch.zeros(len(species), dtype=torch.float64)
    for s, matrix in enumerate(matrices):
        chosen = (species == s).nonzero().squeeze(1)
        forms[chosen] = ((features[chosen] @ matrix) * features[chosen]).sum(dim=1)
    return forms
