"""The published PyKinML run, to the last digits that were published.

PyKinML 1.1.2's `single_fid` example on its C5H5.db: float64, no reshuffling, its own seeding; ten epochs of Adam. Two
independent machines agree on these numbers to 2e-12.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import SHARED, needs_shared, pykinml_split

from kinml_fast.data import sae, sqlite
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import TrainingData, continued
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.trainer import Trainer

PUBLISHED = {  # epoch: train MAE, train RMSE, validation RMSE, test MAE, test RMSE; kcal/mol
    0: (20.7265743219, 25.4876383279, 19.8281804296, 27.1253221667, 27.1788924073),
    4: (3.84367930571, 4.65515749707, 5.20885567012, 3.65294883958, 4.31569928885),
    9: (2.25488768851, 2.80692176424, 2.96392338075, 2.78241456998, 3.63709754131),
}


CONFIG = TrainingConfig(epochs=10, batch_size=50, shuffle=False, test_every=1)


def published_run() -> tuple[EnergyModel, TrainingData]:
    """Its initial model and its data."""
    structures = sqlite.read([SHARED / "C5H5.db"])
    split = pykinml_split(structures, SHARED / "sample_tvt.txt", 2000, 48, seed=0)
    fitted = np.concatenate([split.train, split.validation])
    energies = sae.fit(structures.counts()[fitted], structures.energies[fitted], structures.elements)
    random.seed(1)  # as PyKinML seeds before it makes the model
    torch.manual_seed(random.randrange(200000))
    model = EnergyModel(AEVParameters.aevmod(("C", "H")), biases=False)
    return model, TrainingData(structures, split, energies)


def metrics(run: Path) -> dict[tuple[int, str], dict[str, str]]:
    """The rows of metrics.csv by epoch and split."""
    with (run / "metrics.csv").open() as file:
        return {(int(row["epoch"]), row["split"]): row for row in csv.DictReader(file)}


@needs_shared
@pytest.mark.parametrize("threads", [1, 2])
def test_ten_epochs_equal_the_published_run(tmp_path, threads):
    model, data = published_run()
    Trainer(model, data, CONFIG.model_copy(update={"threads": threads}), tmp_path / "run").fit()
    rows = metrics(tmp_path / "run")
    for epoch, published in PUBLISHED.items():
        train, validation, test = (rows[epoch, part] for part in ("train", "validation", "test"))
        ours = [
            train["energy_mae"],
            train["energy_rmse"],
            validation["energy_rmse"],
            test["energy_mae"],
            test["energy_rmse"],
        ]
        # The published numbers have twelve digits: half of the last one is 2e-12 of them.
        np.testing.assert_allclose([float(value) for value in ours], published, rtol=1e-11)


@needs_shared
def test_training_goes_on_where_it_was(tmp_path):
    """Where PyKinML's load_model jumps from 2.81 to 6.58 kcal/mol, because it loses the state of its optimizer."""
    model, data = published_run()
    Trainer(model, data, CONFIG, tmp_path / "first").fit()
    origin = continued.load(tmp_path / "first/checkpoints/last.pt", averaged=False)
    Trainer(origin.model, data, CONFIG.model_copy(update={"epochs": 1}), tmp_path / "second", origin=origin).fit()
    assert float(metrics(tmp_path / "second")[0, "train"]["energy_rmse"]) < PUBLISHED[9][1]
