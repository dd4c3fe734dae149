"""The prepared data set: everything a training run takes from its files, saved once and recognised on the next run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from kinml_fast.data import plausible, sources, splits
from kinml_fast.data import sae as sae_module
from kinml_fast.data import weights as weights_module
from kinml_fast.data.files import expand, is_hdf5, is_sqlite, replacing
from kinml_fast.data.selection import Selection
from kinml_fast.data.sources import DescriptorSource, file_digest
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.sqlite import MissingIdsError
from kinml_fast.data.structures import Structures
from kinml_fast.data.training_data import TrainingData
from kinml_fast.errors import ConfigError, DataError, InputError

_log = logging.getLogger(__name__)
_FORMAT = "kinml_fast prepared data"
_VERSION = 3


@dataclass(frozen=True, eq=False)
class Prepared(TrainingData):
    """The training data of files, and what it takes to recognise them on the next run.

    Parameters
    ----------
    structures
        Those that are in a part of the split, in the order of the files.
    split
        Indices into `structures`.
    sae
        float64 [n_elements], of K > 1 levels of theory [K, n_elements], eV, in the order of `structures.elements`.
    weights, source
        See `TrainingData`.
    descriptor
        Settings of the descriptor, carried along.
    hash
        sha256 (hexadecimal) of the contents of all files and of all settings.
    fidelities
        The levels of theory, lowest first.
    baseline
        The level whose energies and forces were subtracted (delta learning), so that those of `structures` are
        differences; None: none.
    """

    sae: np.ndarray
    descriptor: dict[str, Any] = field(default_factory=dict)
    hash: str = ""
    fidelities: tuple[int, ...] = (1,)
    baseline: int | None = None


def prepare(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    selection: Selection = Selection(),
    *,
    split: Sequence[float] = (0.8, 0.1, 0.1),
    split_file: str | os.PathLike | None = None,
    split_seed: int = 0,
    sae: str | Mapping[str, float] | Sequence[str | Mapping[str, float]] = "fit",
    weights: str | os.PathLike | Mapping[str, float] | None = None,
    descriptor: Mapping[str, object] | None = None,
    path: str | os.PathLike | None = None,
) -> Prepared:
    """Read, check and split data, and fit its single-atom energies; or take all that from the last time.

    Parameters
    ----------
    files
        Databases, PyKinML's HDF5 files, and files that ASE reads: paths, glob patterns, `shipped:NAME`.
    selection
        What to take of them; its ids are not used.
    split, split_seed, split_file
        See `splits.make_split`. With a split file only the ids that it lists are read from databases; those that are
        dropped because they lack a level are left out of it.
    sae
        "fit" (to the training and validation structures that have the level), "none", or energies by element (eV); one
        for all levels, or a list with one for each.
    weights
        Weights of structures in the loss, or their file, see `weights.resolve`; None: all 1.
    descriptor
        Plain settings of the descriptor, kept with the data; `backend` is what computes stored descriptors.
    path
        HDF5 file of the prepared data. If it holds the result of the same contents and settings it is taken as it is,
        otherwise it is written; None: nothing is saved.

    Raises
    ------
    InputError
        As the functions named; `path` is one of the data files; the file cannot be written (nothing is changed then).
    """
    given = split, split_file, split_seed, sae, weights, descriptor
    paths, source, settings, digest = recognise(files, selection, *given)
    if path is not None:
        path = Path(path)
        check_path(path, paths, _is_ours)
        ready = _up_to_date(path, digest)
        if ready is not None:
            return replace(ready, source=source)  # the files may have moved

    ids = None if split_file is None else splits.read_tvtmsk(split_file).ids()
    try:
        structures, dropped = sources.read_and_drop(paths, replace(selection, ids=ids))
    except MissingIdsError as error:
        raise DataError(f"{split_file}: {error}") from error
    loss_weights = None if weights is None else weights_module.resolve(weights, structures.labels)
    chosen = splits.make_split(structures, split, split_seed, split_file, dropped)
    check_levels(structures.known_energies, chosen, selection.fidelities)
    used = np.sort(chosen.used)
    if len(used) < len(structures):
        structures = structures.select(used)
        loss_weights = None if loss_weights is None else loss_weights[used]
        chosen = Split(*(np.searchsorted(used, getattr(chosen, part)) for part in PARTS))
    for doubt in plausible.doubts(structures, chosen, selection.baseline is not None):
        _log.warning("%s", doubt)
    assert structures.energies is not None  # what is read has them
    fitted = np.concatenate([chosen.train, chosen.validation])
    # Differences of levels do not contain the energies of single atoms: those start at 0.
    start = None if selection.baseline is None else np.zeros(len(structures.elements))
    energies = sae_module.resolve_levels(
        sae, structures.counts()[fitted], structures.energies[..., fitted], structures.elements, start
    )
    result = Prepared(
        structures,
        chosen,
        energies,
        loss_weights,
        source,
        descriptor=settings["descriptor"],
        hash=digest,
        fidelities=selection.fidelities,
        baseline=selection.baseline,
    )
    if path is not None:
        save(path, result)
    return result


def recognise(
    files: str | os.PathLike | Sequence[str | os.PathLike],
    selection: Selection,
    split: Sequence[float],
    split_file: str | os.PathLike | None,
    split_seed: int,
    sae: str | Mapping[str, float] | Sequence[str | Mapping[str, float]],
    weights: str | os.PathLike | Mapping[str, float] | None,
    descriptor: Mapping[str, object] | None,
) -> tuple[list[Path], DescriptorSource, dict[str, Any], str]:
    """The files of what `prepare` was called with, the descriptors in them, plain settings, and the hash of it all."""
    paths = expand(files)
    digests = {path: file_digest(path) for path in paths}
    # As JSON has them, so that they are equal to what is read back.
    settings = json.loads(
        json.dumps(
            selection.settings()
            | {
                "split": [float(amount) for amount in split],
                "split_seed": int(split_seed),
                "sae": _plain(sae),
                "weights": list(weights.items()) if isinstance(weights, Mapping) else weights is not None,
                "descriptor": dict(descriptor or {}),
            }
        )
    )
    others = {"split": split_file, "weights": None if isinstance(weights, Mapping) else weights}
    source = DescriptorSource(
        settings["descriptor"].get("backend", "native"),
        tuple((path.resolve(), digests[path]) for path in paths if is_hdf5(path)),
    )
    return paths, source, settings, _digest(digests, others, settings)


def check_path(path: Path, files: Sequence[Path], is_ours: Callable[[Path], bool]) -> None:
    """Refuse to write prepared data over one of the files that they are made from, or over others of no run."""
    if path.resolve() in [p.resolve() for p in files]:
        raise ConfigError(f"{path}: is one of the data files and would be overwritten: name another file")
    if path.exists() and not is_ours(path):
        raise ConfigError(f"{path}: holds no prepared data and would be overwritten: name another file")


def _is_ours(path: Path) -> bool:
    """Whether a file is prepared data, of whatever version, or a damaged HDF5 file."""
    if not path.is_file() or not is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            return _texts(file).get("format") == _FORMAT
    except (OSError, KeyError, RuntimeError):
        return True


def _texts(file: h5py.File) -> dict[str, str]:
    """The attributes that are text."""
    attributes = {name: value for name, value in file.attrs.items() if isinstance(value, bytes)}
    return {name: value.decode(errors="replace") for name, value in attributes.items()}


def save(path: str | os.PathLike, prepared: Prepared) -> None:
    """Write prepared data as HDF5, in one step. Every array carries a checksum.

    Raises
    ------
    InputError
        The file cannot be written; an older one is left as it was.
    """
    path = Path(path)
    structures = prepared.structures
    arrays = {
        "species": structures.species,
        "coordinates": structures.coordinates,
        "offsets": structures.offsets,
        "energies": structures.energies,
        "forces": structures.forces,
        "cells": structures.cells,
        "periodic": structures.periodic,
        "stresses": structures.stresses,
        "labels": np.array([label.encode() for label in structures.labels]),
        "sae": prepared.sae,
        "weights": prepared.weights,
        **{f"split/{part}": getattr(prepared.split, part) for part in PARTS},
    }
    # HDF5 does not recover from a full disk, so the file is built in memory and written like any other.
    with h5py.File(path.name, "w", driver="core", backing_store=False, libver="latest") as file:
        # Strings of fixed length, because those of variable length lie where HDF5 has no checksums.
        attributes = {
            "format": _FORMAT,
            "version": str(_VERSION),
            "hash": prepared.hash,
            "elements": json.dumps(structures.elements),
            "descriptor": json.dumps(prepared.descriptor),
            "backend": prepared.source.backend,
            "fidelities": json.dumps(prepared.fidelities),
            "baseline": json.dumps(prepared.baseline),
            "descriptor_files": json.dumps([[str(path), digest] for path, digest in prepared.source.files]),
            "units": "eV, angstrom, eV/angstrom, eV/angstrom^3",
        }
        file.attrs.update({name: np.bytes_(value.encode()) for name, value in attributes.items()})
        for name, array in arrays.items():
            if array is not None:
                file.create_dataset(name, data=array, **({"fletcher32": True} if array.size else {}))
        file.flush()
        image = file.id.get_file_image()
    with replacing(path) as temporary:
        temporary.write_bytes(image)


def load(path: str | os.PathLike) -> Prepared:
    """Read prepared data.

    Raises
    ------
    InputError
        The file is missing, damaged, or of another kind or version.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file: run kinml-fast prepare first")
    try:
        with h5py.File(path, "r", locking=False) as file:  # it is only ever replaced as a whole
            attributes = _texts(file)
            if attributes.get("format") != _FORMAT or attributes.get("version") != str(_VERSION):
                raise DataError(f"{path}: is not prepared data of this version: run kinml-fast prepare again")
            arrays: dict[str, np.ndarray] = {}
            file.visititems(
                lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
            )
        structures = Structures(
            elements=tuple(json.loads(attributes["elements"])),
            labels=tuple(label.decode() for label in arrays["labels"].tolist()),
            coordinates=arrays.get("coordinates"),
            forces=arrays.get("forces"),
            cells=arrays.get("cells"),
            periodic=arrays.get("periodic"),
            stresses=arrays.get("stresses"),
            **{name: arrays[name] for name in ("species", "offsets", "energies")},
        )
        files = tuple((Path(name), digest) for name, digest in json.loads(attributes["descriptor_files"]))
        split = Split(*(arrays[f"split/{part}"] for part in PARTS))
        return Prepared(
            structures,
            split,
            arrays["sae"],
            arrays.get("weights"),
            DescriptorSource(attributes["backend"], files),
            descriptor=json.loads(attributes["descriptor"]),
            hash=attributes["hash"],
            fidelities=tuple(json.loads(attributes["fidelities"])),
            baseline=json.loads(attributes["baseline"]),
        )
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, InputError) and str(error).startswith(str(path)):
            raise
        raise DataError(f"{path}: is damaged ({error}): run kinml-fast prepare again") from error


