"""Fine-tuning and continued training: runs that begin with the weights of another one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data import sae
from kinml_fast.data.large import LargeData
from kinml_fast.data.prepared import Prepared
from kinml_fast.deploy import model_file
from kinml_fast.deploy.archive import unpacked
from kinml_fast.errors import ConfigError, ModelError, first_line
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble, extended
from kinml_fast.nn.extension import parameter_places
from kinml_fast.train import checkpoint
from kinml_fast.train.config import (
    Config,
    DispersionConfig,
    RepulsionConfig,
    Section,
    StartConfig,
    TrainingConfig,
)
from kinml_fast.train.folder import RunFolder
from kinml_fast.train.metrics import ResidualSums
from kinml_fast.train.update import Update

log = logging.getLogger(__name__)

_FAR_OFF = 1.0  # eV, a mean error that another level of theory makes and a poor model does not


@dataclass(frozen=True)
class Origin:
    """A trained model to begin with, and what its file knows about the training.

    Parameters
    ----------
    path
        The file.
    model
        With its weights and single-atom energies.
    state
        What a checkpoint holds; None for a model file.
    """

    path: Path
    model: EnergyModel
    state: dict[str, Any] | None = None


def load(path: str | Path, *, averaged: bool = True) -> Origin:
    """Read a model file or a checkpoint of a run.

    Parameters
    ----------
    path
        model.pt, last.pt, best.pt or epoch-*.pt; of a run folder its model.pt.
    averaged
        Whether to take, from the checkpoint of a run that averaged its weights, the average, by which such a run is
        judged, or the weights that the optimizer moved.

    Raises
    ------
    InputError
        The file is missing, damaged, of another kind, or of a later version.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}): name model.pt or a checkpoint of a run"
        ) from error
    try:
        contents = unpacked(raw)
    except ValueError as error:
        raise ModelError(
            f"{path}: is no readable model and no checkpoint ({error}): name model.pt of a run or one of "
            "its checkpoints (those of PyKinML are converted first)"
        ) from error
    kind = contents.get("format") if isinstance(contents, dict) else None
    if kind == model_file.FORMAT:
        model = model_file.load(path)
        if isinstance(model, Ensemble):
            raise ModelError(f"{path}: is an ensemble: name model.pt of one of its members")
        return Origin(path, model)
    if kind != checkpoint.FORMAT:
        raise ModelError(
            f"{path}: is no model file and no checkpoint of this program: name model.pt of a run or one of its "
            "checkpoints (those of PyKinML are converted first)"
        )
    state = checkpoint.load(path)
    try:
        return Origin(path, _model_of(state, averaged), state)
    except Exception as error:  # contents that do not fit together raise whatever they run into
        raise ModelError(
            f"{path}: does not hold a whole model ({first_line(error)}): name an intact checkpoint"
        ) from error


def start_of_member(start: StartConfig, number: int) -> StartConfig:
    """What a member of an ensemble begins with, counted from 1: of the run of another ensemble its namesake there.

    Raises
    ------
    ModelError
        That ensemble has fewer members.
    """
    if start.model is None or not (members := RunFolder(start.model).members()):
        return start
    if number > len(members):
        raise ModelError(
            f"{start.model}: is an ensemble of {len(members)} members, from which {number} cannot begin: set "
            "ensemble.members to at most that, or name model.pt of one of its members"
        )
    return start.model_copy(update={"model": str(members[number - 1])})


def _model_of(state: Mapping[str, Any], averaged: bool) -> EnergyModel:
    model = EnergyModel.from_dict(state["model"])
    model.load_state_dict(state["weights"])
    if averaged and state.get("average"):
        with torch.no_grad():
            for parameter, average in zip(model.parameters(), state["average"]["averages"], strict=True):
                parameter.copy_(average)
    return model


def resolved(config: Config, origin: Origin) -> Config:
    """The configuration with the architecture of the model that it begins with, and its levels if none are given.

    Raises
    ------
    InputError
        A key that was given says otherwise.
    """
    config = _with_levels(config, origin)
    model = origin.model
    networks, descriptor = model.networks, model.descriptor
    layers = networks.layers
    architecture: dict[str, dict[str, Any]] = {
        "network": {
            "layers": layers[0] if all(widths == layers[0] for widths in layers) else layers,
            "activations": list(networks.activations),
            "biases": networks.biases,
            "repulsion": RepulsionConfig.of(model.repulsion),
            "dispersion": DispersionConfig.of(model.dispersion),
        },
        "descriptor": {
            "n_radial": len(descriptor.radial_shifts),
            "n_angular": len(descriptor.angular_shifts),
            "n_sections": len(descriptor.sections),
            "cutoffs": [descriptor.radial_cutoff, descriptor.angular_cutoff],
            "beta": descriptor.beta,
        },
    }
    for section, values in architecture.items():
        given = getattr(config, section)
        for key, value in values.items():
            wanted = getattr(given, key)
            if key in given.model_fields_set and wanted is not None and wanted != value:
                wanted, value = (x.model_dump() if isinstance(x, Section) else x for x in (wanted, value))
                raise ConfigError(
                    f"{section}.{key} is {wanted} in the configuration and {value} in the start model {origin.path}: "
                    f"leave the key out, which takes the model's, or set {section}.{key}={value}"
                )
    if not _is_of_aevmod(descriptor):
        log.info("%s: has a descriptor that no configuration can name, which is kept", origin.path)
    update = {name: getattr(config, name).model_copy(update=values) for name, values in architecture.items()}
    if "dtype" not in config.training.model_fields_set:
        dtype = str(model.dtype).removeprefix("torch.")
        update["training"] = config.training.model_copy(update={"dtype": dtype})
    return config.model_copy(update=update)


