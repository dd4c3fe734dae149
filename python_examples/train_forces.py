"""Train a model on energies and forces, and use it.

    python train_forces.py            # some twenty seconds on two cores
    python train_forces.py --smoke    # a few epochs

The same from the command line: kinml-fast train forces
"""

import argparse
import logging

import torch

from kinml_fast.deploy import model_file
from kinml_fast.train import load, start

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="only a few epochs")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")

# `forces` is the recommended start, which comes with the package: float32, batches of 25, a high learning rate that
# falls along a cosine. Your own data: load("forces", ["data.files=['mine.db']", …]).
config = load(
    "forces",
    [
        "run=runs/train_forces",
        f"training.epochs={3 if options.smoke else 200}",
        # The loss is (1 - force_weight) L_E + force_weight L_F; training.loss.weighting=learned finds its own weights,
        # forces_from and forces_until give phases without forces. Structures without forces count with their energies.
        "training.loss.forces=true",
        "training.loss.force_weight=0.7",
        # The best model is that of the lowest energy RMSE (kcal/mol) + forces RMSE (kcal/mol/Å) of the validation set.
        "training.score={energy: 1, forces: 1}",
    ],
)
summary = start(config, overwrite=True)
errors, forces = summary.errors["test"], summary.forces["test"]
print(f"best epoch {summary.best_epoch}, test RMSE {errors.rmse:.2f} kcal/mol and {forces.rmse:.2f} kcal/mol/Å")

# Energies (eV) and forces (eV/Å) of a ragged batch in one call: here one molecule of four atoms.
model = model_file.load("runs/train_forces/model.pt")
coordinates = torch.tensor([[0.0, 0.0, 0.6], [0.0, 0.0, -0.6], [0.0, 0.0, 1.66], [0.0, 0.0, -1.66]], dtype=model.dtype)
species = torch.tensor([model.elements.index(symbol) for symbol in ("C", "C", "H", "H")])
with torch.inference_mode():
    energies, forces = model.energies_and_forces(coordinates, species, torch.tensor([0, 4]))
print(f"acetylene: {energies.item():.3f} eV, force on the first atom {forces[0].tolist()} eV/Å")