def _plain(setting: object) -> object:
    """A setting as JSON has it: lists and dictionaries."""
    if isinstance(setting, Mapping):
        return dict(setting)
    return (
        [_plain(part) for part in setting]
        if isinstance(setting, Sequence) and not isinstance(setting, str)
        else setting
    )


def check_levels(known: np.ndarray, split: Split, fidelities: Sequence[int]) -> None:
    """Each level must be trained on somewhere, and the highest, which a model is judged by, validated.

    `known` is bool [K, n_structures]: which structures have an energy at each level.
    """
    for fidelity, at_level in zip(fidelities, known, strict=True):
        if not at_level[split.train].any():
            raise DataError(
                f"no training structure has an energy of fidelity {fidelity}: enlarge the training part or take more "
                "data"
            )
    if not known[-1][split.validation].any():
        raise DataError(
            f"no validation structure has an energy of fidelity {fidelities[-1]}, the highest, by which a model "
            "is judged: enlarge the validation part or take more data"
        )
    if len(split.test) and not known[-1][split.test].any():
        _log.warning("no test structure has an energy of fidelity %d, the highest", fidelities[-1])


def _up_to_date(path: Path, digest: str) -> Prepared | None:
    if not path.exists():
        return None
    try:
        ready = load(path)
    except InputError as error:
        _log.warning("%s; preparing the data anew", error)
        return None
    if ready.hash != digest:
        _log.info("%s: data or settings have changed; preparing the data anew", path)
        return None
    _log.info("%s: up to date, %d structures", path, len(ready.structures))
    return ready


def _digest(
    digests: Mapping[Path, str], others: Mapping[str, str | os.PathLike | None], settings: Mapping[str, object]
) -> str:
    # Folders do not matter, names do: labels and formulas come from them.
    total = hashlib.sha256(json.dumps([_FORMAT, _VERSION, settings], sort_keys=True).encode())
    for path, digest in digests.items():
        total.update(f"\n{path.name} {digest}".encode())
        # What a running writer has not yet moved into the database itself.
        journal = path.with_name(path.name + "-wal")
        if is_sqlite(path) and journal.exists():
            total.update(f" {file_digest(journal)}".encode())
    for kind, other in others.items():
        if other is not None:
            total.update(f"\n{kind} {file_digest(Path(other))}".encode())
    return total.hexdigest()
