"""The program that labels structures: one process, which is given one structure after another.

It reads a line of JSON with the calculator, answers whether that can be made, then answers each line with a structure.
What calculators print goes to standard error. It ends, with whatever it has started, when nobody writes to it any more.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from kinml_fast.errors import InputError, first_line
from kinml_fast.explore import calculators


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    home = Path.cwd()
    asked = json.loads(lines.get())
    try:
        calculators.make(asked["calculator"], asked["options"])
    except InputError as error:
        answer({"refused": str(error)})
        return
    answer({"ready": True})
    while True:
        answer(_label(json.loads(lines.get()), asked, home))


def _listen(lines: queue.Queue[str]) -> None:
    for line in sys.stdin:
        lines.put(line)
    os.killpg(0, signal.SIGKILL)  # the group is this program's own; a calculator may have started others


def _label(structure: dict[str, Any], asked: dict[str, Any], home: Path) -> dict[str, Any]:
    """Energy (eV) and forces (eV/Å) of a structure, by a calculator that knows of no other, or what went wrong."""
    os.chdir(home)  # relative paths of the options are meant from here
    try:
        atoms = Atoms(structure["symbols"], structure["positions"])
        atoms.calc = calculators.make(asked["calculator"], asked["options"])
        os.chdir(structure["scratch"])
        forces = np.asarray(atoms.get_forces(), dtype=float)
        energy = float(atoms.get_potential_energy())
    except Exception as error:  # whatever a calculator raises is a failure of this structure
        return {"failure": f"{type(error).__name__}: {first_line(error)}"}
    finally:
        os.chdir(home)
    if not np.isfinite(energy) or not np.isfinite(forces).all():
        return {"failure": "an energy or force is NaN or infinite"}
    if forces.shape != (len(atoms), 3):
        return {"failure": f"forces have the shape {list(forces.shape)}, not {[len(atoms), 3]}"}
    return {"energy": energy, "forces": forces.tolist()}


if __name__ == "__main__":
    main()
