"""Vibrations of the molecules in a file, a saddle point from a file: tables, JSON files, geometries, pictures."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase.io
import numpy as np
import yaml
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from kinml_fast import lock
from kinml_fast.data import Selection, xyz
from kinml_fast.data.files import check_output, expand_one, replacing
from kinml_fast.deploy import model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError
from kinml_fast.kinetics import saddle
from kinml_fast.kinetics.record import Live, Record
from kinml_fast.kinetics.vibrations import (
    FMAX,
    STEPS,
    Optimiser,
    Vibrations,
    lowest_spin,
    vibrate,
    warn_without_forces,
)
from kinml_fast.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

_OUTPUTS = ("saddle.xyz", "path.xyz", "minima.xyz", "saddle.json", "path.png")
"""Files of a reaction, in the order in which they are written but for saddle.json, the last."""
UNFINISHED = "unfinished"
"""The folder in that of a reaction in which its stages are kept until its end."""


def vibrations(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    in_path: str | os.PathLike,
    *,
    optimise: bool | Optimiser = False,
    fmax: float = FMAX,
    steps: int = STEPS,
    temperature: float = 298.15,
    pressure: float = 101325.0,
    symmetry_number: int | None = None,
    spin: float | None = None,
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
        JSON file to write, a list with an entry for each molecule; or, of one molecule, a YAML file (.yml) as ARC has
        it, see `Vibrations.to_arc`.
    modes
        Folder for an animation of each mode, extended XYZ; made if it is not there.
    base, device, form
        As in `predict`.

    Raises
    ------
    InputError
        A file that cannot be read or written, or what `vibrate` raises, with the frame.
    """
    if not (0 < temperature < np.inf and 0 < pressure < np.inf):
        raise ConfigError(f"{temperature:g} K and {pressure:g} Pa: give a temperature and a pressure above 0")
    if spin is not None and not (0 <= spin < np.inf and (2 * spin).is_integer()):
        raise ConfigError(f"a spin of {spin:g}: give 0, 0.5, 1 …, half the number of unpaired electrons")
    _check_limits(fmax, steps)
    path = expand_one(in_path)
    if out_path is not None:
        check_output(out_path, [path, *model_file.files(model_path)], (".json", ".yml"))
    if modes is not None:
        _made(Path(modes))
    calculator = KinMLCalculator(model_file.resolve(model_path, device), base=base)
    warn_without_forces(model_path)
    found, entries = [], []
    Selection(format=form)  # says if there is no such format
    for number, atoms in enumerate(xyz.frames(path, form), start=1):
        try:
            one = vibrate(atoms, calculator, optimise=optimise, fmax=fmax, steps=steps, symmetry_number=symmetry_number)
        except DataError as error:
            raise DataError(f"{path}: frame {number}: {error}") from error
        of_electrons = lowest_spin(one.atoms)
        taken = of_electrons if spin is None else spin
        if (taken - of_electrons) % 1:
            log.warning(
                "%s: a spin of %g does not fit the number of electrons of %s without a charge; take %g, %g …",
                *(f"{path}: frame {number}", taken, one.atoms.symbols, of_electrons, of_electrons + 1),
            )
        gas = one.thermochemistry(temperature, pressure, taken)
        log.info("%s", table(f"{path.name}/{number}", one, gas, temperature, pressure, taken))
        entries.append({**one.to_dict(), "temperature": temperature, "pressure": pressure, "spin": taken, **gas})
        if modes is not None:
            _animate(Path(modes), f"{path.stem}-{number}", one)
        found.append(one)
    if not found:
        raise DataError(f"{path}: contains no structures: take a file with molecules")
    if out_path is not None:
        if Path(out_path).suffix == ".yml":
            if len(found) > 1:
                raise DataError(
                    f"{path}: contains {len(found)} molecules, but ARC has one in a file: take one, or .json"
                )
            with replacing(out_path) as temporary:
                temporary.write_text(yaml.safe_dump(found[0].to_arc()), encoding="utf-8")
        else:
            _write_json(Path(out_path), entries)
        log.info("wrote %s", out_path)
    return found


