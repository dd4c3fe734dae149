"""Models of PyKinML: its checkpoints, read without running code that they might contain.

A PyKinML checkpoint is a pickle with whole optimizer and scheduler objects in it. Only tensors, numpy arrays and plain
values are rebuilt here; optimizers and schedulers become objects without behaviour, and any other class or function
that the file names is refused. Checkpoints of delta learning look like those of one level of theory; those for two
levels have a second set of networks; those of distributed training have `module.` before each name.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data.files import check_output
from kinml_fast.deploy import model_file
from kinml_fast.deploy.archive import unpacked
from kinml_fast.errors import ConfigError, InputError, ModelError, first_line
from kinml_fast.nn import AEVParameters, EnergyModel

log = logging.getLogger(__name__)

EXTRA = "kinml_fast"
"""Key of what `kinml_fast.pykinml` writes into a checkpoint besides PyKinML's keys: the native model's architecture."""

_ACTIVATIONS = ("gaussian", "tanh", "identity", "relu", "silu")

Weights = tuple[tuple[tuple[Tensor, Tensor | None], ...], ...]
"""For each species and layer the weight [out, in] and the bias [out] or None."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint says about its model, which is neither elements nor descriptor if PyKinML wrote it.

    Parameters
    ----------
    n_input
        Length of the vectors that the networks take.
    layers
        Widths of the layers of each species' network.
    activations
        Activation function of each layer, the same for all species.
    weights
        Of the networks for one level of theory, or for the lower one of two.
    sae
        Single-atom energies, float64 [n_species], eV; zero if the model does not add them. [2, n_species] for two
        levels.
    epoch
        The epoch that it was written after, counted from 0.
    higher
        Weights of the networks for the higher one of two levels, whose first layers take one number more, the atomic
        energy of the lower level; None for one level.
    sae_is_input
        Whether that energy includes the single-atom energy, as PyKinML has it.
    architecture
        `EnergyModel.to_dict()` if `kinml_fast.pykinml` wrote the checkpoint, else None.
    optimizer, log_sigma
        What the optimizer remembers, as its `state_dict()`, and what weighs the terms of the loss, if the file has it.
    """

    n_input: int
    layers: tuple[tuple[int, ...], ...]
    activations: tuple[str, ...]
    weights: Weights
    sae: Tensor
    epoch: int | None
    higher: Weights | None = None
    sae_is_input: bool = False
    architecture: dict[str, Any] | None = None
    optimizer: dict[str, Any] | None = None
    log_sigma: Tensor | None = None

    @property
    def elements(self) -> tuple[str, ...] | None:
        """The elements, if the checkpoint says them."""
        found = self.architecture and self.architecture.get("descriptor", {}).get("elements")
        return tuple(found) if found else None

    @property
    def biases(self) -> bool:
        """Whether the layers have biases, once single-atom energies are no input."""
        return self.sae_is_input or self.weights[0][0][1] is not None

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.weights[0][0][0].dtype


def load(
    path: str | os.PathLike,
    elements: Sequence[str] | None = None,
    n_radial: int = 16,
    n_angular: int = 8,
    n_sections: int = 8,
    cutoffs: tuple[float, float] = (5.2, 3.8),
    beta: float = 0.95,
    fidelities: Sequence[int] | None = None,
    baseline: int | None = None,
) -> tuple[EnergyModel, dict[str, Any]]:
    """The model of a checkpoint, and notes on its origin for `model_file.save`.

    What a checkpoint says itself, which is so if `kinml_fast.pykinml` wrote it, need not be given and is not changed.

    Parameters
    ----------
    path
        A checkpoint that PyKinML's training or that of `kinml_fast.pykinml` has written.
    elements
        PyKinML's `present_elements`, in the order that the model was trained with; None: carbon and hydrogen.
    n_radial, n_angular, n_sections, cutoffs, beta
        PyKinML's `aev_params`, `cutoff_radius` (Å) and `beta` of that training.
    fidelities
        The levels of theory, lowest first; None: 1, or 0 and 1 for a model of two.
    baseline
        The level that the energies are differences from (delta learning, which no checkpoint of PyKinML tells).

    Raises
    ------
    InputError
        A missing or damaged file, one of another kind, one that names foreign classes or functions, or elements and
        settings that do not fit the networks.
    """
    checkpoint = read(path)
    trained = checkpoint.elements
    if trained and elements and list(elements) != list(trained):
        raise ConfigError(
            f"{path}: was trained with the elements {' '.join(trained)}, but {' '.join(elements)} are given: leave "
            "them out"
        )
    descriptor = AEVParameters.aevmod(tuple(elements or ("C", "H")), n_radial, n_angular, n_sections, cutoffs, beta)
    return build(checkpoint, descriptor, path, fidelities, baseline), {
        "source": f"PyKinML checkpoint {Path(path).name}",
        "epoch": checkpoint.epoch,
    }


def convert(path: str | os.PathLike, output: str | os.PathLike, **settings: Any) -> None:
    """Write the model of a checkpoint as a model file; `settings` are the other arguments of `load`.

    Raises
    ------
    InputError
        As `load`, or `output` cannot be written.
    """
    check_output(output, [path])
    model, notes = load(path, **settings)
    model_file.save(output, model, notes)
    fidelities = f"fidelit{'y' if len(model.fidelities) == 1 else 'ies'} {' '.join(map(str, model.fidelities))}"
    fidelities += "" if model.baseline is None else f" minus {model.baseline}"
    log.info("%s: %s of %s, epoch %s", output, fidelities, " ".join(model.elements), notes["epoch"])


def build(
    checkpoint: Checkpoint,
    descriptor: AEVParameters,
    path: str | os.PathLike,
    fidelities: Sequence[int] | None = None,
    baseline: int | None = None,
) -> EnergyModel:
    """The model of what `read` gave; the other arguments are those of `load`, `path` is for messages."""
    if checkpoint.architecture is not None:
        return _described(path, checkpoint, checkpoint.architecture).eval()
    n_levels = 1 if checkpoint.higher is None else 2
    fidelities = tuple(fidelities or ((1,) if n_levels == 1 else (0, 1)))
    if len(fidelities) != n_levels:
        raise ConfigError(
            f"{path}: holds a model for {n_levels} level{'s' * (n_levels > 1)} of theory, but the fidelities "
            f"{' '.join(map(str, fidelities))} are given: name {n_levels}"
        )
    if len(checkpoint.weights) != len(descriptor.elements):
        raise ConfigError(
            f"{path}: has networks for {len(checkpoint.weights)} elements, but {' '.join(descriptor.elements)} are "
            "given: name the elements that it was trained with, in its order"
        )
    if checkpoint.n_input != descriptor.length:
        sizes = [len(part) for part in (descriptor.radial_shifts, descriptor.angular_shifts, descriptor.sections)]
        raise ConfigError(
            f"{path}: its networks take {checkpoint.n_input} numbers for an atom, but "
            f"{' '.join(map(str, sizes))} for {' '.join(descriptor.elements)} give {descriptor.length}: give the "
            "descriptor's settings that it was trained with"
        )
    if checkpoint.sae_is_input:
        log.info(
            "%s: the single-atom energies that PyKinML feeds into the second network become biases of its first layer",
            path,
        )
    model = EnergyModel(
        descriptor,
        layers=[list(widths) for widths in checkpoint.layers],
        activations=list(checkpoint.activations),
        biases=checkpoint.biases,
        dtype=checkpoint.dtype,
        fidelities=fidelities,
        baseline=baseline,
    )
    _fill(model, checkpoint)
    return model.eval()


def _described(path: str | os.PathLike, checkpoint: Checkpoint, architecture: dict[str, Any]) -> EnergyModel:
    """A model as a checkpoint of `kinml_fast.pykinml` describes it."""
    try:
        model = EnergyModel.from_dict(architecture)
        _fill(model, checkpoint)
    except (InputError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"{path}: its description of the model does not fit its tensors ({first_line(error)}): take another "
            "checkpoint of the same training"
        ) from error
    return model


def layers_of(checkpoint: Checkpoint) -> Iterator[tuple[int, int, int, Tensor, Tensor | None]]:
    """Level, species, place, weight and bias of each layer, for networks that take no single-atom energies."""
    for level, networks in enumerate([checkpoint.weights, *([] if checkpoint.higher is None else [checkpoint.higher])]):
        for species, network in enumerate(networks):
            for place, (weight, bias) in enumerate(network):
                if checkpoint.sae_is_input:
                    bias = weight.new_zeros(len(weight)) if bias is None else bias
                    if (level, place) == (1, 0):
                        # W [a, e + sae] + b = W [a, e] + (b + sae · last column of W)
                        bias = bias + checkpoint.sae[0, species].to(weight) * weight[:, -1]
                yield level, species, place, weight, bias


@torch.no_grad()
def _fill(model: EnergyModel, checkpoint: Checkpoint) -> None:
    """Give a model the weights and the single-atom energies of a checkpoint."""
    model.sae.copy_(checkpoint.sae)
    for level, species, place, *tensors in layers_of(checkpoint):
        for parameter, tensor in zip(model.networks.layer(species, place, level), tensors, strict=True):
            if parameter is not None and tensor is not None:
                parameter.copy_(tensor)


def read(path: str | os.PathLike) -> Checkpoint:
    """What a checkpoint says about its model.

    Raises
    ------
    InputError
        As `load`, but for elements and settings.
    """
    path = Path(path)
    contents = _unpickle(path)
    kinds: dict[str, Any] = {
        "model_state_dict": dict,
        "params": dict,
        "sae_energies": (np.ndarray, Tensor, list, tuple),
    }
    for key, kind in kinds.items():
        if not isinstance(contents.get(key), kind):
            raise ModelError(f"{path}: is no checkpoint of PyKinML (it has no {key}): name one that PyKinML wrote")
    try:
        return _checked(path, contents)
    except InputError:
        raise
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: its settings and tensors do not fit together ({type(error).__name__}: {error}): "
            "take another checkpoint of the same training"
        ) from error


def _checked(path: Path, contents: dict[str, Any]) -> Checkpoint:
    # Distributed training puts `module.` before each name.
    state = {name.removeprefix("module."): value for name, value in contents["model_state_dict"].items()}
    params, extra = contents["params"], contents.get(EXTRA)
    for key in ("n_input", "activations"):
        if any(value != params[key][0] for value in params[key]):
            raise ModelError(f"{path}: {key} differs from element to element: only equal ones can be converted")
    n_input = int(params["n_input"][0])
    layers = tuple(tuple(int(width) for width in widths) for widths in params["neurons"])
    activations = tuple(params["activations"][0])
    known = _ACTIVATIONS if extra is None else (*_ACTIVATIONS, "celu", "gelu")
    unknown = [name for name in activations if name not in known]
    if unknown:
        raise ModelError(
            f"{path}: has the activation function {unknown[0]!r}, expected one of {', '.join(_ACTIVATIONS)}"
        )
    biases = bool(params.get("biases", True))
    for widths in layers:
        if len(widths) != len(activations) or widths[-1] != 1:
            raise ValueError(f"layers {list(widths)} with activations {list(activations)}")

    weights, used = _networks(path, state, "NNs", n_input, layers, biases)
    higher = None
    if params.get("neurons_hf") is not None or any(name.startswith("NNs_hf.") for name in state):
        _check_second(path, params, layers)
        higher, names = _networks(path, state, "NNs_hf", n_input + 1, layers, biases)
        used |= names
    unused = sorted(name for name in state if name.startswith(("NNs.", "NNs_hf.")) and name not in used)
    if unused:
        raise ValueError(f"{unused[0]} belongs to no layer")

    sae = torch.as_tensor(np.asarray(contents["sae_energies"], dtype=np.float64))
    if not params.get("add_sae", False):
        sae = torch.zeros_like(sae)
    if sae.shape[-1:] != (len(layers),) or sae.ndim not in ((1,) if higher is None else (1, 2)):
        raise ValueError(f"{sae.numel()} single-atom energies for {len(layers)} elements")
    if higher is not None and sae.ndim == 1:
        sae = sae.expand(2, -1).clone()
    epoch, optimizer, log_sigma = (contents.get("epoch"), contents.get("optimizer_state_dict"), state.get("log_sigma"))
    return Checkpoint(
        n_input=n_input,
        layers=layers,
        activations=activations,
        weights=weights,
        sae=sae,
        epoch=epoch if isinstance(epoch, int) else None,
        higher=higher,
        sae_is_input=higher is not None and extra is None and bool(sae.any()),
        architecture=extra if isinstance(extra, dict) else None,
        optimizer=optimizer if isinstance(optimizer, dict) else None,
        log_sigma=None if log_sigma is None else log_sigma.detach(),
    )


def _networks(
    path: Path,
    state: dict[str, Tensor],
    prefix: str,
    n_input: int,
    layers: tuple[tuple[int, ...], ...],
    biases: bool,
) -> tuple[Weights, set[str]]:
    """The weights of one set of networks, and the names of the tensors."""
    weights, used = [], set()
    for species, widths in enumerate(layers):
        network = []
        for layer, shape in enumerate(zip(widths, (n_input, *widths[:-1]), strict=True)):
            names = [f"{prefix}.{species}.{layer}.linear.{part}" for part in ("weight", "bias")]
            tensors = []
            for name, expected in zip(names, (shape, shape[:1]) if biases else (shape,), strict=False):
                if tuple(state[name].shape) != expected:
                    raise ValueError(f"{name} has the shape {list(state[name].shape)}, expected {list(expected)}")
                if not torch.isfinite(state[name]).all():
                    raise ModelError(f"{path}: {name} has NaN or infinite numbers: take an earlier checkpoint")
                tensors.append(state[name].detach())
                used.add(name)
            network.append((tensors[0], tensors[1] if biases else None))
        weights.append(tuple(network))
    return tuple(weights), used


def _check_second(path: Path, params: dict[str, Any], layers: tuple[tuple[int, ...], ...]) -> None:
    """Refuse a second network of another kind than the native model has."""
    equal = [list(widths) for widths in params["neurons_hf"]] == [list(widths) for widths in layers]
    if not equal or not all(
        function == name
        for names in params["activations_hf"]
        for function, name in zip(names, params["activations"][0], strict=True)
    ):
        raise ModelError(
            f"{path}: its networks for the two levels have different layers or activation functions: only equal ones "
            "can be converted"
        )
    for key in ("pass_eng", "pass_aev", "dscr"):
        if not params.get(key, True):
            raise ModelError(
                f"{path}: was trained with {key}=False: only a second network that takes descriptor and energy and "
                "gives a difference can be converted"
            )


class _Inert:
    """Stands for an optimizer or a scheduler: takes its state and does nothing with it."""

    def __setstate__(self, state: object) -> None:
        pass


class _Tanh(_Inert):
    """Stands for the module of that activation function, which checkpoints for two levels hold as an object."""

    def __eq__(self, other: object) -> bool:
        return other == "tanh"

    def __hash__(self) -> int:
        return hash("tanh")


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
    # Functions of the second of two networks stand in a checkpoint as themselves: here their names take their place.
    functions = {"gaussian": "gaussian", "identity": "identity", "my_relu": "relu", "silu": "silu"}
    allowed += [(name, f"pykinml.nnpes.{function}") for function, name in functions.items()]
    allowed += [(_Tanh, "torch.nn.modules.activation.Tanh")]
    return [*allowed, (_plain_dict, "collections.defaultdict")]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}): name a checkpoint that PyKinML wrote") from error
    with torch.serialization.safe_globals(_allowed_globals()):
        try:
            contents = unpacked(raw)
        except ValueError as error:
            raise ModelError(
                f"{path}: is no checkpoint of PyKinML, or damaged ({error}): name one that PyKinML wrote"
            ) from error
    if not isinstance(contents, dict):
        raise ModelError(f"{path}: is no checkpoint of PyKinML: name one that PyKinML wrote")
    return contents
