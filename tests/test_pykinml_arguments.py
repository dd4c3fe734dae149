"""PyKinML's arguments: defaults, what each may be, and the native key of each, as docs/from_pykinml.md says."""

from __future__ import annotations

import copy
import logging
import pickle
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from kinml_fast import devices
from kinml_fast.errors import InputError
from kinml_fast.pykinml import arguments, prepper
from kinml_fast.pykinml.arguments import Arguments, check, configuration, parse_arguments_list
from kinml_fast.train import config

PAGE = Path(__file__).parents[1] / "docs" / "from_pykinml.md"

DEFAULTS = {
    "fidlevel": 1,
    "fidlevel_lf": None,
    "input_data_type": "sqlite",
    "input_data_fname": ["data_holder/C5H5/C*H*.db"],
    "trtsid_name": ["sample_tvt.txt"],
    "tvt": [0.8, 0.1, 0.1],
    "present_elements": ["C", "H"],
    "temp": None,
    "sae_fit": True,
    "nameset": None,
    "pre_saved": False,
    "data_path": "",
    "optimizer": ["Adam"],
    "lrscheduler": "rop",
    "learning_rate": 1e-3,
    "decayrate": 0.5,
    "LR_patience": 25,
    "LR_threshold": 0.05,
    "momentum": 0.5,
    "weight_decay": 0,
    "epochs": 2,
    "save_every": 10,
    "load_model": False,
    "load_model_name": ["comp.pt"],
    "tr_batch_size": 10,
    "vl_batch_size": 10,
    "ts_batch_size": 10,
    "my_neurons": [128, 64, 32, 1],
    "my_actfn": ["gaussian", "gaussian", "gaussian", "identity"],
    "savenm": "my_model",
    "randomseed": [0, 1],
    "fw": 0.0,
    "floss": False,
    "write_tvtmsk": False,
    "read_trid": True,
    "optimize_force_weight": False,
    "no_biases": False,
    "delta": False,
    "multi_fid": False,
    "ddp": False,
    "gpus": [0],
    "num_cores": 4,
    "beta": 0.95,
    "cuttoff_radius": [5.2, 3.8],
    "aev_params": [16, 8, 8],
}
"""Those of PyKinML 1.1.2."""

