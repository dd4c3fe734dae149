"""PyKinML's preparation: arguments, prepared data, models, the terms of the loss."""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import is_initialized
from torch.utils.data import DataLoader, DistributedSampler

from kinml_fast.data import prepared, splits
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.sae import resolve_levels
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.pykinml import data, nnpes, state
from kinml_fast.pykinml.arguments import (
    NO_BIASES,
    THRESHOLD,
    Arguments,
    check,
    configuration,
    note,
    one,
    parse_arguments_list,
    seeds,
    show_log,
)
from kinml_fast.pykinml.data import Data_pes, PesDataset
from kinml_fast.train import config as configurations
from kinml_fast.train.config import Config
from kinml_fast.train.optimizers import make_optimizer
from kinml_fast.train.schedulers import make_scheduler
from kinml_fast.units import KCAL_PER_MOL

__all__ = [
    "Arguments",
    "energy_abs_dif",
    "force_abs_dif",
    "kcpm",
    "load_data",
    "load_train_data",
    "load_train_objs",
    "load_trained_model",
    "main",
    "my_loss",
    "parse_arguments_list",
    "prep_data",
    "prep_model",
    "prep_testing_data",
    "prep_training_data",
    "set_up_task_weights",
    "task_weights",
]

log = logging.getLogger(__name__)


def kcpm(E_eV: Any) -> Any:
    """An energy in kcal/mol, given in eV."""
    return E_eV * KCAL_PER_MOL


# The loss


def energy_abs_dif(pred_engs: Tensor, true_engs: Tensor) -> Tensor:
    """Absolute differences of energies."""
    return (pred_engs - true_engs).abs()


def force_abs_dif(pred_forces: Any, true_forces: Any, fdims: Any) -> list[Tensor]:
    """Absolute differences of the true components (the first `fdims` of each structure) of padded forces."""
    return [(p[:n] - t[:n]).abs() for p, t, n in zip(pred_forces, true_forces, fdims, strict=True)]


def my_loss(
    ediff: Tensor, fdiff: Any = (), dEsq: float = 1.0, dfsq: float = 1.0, p: float = 2
) -> tuple[Tensor, Tensor | float]:
    """The energy and the force term of the loss.

    Parameters
    ----------
    ediff
        Absolute differences of the energies, eV.
    fdiff
        For each structure the absolute differences of its force components, eV/Å; empty without forces.
    dEsq, dfsq
        What the terms are divided by.
    p
        Power: 2 for mean squared errors.

    Returns
    -------
    The mean of |ΔE|^p, and the mean over structures of the mean of |ΔF|^p, 0 without forces.
    """
    forces = sum((difference.pow(p).mean() for difference in fdiff), 0.0)
    return ediff.pow(p).mean() / dEsq, forces / len(ediff) / dfsq


class task_weights(torch.nn.Module):
    """What weighs the terms of the loss: given shares, or learned ones (Kendall et al., CVPR 2018).

    Parameters
    ----------
    num_tasks
        Number of terms.
    log_sigma
        The numbers at the beginning; None: equal shares, or zeros if they are learned.
    traditional
        Shares w of the terms behind the first: (1 − Σ w) L_0 + Σ w_t L_t. Otherwise Σ e^(−σ_t) L_t + σ_t.
    """

    def __init__(self, num_tasks: int = 2, log_sigma: Tensor | None = None, traditional: bool = False) -> None:
        super().__init__()
        self.num_tasks, self.traditional = num_tasks, traditional
        if log_sigma is None:
            log_sigma = torch.full((num_tasks - 1,), 1 / num_tasks) if traditional else torch.zeros(num_tasks)
            log_sigma.requires_grad_()
        self.log_sigma = log_sigma

    def get_precisions(self, log_sigma: Tensor) -> Tensor:
        """e^(−σ)"""
        return torch.exp(-log_sigma)

    def forward(self, loss_terms: Any, log_sigma: Tensor) -> Tensor:
        if self.traditional:
            factors = [1 - log_sigma.sum(), *log_sigma]
            return sum(factor * term for factor, term in zip(factors, loss_terms, strict=True))
        self.precisions = self.get_precisions(log_sigma)
        terms = zip(self.precisions, loss_terms, log_sigma, strict=True)
        return sum(factor * term + sigma for factor, term, sigma in terms)


