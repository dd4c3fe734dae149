"""PyKinML's networks as torch modules: one multilayer perceptron per species, with PyKinML's names of the parameters.

Training and prediction run on `kinml_fast.nn.EnergyModel`, which shares the weights of such a module while it trains
(`energy_model`). The `forward` of the modules here is for programs that call a network themselves, with descriptors as
PyKinML keeps them: for each species the vectors of its atoms, and the molecule that each of them belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kinml_fast.deploy.pykinml_checkpoint import Checkpoint, layers_of
from kinml_fast.errors import ConfigError, ModelError
from kinml_fast.nn import AEVParameters, EnergyModel


def identity(input: Tensor) -> Tensor:
    """x"""
    return input


def gaussian(input: Tensor) -> Tensor:
    """exp(−x²)"""
    return torch.exp(-input.square())


def my_relu(input: Tensor) -> Tensor:
    """max(x, 0)"""
    return torch.relu(input)


def silu(input: Tensor) -> Tensor:
    """x / (1 + exp(−x))"""
    return nn.functional.silu(input)


def celu(input: Tensor) -> Tensor:
    """The ANI models' CELU, with alpha 0.1; PyKinML does not have it."""
    return nn.functional.celu(input, alpha=0.1)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gaussian": gaussian,
    "tanh": torch.tanh,
    "identity": identity,
    "relu": my_relu,
    "silu": silu,
    "celu": celu,
    "gelu": nn.functional.gelu,
}
"""Activation functions by name."""


class LinearBlock(nn.Module):
    """A layer: activation(W x + b).

    Parameters
    ----------
    in_nums, out_nums
        Lengths of input and output.
    activation
        A function, or its name in `FUNCTIONS`.
    biases
        Whether there is a b.
    """

    def __init__(
        self, in_nums: int, out_nums: int, activation: str | Callable[[Tensor], Tensor], biases: bool = True
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_nums, out_nums, bias=biases)
        self.activation = FUNCTIONS[activation] if isinstance(activation, str) else activation

    def tensors(self) -> list[Tensor]:
        """The weight [out, in], and the bias [out] if there is one."""
        return [self.linear.weight, *([] if self.linear.bias is None else [self.linear.bias])]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class _Networks(nn.Module):
    """What both kinds of models share.

    Attributes
    ----------
    netparams : dict
        PyKinML's description of the networks, in plain values, as a checkpoint keeps it.
    log_sigma : torch.nn.Parameter
        What weighs the terms of the loss; `prepper.set_up_task_weights` makes it.
    mtl : prepper.task_weights
        How; made together with it.
    kept_log_sigma : tuple or None
        A learned one of the checkpoint that the model was loaded from, with what the optimizer remembers of it.
    """

    netparams: dict[str, Any]
    log_sigma: nn.Parameter
    mtl: Any
    kept_log_sigma: tuple[Tensor, dict[str, Any]] | None

    def __init__(self, sae_energies: Sequence[float] | np.ndarray | Tensor, add_sae: bool, biases: bool) -> None:
        super().__init__()
        self.sae_energies = sae_energies
        self.add_sae = add_sae
        self.biases = biases

    def _stack(
        self, n_input: Sequence[int], neurons: Sequence[Sequence[int]], activations: Sequence[Sequence[Any]]
    ) -> nn.ModuleList:
        networks = nn.ModuleList()
        for first, widths, functions in zip(n_input, neurons, activations, strict=True):
            inputs = [first, *widths[:-1]]
            layers = zip(inputs, widths, functions, strict=True)
            networks.append(nn.ModuleList(LinearBlock(i, o, f, self.biases) for i, o, f in layers))
        return networks

    def by_level(self) -> list[Any]:
        """The networks of each level of theory, lowest first: for each species a list of its `LinearBlock`."""
        raise NotImplementedError

    def blocks(self) -> Iterator[tuple[int, int, int, LinearBlock]]:
        """Level, species, place and module of each layer, in the order of the parameters."""
        for level, networks in enumerate(self.by_level()):
            for species, layers in enumerate(networks):
                for place, block in enumerate(layers):
                    yield level, species, place, block

    def _saes(self, level: int) -> Sequence[float]:
        """The single-atom energies of a level: those of all levels if only one set is known."""
        table = torch.as_tensor(np.asarray(self.sae_energies, dtype=np.float64))
        return (table if table.ndim == 1 else table[level]).tolist()

    def _level_energies(self, Xs: Sequence[Tensor], inds: Sequence[Tensor], nmols: int) -> list[Tensor]:
        """Energies [nmols, 1] of each level; an atomic energy goes into the next level without single-atom energy."""
        by_level = self.by_level()
        totals: list[Any] = [0.0] * len(by_level)
        for species, (x, molecules) in enumerate(zip(Xs, inds, strict=True)):
            if len(molecules) == 0:
                continue
            atomic = None
            for level, networks in enumerate(by_level):
                y = x if atomic is None else torch.cat([x, atomic], dim=1)
                for block in networks[species]:
                    y = block(y)
                atomic = y if atomic is None else atomic + y
                shifted = atomic + self._saes(level)[species] if self.add_sae else atomic
                totals[level] = totals[level] + shifted.new_zeros(nmols, 1).index_add(0, molecules, shifted)
        return [t if isinstance(t, Tensor) else Xs[0].new_zeros(nmols, 1) for t in totals]


