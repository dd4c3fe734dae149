"""The model file, model.pt: everything that a prediction needs, and no code.

It is a dictionary of plain values and tensors, written by `torch.save` and read with `weights_only=True`:
`format`, `format_version`, `model` (`to_dict()` of an `EnergyModel`, or of an `Ensemble`, which has `members`, their
number), `state_dict`, `units`, `elements`, and `training`, plain values about the model's origin (settings, epoch,
errors).
"""

from __future__ import annotations

import copy
import glob
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kinml_fast import devices
from kinml_fast.data.files import replacing
from kinml_fast.deploy.archive import unpacked
from kinml_fast.errors import ConfigError, ModelError, first_line
from kinml_fast.nn import EnergyModel, Ensemble

FORMAT = "kinml_fast.model"
FORMAT_VERSION = 3
"""What is read. A file has the lowest version that tells its model, so that older programs read it or refuse it."""
UNITS = {"energy": "eV", "length": "Å", "force": "eV/Å"}

Source = EnergyModel | Ensemble | str | os.PathLike
"""A model, or the model file or run folder of one."""


def save(path: str | os.PathLike, model: EnergyModel | Ensemble, training: dict[str, Any] | None = None) -> None:
    """Write a model, as a whole or not at all.

    Parameters
    ----------
    path
        The file to write; one that is there is replaced.
    model
        Its tensors are saved as CPU tensors.
    training
        What is known about the model's origin: plain values and tensors.

    Raises
    ------
    InputError
        The file cannot be written, or `training` holds something that is no plain value.
    """
    contents = {
        "format": FORMAT,
        "format_version": version_for(model),
        "model": model.to_dict(),
        "state_dict": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "units": UNITS,
        "elements": list(model.descriptor.elements),
        "training": training or {},
    }
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    try:
        unpacked(buffer.getvalue())
    except ValueError as error:  # what the reader would say later is said now
        raise ConfigError(
            f"{path}: the notes on the training hold something that is no plain value ({error}): "
            "give numbers, strings, lists, dictionaries and tensors only"
        ) from error
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def version_for(model: EnergyModel | Ensemble) -> int:
    """The lowest version of a file that tells all of a model.

    It is 3 of an ensemble with factors of its deviations, 2 with a repulsion or dispersion, else 1.
    """
    if isinstance(model, Ensemble) and model.calibration is not None:
        return 3
    return 1 if model.repulsion is None and model.dispersion is None else 2


def load(path: str | os.PathLike) -> EnergyModel | Ensemble:
    """Read a model; its tensors are on the CPU.

    Parameters
    ----------
    path
        A model file, or a run folder, whose model.pt is taken.

    Raises
    ------
    InputError
        The file is missing, damaged, no model file, or of a later version.
    """
    path = place(path)
    contents = _read(path)
    try:
        kind = Ensemble if "members" in contents["model"] else EnergyModel
        with torch.random.fork_rng(devices=()):  # new weights are drawn, and those of the file take their place
            model = kind.from_dict(contents["model"])
        model.load_state_dict(contents["state_dict"])
    except Exception as error:  # contents that do not fit together raise whatever they run into
        raise ModelError(
            f"{path}: its parts do not fit together ({first_line(error)}): write the model file again"
        ) from error
    return model.eval()


