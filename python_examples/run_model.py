"""Run trained models through ASE: energies and forces with their uncertainty, an optimised geometry, dynamics.

    python run_model.py            # trains four models first, half a minute on two cores
    python run_model.py --smoke    # a few epochs and steps

Other models: python run_model.py runs/mine, or several model files, which become an ensemble.
"""

import argparse
import logging

import numpy as np
from ase import Atoms, units
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.vibrations import Vibrations

from kinml_fast import KinMLCalculator
from kinml_fast.data import Selection, read
from kinml_fast.train import load, start

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("models", nargs="*", help="model files or run folders; without any, an ensemble is trained")
parser.add_argument("--smoke", action="store_true", help="only a few epochs and steps")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")

# Four models with different seeds, trained on energies and forces of C5H5; runs/run_model/model.pt holds all of them.
# The same from the command line: kinml-fast train forces run=runs/run_model ensemble.members=4
models = options.models
if not models:
    epochs = 3 if options.smoke else 100
    start(load("forces", ["run=runs/run_model", f"training.epochs={epochs}", "ensemble.members=4"]), overwrite=True)
    models = ["runs/run_model"]

# A model, its file, its run folder, or a list of them. A delta model also needs its low level, any ASE calculator:
# KinMLCalculator("runs/delta", base=TBLite(method="GFN1-xTB")), or base="tblite:GFN1-xTB" for short.
calculator = KinMLCalculator(models)

# Cyclopentadienyl, as molecular dynamics has bent it.
bent = read("shipped:C5H5.db", Selection(names=["cyclopentadienyl:md"])).select([0])
atoms = Atoms(bent.symbols(0), bent.coordinates)
atoms.calc = calculator
print(f"energy {atoms.get_potential_energy():.4f} eV (reference {bent.energies[0]:.4f} eV)")
print(f"root mean square error of the forces {np.sqrt(np.mean((atoms.get_forces() - bent.forces) ** 2)):.3f} eV/Å")
if "energy_std" in calculator.results:
    # Where the members disagree, none of them is to be trusted. all_energies and all_forces are those of each member.
    print(f"members: {np.round(calculator.results['all_energies'], 4)} eV")
    print(f"standard deviation of the energy {calculator.results['energy_std']:.4f} eV")
    print(f"largest standard deviation of a force component {calculator.results['forces_std'].max():.3f} eV/Å")

# The nearest minimum and its vibrations.
BFGS(atoms, logfile=None).run(fmax=0.01, steps=5 if options.smoke else 500)
largest = np.abs(atoms.get_forces()).max()
print(f"after optimisation {atoms.get_potential_energy():.4f} eV, largest force component {largest:.4f} eV/Å")
vibrations = Vibrations(atoms, name="runs/run_model/vibrations")
vibrations.clean()
vibrations.run()
print(f"highest wavenumbers {np.round(vibrations.get_frequencies()[-5:].real)} 1/cm")

# Dynamics at constant energy, 0.5 fs a step.
atoms.set_momenta(np.random.default_rng(0).normal(size=(10, 3)) * np.sqrt(300 * units.kB * atoms.get_masses()[:, None]))
dynamics = VelocityVerlet(atoms, timestep=0.5 * units.fs)
before = atoms.get_total_energy()
dynamics.run(10 if options.smoke else 2000)
print(f"total energy {before:.4f} eV, {atoms.get_total_energy():.4f} eV after {dynamics.get_time() / units.fs:.0f} fs")