def set_up_task_weights(model: torch.nn.Module, args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
    """Give a model `log_sigma` and `mtl`, as `args` says; learned ones become parameters of the optimizer too.

    A model that was loaded with learned ones goes on with them.
    """
    if not args.floss:
        args.optimize_force_weight, args.fw = False, 0.0
    learned = args.optimize_force_weight
    model.mtl = task_weights(num_tasks=2, traditional=not learned)
    values = torch.zeros(2) if learned else torch.tensor([float(args.fw)])
    kept = getattr(model, "kept_log_sigma", None)
    if learned and kept is not None:
        values = kept[0].detach().clone()
    model.log_sigma = torch.nn.Parameter(values.to(torch.get_default_dtype()), requires_grad=learned)
    if learned:
        optimizer.param_groups[0]["params"].append(model.log_sigma)
        if kept is not None and kept[1]:
            optimizer.state[model.log_sigma] = dict(kept[1])
        log.info("the shares of energies and forces in the loss are learned")


# Data


def prep_data(args: argparse.Namespace, mf: Any = None, fid: int | str = "", get_aevs: bool = True) -> None:
    """Read the data of a level of theory, set the test structures apart, and keep all that in `args.savenm`.

    Parameters
    ----------
    args
        See `parse_arguments_list`.
    mf
        Not needed.
    fid
        Level of theory; "": `args.fidlevel`.
    get_aevs
        Whether descriptors are kept too, under PyKinML's names.

    Raises
    ------
    InputError
        An argument that is not allowed, and whatever is wrong with the data.
    """
    show_log()
    check(args)
    config = configuration(args)
    folder = Path(one(args.savenm))
    fid = args.fidlevel if fid == "" else fid
    args.savepth, args.trpath, args.tspath = f"{folder}/", f"{folder}/training{fid}/", f"{folder}/testing{fid}/"
    mask = None if config.data.split_file is None else splits.read_tvtmsk(config.data.split_file)
    dpes = data.get_data(args, None if mask is None else mask.labels, fid, get_aevs)
    if mask is None:
        split = splits.make_split(dpes.structures, config.data.split, config.data.split_seed)
        chosen = np.concatenate([split.train, split.validation])
        train, test = ([dpes.md[i] for i in indices] for indices in (chosen, split.test))
    else:
        train, test = ([x for x, m in zip(mask.labels, mask.masks, strict=True) if m == value] for value in (2, -1))
    prep_training_data(dpes, train, args.trpath, get_aevs)
    prep_testing_data(dpes, test, args.tspath, get_aevs)
    dpes.save(args.trpath)
    log.info("%s: %d structures for training and validation, %d for testing", folder, len(dpes.pool), len(dpes.test))


# The manual calls these functions of this module.
prep_training_data, prep_testing_data = Data_pes.prep_training_data, Data_pes.prep_testing_data


def load_data(args: argparse.Namespace, get_aevs: bool = True, fid: int | str = "", mf: Any = None) -> tuple[Any, ...]:
    """The training, validation and test set of prepared data, divided as PyKinML does with `args.randomseed[0]`.

    Returns
    -------
    Three `PesDataset`, with `get_aevs` single-atom energies [n_elements] (eV) and the length of the descriptor, and the
    keys of an item.

    Raises
    ------
    InputError
        An argument that is not allowed, data that are not there, more structures asked for than there are.
    """
    check(args)
    config = configuration(args)
    folder = Path(args.data_path if args.pre_saved and args.data_path else one(args.savenm))
    fid = args.fidlevel if fid == "" else fid
    args.savepth, args.trpath, args.tspath = f"{folder}/", f"{folder}/training{fid}/", f"{folder}/testing{fid}/"
    found, kept = _prepared(Path(args.trpath))
    # What the data are was decided when they were prepared.
    division = {"split": config.data.split, "split_seed": config.data.split_seed}
    config = config.model_copy(update={"data": kept.data.model_copy(update=division), "descriptor": kept.descriptor})
    pool, test = found.split.train, found.split.test
    n_train, n_valid = _amounts(args.tvt, len(pool), len(test))
    _seed(args.randomseed[0])
    order = list(range(len(pool)))
    random.shuffle(order)
    train, valid = pool[order[:n_train]], pool[order[n_train : n_train + n_valid]]
    sae = found.sae
    if n_train + n_valid < len(pool):
        used = np.concatenate([train, valid])
        assert found.structures.energies is not None
        counts, energies = found.structures.counts()[used], found.structures.energies[used]
        start = None if found.baseline is None else np.zeros(len(sae))
        sae = resolve_levels(config.data.sae, counts, energies, found.structures.elements, start)
    forces = ["forces", *(["daevs", "fdims"] if get_aevs else [])] if args.floss else []
    keys = [*(["aevs"] if get_aevs else []), *forces, "engs"]
    shape = data.descriptor(config)
    sets = [
        PesDataset(found.structures.select(part), shape, keys, found.source, config, sae)
        for part in (train, valid, test)
    ]
    log.info("%s: %d structures for training, %d for validation, %d for testing", folder, *map(len, sets))
    return (*sets, sae, shape.length, keys) if get_aevs else (*sets, keys)


def load_train_data(args: argparse.Namespace, get_aevs: bool = True, fid: int | str = "") -> tuple[Any, ...]:
    """Loaders of the training, validation and test set, and the keys of an item; otherwise as `load_data`."""
    _seed(args.randomseed[1])
    found = load_data(args, get_aevs=get_aevs, fid=fid)
    return (*_loaders(args, found[:3]), found[-1])


def load_train_objs(args: argparse.Namespace, get_aevs: bool = True, fid: int | str = "") -> tuple[Any, ...]:
    """All that training takes.

    Returns
    -------
    Loaders of the training, validation and test set, model, optimizer, schedule of the learning rate, single-atom
    energies, keys of an item.
    """
    _seed(args.randomseed[1])
    *sets, sae_energies, dimdat, keys = load_data(args, get_aevs=True, fid=fid)
    if args.load_model:
        model, optimizer, schedule = prep_model(args, getattr(args, "load_opt", True), sae_energies=sae_energies)
    else:
        note(NO_BIASES)
        model, optimizer, schedule = prep_model(
            args,
            num_nn=len(args.present_elements),
            din_nn=dimdat,
            my_neurons_a=args.my_neurons,
            sae_energies=sae_energies,
            biases=False,
        )
    return (*_loaders(args, sets), model, optimizer, schedule, sae_energies, keys)


# Models


def prep_model(
    args: argparse.Namespace,
    load_opt: bool = True,
    num_nn: int | None = None,
    din_nn: int = 256,
    my_neurons_a: Any = None,
    my_neurons_b: Any = None,
    sae_energies: Any = None,
    biases: bool = True,
) -> tuple[nnpes.Composite, torch.optim.Optimizer, Any]:
    """A model, new or loaded, its optimizer and its schedule of the learning rate.

    Parameters
    ----------
    args
        Says which.
    load_opt
        Whether a loaded model's optimizer goes on with its state, learning rate and weight decay.
    num_nn, my_neurons_b
        Not needed.
    din_nn
        Length of the descriptor.
    my_neurons_a
        Nodes of each layer; None: `args.my_neurons`.
    sae_energies
        Single-atom energies, eV; None: zeros.
    biases
        Whether a new model's layers have biases.
    """
    check(args)
    _seed(args.randomseed[1])
    species = len(args.present_elements)
    if sae_energies is None:
        sae_energies = np.zeros(species)
    if args.load_model and load_opt:
        net, scheduler = load_trained_model(args, load_opt)
        optimizer = scheduler.optimizer
    else:
        if args.load_model:
            net = load_trained_model(args, load_opt)
        else:
            neurons = [list(my_neurons_a or args.my_neurons)] * species
            actfn = [list(args.my_actfn)] * species
            args.netparams = {"n_input": [int(din_nn)] * species, "neurons": neurons, "activations": actfn}
            if args.multi_fid:
                args.netparams |= {"neurons_hf": neurons, "activations_hf": actfn, "pass_eng": True, "pass_aev": True}
            args.netparams |= {"sae_energies": sae_energies, "add_sae": True, "biases": biases}
            net = (nnpes.CompositeNetworks_MF if args.multi_fid else nnpes.CompositeNetworks)(**args.netparams)
        optimizer, scheduler = _optimization(args, net)
    net.netparams, net.sae_energies = args.netparams, sae_energies
    log.info("net: %s", net)
    return net, optimizer, scheduler


def load_trained_model(args: argparse.Namespace, load_opt: bool = True) -> Any:
    """The model in `args.load_model_name`: a checkpoint of PyKinML or of this adapter, a native one, or model.pt.

    Parameters
    ----------
    args
        `netparams` and `my_actfn` are set to what the file says, with `load_opt` also `learning_rate` and
        `weight_decay`.
    load_opt
        Whether the schedule of the learning rate is returned too. Its `optimizer` goes on with the state of the one in
        the file, if that is of the same kind.

    Returns
    -------
    The model, or the model and the schedule.

    Raises
    ------
    InputError
        The file is missing, damaged, of another kind, names foreign classes or functions, or does not fit `args`.
    """
    show_log()
    path = Path(one(args.load_model_name))
    net, saved, elements = state.load(path)
    _check_model(args, path, net, elements)
    args.netparams = net.netparams
    args.my_actfn = list(net.netparams["activations"][0])
    log.info("%s: activation functions %s", path, ", ".join(args.my_actfn))
    if not load_opt:
        return net
    args.my_neurons = list(net.netparams["neurons"][0])
    if saved is None:
        log.info("%s: keeps no optimizer, which starts without a state", path)
    else:
        args.learning_rate, args.weight_decay = saved.settings["lr"], saved.settings["weight_decay"]
        log.info("%s: learning rate %g", path, args.learning_rate)
    optimizer, scheduler = _optimization(args, net)
    if saved is not None:
        saved.restore(optimizer, net)
    return net, scheduler


def main() -> None:
    """Prepare data as the command line says."""
    torch.set_default_dtype(torch.float64)
    prep_data(parse_arguments_list())


def _optimization(args: argparse.Namespace, net: nnpes.Composite) -> tuple[torch.optim.Optimizer, Any]:
    config = configuration(args).training
    if config.scheduler.name == "rop":
        note(THRESHOLD)
    optimizer = make_optimizer(net.parameters(), config.optimizer)
    return optimizer, make_scheduler(optimizer, config.scheduler, config.epochs)


def _check_model(args: argparse.Namespace, path: Path, net: nnpes.Composite, elements: tuple[str, ...] | None) -> None:
    several = len(net.by_level()) > 1
    if several != args.multi_fid:
        raise ConfigError(
            f"{path}: holds a model for {'two levels' if several else 'one level'} of theory, and args.multi_fid is "
            f"{args.multi_fid}: set it to {several}"
        )
    if elements not in (None, tuple(args.present_elements)) or len(net.NNs) != len(args.present_elements):
        known = "" if elements is None else f" ({' '.join(elements)})"
        raise ConfigError(
            f"{path}: has networks for {len(net.NNs)} elements{known}, and args.present_elements is "
            f"{' '.join(args.present_elements)}: name the elements that it was trained with, in their order"
        )


def _prepared(folder: Path) -> tuple[Prepared, Config]:
    """Prepared data and the configuration that they were prepared with."""
    if not (folder / data.PREPARED).exists():
        if (folder / "train_engs").exists():
            raise DataError(
                f"{folder}: was prepared by PyKinML: set args.pre_saved = False and prepare the data again, which "
                "takes seconds"
            )
        raise DataError(
            f"{folder}: holds no prepared data: call prep_data before, or set args.data_path to the args.savenm of a "
            "script that did"
        )
    config = configurations.from_dict(configurations.read_yaml(folder / data.CONFIG), str(folder / data.CONFIG))
    return prepared.load(folder / data.PREPARED), config


def _amounts(tvt: Sequence[float], n_pool: int, n_test: int) -> tuple[int, int]:
    """How many structures train and validate."""
    n_train, n_valid, n_last = tvt
    if sum(tvt) <= 1 + 1e-9:
        n_train = round(n_train / (n_train + n_valid) * n_pool)
        return n_train, n_pool - n_train
    if n_train + n_valid > n_pool:
        raise ConfigError(
            f"args.tvt asks for {int(n_train)} training and {int(n_valid)} validation structures, and there are "
            f"{n_pool} for both: ask for fewer"
        )
    if n_last not in (0, n_test):
        raise ConfigError(f"args.tvt asks for {int(n_last)} test structures, and there are {n_test}: write 0 there")
    return int(n_train), int(n_valid)


def _loaders(args: argparse.Namespace, sets: Sequence[PesDataset]) -> list[DataLoader]:
    """Loaders of the three parts; with `args.ddp` that for training gives each process a share, as in PyKinML."""
    shares: DistributedSampler | None = None
    if args.ddp:
        if not is_initialized():
            raise ConfigError(
                "args.ddp is True, but no processes have joined: call trainer.ddp_setup(rank, world_size) before, or "
                "set args.ddp = False"
            )
        shares = DistributedSampler(sets[0])
    samplers, sizes = (shares, None, None), (args.tr_batch_size, args.vl_batch_size, args.ts_batch_size)
    return [
        DataLoader(part, batch_size=size, sampler=sampler, collate_fn=list)
        for part, size, sampler in zip(sets, sizes, samplers, strict=True)
    ]


def _seed(seed: int) -> None:
    """Seed the generators of torch, numpy and Python as PyKinML does."""
    of_torch, of_numpy, of_python = seeds(seed)
    torch.manual_seed(of_torch)
    np.random.seed(of_numpy)  # noqa: NPY002 - scripts may use it
    random.seed(of_python)
