"""Train a model on the difference of two levels of theory, and add it to the lower one.

    python train_delta.py            # some twenty seconds on two cores
    python train_delta.py --smoke    # a few epochs

The same from the command line: kinml-fast train forces data.fidelity=1 data.baseline=0
"""

import argparse
import logging

from kinml_fast.data import Selection, read
from kinml_fast.deploy import model_file
from kinml_fast.deploy.evaluate import evaluate
from kinml_fast.metrics import Errors
from kinml_fast.train import load, start

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="only a few epochs")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")

# One network for each element, as on one level. Targets are E(fidelity) - E(baseline), and the same of the forces; a
# structure that lacks one of them is an error, or left out with data.incomplete=drop.
config = load(
    "forces",
    [
        "run=runs/train_delta",
        "data.fidelity=1",  # in these data GFN2-xTB
        "data.baseline=0",  # GFN1-xTB
        f"training.epochs={3 if options.smoke else 200}",
    ],
)
summary = start(config, overwrite=True)
errors, forces = summary.errors["test"], summary.forces["test"]
print(f"best epoch {summary.best_epoch}, test RMSE {errors.rmse:.2f} kcal/mol and {forces.rmse:.2f} kcal/mol/Å")

# The model's energies and forces are differences; whoever has those of the lower level adds them. Here they are in the
# database; kinml_fast.KinMLCalculator adds those of any calculator of ASE.
model = model_file.load("runs/train_delta/model.pt")
low, high = (read("shipped:C5H5.db", Selection(fidelity=fidelity)) for fidelity in (0, 1))
difference = evaluate(model, low, forces=True)
for name, energies, forces in (
    ("alone", low.energies, low.forces),
    ("with the model", low.energies + difference.energies, low.forces + difference.forces),
):
    # Only differences of energies have a meaning between levels of theory.
    shifted = (energies - energies.mean()) - (high.energies - high.energies.mean())
    energy, force = Errors.of(shifted), Errors.of(forces - high.forces)
    print(f"fidelity 0 {name}: RMSE {energy.rmse:.2f} kcal/mol and {force.rmse:.2f} kcal/mol/Å from fidelity 1")
