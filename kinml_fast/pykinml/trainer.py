"""PyKinML's training for one level of theory, and of differences of two; its energies of a trained model."""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kinml_fast.errors import ConfigError
from kinml_fast.pykinml import daev as daev_calc
from kinml_fast.pykinml import nnpes
from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml.arguments import NOT_DISTRIBUTED, device_of, one, refuse_distributed, seeds, show_log
from kinml_fast.pykinml.loop import Loop

log = logging.getLogger(__name__)


def ddp_setup(rank: int, world_size: int) -> None:
    """Join several processes: not there yet.

    Raises
    ------
    InputError
        Always.
    """
    raise ConfigError(NOT_DISTRIBUTED)


class Runner:
    """Energies and forces of a trained model from descriptors and Jacobians in PyKinML's form.

    Parameters
    ----------
    args
        `load_model_name`, `present_elements` and `multi_fid`.
    device
        Where to compute, see `arguments.device_of`; descriptors and Jacobians must be there.

    Attributes
    ----------
    pred_engs, pred_engs_lf : list of Tensor
        What `eval` has found, [1, 1] for each molecule, eV; of the lower level if there are two.
    """

    def __init__(self, args: argparse.Namespace, device: Any) -> None:
        self.args, self.device = args, device_of(device)
        self.num_spec = len(args.present_elements)
        self.model: nnpes.Composite = prep.load_trained_model(args, load_opt=False).to(self.device)
        self.model.add_sae = True

    def get_ids(self, aevs: Any) -> list[list[Tensor]]:
        """The molecule of each atom, by species, for molecules one after another."""
        ids = [
            torch.cat([torch.full((len(molecule[s]),), i) for i, molecule in enumerate(aevs)])
            for s in range(self.num_spec)
        ]
        return [[of_species.to(self.device) for of_species in ids]]

    def eval(self, aevs: Any, daevs: Any = ()) -> Tensor:
        """Energies [n_molecules, 1], eV, from the descriptors of each molecule and species."""
        self.aevs, self.pred_engs, self.pred_engs_lf = aevs, [], []
        for molecule in aevs:
            self.ids = self.get_ids([molecule])[0]
            energies = self.model(molecule, self.ids, 1, train=False)
            if self.args.multi_fid:
                self.pred_engs_lf.append(energies[0])
            self.pred_engs.append(energies[1] if self.args.multi_fid else energies)
        return torch.cat(self.pred_engs)

    def eval_force(self, daevs: Any) -> list[list[Tensor]]:
        """Forces [3 n] of each molecule, eV/Å, from Jacobians; `eval` must have had descriptors that need gradients."""
        self.pred_forces = [
            daev_calc.cal_dEdxyz_ddp(aevs, -energy, jacobian, self.get_ids([aevs])[0])
            for aevs, energy, jacobian in zip(self.aevs, self.pred_engs, daevs, strict=True)
        ]
        return self.pred_forces


class Trainer(Loop):
    """Trains a model of one level of theory.

    Parameters
    ----------
    model, train_data, valid_data, test_data, keys, optimizer, lr_scheduler, sae_energies
        From `prepper.load_train_objs`; the model has gone through `prepper.set_up_task_weights`.
    save_every, fname, svpath, device, force_train
        See `Loop`.
    num_spec
        Not needed.
    """

    def __init__(
        self,
        model: nnpes.CompositeNetworks,
        train_data: DataLoader,
        valid_data: DataLoader,
        test_data: DataLoader,
        keys: Any,
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
        self.keys, self.sae_energies = keys, sae_energies


def spawned_trainer(rank: Any, args: argparse.Namespace, world_size: int) -> None:
    """Load prepared data and train as `args` says.

    Parameters
    ----------
    rank
        Where to train: "cpu", or the index of a GPU.
    args
        See `prepper.parse_arguments_list`.
    world_size
        0.
    """
    Trainer(**training_objects(rank, args)).train(args.epochs)


def main(args: argparse.Namespace) -> None:
    """Prepare the data, unless `args.pre_saved`, and train."""
    torch.set_default_dtype(torch.float64)
    refuse_distributed(args)
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel)
        args.pre_saved, args.data_path = True, one(args.savenm)
    spawned_trainer("cpu", args, 0)


def training_objects(rank: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What `Trainer` takes, by name."""
    show_log()
    refuse_distributed(args)
    torch.manual_seed(seeds(args.randomseed[1])[0])
    torch.set_default_dtype(torch.float64)
    args.num_species = len(args.present_elements)
    train, valid, test, model, optimizer, schedule, sae, keys = prep.load_train_objs(args, fid=args.fidlevel)
    prep.set_up_task_weights(model, args, optimizer)
    name = one(args.savenm)
    return {
        "model": model,
        "train_data": train,
        "valid_data": valid,
        "test_data": test,
        "keys": keys,
        "optimizer": optimizer,
        "lr_scheduler": schedule,
        "sae_energies": sae,
        "save_every": args.save_every,
        "fname": f"{name.rstrip('/')}_device_{rank}.log",
        "svpath": name,
        "device": rank,
        "force_train": args.floss,
    }


if __name__ == "__main__":
    main(prep.parse_arguments_list())