# For each argument: what is set besides, another value than the default's, and the keys that then change.
ROWS = {
    "fidlevel": ({}, 3, {"data.fidelity": 3}),
    "fidlevel_lf": ({"delta": True}, 0, {"data.baseline": 0}),
    "input_data_type": ({}, "aev", {"training.jacobian": "stored"}),
    "input_data_fname": ({}, "a/*.db", {"data.files": ["a/*.db"]}),
    "trtsid_name": ({}, ["mine.txt"], {"data.split_file": "mine.txt"}),
    "tvt": ({}, [20, 5, 0], {"data.split": [20, 5, 0]}),
    "present_elements": ({}, ["O", "N"], {"data.elements": ["O", "N"]}),
    "temp": ({}, 300, {"data.temperature": 300.0}),
    "sae_fit": ({}, False, {"data.sae": "none"}),
    "nameset": ({}, ["w%", "irc"], {"data.names": ["w%", "irc"]}),
    "optimizer": ({}, "AdamW", {"training.optimizer.name": "adamw"}),
    "lrscheduler": ({}, ["exp"], {"training.scheduler.name": "exp", "training.scheduler.gamma": 0.5}),
    "learning_rate": ({}, 0.01, {"training.optimizer.learning_rate": 0.01}),
    "decayrate": ({}, 0.3, {"training.scheduler.factor": 0.3}),
    "LR_patience": ({}, 7, {"training.scheduler.patience": 7}),
    "LR_threshold": ({}, 0.2, {"training.scheduler.threshold": 0.2}),
    "momentum": ({"optimizer": "SGD"}, 0.9, {"training.optimizer.momentum": 0.9}),
    "weight_decay": ({}, 0.1, {"training.optimizer.weight_decay": 0.1}),
    "epochs": ({}, 9, {"training.epochs": 9}),
    "save_every": ({}, 3, {"training.save_every": 3}),
    "load_model": (
        {"load_model_name": "m.pt"},
        True,
        {"start.model": "m.pt", "start.optimizer": "keep", "start.sae": "data"},
    ),
    "load_model_name": ({"load_model": True}, "other.pt", {"start.model": "other.pt"}),
    "load_opt": ({"load_model": True}, False, {"start.optimizer": "reset"}),
    "tr_batch_size": ({}, 7, {"training.batch_size": 7}),
    "vl_batch_size": ({}, 7, {"training.validation_batch_size": 7}),
    "ts_batch_size": ({}, 7, {"training.test_batch_size": 7}),
    "my_neurons": ({}, [5, 4, 3, 1], {"network.layers": [5, 4, 3, 1]}),
    "my_actfn": (
        {},
        ["silu", "tanh", "relu", "identity"],
        {"network.activations": ["silu", "tanh", "relu", "identity"]},
    ),
    "savenm": ({}, "here", {"run": "here"}),
    "randomseed": ({}, [5, 6], {"data.split_seed": 5, "network.seed": random.Random(6).randrange(200000)}),
    "fw": ({"floss": True}, 0.5, {"training.loss.force_weight": 0.5}),
    "floss": ({"fw": 0.7}, True, {"training.loss.forces": True}),
    "optimize_force_weight": ({"floss": True, "fw": 0.7}, True, {"training.loss.weighting": "learned"}),
    "delta": ({"fidlevel_lf": 0}, True, {"data.baseline": 0, "data.incomplete": "error"}),
    "multi_fid": ({"fidlevel_lf": 0}, True, {"data.fidelity": [0, 1], "data.incomplete": "error"}),
    "ddp": ({"gpus": ["cpu", "cpu"]}, True, {"training.per_rank": ["batch_size"]}),
    "beta": ({}, 0.9, {"descriptor.beta": 0.9}),
    "cuttoff_radius": ({}, [6, 4.0], {"descriptor.cutoffs": [6.0, 4.0]}),
    "aev_params": (
        {},
        [4, 2, 3],
        {"descriptor.n_radial": 4, "descriptor.n_angular": 2, "descriptor.n_sections": 3},
    ),
}
WITHOUT_EFFECT = {
    "pre_saved": True,
    "data_path": "there",
    "write_tvtmsk": True,
    "read_trid": False,
    "no_biases": True,
    "gpus": [0, 1],
    "num_cores": 1,
}
"""Arguments that change nothing of a native configuration, and another value of each."""


def page_rows() -> dict[str, list[str]]:
    """Argument and native keys of each row of the page's table."""
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| argument |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {re.fullmatch(r"`(\w+)`", row[0])[1]: re.findall(r"`([\w.]+)`", row[1]) for row in rows}


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_defaults_are_pykinmls():
    args = parse_arguments_list([])
    assert vars(args) == DEFAULTS
    assert configuration(args).training.optimizer.learning_rate == 1e-3


def test_the_command_line_changes_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "-if", "2", "--no-sae-fit", "--tvt", "20", "5", "0", "-e", "7"])
    args = prepper.parse_arguments_list()
    assert (args.fidlevel, args.sae_fit, args.tvt, args.epochs) == (2, False, [20.0, 5.0, 0.0], 7)
    assert configuration(args).data.split == [20, 5, 0]


def test_a_mistake_on_the_command_line_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments_list(["-o", "RMSprop"])
    assert caught.value.code == 2
    assert "args.optimizer = ['RMSprop'] is not allowed: take one of Adam, AdamW, SGD" in capsys.readouterr().err


