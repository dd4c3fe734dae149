"""Checkpoints and the state of optimizers, between PyKinML's form (a tensor for each layer) and the native flat one."""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data.files import replacing
from kinml_fast.deploy import model_file, pykinml_checkpoint
from kinml_fast.deploy.archive import unpacked
from kinml_fast.nn import EnergyModel
from kinml_fast.pykinml import nnpes
from kinml_fast.train import checkpoint, continued

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint keeps of an optimizer.

    Parameters
    ----------
    tensors
        For each weight and bias of the networks, in the order of the module's blocks, what is remembered of it.
    settings
        The settings of the optimizer.
    log_sigma
        What weighed the terms of the loss, learned, with what is remembered of it; None if it was given.
    """

    tensors: list[dict[str, Any]]
    settings: dict[str, Any]
    log_sigma: tuple[Tensor, dict[str, Any]] | None = None

    @property
    def family(self) -> str:
        """Which optimizers can go on with it."""
        return "Adam or AdamW" if "betas" in self.settings else "SGD"

    def restore(self, optimizer: torch.optim.Optimizer, net: nnpes.Composite) -> None:
        """Let an optimizer of a module's parameters go on with this, if it is one of the same kind."""
        if ("betas" in self.settings) != isinstance(optimizer, torch.optim.Adam):
            log.info("the checkpoint has the state of %s, so that this optimizer starts without one", self.family)
            return
        for parameter, kept in zip(_parameters(net), self.tensors, strict=True):
            if kept:
                optimizer.state[parameter] = {name: _copied(value, parameter) for name, value in kept.items()}
        net.kept_log_sigma = self.log_sigma


def load(path: str | os.PathLike) -> tuple[nnpes.Composite, Saved | None, tuple[str, ...] | None]:
    """The model of a checkpoint of PyKinML, of this package's adapter, or of a native run.

    Returns
    -------
    The module, what the file keeps of the optimizer (None: nothing), and its elements if it says them.

    Raises
    ------
    InputError
        The file is missing, damaged, of another kind, or names foreign classes or functions.
    """
    path = Path(path)
    if kind(path) is not None:
        origin = continued.load(path, averaged=False)
        net = nnpes.from_energy_model(origin.model)
        return net, _of_native(net, origin.state), origin.model.elements
    found = pykinml_checkpoint.read(path)
    net = nnpes.from_checkpoint(found)
    return net, _of_pykinml(net, found), found.elements


def kind(path: str | os.PathLike) -> str | None:
    """The format of a native file, that of model files or that of checkpoints; None for others and damaged ones."""
    try:
        contents = unpacked(Path(path).read_bytes())
    except (OSError, ValueError):  # whoever reads it says what is wrong
        return None
    found = contents.get("format") if isinstance(contents, dict) else None
    return found if found in (model_file.FORMAT, checkpoint.FORMAT) else None


def write(
    path: Path,
    net: nnpes.Composite,
    model: EnergyModel,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    epoch: int,
) -> None:
    """Write a checkpoint with PyKinML's keys, in plain values and tensors: `torch.load` needs no trust to read it.

    Optimizer and schedule stand in it as names and states, not as objects. The key "kinml_fast" has the architecture
    of the native model, with elements and descriptor.
    """
    params = {**net.netparams, "sae_energies": model.sae.tolist()}
    contents = {
        "epoch": epoch,
        "optimizer": "AdamW" if optimizer.param_groups[0].get("decoupled_weight_decay") else _kind(optimizer),
        "optimizer_state_dict": optimizer.state_dict(),
        "lr_scheduler": None if scheduler is None else {"name": type(scheduler).__name__, **scheduler.state_dict()},
        "model_state_dict": {name: value.detach().clone() for name, value in net.state_dict().items()},
        "sae_energies": model.sae.clone(),
        "params": _plain(params),
        pykinml_checkpoint.EXTRA: model.to_dict(),
    }
    with replacing(path) as temporary:
        torch.save(checkpoint.on_cpu(contents), temporary)


