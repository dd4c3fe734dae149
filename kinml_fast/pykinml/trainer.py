"""PyKinML's training for one level of theory, and of differences of two; its energies of a trained model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kinml_fast import devices
from kinml_fast.pykinml import daev as daev_calc
from kinml_fast.pykinml import nnpes
from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml.arguments import device_of, gpus, one, seeds, show_log
from kinml_fast.pykinml.loop import Loop
from kinml_fast.train import meeting, ranks

log = logging.getLogger(__name__)


def ddp_setup(rank: int, world_size: int) -> None:
    """Join the processes that `torch.multiprocessing.spawn` has started; each has the GPU of its rank if there is one.

    They meet on this computer at a port that follows from the program that has started them, or where the variables
    MASTER_ADDR and MASTER_PORT say.

    Parameters
    ----------
    rank
        The number of this process, from 0.
    world_size
        How many there are.

    Raises
    ------
    InputError
        They do not find one another.
    """
    ranks.join(meeting.of_children(rank, world_size, os.environ))
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of(rank))


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
        Where to train: "cpu", or the index of a GPU. With `args.ddp` the number of this process, from 0, which is the
        index of its GPU unless `args.gpus` are "cpu".
    args
        See `prepper.parse_arguments_list`.
    world_size
        With `args.ddp` the number of processes; otherwise 0.
    """
    with place(rank, args, world_size) as device:
        Trainer(**training_objects(rank, args, device)).train(args.epochs)


def main(args: argparse.Namespace) -> None:
    """Prepare the data, unless `args.pre_saved`, and train."""
    torch.set_default_dtype(torch.float64)
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel)
        args.pre_saved, args.data_path = True, one(args.savenm)
    launch(spawned_trainer, args)


def launch(target: Callable[[Any, argparse.Namespace, int], None], args: argparse.Namespace) -> None:
    """Call `spawned_trainer`, with `args.ddp` in a process for each of `args.gpus`."""
    if not args.ddp:
        target("cpu", args, 0)
        return
    chosen = gpus(args)
    if "cpu" not in chosen:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
        devices.resolve(f"cuda:{len(chosen) - 1}")  # says which are there
    torch.multiprocessing.spawn(target, (args, len(chosen)), nprocs=len(chosen))


@contextlib.contextmanager
def place(rank: Any, args: argparse.Namespace, world_size: int) -> Iterator[Any]:
    """Where `spawned_trainer` trains; with `args.ddp` the processes are joined while the block runs."""
    if not args.ddp:
        yield rank
        return
    ddp_setup(rank, world_size)
    with ranks.together(ranks.present()):
        if "cpu" in gpus(args):
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(torch.get_num_threads() // world_size, 1))
            yield "cpu"
        else:
            yield rank


def training_objects(rank: Any, args: argparse.Namespace, device: Any) -> dict[str, Any]:
    """What `Trainer` takes, by name."""
    show_log()
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
        "device": device,
        "force_train": args.floss,
    }


if __name__ == "__main__":
    main(prep.parse_arguments_list())
