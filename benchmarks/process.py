"""One process of a training, whose memory or whose time from its first line is measured. Prints JSON.

python process.py memory FORM DTYPE --threads N   # peak memory after `import torch` and after an epoch of 2000 C5H5
python process.py cold-start RECIPE KEY=VALUE …   # time until the test errors are below LIMITS
"""

# ruff: noqa: E402 (the clock starts before the imports)
from __future__ import annotations

import time

STARTED = time.perf_counter()

import argparse
import csv
import json
import re
import sys
import tempfile
from pathlib import Path

LIMITS = {"energy_rmse": 1.0, "forces_rmse": 2.3}
"""kcal/mol and kcal/mol/Å"""


def peak_memory() -> int:
    """Most bytes of memory that the process has had so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def memory(form: str, dtype: str, threads: int) -> dict:
    import torch

    imported = peak_memory()
    torch.set_num_threads(threads)
    from forms import training
    from tasks import c5h5

    training(form, c5h5(), getattr(torch, dtype))()
    return {"imported": imported, "peak": peak_memory()}


def cold_start(recipe: str, overrides: list[str]) -> dict:
    """Train as the command line does, and say when the limits were reached."""
    from kinml_fast.train import load, start
    from kinml_fast.train.progress import Progress

    class Clock(Progress):
        def begin(self, epochs: int, first: int) -> None:
            super().begin(epochs, first)
            self.begun, self.ends = time.perf_counter(), []

        def epoch(self, train, validation) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        start(load(recipe, [*overrides, f"run={folder}/run", "training.test_every=1"]), progress=clock)
        with (Path(folder) / "run" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    errors = [{name: float(row[name]) for name in LIMITS} for row in rows]
    reached = [all(error[name] < limit for name, limit in LIMITS.items()) for error in errors]
    result: dict = {"epochs": len(rows), "limits": LIMITS, "last": errors[-1]}
    if any(reached):
        epoch = reached.index(True)
        result |= {
            "epoch": epoch,
            "errors": errors[epoch],
            "seconds": clock.ends[epoch] - STARTED,
            "training_seconds": clock.ends[epoch] - clock.begun,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    one = kinds.add_parser("memory")
    one.add_argument("form")
    one.add_argument("dtype")
    one.add_argument("--threads", type=int, required=True)
    other = kinds.add_parser("cold-start")
    other.add_argument("recipe")
    other.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.kind == "memory":
        result = memory(arguments.form, arguments.dtype, arguments.threads)
    else:
        result = cold_start(arguments.recipe, arguments.overrides)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