def reaction(
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    in_path: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    fmax: float = FMAX,
    steps: int = STEPS,
    images: int = 9,
    base: BaseCalculator | str | None = None,
    device: str | None = None,
    form: str | None = None,
    console: Console | None = None,
) -> tuple[Vibrations, saddle.ReactionPath, list[Vibrations]]:
    """Find a saddle point, the path through it and the minima that it joins; write all into a folder.

    What was interrupted goes on when it is called again with the same arguments, and ends with the same results.

    Parameters
    ----------
    model_path, base, device, form
        As in `vibrations`.
    in_path
        A file with a guess of the saddle point, or with two minima, between which one is looked for.
    folder
        For saddle.xyz, path.xyz (with energies), minima.xyz, saddle.json and path.png; made if it is not there.
    fmax, steps, images
        See `saddle.search` and `saddle.between`.
    console
        Terminal for a line that shows the steps; None: there is none.

    Raises
    ------
    InputError
        A file that cannot be read or written, another number of frames, a folder with an unfinished search of something
        else, or what the functions of `saddle` raise, after which nothing unfinished is left.
    """
    _check_limits(fmax, steps)
    if images < 1:
        raise ConfigError(f"{images} images: give a number of at least 1")
    path = expand_one(in_path)
    Selection(format=form)
    frames = list(xyz.frames(path, form))
    if len(frames) not in (1, 2):
        raise DataError(f"{path}: has {len(frames)} frames: give one, a guess of the saddle point, or two minima")
    with lock.hold(into := Path(folder)), Live(console, steps) as live:
        _check_outputs(into, [path, *model_file.files(model_path)])
        calculator = KinMLCalculator(model_file.resolve(model_path, device), base=base)
        warn_without_forces(model_path)
        record = Record(into / UNFINISHED, live.tell)
        if record.begin(_inputs(frames, model_path, base, fmax, steps, images)):
            log.info("%s: goes on where it was", into)
        try:
            if len(frames) == 2:
                names = ("first minimum", "second minimum")
                first, second = (
                    saddle.minimum(one, calculator, name, fmax=fmax, steps=steps, record=record).atoms
                    for one, name in zip(frames, names, strict=True)
                )
                frames = [saddle.between(first, second, calculator, images=images, steps=steps, record=record)]
            found, _ = saddle.search(frames[0], calculator, fmax=fmax, steps=steps, record=record)
            way = saddle.follow(found, calculator, steps=steps, record=record)
            both = saddle.minima(way, calculator, fmax=fmax, steps=steps, record=record)
        except ConfigError:
            record.remove()
            raise
        except DataError as error:
            record.remove()  # the same again would end in the same
            raise DataError(f"{path}: {error}") from error
        _write_reaction(into, found, way, both)
        record.remove()
    log.info("%s", barriers(found, both))
    log.info("wrote %s", into)
    return found, way, both


def _check_limits(fmax: float, steps: int) -> None:
    if not 0 < fmax < np.inf or steps < 1:
        raise ConfigError(f"a largest force of {fmax:g} eV/Å, {steps} steps: give a force above 0 and at least 1 step")


def _check_outputs(into: Path, inputs: Sequence[Path]) -> None:
    """Refuse to write over what is read, or over what no search has written."""
    for name in _OUTPUTS:
        check_output(into / name, inputs)
        for part in into.glob(f".{name}.*.part"):  # of a process that was killed while it wrote
            part.unlink(missing_ok=True)
    if not ((into / UNFINISHED).is_dir() or (into / "saddle.json").is_file()):
        foreign = [name for name in _OUTPUTS if (into / name).exists()]
        if foreign:
            raise ConfigError(f"{into / foreign[0]}: was not written by a search before: choose another folder")


def _write_reaction(into: Path, found: Vibrations, way: saddle.ReactionPath, both: Sequence[Vibrations]) -> None:
    _write_frames(into / "saddle.xyz", [found.atoms])
    for i, frame in enumerate(way.frames):
        frame.info |= {"energy": float(way.energies[i]), "length": float(way.lengths[i])}
    _write_frames(into / "path.xyz", way.frames)
    _write_frames(into / "minima.xyz", [one.atoms for one in both])
    entries = {"saddle": found.to_dict(), "minima": [one.to_dict() for one in both]}
    _write_json(into / "saddle.json", entries)
    _draw(into / "path.png", way, str(found.atoms.symbols))