def _with_levels(config: Config, origin: Origin) -> Config:
    model, data = origin.model, config.data
    fidelities = list(model.fidelities)
    update: dict[str, Any] = {"fidelity": fidelities[0] if len(fidelities) == 1 else fidelities}
    if "baseline" in data.model_fields_set or "fidelity" in data.model_fields_set:
        if (data.baseline is None) != (model.baseline is None):
            kinds = ["whole energies" if x.baseline is None else "differences of energies" for x in (model, data)]
            raise ConfigError(
                f"{origin.path}: is a model of {kinds[0]}, and the configuration trains one of {kinds[1]}: start from "
                f"one of {kinds[1]}, or set data.baseline={'null' if model.baseline is None else model.baseline}"
            )
    else:
        update["baseline"] = model.baseline
    if "fidelity" in data.model_fields_set:
        given = [data.fidelity] if isinstance(data.fidelity, int) else data.fidelity
        known = len(fidelities)
        if len(given) < known or (len(given) > known and given[:known] != fidelities):
            raise ConfigError(
                f"{origin.path}: is a model of the fidelities {fidelities}, and data.fidelity is {data.fidelity}: name "
                "as many, or further ones above its own"
            )
        del update["fidelity"]
    return config.model_copy(update={"data": data.model_copy(update=update)}) if update else config


def _is_of_aevmod(p: AEVParameters) -> bool:
    numbers = (len(p.radial_shifts), len(p.angular_shifts), len(p.sections))
    return AEVParameters.aevmod(p.elements, *numbers, (p.radial_cutoff, p.angular_cutoff), p.beta) == p


def model_for(
    origin: Origin, data: Prepared | LargeData, elements: Sequence[str], dtype: torch.dtype, seed: int
) -> EnergyModel:
    """The model to begin with, which also knows the elements and levels of the data.

    Parameters
    ----------
    origin
        Where the weights come from.
    data
        Says what the levels are called.
    elements
        Those to know.
    dtype
        float64 or float32.
    seed
        Of the networks that are new.
    """
    old = origin.model
    torch.manual_seed(seed)
    model = extended(old, elements, dtype, data.fidelities)
    model.baseline = data.baseline
    new = [
        *model.elements[len(old.elements) :],
        *(f"fidelity {fidelity}" for fidelity in model.fidelities[len(old.fidelities) :]),
    ]
    added = f", with new networks for {', '.join(new)}" if new else ""
    log.info("starts from %s, a model of %s%s", origin.path, " ".join(old.elements), added)
    return model


def keep_sae(
    model: EnergyModel, origin: Origin, setting: str | Mapping[str, float] | Sequence[Any], data: Prepared | LargeData
) -> None:
    """Give a model single-atom energies for what is new to it, with those of the start model unchanged.

    Parameters
    ----------
    model
        `origin.model`, or extended from it.
    origin
        The start model.
    setting
        data.sae, see `data.sae.resolve_levels`; a fit for new elements is one to what the old ones leave of the
        energies. Those of new levels are the data's.
    data
        The data.
    """
    n_old, n_levels = len(origin.model.elements), len(origin.model.fidelities)
    energies = model.sae.view(len(model.fidelities), -1)
    new = model.elements[n_old:]
    if new and isinstance(data, LargeData):
        raise ConfigError(
            f"{origin.path}: does not know {', '.join(new)}, whose single-atom energies cannot be fitted to data that "
            "are read from disk yet: set start.sae=data, or data.on_disk=false"
        )
    if new and isinstance(data, Prepared):
        fitted = np.concatenate([data.split.train, data.split.validation])
        chosen = data.structures.with_elements(model.elements).select(fitted)
        assert chosen.energies is not None
        counts = chosen.counts()
        left = (
            chosen.energies.reshape(len(model.fidelities), -1) - energies[:, :n_old].cpu().numpy() @ counts[:, :n_old].T
        )
        energies[:, n_old:] = torch.from_numpy(sae.resolve_levels(setting, counts[:, n_old:], left, new))
    for level in range(n_levels, len(model.fidelities)):
        assert data.sae is not None
        given = dict(zip(data.elements, data.sae[level].tolist(), strict=True))
        energies[level] = torch.tensor([given.get(element, 0.0) for element in model.elements], dtype=torch.float64)
    others = " and others added" if energies.numel() > origin.model.sae.numel() else ""
    for fidelity, shifts in zip(model.fidelities, energies.tolist(), strict=True):
        values = ", ".join(f"{element} {value:.6f}" for element, value in zip(model.elements, shifts, strict=True))
        of_level = f", fidelity {fidelity}" if len(model.fidelities) > 1 else ""
        log.info("single-atom energies of the start model are kept%s, eV%s: %s", others, of_level, values)


