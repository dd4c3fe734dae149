"""Train a model on two levels of theory at once, and use it.

    python train_multi_fid.py            # half a minute on two cores
    python train_multi_fid.py --smoke    # a few epochs

The same from the command line: kinml-fast train forces 'data.fidelity=[0, 1]'
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

# The networks of the lowest level take the descriptor, those of a higher one also the atomic energy of the level below,
# to which they add what is missing. Structures that have only some of the levels train these: a few expensive energies
# on top of many cheap ones. More than two levels are a longer list.
config = load(
    "forces",
    [
        "run=runs/train_multi_fid",
        "data.fidelity=[0, 1]",  # lowest first; in these data 0 is GFN1-xTB and 1 is GFN2-xTB
        "data.incomplete=keep",  # structures that lack a level; drop leaves them out, error refuses them
        f"training.epochs={3 if options.smoke else 200}",
        # What is minimised sums over the levels; the best model is that of the lowest errors at the highest level.
        # Other factors: training.loss.level_weights=[0.5, 1], training.score.level_weights=[0, 1].
    ],
)
summary = start(config, overwrite=True)
errors, forces = summary.errors["test"], summary.forces["test"]
print(f"fidelity 1: test RMSE {errors.rmse:.2f} kcal/mol and {forces.rmse:.2f} kcal/mol/Å")
for fidelity, (lower_errors, lower_forces, *_) in summary.lower.items():
    energy, force = lower_errors["test"].rmse, lower_forces["test"].rmse
    print(f"fidelity {fidelity}: test RMSE {energy:.2f} kcal/mol and {force:.2f} kcal/mol/Å")

# Both levels of a ragged batch in one pass: energies [levels, molecules] in eV, forces [levels, atoms, 3] in eV/Å.
# model(…) and model.energies_and_forces(…) give the highest level.
model = model_file.load("runs/train_multi_fid/model.pt")
coordinates = torch.tensor([[0.0, 0.0, 0.6], [0.0, 0.0, -0.6], [0.0, 0.0, 1.66], [0.0, 0.0, -1.66]], dtype=model.dtype)
species = torch.tensor([model.elements.index(symbol) for symbol in ("C", "C", "H", "H")])
with torch.inference_mode():
    energies, forces = model.level_energies_and_forces(coordinates, species, torch.tensor([0, 4]))
for level, fidelity in enumerate(model.fidelities):
    print(f"acetylene at fidelity {fidelity}: {energies[level].item():.3f} eV, {forces[level, 0].tolist()} eV/Å")
