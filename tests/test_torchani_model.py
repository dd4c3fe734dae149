"""Models of TorchANI as models of this package: the same numbers, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import ase.units
import pytest
import torch
from torch import Tensor

from kinml_fast import cli, reference
from kinml_fast.deploy import model_file, torchani_model
from kinml_fast.errors import ModelError
from kinml_fast.nn import EnergyModel, Ensemble

RADIAL = {"radial_shifts": [0.9, 2.0, 3.5], "radial_eta": 16.0, "radial_cutoff": 5.2}
ANGULAR = {
    "angular_shifts": [0.9, 2.2],
    "angular_eta": 8.0,
    "angular_cutoff": 3.5,
    "zeta": 32.0,
    "sections": [0.4, 2.0],
}
LENGTH = 2 * 3 + 3 * 4
WIDTHS = {"H": (5, 4, 1), "C": (6, 3, 1)}

TEXT = """ANI(
  (neighborlist): AllPairs()
  (energy_shifter): SelfEnergy()
  (potentials): ModuleDict(
    (nnp): NNPotential(
      (aev_computer): AEVComputer(
        (radial): ANIRadial(
          eta=16.0000, 
          cutoff=5.2000,
          (cutoff_fn): CutoffCosine()
        )
        (angular): ANIAngular(
          zeta=32.0000, 
          cutoff=3.5000,
          (cutoff_fn): CutoffCosine()
        )
      )
      (neural_networks): Ensemble(
        (members): ModuleList(
          (0-1): 2 x ANINetworks(
            (atomics): ModuleDict(
              (H): AtomicNetwork(
                (activation): TightCELU()
              )
              (C): AtomicNetwork(
                (activation): TightCELU()
              )
            )
          )
        )
      )
    )
  )
)"""  # noqa: W291 (as TorchANI prints it)
"""What TorchANI 2.9 prints, without the lines that nobody reads."""


def state(members: int = 2) -> dict[str, Tensor]:
    """A state dict with the names and shapes of TorchANI 2.9."""
    generator = torch.Generator().manual_seed(0)
    aev = "potentials.nnp.aev_computer."
    values = OrderedDict(
        {
            "atomic_numbers": torch.tensor([1, 6]),
            "energy_shifter.self_energies": torch.tensor([-0.5, -37.8], dtype=torch.float64),
            "species_converter.conv_tensor": torch.full((120,), -1),
            f"{aev}triu_index": torch.tensor([[0, 1], [1, 2]]),
        }
    )
    for name, number in {**RADIAL, **ANGULAR}.items():
        term, _, key = name.partition("_")
        if key != "cutoff":
            place = f"{term}.{key}" if key else f"angular.{term}"
            values[aev + place] = torch.atleast_1d(torch.tensor(number, dtype=torch.float64))
    for member in range(members):
        for element, widths in WIDTHS.items():
            for layer, (inputs, outputs) in enumerate(zip((LENGTH, *widths), widths, strict=False)):
                of_member = f"members.{member}." if members > 1 else ""
                place = f"layers.{layer}" if layer < len(widths) - 1 else "final_layer"
                key = f"potentials.nnp.neural_networks.{of_member}atomics.{element}.{place}"
                values[f"{key}.weight"] = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
                values[f"{key}.bias"] = torch.randn(outputs, generator=generator, dtype=torch.float64)
    return values


def by_definition(values: dict[str, Tensor], x: Tensor, species: Tensor, members: int) -> Tensor:
    """The energy of a molecule in Hartree: the mean over the members, from the formulas of the ANI papers."""
    offsets = torch.tensor([0, len(x)])
    vectors = reference.aev(
        x, species, offsets, n_species=2, beta=0.95, radial_factor=0.25, angular_factor=2.0, **RADIAL, **ANGULAR
    )
    total = values["energy_shifter.self_energies"][species].sum()
    for member in range(members):
        prefix = "potentials.nnp.neural_networks." + (f"members.{member}." if members > 1 else "") + "atomics."
        for vector, code in zip(vectors, species.tolist(), strict=True):
            y = vector
            for place in ("layers.0", "layers.1", "final_layer"):
                key = f"{prefix}{'HC'[code]}.{place}"
                y = values[f"{key}.weight"] @ y + values[f"{key}.bias"]
                if place != "final_layer":
                    y = torch.where(y > 0, y, 0.1 * torch.expm1(y / 0.1))
            total = total + y[0] / members
    return total


def molecule() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.tensor([[0, 0, 0], [1.3, 0, 0], [-0.6, 0.9, 0], [1.9, -0.9, 0.1], [2.0, 0.8, 0.6]], dtype=torch.float64)
    x = x + 0.05 * torch.randn(5, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([1, 1, 0, 0, 0])


def saved(folder: Path, values: object) -> Path:
    path = folder / "ani.pt"
    torch.save(values, path)
    return path


@pytest.mark.parametrize("members", [1, 2])
def test_the_file_gives_the_energies_and_forces_of_the_formulas(tmp_path, members):
    values = state(members)
    path = saved(tmp_path, {"state_dict": values, "repr": TEXT})
    output = tmp_path / "model.pt"
    assert cli.main(["convert", str(path), "--from", "torchani", "-o", str(output), "--fidelity", "3"]) == 0
    model = model_file.load(output)
    assert isinstance(model, Ensemble if members > 1 else EnergyModel)
    assert (model.elements, model.fidelities) == (("H", "C"), (3,))
    x, species = molecule()
    x.requires_grad_()
    energy = by_definition(values, x, species, members) * ase.units.Hartree
    forces = -torch.autograd.grad(energy, x)[0]
    found = model.energies_and_forces(x.detach(), species, torch.tensor([0, 5]))
    assert found[0].item() == pytest.approx(energy.item(), abs=1e-10)
    torch.testing.assert_close(found[1], forces, rtol=0, atol=1e-10)


@pytest.fixture
def torchani() -> Iterator[None]:
    pytest.importorskip("torchani", reason="pip install --no-deps torchani==2.9 huggingface_hub")


def exact_celu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.1 * torch.expm1(x.clamp(max=0) / 0.1))


@pytest.mark.usefixtures("torchani")
@pytest.mark.parametrize(
    ("members", "activation", "bias"), [(1, "gelu", False), (3, "celu", True)], ids=["gelu", "celu"]
)
def test_a_model_of_torchani_gives_its_energies_and_forces(tmp_path, monkeypatch, members, activation, bias):
    from torchani.arch import simple_ani
    from torchani.nn import TightCELU

    torch.manual_seed(0)
    model = simple_ani(
        ("H", "C", "N", "O", "S", "F", "Cl"),
        lot="wb97x-631gd",
        ensemble_size=members,
        activation=activation,
        bias=bias,
        repulsion=False,
        cutoff_fn="cosine",
        radial_cutoff=5.1,
        radial_start=0.8,
    ).double()
    # PyTorch's own derivative of celu takes 1 / alpha from a float32 and is wrong in the eighth digit.
    monkeypatch.setattr(TightCELU, "forward", lambda self, x: exact_celu(x))
    numbers = torch.tensor([[6, 8, 7, 1, 17, 16, 1, 9]])
    x = torch.rand(1, 8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 4
    x.requires_grad_()
    energy = model((numbers, x)).energies
    forces = -torch.autograd.grad(energy.sum(), x)[0][0]
    file, _ = torchani_model.load(saved(tmp_path, {"state_dict": model.state_dict(), "repr": repr(model)}))
    for native in (file, torchani_model.from_torchani(model)):
        species = torch.tensor([model.symbols.index(s) for s in ("C", "O", "N", "H", "Cl", "S", "H", "F")])
        found, found_forces = native.energies_and_forces(x[0].detach(), species, torch.tensor([0, 8]))
        assert (found / ase.units.Hartree).item() == pytest.approx(energy.item(), abs=1e-10)
        torch.testing.assert_close(found_forces / ase.units.Hartree, forces, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("torchani")
def test_a_part_that_is_switched_off_is_refused():
    from torchani.arch import simple_ani

    model = simple_ani(("H", "C"), lot="wb97x-631gd", repulsion=False, cutoff_fn="cosine")
    model.set_enabled("energy_shifter", False)
    with pytest.raises(ModelError, match="energy_shifter switched off"):
        torchani_model.from_torchani(model)


def without(key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state().items() if name != key}


LAST = "potentials.nnp.neural_networks.members.1.atomics.C.final_layer.weight"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (state(), "has no state_dict and repr"),
        ([1], "has no state_dict and repr"),
        ({"state_dict": state()}, "lacks the model's repr"),
        ({"state_dict": state(), "repr": TEXT.replace("ANI(", "ANIq(", 1)}, "is of the class ANIq"),
        ({"state_dict": state(), "repr": TEXT.replace("CutoffCosine", "CutoffSmooth")}, "CutoffSmooth: only"),
        ({"state_dict": state(), "repr": TEXT.replace("ANIRadial", "MyRadial")}, "radial terms are MyRadial"),
        ({"state_dict": state(), "repr": TEXT.replace("TightCELU", "Softplus")}, "Softplus"),
        ({"state_dict": state(), "repr": TEXT.replace("TightCELU", "Tanh", 1)}, "2 activation functions"),
        (
            {
                "state_dict": state(),
                "repr": TEXT.replace("    (nnp)", "    (repulsion_xtb): RepulsionXTB()\n    (nnp)"),
            },
            "has the potential repulsion_xtb",
        ),
        ({"state_dict": without("atomic_numbers"), "repr": TEXT}, "has no atomic_numbers"),
        *(
            (
                {"state_dict": {**state(), "atomic_numbers": torch.tensor(numbers)}, "repr": TEXT},
                "not those of different",
            )
            for numbers in ([1, 119], [-1, 6], [0, 6], [6, 6], [1, 6.5])
        ),
        ({"state_dict": without(LAST), "repr": TEXT}, "do not fit together"),
        ({"state_dict": {**state(), LAST: torch.ones(1, 7)}, "repr": TEXT}, "do not fit together"),
        ({"state_dict": {**state(), LAST: torch.full((1, 3), float("nan"))}, "repr": TEXT}, "has NaN"),
        ({"state_dict": {**state(), "charges": torch.ones(1)}, "repr": TEXT}, "has charges, which has no native form"),
        ({"state_dict": state(), "repr": TEXT, "model": torch.nn.Linear(1, 1)}, "more than tensors and text"),
    ],
)
def test_what_cannot_be_converted_is_refused(tmp_path, capsys, values, sentence):
    path = saved(tmp_path, values)
    assert cli.main(["convert", str(path), "--from", "torchani", "-o", str(tmp_path / "model.pt")]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "model.pt").exists()


def test_options_of_pykinml_are_refused(tmp_path, capsys):
    assert cli.main(["convert", "ani.pt", "--from", "torchani", "-o", "m.pt", "--beta", "0.95"]) == 2
    assert "leave the rest out" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "none.pt"), "--from", "torchani", "-o", "m.pt"]) == 2
    assert "cannot be read" in capsys.readouterr().err
