"""PyKinML's training for two levels of theory at once."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from kinml_fast.data.fidelities import join
from kinml_fast.data.files import first_few
from kinml_fast.data.sae import resolve_levels
from kinml_fast.data.structures import Structures
from kinml_fast.errors import DataError
from kinml_fast.pykinml import nnpes
from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml import trainer as single
from kinml_fast.pykinml.arguments import LEVELS, one
from kinml_fast.pykinml.loop import Loop, config_of, dataset
from kinml_fast.pykinml.trainer import ddp_setup

__all__ = ["Trainer_mf", "ddp_setup", "main", "spawned_trainer"]

_SHOWN = 10  # structures that a message names


class Trainer_mf(Loop):
    """Trains a model of two levels of theory.

    Parameters
    ----------
    model, train_data, valid_data, test_data, keys, optimizer, lr_scheduler, sae_energies
        From `prepper.load_train_objs` for the higher level; the model has gone through `prepper.set_up_task_weights`.
    train_data_lf, valid_data_lf, test_data_lf, keys_lf
        From `prepper.load_train_data` for the lower level. Structures are matched by name.
    save_every, fname, svpath, device, force_train
        See `Loop`.
    num_spec
        Not needed.
    """

    suffixes = ("_lf", "_hf")
    opening = "\nGPU  {device}  epoch:  {epoch}"
    closing = "device  {device} is DONE!!!"
    notes = (LEVELS,)

    def __init__(
        self,
        model: nnpes.CompositeNetworks_MF,
        train_data: DataLoader,
        valid_data: DataLoader,
        test_data: DataLoader,
        keys: Any,
        train_data_lf: DataLoader,
        valid_data_lf: DataLoader,
        test_data_lf: DataLoader,
        keys_lf: Any,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Any,
        sae_energies: Any,
        save_every: int,
        fname: str,
        svpath: str,
        device: Any,
        force_train: bool = False,
        num_spec: int = 2,
    ) -> None:
        loaders = (train_data, valid_data, test_data)
        super().__init__(model, loaders, optimizer, lr_scheduler, save_every, fname, svpath, device, force_train)
        self.lower = dict(zip(self.loaders, (train_data_lf, valid_data_lf, test_data_lf), strict=True))
        self.keys, self.keys_lf, self.sae_energies = keys, keys_lf, sae_energies

    def _structures(self, part: str) -> Structures:
        sets = [dataset(loader).structures for loader in (self.lower[part], self.loaders[part])]
        both = join(sets)
        lacking = np.flatnonzero(~both.known_energies.all(axis=0))
        if lacking.size:
            raise DataError(
                f"{len(lacking)} {part} structures have energies of one level only: "
                f"{first_few([both.labels[i] for i in lacking], _SHOWN)}: take structures that have both (the native "
                "data.fidelity takes any)"
            )
        return both.with_elements(sets[1].elements)

    def _sae(self, structures: Structures, n_fitted: int) -> np.ndarray:
        assert structures.energies is not None
        setting = config_of(self.loaders["train"]).data.sae
        counts, energies = structures.counts()[:n_fitted], structures.energies[:, :n_fitted]
        return resolve_levels(setting, counts, energies, structures.elements)


def spawned_trainer(rank: Any, args: argparse.Namespace, world_size: int) -> None:
    """Load prepared data of both levels and train as `args` says; the arguments are those of `trainer`'s."""
    with single.place(rank, args, world_size) as device:
        objects = single.training_objects(rank, args, device)
        names = ("train_data_lf", "valid_data_lf", "test_data_lf", "keys_lf")
        lower = prep.load_train_data(args, fid=args.fidlevel_lf, get_aevs=False)
        Trainer_mf(**objects, **dict(zip(names, lower, strict=True))).train(args.epochs)


def main(args: argparse.Namespace) -> None:
    """Prepare the data of both levels, unless `args.pre_saved`, and train."""
    torch.set_default_dtype(torch.float64)
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel, get_aevs=True)
        prep.prep_data(args, fid=args.fidlevel_lf, get_aevs=False)
        args.pre_saved, args.data_path = True, one(args.savenm)
    single.launch(spawned_trainer, args)


if __name__ == "__main__":
    main(prep.parse_arguments_list())
