"""Models of TorchANI 2: their weights and descriptor, without running code and without TorchANI.

A state dict of TorchANI has weights, shifts, exponents and self energies, but neither cutoffs nor cutoff and activation
functions; what TorchANI prints for a model has them. Both together are a file that one line writes where the model is::

    torch.save({"state_dict": model.state_dict(), "repr": repr(model)}, "ani.pt")

TorchANI's energies are Hartree: the last layers and the self energies are multiplied by `HARTREE`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ase.data import chemical_symbols
from torch import Tensor

from kinml_fast.data.files import check_output
from kinml_fast.deploy import model_file
from kinml_fast.deploy.archive import unpacked
from kinml_fast.errors import ModelError, first_line
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble
from kinml_fast.units import HARTREE

log = logging.getLogger(__name__)

ONE_LINE = 'torch.save({"state_dict": model.state_dict(), "repr": repr(model)}, "ani.pt")'
"""What a user of TorchANI runs to write the file."""

_ACTIVATIONS = {
    "TightCELU()": "celu",
    "CELU(alpha=0.1)": "celu",
    "GELU(approximate='none')": "gelu",
    "Tanh()": "tanh",
    "ReLU()": "relu",
    "SiLU()": "silu",
}
"""Activation functions as they are printed, and the native ones."""

_LAYER = re.compile(
    r"potentials\.nnp\.neural_networks\.(?:members\.(\d+)\.)?atomics\.(\w+)\.(?:layers\.(\d+)|final_layer)\.(weight|bias)"
)
_AEV = "potentials.nnp.aev_computer."
_NEEDED = (
    "atomic_numbers",
    "energy_shifter.self_energies",
    *(f"{_AEV}{name}" for name in ("radial.eta", "radial.shifts")),
    *(f"{_AEV}angular.{name}" for name in ("eta", "zeta", "shifts", "sections")),
)
_UNUSED = ("species_converter.conv_tensor", f"{_AEV}triu_index")

_Layers = dict[tuple[int, str, int], dict[str, Tensor]]
"""Weight and bias of a member's layer of an element; the last layer is -1."""


