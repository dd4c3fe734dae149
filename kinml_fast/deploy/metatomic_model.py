"""A model as metatomic takes it (https://docs.metatensor.org/metatomic), and with it i-PI, TorchSim, eOn, LAMMPS, ASE.

Imported only where the package metatomic-torch is. It and TorchScript read hints, which are no texts here.
"""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple  # noqa: UP035  (TorchScript reads the hints)

import numpy as np
import torch
from ase.data import atomic_numbers
from metatensor.torch import Labels, TensorBlock, TensorMap
from metatomic.torch import (
    AtomisticModel,
    ModelCapabilities,
    ModelEvaluationOptions,
    ModelMetadata,
    ModelOutput,
    NeighborListOptions,
    System,
    load_atomistic_model,
)
from torch import Tensor
from vesin.metatomic import compute_requested_neighbors

from kinml_fast import ops
from kinml_fast._library import library_path
from kinml_fast.nn import EnergyModel, Ensemble
from kinml_fast.nn.aev import AEV
from kinml_fast.nn.networks import SpeciesNetworks

log = logging.getLogger(__name__)

_ENERGY = "energy"


class MetatomicModel(torch.nn.Module):
    """Energies of atoms and systems at the highest level, differentiable with respect to positions and cells.

    Parameters
    ----------
    model
        Of an ensemble the energy is the mean, and ``energy_ensemble`` has those of the members.
    """

    if TYPE_CHECKING:  # TorchScript would read these
        weights: Tensor
        sae: Tensor
        species_of: Tensor
        aev: AEV
        networks: SpeciesNetworks

    def __init__(self, model: EnergyModel | Ensemble) -> None:
        super().__init__()
        self.aev = model.aev
        self.networks = model.networks
        self.levels = model.levels
        self.members = model.n_members if isinstance(model, Ensemble) else 1
        self.register_buffer("weights", model.networks.weights.detach().reshape(self.members, -1))
        self.register_buffer("sae", model.sae.reshape(self.members, self.levels, -1))
        species = torch.full((max(atomic_numbers.values()) + 1,), -1)
        for code, element in enumerate(model.elements):
            species[atomic_numbers[element]] = code
        self.register_buffer("species_of", species)
        cutoff = max(model.descriptor.radial_cutoff, model.descriptor.angular_cutoff)
        self.options = NeighborListOptions(cutoff=cutoff, full_list=True, strict=False)

    def requested_neighbor_lists(self) -> List[NeighborListOptions]:  # noqa: UP006
        """What the engine has to find: a full list within the cutoff."""
        return [self.options]

    def forward(
        self,
        systems: List[System],  # noqa: UP006
        outputs: Dict[str, ModelOutput],  # noqa: UP006
        selected_atoms: Optional[Labels] = None,  # noqa: UP045
    ) -> Dict[str, TensorMap]:  # noqa: UP006
        """See metatomic's ModelInterface."""
        energies, atoms = self._atomic_energies(systems)  # [M, n], [n, 2]
        if selected_atoms is not None:
            taken = self._among(atoms, selected_atoms)
            energies, atoms = energies[:, taken], atoms[taken]
        results: Dict[str, TensorMap] = {}  # noqa: UP006
        for name, output in outputs.items():
            values = energies if name == "energy_ensemble" else energies.sum(dim=0, keepdim=True) / energies.size(0)
            if output.sample_kind == "atom":
                samples = Labels(["system", "atom"], atoms.to(torch.int32))
            else:
                sums = torch.zeros(values.size(0), len(systems), dtype=values.dtype, device=values.device)
                values = sums.index_add(1, atoms[:, 0], values)
                numbers = torch.arange(len(systems), dtype=torch.int32, device=values.device)
                samples = Labels(["system"], numbers.reshape(-1, 1))
            members = torch.arange(values.size(0), dtype=torch.int32, device=values.device)
            block = TensorBlock(
                values=values.transpose(0, 1).to(systems[0].positions.dtype),
                samples=samples,
                components=torch.jit.annotate(List[Labels], []),  # noqa: UP006
                properties=Labels(["energy"], members.reshape(-1, 1)),
            )
            key = Labels(["_"], torch.zeros(1, 1, dtype=torch.int32, device=values.device))
            results[name] = TensorMap(keys=key, blocks=[block])
        return results

    def _atomic_energies(self, systems: List[System]) -> Tuple[Tensor, Tensor]:  # noqa: UP006
        """Energies [M, n] of all atoms, eV, float64, and the system and the number in it of each, [n, 2]."""
        coordinates, species, atoms = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
        cells, periodic = [torch.empty(0)], [torch.empty(0)]
        counts, neighbours, shifts = [torch.empty(0)], [torch.empty(0)], [torch.empty(0)]
        offsets = [0]
        for i, system in enumerate(systems):
            n, device = len(system), system.positions.device
            numbers = torch.arange(n, device=device)
            pairs = system.get_neighbor_list(self.options).samples.values.to(torch.int64)
            pairs = pairs[torch.argsort(pairs[:, 0], stable=True)]
            coordinates.append(system.positions)
            species.append(self.species_of[system.types])
            atoms.append(torch.stack([torch.full_like(numbers, i), numbers], dim=1))
            cells.append(system.cell.to(torch.float64))
            periodic.append(system.pbc.to(torch.int64))
            counts.append(torch.bincount(pairs[:, 0], minlength=n))
            neighbours.append(pairs[:, 1] + offsets[-1])
            shifts.append(pairs[:, 2:5])
            offsets.append(offsets[-1] + n)
        all_species, all_atoms = torch.cat(species[1:]), torch.cat(atoms[1:])
        ends = torch.cumsum(torch.cat(counts[1:]), dim=0)
        around = ops.surroundings(
            torch.stack(cells[1:]),
            torch.stack(periodic[1:]),
            None,
            torch.cat([torch.zeros_like(ends[:1]), ends]),
            torch.cat(neighbours[1:]),
            torch.cat(shifts[1:]),
        )
        starts = torch.tensor(offsets, device=all_species.device)
        features = self.aev(torch.cat(coordinates[1:]), all_species, starts, around)
        each = torch.arange(offsets[-1] + 1, device=all_species.device)
        energies: List[Tensor] = []  # noqa: UP006
        for member in range(self.weights.size(0)):
            sae = self.sae[member] if self.levels > 1 else self.sae[member, 0]
            own = self.networks.with_weights(features, all_species, each, sae, self.weights[member])
            energies.append(own[-1] if self.levels > 1 else own)
        of_members = torch.stack(energies)
        if self.aev.repels:
            repulsion = self.aev.atomic_repulsion(torch.cat(coordinates[1:]), all_species, starts, around)
            of_members = of_members + repulsion.to(torch.float64)
        return of_members, all_atoms

    def _among(self, atoms: Tensor, selected: Labels) -> Tensor:
        """Which rows of atoms [n, 2] are selected."""
        largest = int(atoms[:, 1].max()) + 1 if atoms.size(0) > 0 else 1
        wanted = selected.column("system").to(torch.int64) * largest + selected.column("atom").to(torch.int64)
        return torch.isin(atoms[:, 0] * largest + atoms[:, 1], wanted).nonzero().flatten()


