"""A model as TorchSim takes it (https://torchsim.github.io/torch-sim): many molecules or crystals in one call.

Imported only where the package torch-sim-atomistic is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor
from torch_sim import SimState
from torch_sim.models.interface import ModelInterface

from kinml_fast import ops
from kinml_fast.deploy import dispersion, model_file
from kinml_fast.errors import DataError, ModelError


class TorchSimModel(ModelInterface):
    """Energies, forces and stresses of TorchSim's states at the highest level, of an ensemble the means.

    Parameters
    ----------
    source
        See `model_file.resolve`.
    device
        Where to compute, as there; the states must be there.
    compute_forces, compute_stress
        What `forward` returns. The stress of a molecule is 0.

    Raises
    ------
    InputError
        The model cannot be read, or its energies are differences (delta learning).
    """

    def __init__(
        self,
        source: model_file.Source | Sequence[model_file.Source],
        device: str = "auto",
        compute_forces: bool = True,
        compute_stress: bool = True,
    ) -> None:
        super().__init__()
        self.model = model_file.resolve(source, device)
        if self.model.baseline is not None:
            raise ModelError(
                f"the model gives differences from fidelity {self.model.baseline} (delta learning), not energies: "
                "train a model of whole energies for TorchSim"
            )
        dispersion.check_without(self.model, "TorchSim does", "add D3 there by a model of its own")
        self.model.requires_grad_(False)
        self._device, self._dtype = self.model.sae.device, self.model.dtype
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._places = torch.full((len(chemical_symbols),), -1, device=self._device)
        for species, element in enumerate(self.model.elements):
            self._places[atomic_numbers[element]] = species
        # Of the last state: its atomic numbers and what the model takes for them.
        self._numbers = self._species = torch.empty(0, dtype=torch.int64, device=self._device)

    @property
    def compute_forces(self) -> bool:
        """Whether `forward` returns forces."""
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, wanted: bool) -> None:
        self._compute_forces = wanted

    @property
    def compute_stress(self) -> bool:
        """Whether `forward` returns stresses."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, wanted: bool) -> None:
        self._compute_stress = wanted

    def forward(self, state: SimState | dict[str, Any], **_: object) -> dict[str, Tensor]:
        """Of all systems of a state.

        Returns
        -------
        dict
            ``energy`` [n_systems] in eV, and if wanted ``forces`` [n_atoms, 3] in eV/Å and ``stress``
            [n_systems, 3, 3] in eV/Å³ (ASE's sign), in the model's dtype.

        Raises
        ------
        DataError
            An element that the model does not know.
        """
        if isinstance(state, dict):
            state = SimState(**state, masses=torch.ones_like(state["atomic_numbers"]))
        counts = torch.bincount(state.system_idx, minlength=state.n_systems)
        offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        periodic = torch.as_tensor(state.pbc, device=self._device).to(torch.int64).expand(3)
        cells = state.row_vector_cell.to(torch.float64)
        around = ops.surroundings(cells, periodic.expand(len(cells), 3).contiguous()) if periodic.any() else None
        # From the first atom of each system: far from the origin float32 has too few digits.
        positions = state.positions - state.positions[offsets[:-1]][state.system_idx]
        arguments = positions.to(self._dtype), self._codes(state.atomic_numbers), offsets, around
        with torch.inference_mode():
            if self._compute_stress and around is not None:
                energies, forces, virials = self.model.energies_forces_virials(*arguments)
                volumes = torch.linalg.det(cells).abs()[:, None, None]
                stress = (virials + virials.mT) / (2 * volumes)
            else:
                energies, forces = self.model.energies_and_forces(*arguments)
                stress = torch.zeros(len(cells), 3, 3, dtype=self._dtype, device=self._device)
        results = {"energy": energies.to(self._dtype)}
        if self._compute_forces:
            results["forces"] = forces
        if self._compute_stress:
            results["stress"] = stress.to(self._dtype)
        return {name: value.clone() for name, value in results.items()}  # integrators change them in place

    def _codes(self, numbers: Tensor) -> Tensor:
        """[n_atoms] the model's codes of atomic numbers."""
        if not torch.equal(numbers, self._numbers):
            species = self._places[numbers]
            if bool((species < 0).any()):
                unknown = sorted({chemical_symbols[number] for number in numbers[species < 0].tolist()})
                raise DataError(
                    f"the state contains {' '.join(unknown)}, but the model knows only "
                    f"{' '.join(self.model.elements)}: take other molecules or train a model with this element"
                )
            self._numbers, self._species = numbers.clone(), species
        return self._species
