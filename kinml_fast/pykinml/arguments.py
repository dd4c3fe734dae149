"""PyKinML's arguments: their parser, what each may be, and the native configuration that they stand for."""

from __future__ import annotations

import argparse
import functools
import logging
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from ase.data import chemical_symbols

from kinml_fast import devices
from kinml_fast.errors import ConfigError, DeviceError, InputError
from kinml_fast.train import config as configurations
from kinml_fast.train.config import Config
from kinml_fast.train.ranks import present

log = logging.getLogger(__name__)

ACTIVATIONS = ("gaussian", "tanh", "identity", "relu", "silu")
OPTIMIZERS = {"Adam": "adam", "AdamW": "adamw", "SGD": "sgd"}
SCHEDULERS = ("rop", "exp", "step")
ALIASES = {"cutoff_radius": "cuttoff_radius", "tv": "tvt"}
"""Names that the manual uses for arguments that PyKinML calls otherwise."""


def _number_or_word(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


_YES = {"action": argparse.BooleanOptionalAction}
_PARSER: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("-if --fidlevel", {"type": int, "default": 1}, "level of theory; the higher one of two"),
    ("--fidlevel-lf", {"type": int}, "lower level of theory, for --delta and --multi_fid"),
    ("-d --input-data-type", {"default": "sqlite"}, "kind of data files: sqlite, or aev (PyKinML's HDF5)"),
    ("-f --input-data-fname", {"nargs": "*", "default": ["data_holder/C5H5/C*H*.db"]}, "data files or patterns"),
    ("--trtsid-name", {"nargs": "*", "default": ["sample_tvt.txt"]}, "file of lines `C5H5/17 2` (2 or -1, test)"),
    ("--tvt", {"nargs": "+", "type": float, "default": [0.8, 0.1, 0.1]}, "training, validation, test"),
    ("--present_elements", {"nargs": "+", "default": ["C", "H"]}, "elements in the order of the networks"),
    ("--temp", {"type": int}, "only structures sampled at this temperature"),
    ("-sae --sae-fit", {**_YES, "default": True}, "fit single-atom energies and train on what is left"),
    ("-ns --nameset", {"nargs": "+"}, "only structures with names like these SQL patterns"),
    ("-prs --pre-saved", {**_YES, "default": False}, "the data have been prepared, in --data_path"),
    ("--data_path", {"default": ""}, "folder of prepared data"),
    ("-o --optimizer", {"nargs": "*", "default": ["Adam"]}, "Adam, AdamW or SGD"),
    ("-ls --lrscheduler", {"nargs": "*", "default": "rop"}, "rop (on plateau), exp or step"),
    ("-l --learning-rate", {"type": float, "default": 1e-3}, "initial learning rate"),
    ("-dr --decayrate", {"type": float, "default": 0.5}, "factor of the learning rate"),
    ("-lrp --LR_patience", {"type": float, "default": 25}, "rop: epochs without improvement"),
    ("-lrt --LR_threshold", {"type": float, "default": 0.05}, "rop: improvement that counts, kcal/mol"),
    ("-m --momentum", {"type": float, "default": 0.5}, "SGD: momentum"),
    ("--weight-decay", {"type": float, "default": 0}, "weight decay"),
    ("-e --epochs", {"type": int, "default": 2}, "passes over the training structures"),
    ("--save_every", {"type": int, "default": 10}, "epochs between two checkpoints"),
    ("-lmo --load-model", {**_YES, "default": False}, "start from --load_model_name"),
    ("-lm --load_model_name", {"nargs": "*", "default": ["comp.pt"]}, "checkpoint to start from"),
    ("-btr --tr_batch_size", {"type": int, "default": 10}, "structures in a training batch"),
    ("-bvl --vl_batch_size", {"type": int, "default": 10}, "structures in a validation batch"),
    ("-bts --ts_batch_size", {"type": int, "default": 10}, "structures in a test batch"),
    ("-nl --my-neurons", {"nargs": "+", "type": int, "default": [128, 64, 32, 1]}, "nodes of each layer"),
    (
        "-al --my-actfn",
        {"nargs": "+", "default": ["gaussian", "gaussian", "gaussian", "identity"]},
        "activation of each layer: " + ", ".join(ACTIVATIONS),
    ),
    ("-sn --savenm", {"nargs": "*", "default": "my_model"}, "folder of the run"),
    ("-r --randomseed", {"nargs": "+", "type": int, "default": [0, 1]}, "seeds of the division and of the weights"),
    ("--fw", {"type": float, "default": 0.0}, "share of the forces in the loss"),
    ("--floss", {**_YES, "default": False}, "train on forces too"),
    ("--write-tvtmsk", {**_YES, "default": False}, "nothing: split.txt in the run folder is always written"),
    ("--read-trid", {**_YES, "default": True}, "nothing: --trtsid-name decides"),
    ("-ofw --optimize-force-weight", {**_YES, "default": False}, "learn the shares of energies and forces"),
    ("--no-biases", {"action": "store_true", "default": False}, "layers without biases"),
    ("--delta", {**_YES, "default": False}, "train on differences of two levels of theory"),
    ("--multi_fid", {**_YES, "default": False}, "train on two levels of theory"),
    ("--ddp", {**_YES, "default": False}, "several processes, one for each of --gpus"),
    (
        "--gpus",
        {"nargs": "+", "type": _number_or_word, "default": [0]},
        "indices of the GPUs; cpu cpu for two processes on the CPU",
    ),
    ("-c --num_cores", {"type": int, "default": 4}, "half the number of threads; scripts set those themselves"),
    ("--beta", {"type": float, "default": 0.95}, "factor of the cosine in the descriptor"),
    ("-R_c --cuttoff-radius", {"type": float, "nargs": "+", "default": [5.2, 3.8]}, "radial and angular cutoff, Å"),
    ("-aev --aev_params", {"type": int, "nargs": "+", "default": [16, 8, 8]}, "shifts and angles of the descriptor"),
)


