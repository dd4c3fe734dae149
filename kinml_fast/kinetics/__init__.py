"""From a molecule to numbers of kinetics: frequencies, zero-point energies, thermochemistry.

`vibrate` gives the `Vibrations` of a molecule; `symmetry.rotations` its rotational symmetry number.
"""

from kinml_fast.kinetics.vibrations import Vibrations, vibrate

__all__ = ["Vibrations", "vibrate"]