class CompositeNetworks(_Networks):
    """A model of one level of theory.

    Parameters
    ----------
    n_input
        Length of the descriptor, for each species.
    neurons
        Nodes of each layer, for each species.
    activations
        Functions, or names in `FUNCTIONS`, of each layer, for each species.
    neurons_hf, activations_hf, neurons_hf_b, activations_hf_b
        Not used; PyKinML has them here too.
    sae_energies
        Single-atom energies, eV.
    add_sae
        Whether the energies include them.
    biases
        Whether the layers have biases.
    """

    def __init__(
        self,
        n_input: Sequence[int],
        neurons: Sequence[Sequence[int]],
        activations: Sequence[Sequence[Any]],
        neurons_hf: Any = None,
        activations_hf: Any = None,
        neurons_hf_b: Any = None,
        activations_hf_b: Any = None,
        sae_energies: Sequence[float] | np.ndarray | Tensor = (0.0, 0.0),
        add_sae: bool = False,
        biases: bool = True,
    ) -> None:
        super().__init__(sae_energies, add_sae, biases)
        self.NNs = self._stack(n_input, neurons, activations)

    def by_level(self) -> list[Any]:
        """See the class of both kinds of models."""
        return [self.NNs]

    def forward(
        self, Xs: Sequence[Tensor], inds: Sequence[Tensor], nmols: int = 1, train: bool = True
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Energies of molecules.

        Parameters
        ----------
        Xs
            For each species, [n_atoms, D]: the descriptors of its atoms.
        inds
            For each species, [n_atoms] int64: the molecule of each atom.
        nmols
            Number of molecules.
        train
            Whether `log_sigma` is returned too.

        Returns
        -------
        Tensor
            [nmols, 1], eV; with `train` also `log_sigma`.
        """
        (energies,) = self._level_energies(Xs, inds, nmols)
        return (energies, 1.0 * self.log_sigma) if train else energies


class CompositeNetworks_MF(_Networks):
    """A model of two levels of theory: the second network takes the descriptor and the first one's atomic energy.

    Parameters
    ----------
    n_input, neurons, activations, sae_energies, add_sae, biases
        See `CompositeNetworks`; `sae_energies` may be [2, n_species], a row for each level.
    neurons_hf, activations_hf
        Layers and functions of the second network, for each species.
    dscr, pass_eng, pass_aev
        PyKinML's: that the second network gives a difference, and takes the energy and the descriptor. Only True.

    Notes
    -----
    PyKinML feeds the atomic energy with its single-atom energy, which spoils training with those; here it goes in
    without.
    """

    def __init__(
        self,
        n_input: Sequence[int],
        neurons: Sequence[Sequence[int]],
        activations: Sequence[Sequence[Any]],
        neurons_hf: Sequence[Sequence[int]] | None = None,
        activations_hf: Sequence[Sequence[Any]] | None = None,
        sae_energies: Sequence[float] | np.ndarray | Tensor = (0.0, 0.0),
        add_sae: bool = False,
        biases: bool = True,
        dscr: bool = True,
        pass_eng: bool = True,
        pass_aev: bool = True,
    ) -> None:
        super().__init__(sae_energies, add_sae, biases)
        if not (dscr and pass_eng and pass_aev):
            raise ConfigError(
                "the second network takes the descriptor and the energy of the first and gives a difference: leave "
                "dscr, pass_eng and pass_aev True"
            )
        neurons_hf, activations_hf = neurons_hf or neurons, activations_hf or activations
        self.NNs = self._stack(n_input, neurons, activations)
        self.NNs_hf = self._stack([length + 1 for length in n_input], neurons_hf, activations_hf)

    def by_level(self) -> list[Any]:
        """See the class of both kinds of models."""
        return [self.NNs, self.NNs_hf]

    def forward(
        self,
        Xs: Sequence[Tensor],
        inds: Sequence[Tensor],
        nmols: int = 1,
        maxmin: Any = None,
        train: bool = True,
    ) -> tuple[Tensor, ...]:
        """Energies of both levels, [nmols, 1] each, eV; the arguments are those of `CompositeNetworks.forward`."""
        lower, higher = self._level_energies(Xs, inds, nmols)
        return (lower, higher, 1.0 * self.log_sigma) if train else (lower, higher)


Composite = CompositeNetworks | CompositeNetworks_MF


def energy_model(net: Composite, descriptor: AEVParameters, **settings: Any) -> EnergyModel:
    """The native model with the weights of a PyKinML module, which from then on are the same memory.

    What trains one of the two trains the other. `settings` are further arguments of `EnergyModel`.

    Raises
    ------
    InputError
        The networks do not fit the descriptor, or are of a kind that the native model does not have.
    """
    layers = [
        [[(block.linear.out_features, name_of(block.activation)) for block in network] for network in level]
        for level in net.by_level()
    ]
    widths = [[width for width, _ in network] for network in layers[0]]
    activations = [name for _, name in layers[0][0]]
    if any(level != layers[0] for level in layers) or any([n for _, n in x] != activations for x in layers[0]):
        raise ConfigError(
            "the networks of all elements need the same activation functions, and those of all levels of theory the "
            "same layers: make them equal"
        )
    first = net.by_level()[0][0][0].linear
    if first.in_features != descriptor.length or len(widths) != len(descriptor.elements):
        raise ModelError(
            f"the model has networks for {len(widths)} elements that take {first.in_features} numbers for an atom, and "
            f"the data have {len(descriptor.elements)} elements and {descriptor.length} numbers: take the model and "
            "the data of one kind of descriptor (present_elements, aev_params)"
        )
    model = EnergyModel(descriptor, widths, activations, net.biases, first.weight.dtype, **settings)
    model.to(first.weight.device)
    for level, species, place, block in net.blocks():
        for view, parameter in zip(model.networks.layer(species, place, level), block.tensors(), strict=False):
            assert view is not None  # the model has biases if the module has
            view.copy_(parameter.detach())
            parameter.data = view
    return model


def from_energy_model(model: EnergyModel) -> Composite:
    """A PyKinML module with a copy of the weights of a native model."""
    networks = model.networks
    layers = (
        (level, species, place, *networks.layer(species, place, level))
        for level in range(networks.levels)
        for species in range(len(model.elements))
        for place in range(len(networks.activations))
    )
    sizes, sae = (model.descriptor.length, networks.layers), model.sae
    return _filled(*sizes, networks.activations, sae, networks.biases, model.dtype, layers)


def from_checkpoint(found: Checkpoint) -> Composite:
    """A PyKinML module with the weights of a checkpoint."""
    sae = found.sae if found.higher is None or found.architecture is not None else found.sae[0]
    sizes = (found.n_input, found.layers)
    return _filled(
        *sizes, found.activations, sae, found.biases, found.dtype, layers_of(found), found.higher is not None
    )


def _filled(
    n_input: int,
    layers: Sequence[Sequence[int]],
    activations: Sequence[str],
    sae: Tensor,
    biases: bool,
    dtype: torch.dtype,
    tensors: Iterable[tuple[int, int, int, Tensor, Tensor | None]],
    two: bool = False,
) -> Composite:
    neurons, functions = [list(widths) for widths in layers], [list(activations)] * len(layers)
    params: dict[str, Any] = {"n_input": [n_input] * len(layers), "neurons": neurons, "activations": functions}
    if two or sae.ndim == 2:
        params |= {"neurons_hf": neurons, "activations_hf": functions, "pass_eng": True, "pass_aev": True}
    params |= {"sae_energies": sae.cpu().numpy(), "add_sae": True, "biases": biases}
    net = (CompositeNetworks_MF if "neurons_hf" in params else CompositeNetworks)(**params).to(dtype)
    by_level = net.by_level()
    for level, species, place, *values in tensors:
        for parameter, value in zip(by_level[level][species][place].tensors(), values, strict=False):
            parameter.data.copy_(value)
    net.netparams = params
    return net


def name_of(function: Callable) -> str:
    """The name of an activation function."""
    if isinstance(function, nn.Tanh):
        return "tanh"
    for name, known in FUNCTIONS.items():
        if function is known:
            return name
    raise ConfigError(f"{function!r} is no activation function of the model: take one of {', '.join(FUNCTIONS)}")
