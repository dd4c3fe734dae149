"""Train a model on energies of one level of theory, evaluate it, and use it.

    python train_single_fid.py            # half a minute on two cores
    python train_single_fid.py --smoke    # a few epochs

The same from the command line: kinml-fast train example
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

# What PyKinML's parse_arguments_list() holds is a typed configuration here. `example` is the one that comes with the
# package; your own is a YAML file: load("my.yaml", ["training.epochs=500"]).
config = load(
    "example",
    [
        "run=runs/train_single_fid",
        "data.files=['shipped:C5H5.db']",  # your databases: paths or glob patterns
        "data.fidelity=1",
        "data.split=[0.8, 0.1, 0.1]",  # fractions or numbers of structures
        "network.layers=[48, 24, 12, 1]",
        "training.optimizer.learning_rate=1e-3",
        f"training.epochs={3 if options.smoke else 500}",
    ],
)
# Reads and checks the data, fits single-atom energies, trains, keeps the best model; everything is in the run folder.
summary = start(config, overwrite=True)
print(f"best epoch {summary.best_epoch}, test RMSE {summary.errors['test'].rmse:.2f} kcal/mol")

# The model is a torch module: coordinates (Å), species (places in model.elements), offsets of the molecules.
model = model_file.load("runs/train_single_fid/model.pt")
coordinates = torch.tensor([[0.0, 0.0, 0.6], [0.0, 0.0, -0.6], [0.0, 0.0, 1.66], [0.0, 0.0, -1.66]], dtype=model.dtype)
species = torch.tensor([model.elements.index(symbol) for symbol in ("C", "C", "H", "H")])
coordinates.requires_grad_()
energy = model(coordinates, species, torch.tensor([0, 4]))
(gradient,) = torch.autograd.grad(energy.sum(), coordinates)
print(f"acetylene: {energy.item():.3f} eV, force on the first atom {(-gradient[0]).tolist()} eV/Å")
