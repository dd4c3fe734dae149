"""Fast training and running of ANI-type neural network potentials.

Atomic environment vectors (AEV) of the atoms of a molecule go through one small network per element; the sum of the
networks' outputs is the molecule's energy, its derivative the forces. Units: eV, Å, eV/Å.
"""

from kinml_fast._version import __version__
from kinml_fast.errors import InputError

__all__ = ["InputError", "__version__"]