def load(path: str | os.PathLike, fidelity: int = 1) -> tuple[EnergyModel | Ensemble, dict[str, Any]]:
    """The model of a file, float64, and notes on its origin for `model_file.save`.

    Parameters
    ----------
    path
        What `ONE_LINE` wrote.
    fidelity
        The level of theory that its energies shall be called.

    Raises
    ------
    ModelError
        A missing or damaged file, one of another kind, or a model that has no native form (see `from_parts`).
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be read ({error.strerror}): name a file that was written by {ONE_LINE}"
        ) from error
    try:
        contents = unpacked(raw)
    except ValueError as error:
        raise ModelError(
            f"{path}: cannot be read, or holds more than tensors and text ({error}): write it by {ONE_LINE}"
        ) from error
    if not isinstance(contents, dict) or not isinstance(contents.get("state_dict"), dict):
        raise ModelError(f"{path}: has no state_dict and repr of a TorchANI model: write it by {ONE_LINE}")
    if not isinstance(contents.get("repr"), str):
        raise ModelError(f"{path}: lacks the model's repr, which has the cutoffs: write it by {ONE_LINE}")
    model = from_parts(contents["state_dict"], contents["repr"], str(path), fidelity)
    return model, {"source": f"TorchANI model {path.name}"}


def from_torchani(model: torch.nn.Module, fidelity: int = 1) -> EnergyModel | Ensemble:
    """The native form, float64, of a TorchANI model that is there as an object.

    Raises
    ------
    ModelError
        As `from_parts`, or a part of the model, such as its self energies, is switched off (`set_enabled`).
    """
    disabled = [name for name, part in model.named_modules() if getattr(part, "_enabled", True) is False]
    if disabled:
        raise ModelError(f"the TorchANI model has {disabled[0]} switched off: switch it on with set_enabled")
    return from_parts(model.state_dict(), repr(model), "the TorchANI model", fidelity)


def convert(path: str | os.PathLike, output: str | os.PathLike, fidelity: int = 1) -> None:
    """Write the model of a file as a model file.

    Raises
    ------
    InputError
        As `load`, or `output` cannot be written.
    """
    check_output(output, [path])
    model, notes = load(path, fidelity)
    model_file.save(output, model, notes)
    members = f"{model.n_members} models" if isinstance(model, Ensemble) else "a model"
    log.info("%s: %s of %s", output, members, " ".join(model.elements))


def from_parts(state: Mapping[str, Tensor], text: str, name: str, fidelity: int = 1) -> EnergyModel | Ensemble:
    """The native form, float64, of a TorchANI model, of several members an ensemble.

    Parameters
    ----------
    state
        `model.state_dict()`.
    text
        `repr(model)`, from which the cutoffs (four decimals), the cutoff functions and the activation functions are
        read.
    name
        What messages call the model.
    fidelity
        The level of theory that its energies shall be called.

    Raises
    ------
    ModelError
        A model that is no `ANI`; further potentials (repulsion, dispersion); terms other than ANI's with the cosine
        cutoff; networks shared by elements; activation functions that are not native; tensors that are missing, of
        the wrong shape or not finite.
    """
    kind = text.split("(", 1)[0]
    if kind != "ANI":
        raise ModelError(
            f"{name}: is of the class {kind or 'none'}, and only a TorchANI model of the class ANI is known"
        )
    inside = re.search(r"^  \(potentials\): ModuleDict\(\n(.*?)^  \)$", text, re.MULTILINE | re.DOTALL)
    others = [p for p in re.findall(r"^    \((\w+)\)", inside[1] if inside else "", re.MULTILINE) if p != "nnp"]
    if others:
        raise ModelError(
            f"{name}: has the potential {others[0]} besides its networks, which has no native form: take a model "
            "without it"
        )
    for key in _NEEDED:
        if key not in state:
            raise ModelError(f"{name}: has no {key}: take a model of TorchANI 2.7 or later")
    layers, found = _layers(state, name)
    foreign = [key for key in state if key not in found and key not in (*_NEEDED, *_UNUSED)]
    if foreign:
        raise ModelError(f"{name}: has {foreign[0]}, which has no native form: take a model of ANINetworks without it")
    for key, value in state.items():
        if not torch.isfinite(value).all():
            raise ModelError(f"{name}: {key} has NaN or infinite numbers: take another file of the model")
    numbers = state["atomic_numbers"].flatten().tolist()
    wrong = [number for number in numbers if number not in range(1, len(chemical_symbols))]
    if wrong or len(set(numbers)) < len(numbers):
        raise ModelError(
            f"{name}: has the atomic numbers {' '.join(map(str, numbers))}, which are not those of different elements: "
            "take another file of the model"
        )
    elements = tuple(chemical_symbols[int(number)] for number in numbers)
    descriptor = _descriptor(state, text, elements, name)
    try:
        members = [
            _member(state, layers, member, descriptor, _activation(text, name), fidelity)
            for member in sorted({member for member, _, _ in layers})
        ]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"{name}: its tensors do not fit together ({first_line(error)}): take another file of the model"
        ) from error
    return members[0] if len(members) == 1 else Ensemble(members).eval()


def _layers(state: Mapping[str, Tensor], name: str) -> tuple[_Layers, set[str]]:
    layers: _Layers = {}
    found = set()
    for key, value in state.items():
        if match := _LAYER.fullmatch(key):
            member, element, layer, part = match.groups()
            layers.setdefault((int(member or 0), element, int(layer or -1)), {})[part] = value.double()
            found.add(key)
    if not layers:
        raise ModelError(f"{name}: has no networks of its elements: take a model of ANINetworks or an Ensemble of them")
    return layers, found


def _activation(text: str, name: str) -> str:
    printed = set(re.findall(r"^ *\(activation\): (.*)$", text, re.MULTILINE))
    if len(printed) != 1:
        raise ModelError(f"{name}: has {len(printed)} activation functions: only networks with the same one are known")
    (function,) = printed
    if function not in _ACTIVATIONS:
        raise ModelError(f"{name}: has the activation function {function}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[function]


def _descriptor(state: Mapping[str, Tensor], text: str, elements: tuple[str, ...], name: str) -> AEVParameters:
    cutoffs = []
    for term, kind in (("radial", "ANIRadial"), ("angular", "ANIAngular")):
        match = re.search(rf"\({term}\): (\w+)\(.*?cutoff=([\d.]+),\s*\(cutoff_fn\): (\w+)\(", text, re.DOTALL)
        if match is None or match[1] != kind:
            raise ModelError(f"{name}: its {term} terms are {match[1] if match else 'not printed'}, expected {kind}")
        if match[3] != "CutoffCosine":
            raise ModelError(
                f"{name}: its {term} terms have the cutoff function {match[3]}: only CutoffCosine has a native form"
            )
        cutoffs.append(float(match[2]))
    values = {key.removeprefix(_AEV): state[key].double().tolist() for key in _NEEDED if key.startswith(_AEV)}
    return AEVParameters.ani(
        elements,
        values["radial.shifts"],
        values["radial.eta"][0],
        cutoffs[0],
        values["angular.shifts"],
        values["angular.eta"][0],
        cutoffs[1],
        values["angular.sections"],
        values["angular.zeta"][0],
    )


@torch.no_grad()
def _member(
    state: Mapping[str, Tensor],
    layers: _Layers,
    member: int,
    descriptor: AEVParameters,
    activation: str,
    fidelity: int,
) -> EnergyModel:
    depth = max(layer for of, _, layer in layers if of == member) + 2
    places = [*range(depth - 1), -1]
    tensors = [[layers[member, element, place] for place in places] for element in descriptor.elements]
    if len(layers) % (depth * len(tensors)) or len({len(parts) for of_element in tensors for parts in of_element}) > 1:
        raise ValueError("layers differ in number or in having biases")
    model = EnergyModel(
        descriptor,
        layers=[[len(parts["weight"]) for parts in of_element] for of_element in tensors],
        activations=[activation] * (depth - 1) + ["identity"],
        biases="bias" in tensors[0][0],
        fidelities=(fidelity,),
    )
    for species, of_element in enumerate(tensors):
        for place, parts in enumerate(of_element):
            factor = HARTREE if place == depth - 1 else 1.0
            for parameter, part in zip(model.networks.layer(species, place), ("weight", "bias"), strict=True):
                if parameter is not None:
                    if parameter.shape != parts[part].shape:
                        raise ValueError(
                            f"a {part} has the shape {list(parts[part].shape)}, not {list(parameter.shape)}"
                        )
                    parameter.copy_(parts[part] * factor)
    model.sae.copy_(state["energy_shifter.self_energies"].double() * HARTREE)
    return model.eval()
