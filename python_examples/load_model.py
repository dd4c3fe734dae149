"""Go on from a trained model: on the same data, then on forces with some layers frozen, then from Python.

    python load_model.py            # half a minute on two cores
    python load_model.py --smoke    # a few epochs

The same from the command line: kinml-fast train forces start.model=runs/first/model.pt network.biases=true
(A run that was interrupted, or that shall be longer, is resumed instead: kinml-fast train --resume runs/first)
"""

import argparse
import logging

from kinml_fast.nn import extended
from kinml_fast.train import Trainer, continued, load, prepare, start

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="only a few epochs")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")
epochs = f"training.epochs={3 if options.smoke else 60}"

# A model to begin with, trained on energies.
first = start(load("example", ["run=runs/load_model/first", epochs]), overwrite=True)

# The same data again, or any others: the optimizer goes on with its running means, learning rate and schedule are those
# of the new configuration. last.pt and epoch-*.pt hold an optimizer's state, model.pt and best.pt weights only.
again = start(
    load(
        "example",
        [
            "run=runs/load_model/again",
            "start.model=runs/load_model/first/checkpoints/last.pt",
            "start.optimizer=keep",
            "training.optimizer.learning_rate=1e-3",
            epochs,
        ],
    ),
    overwrite=True,
)

# From energies to energies and forces (the way back is the same). The first layer of each network is frozen; elements
# of new data that the model lacks would be added to it, and start.sae=data would take another level of theory.
with_forces = start(
    load(
        "example",
        [
            "run=runs/load_model/forces",
            "start.model=runs/load_model/again/model.pt",
            "start.freeze=['*.0']",
            "training.loss.forces=true",
            epochs,
        ],
    ),
    overwrite=True,
)
for name, summary in (("energies", first), ("energies, continued", again), ("forces", with_forces)):
    errors, forces = summary.errors["test"], summary.forces["test"]
    print(f"{name}: test RMSE {errors.rmse:.2f} kcal/mol and {forces.rmse:.2f} kcal/mol/Å")

# The same parts from Python, without a configuration for the start: data, a model that knows their elements, a trainer.
config = load("example", ["run=runs/load_model/python", epochs, "training.loss.forces=true"])
data = prepare(config)
origin = continued.load("runs/load_model/forces/checkpoints/last.pt", averaged=False)
model = extended(origin.model, data.structures.elements)
summary = Trainer(model, data, config.training, freeze=["*.0"], origin=origin).fit()
print(f"from Python: test RMSE {summary.errors['test'].rmse:.2f} kcal/mol")