def give(native: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, net: nnpes.Composite) -> None:
    """Let the trainer's optimizer of flat parameters go on where the one of a module's parameters is."""
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(net)]
    others = native.param_groups[0]["params"][1:]
    kept = {0: _joined(states, _parameters(net))} if any(states) else {}
    if others:
        others[0].data.copy_(net.log_sigma.detach())
        if net.log_sigma in optimizer.state:
            kept[1] = {name: _copied(value, others[0]) for name, value in optimizer.state[net.log_sigma].items()}
    native.load_state_dict(native.state_dict() | {"state": kept})


def take(native: torch.optim.Optimizer, optimizer: torch.optim.Optimizer, net: nnpes.Composite) -> None:
    """Give the optimizer of a module's parameters, and its `log_sigma`, what the trainer's optimizer has come to."""
    flat, *others = native.param_groups[0]["params"]
    states = _divided(native.state.get(flat, {}), _parameters(net))
    optimizer.state.update(zip(_parameters(net), states, strict=True))
    if others:
        net.log_sigma.data.copy_(others[0].detach())
        optimizer.state[net.log_sigma] = {n: _copied(v, net.log_sigma) for n, v in native.state[others[0]].items()}
    optimizer.param_groups[0]["lr"] = native.param_groups[0]["lr"]


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return "Adam" if isinstance(optimizer, torch.optim.Adam) else type(optimizer).__name__


def _parameters(net: nnpes.Composite) -> list[Tensor]:
    return [parameter for _, _, _, block in net.blocks() for parameter in block.tensors()]


def _of_pykinml(net: nnpes.Composite, found: pykinml_checkpoint.Checkpoint) -> Saved | None:
    if found.optimizer is None or not found.optimizer.get("param_groups"):
        return None
    state, settings = found.optimizer["state"], dict(found.optimizer["param_groups"][0])
    # Biases that stand for single-atom energies are not in the file.
    stored = ("weight",) if found.sae_is_input and found.weights[0][0][1] is None else ("weight", "bias")
    names = [name for _, _, _, block in net.blocks() for name in ("weight", *("bias" for _ in block.tensors()[1:]))]
    places = itertools.count()
    tensors = [state.get(next(places), {}) if name in stored else {} for name in names]
    last = next(places)
    log_sigma = found.log_sigma
    learned = None if log_sigma is None or log_sigma.numel() != 2 else (log_sigma, state.get(last, {}))
    return Saved(tensors, settings, learned)


def _of_native(net: nnpes.Composite, state: dict[str, Any] | None) -> Saved | None:
    if state is None or "optimizer" not in state:
        return None
    kept = state["optimizer"]["state"]
    log_sigma = state["tasks"]["log_sigma"]
    return Saved(
        _divided(kept.get(0, {}), _parameters(net)),
        dict(state["optimizer"]["param_groups"][0]),
        None if log_sigma is None else (log_sigma[:2], kept.get(1, {})),
    )


def _joined(states: list[dict[str, Any]], parameters: list[Tensor]) -> dict[str, Any]:
    """What is remembered of flat parameters, from what is remembered of their parts; zeros where that is nothing."""
    joined = {}
    for name in dict.fromkeys(name for state in states for name, value in state.items() if value is not None):
        values = [state.get(name) for state in states]
        example = next(value for value in values if value is not None)
        if not isinstance(example, Tensor) or example.ndim == 0:
            joined[name] = example.clone() if isinstance(example, Tensor) else example
        else:
            pairs = zip(values, parameters, strict=True)
            parts = [(torch.zeros_like(p) if v is None else v.to(p.device)).detach() for v, p in pairs]
            joined[name] = torch.cat([part.reshape(-1) for part in parts])
    return joined


def _divided(state: dict[str, Any], parameters: list[Tensor]) -> list[dict[str, Any]]:
    """The opposite of `_joined`."""
    divided: list[dict[str, Any]] = [{} for _ in parameters]
    for name, value in state.items():
        flat = isinstance(value, Tensor) and value.ndim > 0
        parts = value.split([p.numel() for p in parameters]) if flat else [value] * len(parameters)
        for of_parameter, part, parameter in zip(divided, parts, parameters, strict=True):
            of_parameter[name] = _copied(part.reshape(parameter.shape) if flat else part, parameter)
    return divided


def _copied(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.ndim == 0 else value.detach().to(parameter, copy=True)


def _plain(value: Any) -> Any:
    """Nested values without numpy arrays and functions."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    return value