def test_the_page_has_every_argument_and_keys_that_exist():
    rows = page_rows()
    assert set(rows) == {*DEFAULTS, "load_opt"}
    known = config.keys()
    assert [key for keys in rows.values() for key in keys if key not in known] == []


def test_each_argument_of_the_page_is_tested_here():
    assert set(ROWS) | set(WITHOUT_EFFECT) == set(page_rows())


@pytest.mark.parametrize("name", ROWS)
def test_an_argument_changes_its_keys_and_no_others(name):
    besides, value, expected = ROWS[name]
    args = parse_arguments_list([])
    for other, own in besides.items():
        setattr(args, other, own)
    mode = next((mode for mode in ("delta", "multi_fid") if getattr(args, mode)), None)
    if mode and name == "fidlevel_lf":
        args.fidlevel_lf = -1
    before = flat(configuration(args).model_dump())
    setattr(args, name, value)
    after = flat(configuration(args).model_dump())
    changed = {key: value for key, value in after.items() if before[key] != value}
    known = set(page_rows()[name])
    for key, own in expected.items():
        assert after[key] == own
        assert changed.get(key) == own
    assert known & set(changed), f"the page says {known}, and {set(changed)} changed"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_an_argument_without_a_native_effect_changes_nothing(name):
    args = parse_arguments_list([])
    before = configuration(args)
    setattr(args, name, WITHOUT_EFFECT[name])
    assert getattr(args, name) == WITHOUT_EFFECT[name]
    assert configuration(args) == before


def test_names_of_the_manual_are_the_same_arguments():
    args = parse_arguments_list([])
    args.cutoff_radius, args.tv = [6.0, 4.0], [20, 5, 0]
    assert (args.cuttoff_radius, args.tvt) == ([6.0, 4.0], [20, 5, 0])
    assert args.cutoff_radius == [6.0, 4.0]
    with pytest.raises(AttributeError, match="args has no load_opt"):
        _ = args.load_opt
    args.load_opt = False  # PyKinML's script sets it
    assert args.load_opt is False


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("optimizer", ["RMSprop"], "Adam, AdamW, SGD"),
        ("optimizer", ["Adam", "SGD"], "Adam, AdamW, SGD"),
        ("lrscheduler", "cosine", "rop, exp, step"),
        ("input_data_type", "pca", "sqlite, or aev"),
        ("my_actfn", ["gaussian", "elu"], "gaussian, tanh, identity, relu, silu"),
        ("my_neurons", [8, 4], "the last is 1"),
        ("my_neurons", [], "the last is 1"),
        ("my_neurons", [8.0, 1], "whole numbers"),
        ("present_elements", ["C", "X1"], "chemical symbols"),
        ("tvt", [0.8, 0.3, 0.2], "three fractions"),
        ("tvt", [20, 5], "three whole numbers"),
        ("tvt", [20, -5, 0], "three whole numbers"),
        ("randomseed", 0, "two whole numbers"),
        ("randomseed", [0, -1], "two whole numbers"),
        ("aev_params", [16, 8], "three positive whole numbers"),
        ("aev_params", [16, 8, 1], "three positive whole numbers"),
        ("cuttoff_radius", 5.2, "two positive lengths"),
        ("cutoff_radius", [5.2, 0], "two positive lengths"),
        ("beta", 1.1, "at most 1"),
        ("fw", 1.5, "from 0 to 1"),
        ("floss", "False", "True or False"),
        ("sae_fit", 1, "True or False"),
        ("epochs", 2.5, "whole number"),
        ("save_every", 0, "positive whole number"),
        ("tr_batch_size", True, "positive whole number"),
        ("learning_rate", 0, "positive number"),
        ("learning_rate", float("nan"), "positive number"),
        ("decayrate", 1.0, "between 0 and 1"),
        ("LR_patience", 2.5, "whole number"),
        ("LR_threshold", -1, "kcal/mol"),
        ("momentum", 1.0, "less than 1"),
        ("weight_decay", -0.1, "not negative"),
        ("temp", 0, "positive temperature"),
        ("fidlevel", "1", "number of a level"),
        ("fidlevel_lf", 0.5, "number of a level"),
        ("input_data_fname", [], "glob pattern"),
        ("trtsid_name", ["a.txt", "b.txt"], "one file"),
        ("load_model_name", ["a.pt", "b.pt"], "one checkpoint"),
        ("savenm", [], "a folder"),
        ("nameset", [1], "names"),
        ("ddp", 2, "True or False"),
        ("gpus", ["gpu"], "indices of GPUs, or 'cpu' for each process"),
        ("gpus", ["cpu", 0], "indices of GPUs"),
        ("gpus", [], "indices of GPUs"),
        ("gpus", 0, "indices of GPUs"),
        ("gpus", "0, -1", "indices of GPUs"),
    ],
)
def test_a_value_that_is_not_allowed_names_those_that_are(name, value, allowed):
    args = parse_arguments_list([])
    with pytest.raises(InputError, match=allowed) as caught:
        setattr(args, name, value)
    assert str(caught.value).startswith(f"args.{arguments.ALIASES.get(name, name)} = {value!r} is not allowed: ")
    # A script may also bring its own object.
    with pytest.raises(InputError, match=allowed):
        check(SimpleNamespace(**{**DEFAULTS, name: value}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"my_neurons": [8, 1]}, "2 layers and args.my_actfn 4 activation functions"),
        ({"delta": True, "multi_fid": True, "fidlevel_lf": 0}, "both True"),
        ({"load_model": True, "load_model_name": None}, "args.load_model_name is None: give the path"),
        ({"delta": True}, "args.delta is True and args.fidlevel_lf is None"),
        ({"multi_fid": True, "fidlevel_lf": 1}, "args.multi_fid is True and args.fidlevel_lf is 1"),
    ],
)
def test_values_that_do_not_go_together(values, message):
    with pytest.raises(InputError, match=message):
        check(Arguments(**{**DEFAULTS, **values}))


