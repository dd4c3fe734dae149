"""Molecular dynamics at constant energy of one molecule in OpenMM: python run_openmm.py model.pt molecule.xyz

Needs OpenMM 8.4 or later (pip install openmm).
"""

# Run by tests/test_md_codes.py.
import sys

import ase.io
import openmm
from openmm import unit

from kinml_fast import KinMLCalculator
from kinml_fast.deploy import openmm_force

model, molecule = sys.argv[1:3]
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
atoms = ase.io.read(molecule)

system = openmm.System()
for mass in atoms.get_masses():
    system.addParticle(mass)
system.addForce(openmm_force.make(KinMLCalculator(model), atoms.get_chemical_symbols()))

integrator = openmm.VerletIntegrator(0.25 * unit.femtosecond)
context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
context.setPositions(atoms.positions * unit.angstrom)
context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
for step in range(0, steps + 1, 100):
    state = context.getState(energy=True)
    potential, kinetic = state.getPotentialEnergy(), state.getKineticEnergy()
    print(step, potential, kinetic, potential + kinetic)  # kJ/mol
    integrator.step(100)
