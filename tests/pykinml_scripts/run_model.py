"""As PyKinML's manual describes its example run_model: energy and forces of a molecule by train_single_fid's model."""

import numpy as np
from ase import Atoms

from kinml_fast.pykinml import model_calculator as mod

surr = mod.Nn_surr(
    "my_model_0_1/model-0009.pt",
    tnsr=True,
    nrho_rad=16,
    nrho_ang=8,
    nalpha=8,
    R_c=[5.2, 3.8],
    mf=False,
    device="cpu",
)
positions = np.array(
    [
        [-0.99, -0.22, -0.58],
        [-0.93, -0.58, 0.66],
        [0.23, 0.75, -0.97],
        [0.50, -0.46, 0.88],
        [1.17, 0.55, 0.01],
        [-1.77, -0.66, -1.27],
        [-1.66, -1.26, 1.04],
        [2.05, 1.28, 0.56],
        [1.18, -1.18, 1.49],
        [0.52, 1.38, -1.94],
    ]
)
atoms = Atoms(["C"] * 5 + ["H"] * 5, positions)
atoms.set_calculator(surr)
surr.calculate(atoms)
print(surr.results["energy"].item())
print(surr.results["forces"])