def test_gpus_are_what_scripts_make_of_them():
    args = parse_arguments_list(["--gpus", "0", "2"])
    assert args.gpus == [0, 2]
    for value in ([0, 2], ["0", "2"], "0, 2", "0,2"):
        args.gpus = value
        assert arguments.gpus(args) == ["0", "2"]
    args = parse_arguments_list(["--gpus", "cpu", "cpu"])
    args.gpus = ", ".join(args.gpus)
    assert arguments.gpus(args) == ["cpu", "cpu"]


@pytest.mark.skipif(devices.why_no_gpu() is None, reason="there is a GPU")
@pytest.mark.parametrize("values", [{"ddp": True}, {"ddp": True, "gpus": "0, 1"}, {"gpu": 1}])
def test_gpus_that_are_not_there_are_one_sentence(values):
    with pytest.raises(InputError, match=r"(?s)^(?!.*\n).*this (torch|build)|^[^\n]*finds no GPU"):
        check(Arguments(**{**DEFAULTS, **values}))


def test_arguments_can_be_copied():
    args = parse_arguments_list([])
    args.epochs = 77
    for other in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert vars(other) == vars(args)
        with pytest.raises(InputError, match="not allowed"):
            other.epochs = -1


def test_step_takes_its_step_size_where_a_script_sets_it():
    args = parse_arguments_list([])
    args.lrscheduler = "step"
    assert configuration(args).training.scheduler.step_size == 30
    args.stepsize = 5000
    assert configuration(args).training.scheduler.step_size == 5000


def test_a_script_that_logs_keeps_its_log():
    logger = logging.getLogger("kinml_fast")
    before = logger.level, list(logger.handlers)
    own = logging.NullHandler()
    logger.handlers[:] = [own]
    try:
        arguments.show_log()
        assert logger.handlers == [own]
    finally:
        logger.setLevel(before[0])
        logger.handlers[:] = before[1]
