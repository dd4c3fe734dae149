"""Steps of Sella to saddle points, with an exact Hessian at every step, at every k-th, and without.

python benchmarks/saddle_steps.py MODEL saddles.xyz [--starts 10] [--rattle 0.1] [--every 1 3 5 10 0]

Each geometry of the file is near a saddle point of the model; searches start from it after all atoms were moved at
random (Å, standard deviation of each coordinate). Medians of the searches that end in the same saddle point, and how
many these are: steps, evaluations of forces (Sella takes some for Hessians of its own), Hessians, seconds.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from kinml_fast import KinMLCalculator
from kinml_fast.errors import DataError
from kinml_fast.kinetics import saddle


class Counted(KinMLCalculator):
    """Counts what it computes."""

    forces = hessians = 0

    def calculate(self, *arguments: Any, **options: Any) -> None:
        self.forces += 1
        super().calculate(*arguments, **options)

    def get_hessian(self, *arguments: Any, **options: Any) -> np.ndarray:
        self.hessians += 1
        return super().get_hessian(*arguments, **options)


def searched(guess: Atoms, model: str, every: int, target: float) -> tuple[int, int, int, bool, float]:
    """Steps, forces, Hessians, whether the energy is that of the saddle point (within 1 meV), and seconds."""
    calculator = Counted(model)
    begun = time.perf_counter()
    try:
        found, steps = saddle.search(guess, calculator, exact_every=every, steps=300)
    except DataError:
        return 300, calculator.forces, calculator.hessians, False, time.perf_counter() - begun
    near = abs(found.energy - target) < 1e-3
    return steps, calculator.forces, calculator.hessians, near, time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("saddles")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--rattle", type=float, default=0.1)
    parser.add_argument("--every", type=int, nargs="+", default=[1, 3, 5, 10, 0])
    options = parser.parse_args()
    print(
        f"{'saddle point':<12} {'exact Hessian':>14} {'steps':>6} {'forces':>7} {'Hessians':>9} {'found':>7} {'s':>7}"
    )
    for frame in ase.io.read(options.saddles, ":"):
        exact, _ = saddle.search(frame, KinMLCalculator(options.model))
        name = f"{exact.atoms.symbols} {-exact.frequencies[0]:.0f}i"
        for every in options.every:
            rows = []
            for seed in range(options.starts):
                guess = exact.atoms.copy()
                guess.rattle(options.rattle, seed=seed)
                rows.append(searched(guess, options.model, every, exact.energy))
            steps, forces, hessians, near, seconds = zip(*rows, strict=True)
            good = [i for i, one in enumerate(near) if one] or [0]
            middle = [float(np.median(np.array(x)[good])) for x in (steps, forces, hessians, seconds)]
            how = {0: "none", 1: "every step"}.get(every, f"every {every}th")
            print(
                f"{name:<12} {how:>14} {middle[0]:>6.0f} {middle[1]:>7.0f} {middle[2]:>9.0f} "
                f"{sum(near):>3}/{options.starts:<3} {middle[3]:>7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