def say_first_errors(model: EnergyModel, sums: Sequence[ResidualSums], sae_kept: bool) -> None:
    """Log how good the model is on the validation set before any training, by sums of residuals at each level."""
    several = len(model.fidelities) > 1
    for fidelity, of_level in zip(model.fidelities, sums, strict=True):
        name = f" of fidelity {fidelity}" if several else ""
        energy, forces, stress = of_level.errors()
        if energy is None:
            continue
        text = f"{energy.rmse:.4f} kcal/mol" + ("" if forces is None else f" and {forces.rmse:.4f} kcal/mol/Å")
        text += "" if stress is None else f" and {stress.rmse:.4f} GPa"
        log.info("before training: validation RMSE%s %s", name, text)
        mean = of_level.energies.total / of_level.energies.count
        if sae_kept and abs(mean) > _FAR_OFF:
            log.warning(
                "the energies%s of the validation set are %.3f eV away from the start model's on average, as those of "
                "another level of theory are: start.sae=data takes single-atom energies from the data",
                name,
                -mean,
            )


def keep_state(
    origin: Origin,
    model: EnergyModel,
    config: TrainingConfig,
    update: Update,
) -> None:
    """Let a new training have the state of the one that wrote a checkpoint.

    That is what the optimizer remembers of each weight, the learned factors of the loss if it has the same terms, and
    the moving average of the weights if both have one. Learning rate and other settings are those of the new training.

    Parameters
    ----------
    origin
        The checkpoint, loaded without averaging.
    model
        `origin.model`, or one extended from it; new weights begin with means of 0.
    config
        The new training.
    update
        Of the new training; it is changed.

    Raises
    ------
    InputError
        The file has no state of an optimizer, or one of another kind.
    """
    path, state = origin.path, origin.state
    optimizer, tasks, average = update.optimizer, update.tasks, update.average
    if state is None or "optimizer" not in state:
        raise ModelError(
            f"{path}: holds no state of an optimizer: start from checkpoints/last.pt or epoch-*.pt of that run, or set "
            "start.optimizer=reset"
        )
    before, now = state["training"]["optimizer"], config.optimizer.model_dump()
    for key in ("name", "amsgrad"):
        if _family(before[key]) != _family(now[key]):
            raise ModelError(
                f"{path}: holds the state of an optimizer with {key} {before[key]}, not {now[key]}: set "
                f"training.optimizer.{key}={before[key]}, or start.optimizer=reset"
            )
    weights = model.networks.weights
    places = parameter_places(origin.model, model)

    def moved(value: Any, new: Tensor) -> Any:
        # What belongs to each weight goes where the weight went.
        if not isinstance(value, Tensor) or value.shape != origin.model.networks.weights.shape:
            return value
        result = new.clone()
        result[places] = value.to(result)
        return result

    try:
        saved, kept = state["optimizer"]["state"], {}
        if 0 in saved:
            zeros = torch.zeros_like(weights, requires_grad=False)
            kept[0] = {name: moved(value, zeros) for name, value in saved[0].items()}
        log_sigma = state["tasks"]["log_sigma"]
        if tasks.log_sigma is not None and log_sigma is not None and tuple(state["tasks"]["names"]) == tasks.names:
            tasks.load_state_dict(state["tasks"])
            if 1 in saved:
                kept[1] = saved[1]
        optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
        if average is not None and state["average"]:
            (averaged,) = state["average"]["averages"]
            average.load_state_dict(
                {"averages": [moved(averaged, weights.detach())], "steps": state["average"]["steps"]}
            )
    except (ArithmeticError, LookupError, RuntimeError, ValueError, TypeError) as error:
        raise ModelError(
            f"{path}: does not hold a whole training ({first_line(error)}): name an intact checkpoint"
        ) from error
    rates = state["optimizer"]["param_groups"][0]["lr"], optimizer.param_groups[0]["lr"]
    log.info("the optimizer goes on with its state; its learning rate was %.3g and begins with %.3g", *rates)


def _family(value: Any) -> Any:
    """The state of adam is that of adamw."""
    return "adam" if value == "adamw" else value
