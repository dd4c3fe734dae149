"""Models for other programs: TorchScript and AOTInductor files for libtorch, plain ones for those without."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers
from torch import Tensor

from kinml_fast import ops
from kinml_fast._version import __version__
from kinml_fast.data import Selection, read
from kinml_fast.data.files import replacing
from kinml_fast.deploy import dispersion, grade, model_file, plain
from kinml_fast.errors import ConfigError, ModelError, first_line
from kinml_fast.nn import EnergyModel, Ensemble

log = logging.getLogger(__name__)

ABOUT = "kinml_fast.json"
"""The entry of a TorchScript or AOTInductor archive that says in JSON what the model is."""


class Deployed(torch.nn.Module):
    """Energies, forces and virials at the highest level, with every argument given: what AOTInductor compiles."""

    def __init__(self, model: EnergyModel | Ensemble) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, coordinates: Tensor, species: Tensor, offsets: Tensor, cells: Tensor, periodic: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a ragged batch.

        Parameters
        ----------
        coordinates, species, offsets
            [n_atoms, 3] in Å, of the model's dtype; [n_atoms] int64; [n_structures + 1] int64: see `ops.System`.
        cells, periodic
            [n_structures, 3, 3] float64, rows are lattice vectors in Å; [n_structures, 3] int64, 1 along those that a
            structure is periodic along: of a molecule 0 0 0, and its cell is not read.

        Returns
        -------
        tuple of Tensor
            Energies [n_structures] in eV and forces [n_atoms, 3] in eV/Å, of an ensemble their means; virials
            [n_structures, 3, 3] in eV.
        """
        around = ops.surroundings(cells, periodic)
        return self.model.energies_forces_virials(coordinates, species, offsets, around)


