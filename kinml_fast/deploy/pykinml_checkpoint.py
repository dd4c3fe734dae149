"""Models of PyKinML: its single-fidelity checkpoints, read without running code that they might contain.

A PyKinML checkpoint is a pickle with whole optimizer and scheduler objects in it. Only tensors, numpy arrays and plain
values are rebuilt here; optimizers and schedulers become objects without behaviour, and any other class or function
that the file names is refused.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel

_ACTIVATIONS = ("gaussian", "tanh", "identity", "relu", "silu")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about its model; it does not say elements and descriptor.

    Parameters
    ----------
    n_input
        Length of the vectors that the networks take.
    layers
        Widths of the layers of each species' network.
    activations
        Activation function of each layer, the same for all species.
    weights
        For each species and layer the weight [out, in] and the bias [out] or None.
    sae
        Single-atom energies, float64 [n_species], eV; zero if the model does not add them.
    epoch
        The epoch that it was written after, counted from 0.
    """

    n_input: int
    layers: tuple[tuple[int, ...], ...]
    activations: tuple[str, ...]
    weights: tuple[tuple[tuple[Tensor, Tensor | None], ...], ...]
    sae: Tensor
    epoch: int | None


def load(
    path: str | os.PathLike,
    elements: Sequence[str] = ("C", "H"),
    n_radial: int = 16,
    n_angular: int = 8,
    n_sections: int = 8,
    cutoffs: tuple[float, float] = (5.2, 3.8),
    beta: float = 0.95,
) -> tuple[EnergyModel, dict[str, Any]]:
    """The model of a checkpoint, and notes on its origin for `model_file.save`.

    Parameters
    ----------
    path
        A checkpoint that PyKinML's training for one fidelity level has written.
    elements
        PyKinML's `present_elements`, in the order that the model was trained with.
    n_radial, n_angular, n_sections, cutoffs, beta
        PyKinML's `aev_params`, `cutoff_radius` (Å) and `beta` of that training.

    Raises
    ------
    InputError
        A missing or damaged file, one of another kind, one that names foreign classes or functions, or elements and
        settings that do not fit the networks.
    """
    checkpoint = read(path)
    descriptor = AEVParameters.aevmod(tuple(elements), n_radial, n_angular, n_sections, tuple(cutoffs), beta)
    if len(checkpoint.weights) != len(descriptor.elements):
        raise InputError(
            f"{path}: has networks for {len(checkpoint.weights)} elements, but {' '.join(descriptor.elements)} are "
            "given: name the elements that it was trained with, in its order"
        )
    if checkpoint.n_input != descriptor.length:
        raise InputError(
            f"{path}: its networks take {checkpoint.n_input} numbers for an atom, but {n_radial} {n_angular} "
            f"{n_sections} for {' '.join(descriptor.elements)} give {descriptor.length}: give the descriptor's "
            "settings that it was trained with"
        )
    biases = checkpoint.weights[0][0][1] is not None
    model = EnergyModel(
        descriptor,
        layers=[list(widths) for widths in checkpoint.layers],
        activations=list(checkpoint.activations),
        biases=biases,
        dtype=checkpoint.weights[0][0][0].dtype,
    )
    with torch.no_grad():
        model.sae.copy_(checkpoint.sae)
        for species, layers in enumerate(checkpoint.weights):
            for layer, (weight, bias) in enumerate(layers):
                own_weight, own_bias = model.networks.layer(species, layer)
                own_weight.copy_(weight)
                if own_bias is not None:
                    own_bias.copy_(bias)
    return model.eval(), {"source": f"PyKinML checkpoint {Path(path).name}", "epoch": checkpoint.epoch}


def read(path: str | os.PathLike) -> Checkpoint:
    """What a checkpoint says about its model.

    Raises
    ------
    InputError
        As `load`, but for elements and settings.
    """
    path = Path(path)
    contents = _unpickle(path)
    kinds = {"model_state_dict": dict, "params": dict, "sae_energies": (np.ndarray, Tensor, list, tuple)}
    for key, kind in kinds.items():
        if not isinstance(contents.get(key), kind):
            raise InputError(f"{path}: is no checkpoint of PyKinML (it has no {key}): name one that PyKinML wrote")
    # Distributed training puts `module.` before each name.
    state = {name.removeprefix("module."): value for name, value in contents["model_state_dict"].items()}
    params = contents["params"]
    if "neurons_hf" in params or any(name.startswith("NNs_hf.") for name in state):
        raise InputError(
            f"{path}: holds a model for two fidelity levels: only models for one can be converted, train with "
            "multi_fid=False"
        )
    try:
        return _checked(path, params, state, contents["sae_energies"], contents.get("epoch"))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: its settings and tensors do not fit together ({type(error).__name__}: {error}): "
            "take another checkpoint of the same training"
        ) from error


