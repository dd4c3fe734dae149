"""PyKinML's data: structures of a database, their descriptors and energies, divided and kept in a folder.

Native data sets are behind all this. What PyKinML stores for each structure (descriptors by species, Jacobians, padded
forces) is computed when a program asks for it; training does not.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kinml_fast.data import prepared, sources
from kinml_fast.data.files import expand, is_hdf5, replacing
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.sae import resolve_levels
from kinml_fast.data.sources import DescriptorSource, file_digest
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import DataError
from kinml_fast.nn import AEVParameters
from kinml_fast.pykinml.arguments import configuration, device_of, note
from kinml_fast.train import config as configurations
from kinml_fast.train.config import Config

log = logging.getLogger(__name__)

PREPARED, CONFIG = "prepared.h5", "config.yaml"
"""The native files in a folder of prepared data: what was taken, and the configuration that said what to take."""

_CHUNK = 64  # structures at a time whose descriptors are computed


class PesDataset(torch.utils.data.Dataset):
    """Structures as PyKinML's training loop sees them: item i is a list with a value for each key.

    Parameters
    ----------
    structures
        In the order of the items, elements in the order of `descriptor`.
    descriptor
        What `aevs` and `daevs` are.
    keys
        Of `aevs` (for each species the descriptors [n_atoms, D] of its atoms), `daevs` (their Jacobians
        [n_atoms, D, C]), `forces` [1, C] in eV/Å, `fdims` (3 n, the true length of the forces) and `engs` [1] in eV.
        C is three times the size of the largest structure; what is beyond 3 n is zero.
    source
        Where stored descriptors come from.
    config
        The native configuration of the run.
    sae
        Single-atom energies [n_elements], eV, that go with the energies.
    """

    def __init__(
        self,
        structures: Structures,
        descriptor: AEVParameters,
        keys: Sequence[str],
        source: DescriptorSource | None = None,
        config: Config | None = None,
        sae: np.ndarray | None = None,
    ) -> None:
        self.structures = structures.with_elements(descriptor.elements)
        self.descriptor, self.keys = descriptor, tuple(keys)
        self.source, self.config, self.sae = source or DescriptorSource(), config, sae
        self._width = 3 * int(structures.sizes.max(initial=0))

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> list[Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return next(self.items([index % len(self)]))

    def items(self, indices: Sequence[int] | None = None) -> Iterator[list[Any]]:
        """The items of some structures, or of all, one after another."""
        wanted = np.arange(len(self)) if indices is None else np.asarray(indices)
        for first in range(0, len(wanted), _CHUNK):
            yield from self._some(self.structures.select(wanted[first : first + _CHUNK]))

    def _some(self, structures: Structures) -> Iterator[list[Any]]:
        dtype = torch.get_default_dtype()
        if "aevs" in self.keys:
            found = self.source.load(structures, self.descriptor, dtype, jacobian="daevs" in self.keys)
        for i, (begin, end) in enumerate(zip(structures.offsets[:-1], structures.offsets[1:], strict=True)):
            species = torch.from_numpy(structures.species[begin:end])
            values: dict[str, Any] = {"fdims": 3 * len(species)}
            if "engs" in self.keys and structures.energies is not None:
                values["engs"] = torch.tensor([structures.energies[i]], dtype=dtype)
            if "forces" in self.keys and structures.forces is not None:
                values["forces"] = torch.zeros(1, self._width, dtype=dtype)
                values["forces"][0, : values["fdims"]] = torch.from_numpy(structures.forces[begin:end].ravel())
            for key, rows in (("aevs", "features"), ("daevs", "jacobian")):
                if key in self.keys:
                    of_atoms = getattr(found, rows)[begin:end]
                    if key == "daevs":
                        of_atoms = torch.nn.functional.pad(of_atoms, (0, self._width - of_atoms.shape[2]))
                    values[key] = [of_atoms[species == s].clone() for s in range(len(self.descriptor.elements))]
            yield [values[key] for key in self.keys]


class Data_pes:
    """Structures of a run: `get_data` reads them, `prep_training_data` and `prep_testing_data` keep them in folders.

    Parameters
    ----------
    atom_types
        Elements in the order of the networks.

    Attributes
    ----------
    structures : Structures
        What was read.
    md : list of str
        What each structure is called, "C5H5/17".
    ndat, num_nn : int
        Numbers of structures and of elements.
    full_symb_data : list of list of str
        Chemical symbols of each structure.
    sae_energies : numpy array
        Single-atom energies, [n_elements], eV, once training data were prepared.
    """

    def __init__(self, atom_types: Sequence[str] | None = None) -> None:
        if atom_types:
            self.initialize(atom_types)

    def initialize(self, atom_types: Sequence[str]) -> None:
        """Set the elements."""
        self.atom_types, self.num_nn = list(atom_types), len(atom_types)

    def get_data(
        self,
        args: argparse.Namespace,
        xid: Sequence[str] | None = None,
        fid: int | str = "",
        get_aevs: bool = True,
    ) -> None:
        """Read structures with energies, and forces where there are any.

        Parameters
        ----------
        args
            Says the files and what to take from them.
        xid
            Only these: "C5H5/17", or numbers for a single file; None: all.
        fid
            Level of theory; "": `args.fidlevel`.
        get_aevs
            Not needed: descriptors are computed where they are used.
        """
        config = configuration(args)
        data, fidelity = config.data, int(args.fidlevel if fid == "" else fid)
        paths = expand(data.files)
        # What a temperature or names leave out may stand in a list of structures; what is in no file may not.
        selected = data.temperature is not None or data.names is not None
        ids = None if xid is None or selected else _ids(xid, paths)
        self.structures = sources.read(paths, replace(data.selection, fidelity=fidelity, ids=ids))
        if xid is not None and selected:
            labels = {f"{stem}/{number}" for stem, numbers in _ids(xid, paths).items() for number in numbers}
            chosen = [i for i, label in enumerate(self.structures.labels) if label in labels]
            log.info("%d of %d structures in the list are selected", len(chosen), len(labels))
            self.structures = self.structures.select(chosen)
        self.fidelities, self.baseline = (fidelity,), data.baseline
        self.source = DescriptorSource(
            config.descriptor.backend, tuple((p.resolve(), file_digest(p)) for p in paths if is_hdf5(p))
        )
        self.config = config
        self.descriptor = descriptor(config)
        self.dimdat = self.descriptor.length
        self.initialize(self.descriptor.elements)
        self._describe()
        difference = "" if self.baseline is None else f" minus fidelity {self.baseline}"
        names = ", ".join(str(path) for path in paths)
        log.info("%d structures of fidelity %s%s from %s", self.ndat, fidelity, difference, names)

    def prep_training_data(
        self, train_ind: Collection[str], bpath: str | os.PathLike, with_aev_data: bool = True
    ) -> None:
        """Keep training and validation structures in a folder, and fit single-atom energies to them.

        Parameters
        ----------
        train_ind
            Their names, as in `md`.
        bpath
            The folder.
        with_aev_data
            Whether descriptors are kept there too, under PyKinML's names.
        """
        self.pool = self._numbers(train_ind)
        if not self.pool.size:
            raise DataError(f"none of the {self.ndat} structures is for training: mark some of them with 2")
        assert self.structures.energies is not None
        counts, energies = self.structures.counts()[self.pool], self.structures.energies[self.pool]
        start = None if self.baseline is None else np.zeros(self.num_nn)
        self.sae_energies = resolve_levels(self.config.data.sae, counts, energies, self.structures.elements, start)
        left = energies - counts @ self.sae_energies
        log.info(
            "single-atom energies, eV: %s; what is left of the energies: %.6f to %.6f eV, mean %.1e",
            ", ".join(f"{e} {v:.8f}" for e, v in zip(self.structures.elements, self.sae_energies, strict=True)),
            left.min(),
            left.max(),
            left.mean(),
        )
        self._keep("train", self.pool, Path(bpath), with_aev_data)
        with replacing(Path(bpath) / "sae_energies.npy") as path, path.open("wb") as file:
            np.save(file, self.sae_energies)

    def prep_testing_data(
        self, test_ind: Collection[str], bpath: str | os.PathLike, with_aev_data: bool = True
    ) -> None:
        """Keep test structures in a folder; the arguments are those of `prep_training_data`."""
        self.test = self._numbers(test_ind)
        self._keep("test", self.test, Path(bpath), with_aev_data)

    def save(self, bpath: str | os.PathLike) -> None:
        """Write the native files of what `prep_training_data` and `prep_testing_data` have taken into a folder."""
        used = np.concatenate([self.pool, self.test])
        first, last = np.split(np.arange(len(used)), [len(self.pool)])
        whole = Prepared(
            self.structures.select(used),
            Split(first, last[:0], last),
            self.sae_energies,
            source=self.source,
            descriptor=self.config.descriptor.model_dump(),
            fidelities=self.fidelities,
            baseline=self.baseline,
        )
        prepared.save(Path(bpath) / PREPARED, whole)
        configurations.save(self.config, Path(bpath) / CONFIG)

    def aev_from_xyz(
        self,
        xyz_db: Sequence[Sequence[Any]],
        nrho_rad: int = 32,
        nrho_ang: int = 8,
        nalpha: int = 8,
        R_c: Sequence[float] = (4.6, 3.1),
        pack_n_write: bool = True,
        myaev: Any = None,
        nblk: int | None = None,
        meta_db: Any = None,
        beta: float = 0.95,
    ) -> None:
        """Take geometries from memory, for `prep_data`.

        Parameters
        ----------
        xyz_db
            For each structure its chemical symbols and coordinates [n, 3] in Å.
        nrho_rad, nrho_ang, nalpha, R_c, beta
            Settings of the descriptor.
        pack_n_write, myaev, nblk, meta_db
            Not needed.
        """
        one = Structures.of_one_formula
        parts = [one(list(symbols), np.asarray(x)[None], None, elements=self.atom_types) for symbols, x in xyz_db]
        self.structures = concatenate(parts, self.atom_types)
        self.descriptor = AEVParameters.aevmod(tuple(self.atom_types), nrho_rad, nrho_ang, nalpha, R_c, beta)
        self.dimdat, self.source = self.descriptor.length, DescriptorSource()
        self._describe()

    def prep_data(self, device: Any = "cpu") -> int:
        """Compute `aevs` and `daevs`: for each structure and species [n_atoms, D] and [n_atoms, D, 3 n_max]."""
        place = device_of(device)
        items = PesDataset(self.structures, self.descriptor, ("aevs", "daevs"), self.source).items()
        self.aevs, self.daevs = [], []
        for aevs, daevs in items:
            self.aevs.append([aev.to(place) for aev in aevs])
            self.daevs.append([daev.to(place) for daev in daevs])
        return 0

    def _describe(self) -> None:
        self.ndat, self.md = len(self.structures), list(self.structures.labels)
        self.full_symb_data = [list(self.structures.symbols(i)) for i in range(self.ndat)]

    def _numbers(self, names: Collection[str]) -> np.ndarray:
        names = set(names)
        return np.array([i for i, label in enumerate(self.md) if label in names], dtype=np.int64)

    def _keep(self, part: str, indices: np.ndarray, folder: Path, with_aev_data: bool) -> None:
        """Write PyKinML's files of a part, but for the Jacobians."""
        forces = self.config.training.loss.forces and self.structures.forces is not None
        keys = [*(["aevs"] if with_aev_data else []), *(["forces", "fdims"] if forces else []), "engs"]
        items = list(PesDataset(self.structures.select(indices), self.descriptor, keys, self.source).items())
        folder.mkdir(parents=True, exist_ok=True)
        for place, key in enumerate(keys):
            _save(folder / f"{part}_{key}", [item[place] for item in items])
        if with_aev_data and part == "train":
            _save(folder / "aev_length", self.dimdat)
        if with_aev_data and forces:
            note("Jacobians (train_daevs, test_daevs) are not written: training takes forces from coordinates")


def get_data(
    args: argparse.Namespace, xid: Sequence[str] | None = None, fid: int | str = "", get_aevs: bool = True
) -> Data_pes:
    """The structures that `args` says, as `Data_pes` with its `get_data` called."""
    dpes = Data_pes(args.present_elements)
    dpes.get_data(args, xid, fid, get_aevs)
    return dpes


def descriptor(config: Config) -> AEVParameters:
    """The descriptor of a configuration."""
    settings = config.descriptor.model_dump(exclude={"backend"})
    return AEVParameters.aevmod(tuple(config.data.elements or ()), **settings)


def _ids(xid: Sequence[str], paths: Sequence[Path]) -> dict[str, set[int]]:
    """Ids by the name of their file."""
    ids: dict[str, set[int]] = {}
    for name in map(str, xid):
        stem, _, number = name.rpartition("/")
        if not number.isdecimal() or (not stem and len(paths) > 1):
            raise DataError(f"{name!r} names no structure: expected the name of its file and a number, like C5H5/17")
        ids.setdefault(stem or paths[0].stem, set()).add(int(number))
    return ids


def _save(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        torch.save(value, temporary)
