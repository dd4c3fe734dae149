"""Choosing geometries: the farthest from all others first, by their descriptors, and no near duplicates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kinml_fast.explore.geometry import Geometry
from kinml_fast.nn import EnergyModel, Ensemble


def fingerprints(geometries: Sequence[Geometry], model: EnergyModel | Ensemble) -> np.ndarray:
    """Mean and standard deviation of the atomic environment vectors of each element, [n, D] for n geometries.

    They do not depend on the order of atoms. Elements that a geometry lacks have zeros.
    """
    if not geometries:
        return np.empty((0, 0))
    elements = model.elements
    species = [np.array([elements.index(symbol) for symbol in one.symbols]) for one in geometries]
    offsets = np.concatenate([[0], np.cumsum([len(one) for one in species])])
    device = model.sae.device
    with torch.inference_mode():
        vectors = (
            model.aev(
                torch.from_numpy(np.concatenate([one.positions for one in geometries])).to(device, model.dtype),
                torch.from_numpy(np.concatenate(species)).to(device),
                torch.from_numpy(offsets).to(device),
            )
            .double()
            .cpu()
            .numpy()
        )
    rows = []
    for i, codes in enumerate(species):
        own = vectors[offsets[i] : offsets[i + 1]]
        row = np.zeros((len(elements), 2, vectors.shape[1]))
        for code in np.unique(codes):
            row[code] = own[codes == code].mean(axis=0), own[codes == code].std(axis=0)
        rows.append(row.ravel())
    return np.array(rows)


def farthest(candidates: np.ndarray, known: np.ndarray, most: int, distinct: float) -> tuple[list[int], int]:
    """Which candidates to take, the farthest from all that is known or taken first.

    Parameters
    ----------
    candidates, known
        [n, D] and [m, D], descriptors.
    most
        At most so many.
    distinct
        None that is nearer than this to another.

    Returns
    -------
    list of int
        Rows of the candidates in the order in which they are taken.
    int
        How many further ones would be distinct if more were taken; ones that are equally far count once each.
    """
    if not len(candidates):
        return [], 0
    distances = np.full(len(candidates), np.inf)
    for row in known:
        distances = np.minimum(distances, _distances(candidates, row))
    taken: list[int] = []
    while len(taken) < most:
        next_one = int(np.argmax(distances))
        if distances[next_one] < distinct or next_one in taken:
            break
        taken.append(next_one)
        distances = np.minimum(distances, _distances(candidates, candidates[next_one]))
        distances[next_one] = -1.0
    return taken, int((distances >= distinct).sum())


def _distances(rows: np.ndarray, one: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(rows - one).sum(axis=1))
