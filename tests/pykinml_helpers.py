"""What the tests of PyKinML's interface share: arguments of a small run, and scripts that are run."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from kinml_fast.pykinml.arguments import Arguments, parse_arguments_list
from kinml_fast.train import Trainer

SCRIPTS = Path(__file__).parent / "pykinml_scripts"


def small(folder: Path, **changes: object) -> Arguments:
    """Arguments of a run on shipped data of two levels that takes a second."""
    args = parse_arguments_list([])
    values = {
        "input_data_fname": ["shipped:C2H2.db", "shipped:C2H3.db"],
        "trtsid_name": None,
        "tvt": [30, 8, 6],
        "epochs": 3,
        "save_every": 2,
        "tr_batch_size": 10,
        "my_neurons": [6, 4, 1],
        "my_actfn": ["gaussian", "tanh", "identity"],
        "aev_params": [4, 2, 2],
        "savenm": str(folder / "run"),
    }
    for name, value in {**values, **changes}.items():
        setattr(args, name, value)
    return args


def run_script(name: str, folder: Path, *changes: tuple[str, str]) -> str:
    """Run one of `SCRIPTS` in a process of its own, after replacements in its text, and return what it printed."""
    path = write_script(name, folder, *changes)
    # One thread: others may compute on this machine too.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, path.name], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_here(name: str, folder: Path, *changes: tuple[str, str]) -> str:
    """The same in this process and without plots, which takes less time; what the script raises is raised."""
    path = write_script(name, folder, *changes)
    logger, out = logging.getLogger("kinml_fast"), io.StringIO()
    before = logger.level, list(logger.handlers), torch.get_default_dtype(), torch.get_num_threads(), sys.argv
    handler = logging.StreamHandler(out)
    logger.handlers[:], sys.argv = [handler], [path.name]
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    try:
        with _chdir(folder), contextlib.redirect_stdout(out), mock.patch.object(Trainer, "_report"):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        logger.setLevel(before[0])
        logger.handlers[:], sys.argv = before[1], before[4]
        torch.set_default_dtype(before[2])
        torch.set_num_threads(before[3])
    return out.getvalue()


def write_script(name: str, folder: Path, *changes: tuple[str, str]) -> Path:
    """Put one of `SCRIPTS` into a folder, after replacements in its text."""
    text = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return path


@contextlib.contextmanager
def _chdir(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def errors(output: str) -> dict[tuple[int, str], float]:
    """The errors that a run has printed, by epoch and name: (9, "train RMSE")."""
    found, epoch = {}, -1
    for line in output.splitlines():
        if match := re.match(r"(?:device|GPU)  cpu  epoch:  (\d+)$", line):
            epoch = int(match[1])
        elif match := re.match(r"device  cpu   (\w+ \w+):  (\S+)$", line):
            found[epoch, match[1]] = float(match[2])
    return found


def metrics(folder: Path) -> dict[tuple[int, str], dict[str, str]]:
    """The rows of metrics.csv by epoch and split."""
    with (folder / "metrics.csv").open(newline="") as file:
        return {(int(row["epoch"]), row["split"]): row for row in csv.DictReader(file)}
