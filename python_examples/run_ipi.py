"""Forces for i-PI from a model: python run_ipi.py model.pt molecule.xyz NAME

i-PI waits at the unix socket /tmp/ipi_NAME for what this sends (<ffsocket mode='unix'> with the address NAME), and says
when to end. The XYZ file gives the elements, in i-PI's order, and whether they are periodic (extended XYZ:
pbc="T T T"): then i-PI gets the virial, too.
"""

# Run by tests/test_md_codes.py.
import sys

import ase.io
from ase.calculators.socketio import SocketClient

from kinml_fast import KinMLCalculator

model, molecule, name = sys.argv[1:4]
atoms = ase.io.read(molecule)
atoms.calc = KinMLCalculator(model)
SocketClient(unixsocket=name).run(atoms, use_stress=bool(atoms.pbc.all()))