class Arguments(argparse.Namespace):
    """PyKinML's `args`: a value that is not allowed is refused where it is assigned.

    Further attributes may be set, as PyKinML's scripts do (`load_opt`); `cutoff_radius` and `tv`, as the manual calls
    two of them, are the same as `cuttoff_radius` and `tvt`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        name = ALIASES.get(name, name)
        check_one(name, value)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there under its own name.
        if name in ALIASES:
            return getattr(self, ALIASES[name])
        raise AttributeError(f"args has no {name}")


def parse_arguments_list(arguments: Sequence[str] | None = None) -> Arguments:
    """PyKinML's arguments with its defaults, changed by the command line of the script.

    Parameters
    ----------
    arguments
        Instead of the command line.
    """
    show_log()
    parser = argparse.ArgumentParser(description="Train a model; the arguments are PyKinML's.")
    for flags, settings, text in _PARSER:
        parser.add_argument(*flags.split(), **settings, help=text)
    plain = parser.parse_args(arguments)
    try:
        return Arguments(**vars(plain))
    except InputError as error:
        parser.error(str(error))


def check(args: argparse.Namespace) -> None:
    """Refuse values that are not allowed, each for itself and together.

    Raises
    ------
    InputError
        One sentence with the argument, its value and what is allowed.
    """
    for name, value in vars(args).items():
        check_one(ALIASES.get(name, name), value)
    if len(args.my_neurons) != len(args.my_actfn):
        raise ConfigError(
            f"args.my_neurons has {len(args.my_neurons)} layers and args.my_actfn {len(args.my_actfn)} activation "
            "functions: give one function for each layer"
        )
    if args.load_model and args.load_model_name is None:
        raise ConfigError("args.load_model is True and args.load_model_name is None: give the path of a checkpoint")
    if hasattr(args, "gpu"):
        device_of(args.gpu)  # says what is wrong with it
    if args.ddp and "cpu" not in gpus(args) and (reason := devices.why_no_gpu()):
        raise DeviceError(
            f"args.ddp is True and args.gpus is {args.gpus!r}, but {reason}; or set args.gpus = ['cpu', 'cpu'] and "
            "world_size = 2 for two processes on the CPU"
        )
    if args.delta and args.multi_fid:
        raise ConfigError("args.delta and args.multi_fid are both True: choose one of the two")
    if (args.delta or args.multi_fid) and args.fidlevel_lf in (None, args.fidlevel):
        mode = "delta" if args.delta else "multi_fid"
        raise ConfigError(
            f"args.{mode} is True and args.fidlevel_lf is {args.fidlevel_lf}: give the number of the lower level, "
            f"another one than args.fidlevel, which is {args.fidlevel}"
        )


def check_one(name: str, value: Any) -> None:
    """Refuse a value that an argument may not have; names that are no arguments may have any."""
    if name in _RULES:
        allowed, text = _RULES[name]
        if not allowed(value):
            raise ConfigError(f"args.{name} = {value!r} is not allowed: {text}")


def configuration(args: argparse.Namespace) -> Config:
    """The native configuration that the arguments stand for.

    Its run differs from PyKinML's in the division into training and validation structures, which PyKinML draws in its
    own way (`prepper.load_data`); the run folder's config.yaml names the file of that division.

    Raises
    ------
    InputError
        A value that is not allowed.
    """
    check(args)
    rop = one(args.lrscheduler) == "rop"
    scheduler = {"name": one(args.lrscheduler)}
    if rop:
        scheduler |= {
            "factor": float(args.decayrate),
            "patience": int(args.LR_patience),
            "threshold": float(args.LR_threshold),
            "threshold_mode": "abs",
        }
    else:
        scheduler["gamma"] = float(args.decayrate)
    if one(args.lrscheduler) == "step" and getattr(args, "stepsize", None) is not None:
        scheduler["step_size"] = int(args.stepsize)
    optimizer = {
        "name": OPTIMIZERS[one(args.optimizer)],
        "learning_rate": float(args.learning_rate),
        "weight_decay": float(args.weight_decay),
    }
    if optimizer["name"] == "sgd":
        optimizer |= {"momentum": float(args.momentum), "nesterov": args.momentum > 0}
    n_radial, n_angular, n_sections = map(int, args.aev_params)
    values = {
        "run": one(args.savenm),
        "data": {
            "files": several(args.input_data_fname),
            "fidelity": [int(args.fidlevel_lf), int(args.fidlevel)] if args.multi_fid else int(args.fidlevel),
            "baseline": int(args.fidlevel_lf) if args.delta else None,
            "incomplete": "error" if args.delta or args.multi_fid else None,
            "temperature": None if args.temp is None else float(args.temp),
            "names": None if args.nameset is None else several(args.nameset),
            "split": [int(x) if float(x).is_integer() else float(x) for x in args.tvt],
            "split_file": one(args.trtsid_name),
            "split_seed": int(args.randomseed[0]),
            "sae": "fit" if args.sae_fit else "none",
            "elements": list(args.present_elements),
        },
        "descriptor": {
            "n_radial": n_radial,
            "n_angular": n_angular,
            "n_sections": n_sections,
            "cutoffs": [float(cutoff) for cutoff in args.cuttoff_radius],
            "beta": float(args.beta),
        },
        "network": {
            "layers": [int(width) for width in args.my_neurons],
            "activations": list(args.my_actfn),
            "biases": False,
            "seed": seeds(args.randomseed[1])[0],
        },
        "start": _start(args),
        "training": {
            "epochs": int(args.epochs),
            "batch_size": int(args.tr_batch_size),
            "validation_batch_size": int(args.vl_batch_size),
            "test_batch_size": int(args.ts_batch_size),
            "per_rank": ["batch_size"] if args.ddp else [],
            "shuffle": False,
            "jacobian": "stored" if args.input_data_type == "aev" else "recompute",
            "loss": _loss(args),
            "score": {"forces": 0.0},
            "optimizer": optimizer,
            "scheduler": scheduler,
            "save_every": int(args.save_every),
            "test_every": 1,
        },
    }
    return configurations.from_dict(values, "args")


def _start(args: argparse.Namespace) -> dict[str, Any]:
    if not args.load_model:
        return {}
    kept = "keep" if getattr(args, "load_opt", True) else "reset"
    return {"model": one(args.load_model_name), "optimizer": kept, "sae": "data"}


def _loss(args: argparse.Namespace) -> dict[str, Any]:
    if not args.floss:
        return {}
    if args.optimize_force_weight:
        return {"forces": True, "weighting": "learned"}
    return {"forces": True, "force_weight": float(args.fw)}


def seeds(seed: int) -> tuple[int, int, int]:
    """The seeds of torch, numpy and `random` that PyKinML derives from one."""
    generator = random.Random(seed)
    return generator.randrange(200000), generator.randrange(200000), generator.randrange(200000)


def one(value: Any) -> Any:
    """The value of an argument that PyKinML takes as a word or as a list of one."""
    return value if isinstance(value, str) or value is None else value[0]


def several(value: Any) -> list[str]:
    """The values of an argument that PyKinML takes as a word or as a list."""
    return [value] if isinstance(value, str) else list(value)


class _Shown(logging.StreamHandler):
    """What `show_log` shows the log by, and no script of its own."""


def show_log() -> None:
    """Show what the package logs on standard output, as PyKinML prints, unless the script has set up its own log.

    Of several processes that have joined only the first one does.
    """
    logger = logging.getLogger("kinml_fast")
    if not logger.hasHandlers():
        handler = _Shown(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if not present().is_first and any(isinstance(handler, _Shown) for handler in logger.handlers):
        logger.setLevel(logging.ERROR)


@functools.cache
def note(sentence: str) -> None:
    """Say once what is different from PyKinML."""
    log.info("%s", sentence)


def device_of(rank: int | str | torch.device) -> torch.device:
    """Where to compute: "cpu", the index or name of a GPU, or a device of torch; errors as of `devices.resolve`."""
    return devices.resolve(f"cuda:{rank}" if isinstance(rank, int) else str(rank))


def gpus(args: argparse.Namespace) -> list[str]:
    """The words of `args.gpus`, which scripts make one text of ("0, 1"): indices of GPUs, or "cpu" for each process."""
    listed = args.gpus.split(",") if isinstance(args.gpus, str) else args.gpus
    return [str(gpu).strip() for gpu in listed]


NO_BIASES = (
    "networks are built without biases, as PyKinML's training does whatever args.no_biases says (prep_model takes "
    "biases=True)"
)
KEPT_ORDER = "batches keep their structures from epoch to epoch, as in PyKinML (native: training.shuffle)"
FORCES = "forces are derivatives of the energies (PyKinML's are those of aevmod's eval_Jac, which differ a little)"
LEVELS = (
    "single-atom energies belong to a level each and are no input of the second network (PyKinML feeds them into it)"
)
THRESHOLD = "args.LR_threshold is in kcal/mol, as the manual says (PyKinML takes it as a fraction)"


def _numbers(value: Any, kind: Any, count: int | None = None) -> bool:
    return (
        isinstance(value, list | tuple)
        and (count is None or len(value) == count)
        and all(isinstance(x, kind) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )


def _number(low: float = -math.inf, high: float = math.inf, kind: type = Real) -> Callable:
    return lambda value: _numbers([value], kind) and low <= value <= high


def _word(words: Sequence[str], nothing: bool = False) -> Callable[[Any], bool]:
    def allowed(value: Any) -> bool:
        if nothing and value is None:
            return True
        single = [value] if isinstance(value, str) else value
        return isinstance(single, list | tuple) and len(single) == 1 and (not words or single[0] in words)

    return allowed


def _words(words: Sequence[str] = ()) -> Callable[[Any], bool]:
    def allowed(value: Any) -> bool:
        return isinstance(value, list | tuple) and bool(value) and all(x in words for x in value)

    return allowed


def _all_match(pattern: str, value: Any) -> bool:
    listed = value.split(",") if isinstance(value, str) else value
    return (
        isinstance(listed, list | tuple)
        and bool(listed)
        and not any(isinstance(x, bool) for x in listed)
        and all(re.fullmatch(pattern, str(x).strip()) for x in listed)
    )


def _names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(x, str) for x in value)
    )


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "optimizer": (_word(list(OPTIMIZERS)), f"take one of {', '.join(OPTIMIZERS)}"),
    "lrscheduler": (_word(SCHEDULERS), f"take one of {', '.join(SCHEDULERS)}"),
    "input_data_type": (_word(["sqlite", "aev"]), "take sqlite, or aev for PyKinML's HDF5 files"),
    "input_data_fname": (_names, "give a path or glob pattern, or a list of them"),
    "trtsid_name": (_word((), nothing=True), "give one file, or None for a random division"),
    "savenm": (_word(()), "give the name of a folder"),
    "load_model_name": (_word((), nothing=True), "give the path of one checkpoint"),
    "my_actfn": (_words(ACTIVATIONS), f"give a list with one of {', '.join(ACTIVATIONS)} for each layer"),
    "my_neurons": (
        lambda v: _numbers(v, Integral) and len(v) > 0 and min(v) > 0 and v[-1] == 1,
        "give a list of positive whole numbers, of which the last is 1, the energy",
    ),
    "present_elements": (_words(chemical_symbols[1:]), "give a list of chemical symbols like C, H, Cl"),
    "nameset": (lambda v: v is None or bool(_names(v)), "give a list of names, or None for all structures"),
    "tvt": (
        lambda v: _numbers(v, Real, 3) and min(v) >= 0 and (sum(v) <= 1 + 1e-9 or all(x == int(x) for x in v)),
        "give three whole numbers for training, validation and test (the last 0 with trtsid_name), or three fractions "
        "with a sum of at most 1",
    ),
    "randomseed": (lambda v: _numbers(v, Integral, 2) and min(v) >= 0, "give two whole numbers that are not negative"),
    "aev_params": (
        lambda v: _numbers(v, Integral, 3) and min(v) > 0 and v[2] > 1,
        "give three positive whole numbers: radial shifts, angular shifts, angles (at least 2)",
    ),
    "cuttoff_radius": (
        lambda v: _numbers(v, Real, 2) and min(v) > 0,
        "give two positive lengths in Å, radial and angular",
    ),
    "beta": (lambda v: _number(0, 1)(v) and v > 0, "give a number above 0 and at most 1"),
    "fw": (_number(0, 1), "give a number from 0 to 1"),
    "learning_rate": (lambda v: _number(0)(v) and v > 0, "give a positive number"),
    "decayrate": (lambda v: _number(0, 1)(v) and 0 < v < 1, "give a number between 0 and 1"),
    "LR_patience": (lambda v: _number(0)(v) and v == int(v), "give a whole number that is not negative"),
    "LR_threshold": (_number(0), "give a number (kcal/mol) that is not negative"),
    "momentum": (lambda v: _number(0, 1)(v) and v < 1, "give a number from 0 to less than 1"),
    "weight_decay": (_number(0), "give a number that is not negative"),
    "epochs": (_number(0, kind=Integral), "give a whole number that is not negative"),
    "temp": (
        lambda v: v is None or (_number(0)(v) and v > 0),
        "give a positive temperature in K, or None for every temperature above 0",
    ),
    "fidlevel": (_number(kind=Integral), "give the number of a level of theory in the data"),
    "fidlevel_lf": (
        lambda v: v is None or _number(kind=Integral)(v),
        "give the number of a level of theory in the data",
    ),
    "num_cores": (_number(0, kind=Integral), "give a whole number"),
    "gpus": (
        lambda v: _all_match(r"\d+", v) or _all_match("cpu", v),
        "give a list of indices of GPUs, or 'cpu' for each process that is to train on the CPU",
    ),
    **{
        name: (_number(1, kind=Integral), "give a positive whole number")
        for name in ("save_every", "tr_batch_size", "vl_batch_size", "ts_batch_size")
    },
    **{
        name: (lambda v: isinstance(v, bool), "take True or False")
        for name in (
            "sae_fit",
            "pre_saved",
            "load_model",
            "floss",
            "write_tvtmsk",
            "read_trid",
            "optimize_force_weight",
            "no_biases",
            "delta",
            "multi_fid",
            "ddp",
        )
    },
}
