"""The published PyKinML run, to the last digits that were published.

PyKinML 1.1.2's `single_fid` example on its C5H5.db: float64, no reshuffling, its own seeding; ten epochs of Adam. Two
independent machines agree on these numbers to 2e-12.
"""

from __future__ import annotations

import csv
import random

import numpy as np
import pytest
import torch
from data_helpers import SHARED, needs_shared, pykinml_split

from kinml_fast.data import sae, sqlite
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import TrainingData
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.trainer import Trainer

PUBLISHED = {  # epoch: train MAE, train RMSE, validation RMSE, test MAE, test RMSE; kcal/mol
    0: (20.7265743219, 25.4876383279, 19.8281804296, 27.1253221667, 27.1788924073),
    4: (3.84367930571, 4.65515749707, 5.20885567012, 3.65294883958, 4.31569928885),
    9: (2.25488768851, 2.80692176424, 2.96392338075, 2.78241456998, 3.63709754131),
}


@needs_shared
@pytest.mark.parametrize("threads", [1, 2])
def test_ten_epochs_equal_the_published_run(tmp_path, threads):
    structures = sqlite.read([SHARED / "C5H5.db"], fidelity=1)
    split = pykinml_split(structures, SHARED / "sample_tvt.txt", 2000, 48, seed=0)
    fitted = np.concatenate([split.train, split.validation])
    energies = sae.fit(structures.counts()[fitted], structures.energies[fitted], structures.elements)
    random.seed(1)  # as PyKinML seeds before it makes the model
    torch.manual_seed(random.randrange(200000))
    model = EnergyModel(AEVParameters.aevmod(("C", "H")), biases=False)
    config = TrainingConfig(epochs=10, batch_size=50, shuffle=False, test_every=1, threads=threads)
    Trainer(model, TrainingData(structures, split, energies), config, tmp_path / "run").fit()

    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = {(int(row["epoch"]), row["split"]): row for row in csv.DictReader(file)}
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