def load_many(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> Ensemble:
    """Read the models of several files as one ensemble.

    Parameters
    ----------
    paths
        Model files, run folders, and glob patterns of files; the members of a file that holds an ensemble count each.

    Raises
    ------
    InputError
        As `load`, or a file whose model differs from that of the first in more than its weights.
    """
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found = [path for entry in entries for path in _matches(entry)]
    return _joined([load(path) for path in found], [str(path) for path in found])


def resolve(model: Source | Sequence[Source], device: str | None = None) -> EnergyModel | Ensemble:
    """The model that is given or whose file is named; of several, their ensemble.

    Parameters
    ----------
    model
        A model or ensemble, or the model file or run folder of one, or a glob pattern of such, or a list of any of
        these.
    device
        Where it shall be (`devices.NAMES`): a model that is elsewhere is copied. None: a model that is given stays
        where it is, one of a file is on the CPU.

    Raises
    ------
    InputError
        As `load_many`, or something else than these, or a device that cannot be used.
    """
    where = None if device is None else devices.resolve(device)
    found = _found(model)
    return found if where in (None, found.sae.device) else copy.deepcopy(found).to(where)


def _found(model: Source | Sequence[Source]) -> EnergyModel | Ensemble:
    if isinstance(model, EnergyModel | Ensemble):
        return model
    if isinstance(model, str | os.PathLike):
        found = _matches(model)
        return load(found[0]) if len(found) == 1 else load_many(found)
    if not isinstance(model, Sequence):
        raise ModelError(
            f"{type(model).__name__} is no model: give a model, its file or run folder, or a list of these"
        )
    if len(model) == 1:
        return _found(model[0])
    names = [name(m) if isinstance(m, str | os.PathLike) else f"model {i}" for i, m in enumerate(model, start=1)]
    return _joined([_found(one) for one in model], names)


def load_training(path: str | os.PathLike) -> dict[str, Any]:
    """The notes on the model's origin that were given to `save`.

    Raises
    ------
    InputError
        As `load`.
    """
    return _read(place(path))["training"]


def without_forces(model: Source | Sequence[Source]) -> list[Path]:
    """Of the files that `resolve` reads, those of models whose notes say that they were trained on energies alone."""
    return [path for path in files(model) if _energies_alone(_read(path)["training"])]


def _energies_alone(notes: Any) -> bool:
    """Of an ensemble, of any member."""
    if not isinstance(notes, dict):
        return False
    if isinstance(members := notes.get("members"), list):
        return any(map(_energies_alone, members))
    training = notes.get("training")
    loss = training.get("loss") if isinstance(training, dict) else None
    return isinstance(loss, dict) and loss.get("forces") is False


def name(source: Source | Sequence[Source]) -> str:
    """What a message calls that which `resolve` is given."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return ", ".join(map(name, source)) if isinstance(source, Sequence) else "the model"


def _joined(models: Sequence[EnergyModel | Ensemble], names: Sequence[str]) -> Ensemble:
    members: list[EnergyModel] = []
    of_members: list[str] = []
    for model, of_model in zip(models, names, strict=True):
        found = [model.member(i) for i in range(model.n_members)] if isinstance(model, Ensemble) else [model]
        members += found
        of_members += [of_model] * len(found)
    return Ensemble(members, of_members).eval()


def place(path: str | os.PathLike) -> Path:
    """The file itself, of a run folder its model.pt."""
    path = Path(path)
    return path / "model.pt" if path.is_dir() else path


def files(model: Source | Sequence[Source]) -> list[Path]:
    """The files that `resolve` reads."""
    if isinstance(model, str | os.PathLike):
        return _matches(model)
    return [path for one in model for path in files(one)] if isinstance(model, Sequence) else []


def _matches(entry: str | os.PathLike) -> list[Path]:
    """The files that a path or a glob pattern stands for."""
    if Path(entry).exists() or not glob.has_magic(os.fspath(entry)):
        return [place(entry)]
    matches = sorted(glob.glob(os.fspath(entry), recursive=True))
    if not matches:
        raise ModelError(f"{entry}: the pattern matches no file: correct it")
    return [place(match) for match in matches]


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}): name a model file such as model.pt") from error
    if not raw.startswith(b"PK"):
        raise ModelError(f"{path}: is no model file: name one that was written by training, such as model.pt")
    try:
        contents = unpacked(raw)
    except ValueError as error:
        raise ModelError(
            f"{path}: is no model file, or damaged ({error}): name one that was written by training, such as model.pt"
        ) from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ModelError(
            f"{path}: is no model file: name one that was written by training, such as model.pt "
            "(checkpoints of PyKinML are converted first)"
        )
    if contents.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ModelError(
            f"{path}: is a model file of version {contents.get('format_version')}, this program reads versions up to "
            f"{FORMAT_VERSION}: use the program that wrote it"
        )
    return contents