def _inputs(
    frames: Sequence[Atoms],
    model_path: str | os.PathLike | Sequence[str | os.PathLike],
    base: BaseCalculator | str | None,
    fmax: float,
    steps: int,
    images: int,
) -> dict[str, Any]:
    """All that a reaction depends on, as plain values."""
    return {
        "geometry": [[one.get_chemical_symbols(), one.positions, one.get_masses()] for one in frames],
        "model": [hashlib.sha256(file.read_bytes()).hexdigest() for file in model_file.files(model_path)],
        "base": str(base.name if isinstance(base, BaseCalculator) else base),
        "fmax": fmax,
        "steps": steps,
        "images": images if len(frames) == 2 else None,
    }


def barriers(found: Vibrations, both: Sequence[Vibrations]) -> str:
    """Barriers of a saddle point from its two sides, kcal/mol; of an ensemble with the deviations of its members."""
    std = found.frequencies_std
    rows = [
        f"saddle point of {found.atoms.symbols}: {-found.frequencies[0]:.1f}i"
        + (f" ± {std[0]:.1f}" if std is not None else "")
        + " cm⁻¹",
        f"{'barrier, kcal/mol':<18}  {'electronic':>16}  {'with zero-point':>16}  symmetry number",
    ]
    for name, one in zip(("from one side", "from the other"), both, strict=True):
        shown = []
        for zero_point in (False, True):
            (top, tops), (bottom, bottoms) = (_energies(point, zero_point) for point in (found, one))
            spread = (
                "" if tops is None or bottoms is None else f" ± {np.std(tops - bottoms, ddof=1) * KCAL_PER_MOL:.2f}"
            )
            shown.append(f"{(top - bottom) * KCAL_PER_MOL:.2f}{spread}")
        rows.append(f"{name:<18}  {shown[0]:>16}  {shown[1]:>16}  {one.symmetry_number}")
    return "\n".join(rows)


def _energies(point: Vibrations, zero_point: bool) -> tuple[float, np.ndarray | None]:
    """eV, with the zero-point energy or without it; and [M], what each member gives, with its factors."""
    members = point.calibrated_energies
    if not zero_point:
        return point.energy, members
    more = point.calibrated_zero_point_energies
    return point.energy + point.zero_point_energy, None if members is None or more is None else members + more


def _draw(path: Path, way: saddle.ReactionPath, title: str) -> None:
    """The energy along a path, and a band of the members' standard deviations around it."""
    from matplotlib.figure import Figure

    relative = (way.energies - way.energies[0]) * KCAL_PER_MOL
    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).subplots()
    axes.plot(way.lengths, relative, marker=".")
    axes.plot(way.lengths[way.saddle], relative[way.saddle], marker="*", markersize=12)
    if way.energies_std is not None:
        std = way.energies_std * KCAL_PER_MOL
        axes.fill_between(way.lengths, relative - std, relative + std, alpha=0.3, label="± standard deviation")
        axes.legend()
    axes.set(xlabel="reaction path, √u Å", ylabel="energy, kcal/mol", title=title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _write_frames(path: Path, frames: Sequence[Atoms]) -> None:
    with replacing(path) as temporary:
        ase.io.write(temporary, frames, format="extxyz")


def _write_json(path: Path, values: object) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made ({error.strerror}): choose another folder") from error
    return folder


def table(name: str, found: Vibrations, gas: dict[str, float], temperature: float, pressure: float, spin: float) -> str:
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
        f"at {temperature:g} K and {pressure:g} Pa, spin {spin:g}: energy {found.energy:.5f} eV, "
        f"enthalpy {gas['enthalpy']:.5f} eV, entropy {gas['entropy'] * 1000:.4f} meV/K, "
        f"free energy {gas['free_energy']:.5f} eV"
    )
    return "\n".join(rows)


def _animate(folder: Path, stem: str, found: Vibrations) -> None:
    for mode in range(len(found.frequencies)):
        _write_frames(folder / f"{stem}-mode-{mode + 1}.xyz", found.animation(mode))