def export(
    source: model_file.Source | Sequence[model_file.Source],
    path: str | os.PathLike,
    kind: str | None = None,
    training_data: Sequence[str | os.PathLike] = (),
) -> None:
    """Write a model in another form, read it again, and compare it with its source on molecules and crystals.

    Parameters
    ----------
    source
        See `model_file.resolve`.
    path
        The file to write.
    kind
        One of `FORMATS`; default: by the suffix of the path.
    training_data
        Files of the structures that the model was trained on: a plain file then has what extrapolation grades take, see
        `kinml_fast.deploy.grade`.

    Raises
    ------
    InputError
        The model cannot be read, the file cannot be written, or what is read again has other numbers: then no file is
        left.
    """
    path = Path(path)
    chosen = FORMATS.get(kind) if kind else next((one for one in FORMATS.values() if one.suffix == path.suffix), None)
    if chosen is None:
        known = ", ".join(f"{name} ({one.suffix})" for name, one in FORMATS.items())
        raise ConfigError(f"{path}: name a format with --format, or take its suffix: {known}")
    if training_data and chosen is not FORMATS["plain"]:
        raise ConfigError(
            f"{path}: only plain files (.kinml) have extrapolation grades: leave --training-data out for other formats"
        )
    if isinstance(source, str | os.PathLike) and path.resolve() == model_file.place(source).resolve():
        raise ConfigError(f"{path}: is the model itself: give the exported one another name")
    model = copy.deepcopy(model_file.resolve(source, "cpu")).requires_grad_(False)
    dispersion.check_without(model, "exported files do", "add D3 there: in LAMMPS by hybrid/overlay with dispersion/d3")
    notes = model_file.load_training(source) if isinstance(source, str | os.PathLike) else {}
    write = chosen.write
    if training_data:
        trained_on = read(training_data, Selection(model.fidelities, elements=model.elements))
        write = functools.partial(plain.save, grade=grade.fit(model, trained_on))
    with replacing(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / f"model{chosen.suffix}"
        write(written, model, notes)
        _compare(path, model, chosen.open(written, model))
        written.replace(temporary)
        for beside in Path(folder).iterdir():  # libraries
            target = path.parent / beside.name
            shutil.rmtree(target, ignore_errors=True)
            beside.replace(target)
    log.info("%s", path)
    if model.baseline is not None:
        log.warning(
            "the energies of %s are differences from fidelity %s (delta learning): that one has to be added",
            path,
            model.baseline,
        )


Results = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of one structure: energy, forces [n, 3], virial [3, 3]."""
Opened = Callable[["Structure"], Results]


@dataclass(frozen=True)
class Structure:
    """What models are compared on.

    Parameters
    ----------
    positions, species
        [n, 3] in Å, [n].
    cell, periodic
        [3, 3] and [3].
    """

    positions: np.ndarray
    species: np.ndarray
    cell: np.ndarray
    periodic: tuple[bool, bool, bool]

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `Deployed` takes it."""
        return (
            torch.tensor(self.positions, dtype=dtype),
            torch.tensor(self.species),
            torch.tensor([0, len(self.species)]),
            torch.tensor(self.cell).unsqueeze(0),
            torch.tensor([self.periodic], dtype=torch.int64),
        )


@dataclass(frozen=True)
class Format:
    """How a model is written, and opened again.

    Parameters
    ----------
    suffix
        Of its files.
    write
        Called with path, model and what is known about its training.
    open
        Called with path and the source, for its dtype.
    """

    suffix: str
    write: Callable[[Path, EnergyModel | Ensemble, dict[str, Any]], None]
    open: Callable[[Path, EnergyModel | Ensemble], Opened]


def structures(n_species: int) -> Iterator[Structure]:
    """Shipped molecules in the elements of a model: alone, in a crystal, in a slab, pressed together; a single atom."""
    data = read("shipped:C5H5.db").select([0, 100])
    assert data.coordinates is not None
    skewed = np.array([[6.2, 0.0, 0.0], [1.1, 6.9, 0.0], [-0.8, 1.3, 7.4]])
    for i in range(len(data)):
        atoms = slice(data.offsets[i], data.offsets[i + 1])
        positions = data.coordinates[atoms]
        species = (np.arange(len(positions)) + i) % n_species
        for periodic in ((False, False, False), (True, True, True), (True, False, True)):
            yield Structure(positions, species, skewed, periodic)
    yield Structure(0.5 * positions, species, skewed, (False, False, False))
    yield Structure(np.zeros((1, 3)), np.zeros(1, np.int64), skewed, (False, False, False))


def about(model: EnergyModel | Ensemble, notes: dict[str, Any]) -> dict[str, Any]:
    """What a file says of its model, as JSON has it."""
    return {
        "format": "kinml_fast",
        "version": __version__,
        "model": model.to_dict(),
        "elements": list(model.elements),
        "units": model_file.UNITS,
        "single_atom_energies": model.sae.tolist(),
        "training": plain.readable(notes),
    }


def read_about(path: str | os.PathLike) -> dict[str, Any]:
    """What an exported file says of its model; no code in it is run.

    Raises
    ------
    InputError
        It is no such file.
    """
    try:
        if (texts := plain.read_texts(path)) is not None:
            said = {name: json.loads(texts[name]) for name in _ABOUT_PLAIN}
            return {"format": texts["format"], "elements": said["model"]["elements"], **said}
        with zipfile.ZipFile(path) as archive:
            entry = next(name for name in archive.namelist() if name.endswith(f"/{ABOUT}"))
            return json.loads(archive.read(entry))
    except (OSError, StopIteration, zipfile.BadZipFile, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path}: is no file that `kinml-fast export` has written: name one") from error


_ABOUT_PLAIN = ("model", "single_atom_energies", "training", "units", "version")


def _compare(path: Path, model: EnergyModel | Ensemble, opened: Opened) -> None:
    """Refuse a file that has other numbers than its source."""
    source = Deployed(model)
    tolerance = 1e-10 if model.dtype == torch.float64 else 1e-4
    for structure in structures(len(model.elements)):
        with torch.no_grad():
            expected = [value.numpy() for value in source(*structure.tensors(model.dtype))]
        found = opened(structure)
        for name, one, other in zip(("energies", "forces", "virials"), found, expected, strict=True):
            one = np.asarray(one, float).reshape(other.shape)
            largest = float(abs(one - other).max(initial=0.0))
            if not largest <= tolerance * (1 + float(abs(other).max(initial=0.0))):
                raise ModelError(
                    f"{path}: the {name} of the exported model differ from those of the model by {largest:.3g}: "
                    "no file was written; report it with the model"
                )


def _describe(path: Path, model: EnergyModel | Ensemble, notes: dict[str, Any]) -> None:
    """Put what `read_about` reads into an archive of torch."""
    with zipfile.ZipFile(path, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/extra/{ABOUT}", json.dumps(about(model, notes)))


# ---- plain ---------------------------------------------------------------------------------------


def _open_plain(path: Path, model: EnergyModel | Ensemble) -> Opened:
    potential = plain.PlainPotential(path)

    def evaluate(structure: Structure) -> Results:
        cell = structure.cell if any(structure.periodic) else None
        found = potential(structure.positions, structure.species, cell, structure.periodic)
        mean = {name: values.mean(axis=0) for name, values in found.items()}
        return mean["energies"], mean["forces"], mean["virials"].sum(axis=0)

    return evaluate


# ---- libtorch ------------------------------------------------------------------------------------


def _write_torchscript(path: Path, model: EnergyModel | Ensemble, notes: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # docs/cpp.md says so
        scripted = torch.jit.script(model.eval())
        torch.jit.save(scripted, str(path))
    _describe(path, model, notes)


def _open_torchscript(path: Path, model: EnergyModel | Ensemble) -> Opened:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = torch.jit.load(str(path))

    def evaluate(structure: Structure) -> Results:
        coordinates, species, offsets, cells, periodic = structure.tensors(model.dtype)
        around = [cells, periodic, None, None, None, None]
        return _arrays(loaded.energies_forces_virials(coordinates, species, offsets, around))

    return evaluate


def _write_aoti(path: Path, model: EnergyModel | Ensemble, notes: dict[str, Any]) -> None:
    sizes = torch.export.Dim.AUTO
    first, second = [structure.tensors(model.dtype) for structure in list(structures(len(model.elements)))[:2]]
    coordinates, species, _, cells, periodic = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    offsets = torch.tensor([0, len(first[1]), len(species)])
    arguments = (coordinates, species, offsets, cells, periodic)
    try:
        with torch.no_grad():
            program = torch.export.export(
                Deployed(model).eval(), arguments, dynamic_shapes=tuple({0: sizes} for _ in arguments)
            )
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # compilers and torch raise many kinds
        raise ModelError(
            f"{path.name}: AOTInductor cannot compile the model ({first_line(error)}): see that a C++ compiler is "
            "there, or take --format torchscript or plain"
        ) from error
    _describe(path, model, notes)


def _open_aoti(path: Path, model: EnergyModel | Ensemble) -> Opened:
    loaded = torch._inductor.aoti_load_package(str(path))
    return lambda structure: _arrays(loaded(*structure.tensors(model.dtype)))


# ---- metatomic -----------------------------------------------------------------------------------


def _write_metatomic(path: Path, model: EnergyModel | Ensemble, notes: dict[str, Any]) -> None:
    try:
        from kinml_fast.deploy import metatomic_model
    except ImportError as error:
        raise ConfigError(
            f"{path.name}: needs the package metatomic-torch ({first_line(error)}): pip install metatomic-torch"
        ) from error
    metatomic_model.save(path, model, about(model, notes))
    _describe(path, model, notes)


def _open_metatomic(path: Path, model: EnergyModel | Ensemble) -> Opened:
    from kinml_fast.deploy import metatomic_model

    loaded = metatomic_model.load(path)
    numbers = np.array([atomic_numbers[element] for element in model.elements])

    def evaluate(structure: Structure) -> Results:
        return metatomic_model.energy_forces_virial(
            loaded, structure.positions, numbers[structure.species], structure.cell, np.array(structure.periodic)
        )

    return evaluate


def _arrays(tensors: Sequence[Tensor]) -> Results:
    energies, forces, virials = [tensor.detach().numpy() for tensor in tensors]
    return energies, forces, virials


FORMATS = {
    "plain": Format(".kinml", plain.save, _open_plain),
    "torchscript": Format(".ts", _write_torchscript, _open_torchscript),
    "aoti": Format(".pt2", _write_aoti, _open_aoti),
    "metatomic": Format(".pt", _write_metatomic, _open_metatomic),
}
"""How to export, by name."""
