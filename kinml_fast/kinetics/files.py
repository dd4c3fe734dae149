"""Vibrations of the molecules in a file: a table, a JSON file, animations."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import ase.io
from ase.calculators.calculator import BaseCalculator

from kinml_fast.data import Selection, xyz
from kinml_fast.data.files import check_output, expand, replacing
from kinml_fast.deploy import model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.kinetics.vibrations import FMAX, STEPS, Vibrations, vibrate
from kinml_fast.units import KCAL_PER_MOL

log = logging.getLogger(__name__)


def vibrations(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    in_path: str | os.PathLike,
    *,
    optimise: bool = False,
    fmax: float = FMAX,
    steps: int = STEPS,
    temperature: float = 298.15,
    pressure: float = 101325.0,
    symmetry_number: int | None = None,
    spin: float = 0.0,
    out_path: str | os.PathLike | None = None,
    modes: str | os.PathLike | None = None,
    base: BaseCalculator | str | None = None,
    device: str | None = None,
    form: str | None = None,
) -> list[Vibrations]:
    """Log the vibrations of each molecule of a file, and write them on request.

    Parameters
    ----------
    model_path
        What `model_file.resolve` takes; of several an ensemble.
    in_path
        A file of molecules that ASE reads.
    optimise, fmax, steps, symmetry_number
        See `vibrate`.
    temperature, pressure, spin
        See `Vibrations.thermochemistry`.
    out_path
        JSON file to write, a list with an entry for each molecule.
    modes
        Folder for an animation of each mode, extended XYZ; made if it is not there.
    base, device, form
        As in `predict`.

    Raises
    ------
    InputError
        A file that cannot be read or written, or what `vibrate` raises, with the frame.
    """
    if temperature <= 0 or pressure <= 0:
        raise ConfigError(f"{temperature:g} K and {pressure:g} Pa: give a temperature and a pressure above 0")
    if spin < 0 or 2 * spin != int(2 * spin):
        raise ConfigError(f"a spin of {spin:g}: give 0, 0.5, 1 …, half the number of unpaired electrons")
    path, *others = expand(in_path)
    if others:
        raise ConfigError(f"{in_path}: matches several files, among them {others[0]}: name one at a time")
    if out_path is not None:
        check_output(out_path, [path, *model_file.files(model_path)], (".json",))
    calculator = KinMLCalculator(model_file.resolve(model_path, device), base=base)
    found, entries = [], []
    Selection(format=form)  # says if there is no such format
    for number, atoms in enumerate(xyz.frames(path, form), start=1):
        try:
            one = vibrate(atoms, calculator, optimise=optimise, fmax=fmax, steps=steps, symmetry_number=symmetry_number)
        except DataError as error:
            raise DataError(f"{path}: frame {number}: {error}") from error
        gas = one.thermochemistry(temperature, pressure, spin)
        log.info("%s", table(f"{path.name}/{number}", one, gas, temperature, pressure))
        entries.append({**one.to_dict(), "temperature": temperature, "pressure": pressure, "spin": spin, **gas})
        if modes is not None:
            _animate(Path(modes), f"{path.stem}-{number}", one)
        found.append(one)
    if not found:
        raise DataError(f"{path}: contains no structures: take a file with molecules")
    if out_path is not None:
        with replacing(out_path) as temporary:
            temporary.write_text(json.dumps(entries, indent=1), encoding="utf-8")
        log.info("wrote %s", out_path)
    return found


def table(name: str, found: Vibrations, gas: dict[str, float], temperature: float, pressure: float) -> str:
    """Modes and energies as lines of text; of an ensemble with the standard deviations of its members."""
    stds = found.frequencies_std
    what = {0: "a minimum", 1: "a saddle point"}.get(found.imaginary, f"{found.imaginary} imaginary modes")
    rows = [
        f"{name}: {found.atoms.symbols}, {found.geometry}, symmetry number {found.symmetry_number}, {what}, largest "
        f"force {found.largest_force:.1e} eV/Å",
        f"{'mode':>4}  {'cm⁻¹':>9}{'  ±' if stds is not None else '':<7}  {'reduced mass, u':>15}",
    ]
    for k, frequency in enumerate(found.frequencies):
        shown = f"{abs(frequency):.1f}{'i' if frequency < 0 else ''}"
        spread = f"  {stds[k]:<5.1f}" if stds is not None else " " * 7
        rows.append(f"{k + 1:>4}  {shown:>9}{spread}  {found.reduced_masses[k]:>15.3f}")
    std = found.zero_point_energy_std
    zero_point = found.zero_point_energy
    rows.append(
        f"zero-point energy  {zero_point:.5f} eV, {zero_point * KCAL_PER_MOL:.3f}"
        + (f" ± {std * KCAL_PER_MOL:.3f}" if std is not None else "")
        + " kcal/mol"
    )
    rows.append(
        f"at {temperature:g} K and {pressure:g} Pa: energy {found.energy:.5f} eV, enthalpy {gas['enthalpy']:.5f} eV, "
        f"entropy {gas['entropy'] * 1000:.4f} meV/K, free energy {gas['free_energy']:.5f} eV"
    )
    return "\n".join(rows)


def _animate(folder: Path, stem: str, found: Vibrations) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}): choose another folder") from error
    for mode in range(len(found.frequencies)):
        with replacing(folder / f"{stem}-mode-{mode + 1}.xyz") as temporary:
            ase.io.write(temporary, found.animation(mode), format="extxyz")