def _checked(path: Path, params: dict, state: dict[str, Tensor], sae: object, epoch: object) -> Checkpoint:
    for key in ("n_input", "activations"):
        if any(value != params[key][0] for value in params[key]):
            raise InputError(f"{path}: {key} differs from element to element: only equal ones can be converted")
    n_input = int(params["n_input"][0])
    layers = tuple(tuple(int(width) for width in widths) for widths in params["neurons"])
    activations = tuple(params["activations"][0])
    unknown = [name for name in activations if name not in _ACTIVATIONS]
    if unknown:
        raise InputError(
            f"{path}: has the activation function {unknown[0]!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    biases = bool(params.get("biases", True))

    weights, used = [], set()
    for species, widths in enumerate(layers):
        if len(widths) != len(activations) or widths[-1] != 1:
            raise ValueError(f"layers {list(widths)} with activations {list(activations)}")
        network = []
        for layer, shape in enumerate(zip(widths, (n_input, *widths[:-1]), strict=True)):
            names = [f"NNs.{species}.{layer}.linear.{part}" for part in ("weight", "bias")]
            tensors = []
            for name, expected in zip(names, (shape, shape[:1]) if biases else (shape,), strict=False):
                if tuple(state[name].shape) != expected:
                    raise ValueError(f"{name} has the shape {list(state[name].shape)}, expected {list(expected)}")
                if not torch.isfinite(state[name]).all():
                    raise InputError(f"{path}: {name} has NaN or infinite numbers: take an earlier checkpoint")
                tensors.append(state[name].detach())
                used.add(name)
            network.append((tensors[0], tensors[1] if biases else None))
        weights.append(tuple(network))
    unused = sorted(name for name in state if name.startswith("NNs.") and name not in used)
    if unused:
        raise ValueError(f"{unused[0]} belongs to no layer")

    energies = torch.as_tensor(np.asarray(sae, dtype=np.float64)).flatten()
    if len(energies) != len(layers):
        raise ValueError(f"{len(energies)} single-atom energies for {len(layers)} elements")
    return Checkpoint(
        n_input=n_input,
        layers=layers,
        activations=activations,
        weights=tuple(weights),
        sae=energies if params.get("add_sae", False) else torch.zeros_like(energies),
        epoch=epoch if isinstance(epoch, int) else None,
    )


class _Inert:
    """Stands for an optimizer or a scheduler: takes its state and does nothing with it."""

    def __setstate__(self, state: object) -> None:
        pass


def _plain_dict(*_: object) -> dict:
    """Stands for `collections.defaultdict`, the type of an optimizer's state."""
    return {}


def _allowed_globals() -> list:
    """What a checkpoint may name, besides what `weights_only` always allows (tensors and their parts)."""
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    allowed: list = [np.ndarray, np.dtype, dict, *(type(np.dtype(name)) for name in ("f4", "f8", "i8"))]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since numpy 2
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    optimizers = ("sgd.SGD", "adam.Adam", "adamw.AdamW")
    schedulers = ("ExponentialLR", "StepLR", "ReduceLROnPlateau")
    allowed += [(_Inert, f"torch.optim.{name}") for name in optimizers]
    allowed += [(_Inert, f"torch.optim.lr_scheduler.{name}") for name in schedulers]
    return [*allowed, (_plain_dict, "collections.defaultdict")]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name a checkpoint that PyKinML wrote") from error
    with torch.serialization.safe_globals(_allowed_globals()):
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(raw))
        except Exception as error:  # no archive of torch.save, or a damaged one
            raise InputError(
                f"{path}: is no checkpoint of PyKinML, or damaged ({_first_line(error)}): name one that PyKinML wrote"
            ) from error
        if foreign:
            raise InputError(
                f"{path}: names {', '.join(sorted(foreign))}, which no checkpoint of PyKinML needs; nothing of it was "
                "run: take a file from a source that you trust"
            )
        try:
            contents = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        except Exception as error:  # what it refuses or cannot read has no common type
            raise InputError(
                f"{path}: cannot be read as a checkpoint of PyKinML ({_first_line(error)}): name one that PyKinML wrote"
            ) from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: is no checkpoint of PyKinML: name one that PyKinML wrote")
    return contents


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
