"""What tests of PyKinML's interface run in each of several processes that torch.multiprocessing.spawn starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pykinml_helpers import small
from torch.distributed import destroy_process_group
from torch.nn.parallel import DistributedDataParallel

from kinml_fast.pykinml import multi_fid_loop, prepper, trainer
from kinml_fast.pykinml.arguments import Arguments
from kinml_fast.train import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "energies": {},
    "forces": {"floss": True, "fw": 0.5},
    "learned": {"floss": True, "optimize_force_weight": True},
    "delta": {"delta": True, "fidlevel_lf": 0},
    "levels": {"multi_fid": True, "fidlevel_lf": 0, "floss": True, "fw": 0.5},
}


def arguments(folder: Path, kind: str) -> Arguments:
    """The arguments of a run of two processes on the CPU, in a folder of its kind."""
    changes = {"ddp": True, "gpus": ["cpu", "cpu"], "tr_batch_size": 5, "learning_rate": 0.01, **KINDS[kind]}
    args = small(folder / kind, **changes)
    args.gpus = ", ".join(args.gpus)  # as scripts do
    return args


def prepare(folder: Path, kind: str) -> None:
    """What a script does before it spawns."""
    args = arguments(folder, kind)
    prepper.prep_data(args, fid=1)
    if args.multi_fid:
        prepper.prep_data(args, fid=0, get_aevs=False)


def train(rank: int, folder: Path, ports: dict[str, str]) -> None:
    """Train all kinds, each of them as a script's spawn does, and then the first one as PyKinML does."""
    torch.set_num_threads(1)
    for kind in KINDS:
        os.environ["MASTER_PORT"] = ports[kind]
        args = arguments(folder, kind)
        args.pre_saved, args.data_path = True, args.savenm
        target = multi_fid_loop if args.multi_fid else trainer
        with mock.patch.object(Trainer, "_report"):
            target.spawned_trainer(rank, args, 2)
    os.environ["MASTER_PORT"] = ports["own"]
    args = arguments(folder, "energies")
    args.pre_saved, args.data_path = True, args.savenm
    own_loop(rank, args, folder / f"own-{rank}.pt")


def own_loop(rank: int, args: Arguments, path: Path) -> None:
    """PyKinML's loop in its outline: each process takes the batches of its loader, and DDP averages the gradients."""
    trainer.ddp_setup(rank, 2)
    torch.set_default_dtype(torch.float64)
    loader, _, _, net, optimizer, _, _, keys = prepper.load_train_objs(args)
    prepper.set_up_task_weights(net, args, optimizer)
    parallel = DistributedDataParallel(net, find_unused_parameters=True)
    for _ in range(args.epochs):
        for items in loader:
            aevs = [item[keys.index("aevs")] for item in items]
            energies = torch.stack([item[keys.index("engs")] for item in items])
            by_species = [torch.cat([aev[s] for aev in aevs]) for s in range(2)]
            ids = [torch.cat([torch.full((len(aev[s]),), i) for i, aev in enumerate(aevs)]) for s in range(2)]
            optimizer.zero_grad()
            found, _ = parallel(by_species, ids, len(items))
            prepper.my_loss(prepper.energy_abs_dif(found, energies))[0].backward()
            optimizer.step()
    torch.save(net.state_dict(), path)
    destroy_process_group()