def save(path: Path, model: EnergyModel | Ensemble, about: dict[str, Any]) -> None:
    """Write a metatomic file, and beside it in ``extensions`` the libraries that it needs.

    Parameters
    ----------
    path
        The file.
    model
        Any.
    about
        Plain values for the file's metadata.
    """
    outputs = {_ENERGY: ModelOutput(unit="eV", sample_kind="atom", description="energy at the highest level of theory")}
    if isinstance(model, Ensemble):
        outputs["energy_ensemble"] = ModelOutput(unit="eV", sample_kind="atom", description="energies of the members")
    module = MetatomicModel(model).eval()
    capabilities = ModelCapabilities(
        outputs=outputs,
        atomic_types=[atomic_numbers[element] for element in model.elements],
        interaction_range=module.options.cutoff,
        length_unit="angstrom",
        supported_devices=["cpu", "cuda"],
        dtype=str(model.dtype).removeprefix("torch."),
    )
    metadata = ModelMetadata(
        name="kinml_fast",
        description="ANI-type neural network potential",
        extra={name: str(value) for name, value in about.items()},
    )
    # metatomic names libraries by their place below that of Python: those of a tree that is worked on have none.
    installed = library_path().resolve().is_relative_to(Path(sys.prefix).resolve())
    if not installed:
        log.warning("%s is not installed: other computers will not find it beside the model", library_path())
    exported = AtomisticModel(module, metadata, capabilities)
    exported.save(str(path), collect_extensions=str(path.parent / "extensions") if installed else None)


def load(path: Path) -> Any:
    """A metatomic file, with the libraries beside it."""
    return load_atomistic_model(str(path), extensions_directory=str(path.parent / "extensions"))


def energy_forces_virial(
    loaded: Any, positions: np.ndarray, numbers: np.ndarray, cell: np.ndarray, periodic: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What an engine gets from a file.

    Parameters
    ----------
    loaded
        From `load`.
    positions, numbers, cell, periodic
        [n, 3] in Å, atomic numbers [n], [3, 3] in Å, [3].

    Returns
    -------
    tuple of ndarray
        Energy [1] in eV, forces [n, 3] in eV/Å, virial [3, 3] in eV.
    """
    dtype = getattr(torch, loaded.capabilities().dtype)
    strain = torch.eye(3, dtype=dtype, requires_grad=True)
    x = torch.tensor(positions, dtype=dtype, requires_grad=True)
    along = torch.tensor(np.asarray(periodic, bool))
    vectors = torch.tensor(cell, dtype=dtype) * along[:, None]
    system = System(torch.tensor(numbers, dtype=torch.int32), x @ strain, vectors @ strain, along)
    compute_requested_neighbors(system, system_length_unit="angstrom", model=loaded)
    options = ModelEvaluationOptions(length_unit="angstrom", outputs={_ENERGY: ModelOutput(sample_kind="system")})
    energy = loaded([system], options, check_consistency=True)[_ENERGY].block().values
    slope, virial = torch.autograd.grad(energy.sum(), [x, strain])
    return energy.detach().numpy().reshape(1), -slope.numpy(), virial.numpy().T
