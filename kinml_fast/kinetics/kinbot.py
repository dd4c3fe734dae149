"""KinBot with models: its calculations on this machine or by its queue, and uncertainties that an ensemble measures.

KinBot (Van de Vijver, Zádor, Comput. Phys. Commun. 2020, 248, 106947, DOI 10.1016/j.cpc.2019.106947) searches for the
reactions of a molecule by scripts that it writes from templates, one for each calculation. Nothing that is installed is
changed for it: a subclass of its queue has the scripts take `nn_pes` of this package, where KinBot 2.4.1 has one that
cannot be imported, and Gaussian for the first steps to a saddle point.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.db import connect

from kinml_fast.data.files import replacing
from kinml_fast.deploy import low_level, model_file
from kinml_fast.deploy.calculator import KinMLCalculator
from kinml_fast.errors import ConfigError, DataError, InputError, first_line
from kinml_fast.kinetics.vibrations import Vibrations, vibrate, warn_without_forces
from kinml_fast.nn import Ensemble
from kinml_fast.units import KCAL_PER_MOL

log = logging.getLogger(__name__)

_CALCULATOR = "from kinml_fast.kinetics.nn_pes import Nn_surr"
_IMPORTS = {
    "from kinbot.ase_modules.calculators.nn_pes import Nn_surr": _CALCULATOR,
    "from kinbot.ase_modules.calculators.gaussian import Gaussian": f"{_CALCULATOR} as Gaussian",
}
"""What scripts that KinBot writes for nn_pes import, and what they import instead."""
_LEAST_ENERGY = 0.01
"""kcal/mol: KinBot divides by what it is given."""
_LEAST_FACTOR = 1.0001


@dataclasses.dataclass(frozen=True)
class Uncertainties:
    """What KinBot varies in MESS inputs, as an ensemble measures it; a number for all points, as KinBot takes it.

    KinBot draws energies from a uniform distribution of ± these, and factors of frequencies from a log-uniform one
    between 1/f and f. Each is as wide as has the members' standard deviation, of which √3 times is the half width, in
    the median of all points: a few far from all data, of which uncertainties.json tells, would drown the others. None
    where nothing was found that it could be measured of.

    Attributes
    ----------
    well_uq
        kcal/mol, of wells and bimolecular products with their zero-point energies. The first well, of which all other
        energies are told, is varied too, so that a difference of two has √2 times the deviation.
    barrier_uq
        kcal/mol, of saddle points: what the differences to the first well have beyond its own variation.
    freq_uq, imagfreq_uq
        Factors, of real modes at KinBot's reference frequency, and of the imaginary one of saddle points.
    """

    well_uq: float | None
    barrier_uq: float | None
    freq_uq: float | None
    imagfreq_uq: float | None


@dataclasses.dataclass(frozen=True)
class Point:
    """A stationary point that KinBot found: one molecule, or several of a bimolecular product.

    Attributes
    ----------
    name
        KinBot's.
    kind
        well, products or barrier.
    parts
        The vibrations of its molecules.
    """

    name: str
    kind: str
    parts: list[Vibrations]

    @property
    def energy(self) -> float:
        """eV, of the mean of the members, with zero-point energies."""
        return sum(one.energy + one.zero_point_energy for one in self.parts)

    @property
    def member_energies(self) -> np.ndarray:
        """[M], eV, with zero-point energies, both with the ensemble's factors of deviations."""
        total = np.zeros(1)
        for one in self.parts:
            assert one.calibrated_energies is not None
            assert one.calibrated_zero_point_energies is not None
            total = total + one.calibrated_energies + one.calibrated_zero_point_energies
        return total


def uncertainties(points: Sequence[Point], reference: float = 100.0, most: float = 4.0) -> Uncertainties:
    """How much the members of an ensemble differ in stationary points.

    Parameters
    ----------
    points
        The first is the well that the search started from.
    reference, most
        KinBot's ``freq_uq_ref`` (cm⁻¹) and ``freq_uq_max_exp``: a factor f changes a frequency ν by
        f^min(reference/ν, most).
    """
    energies = [(one.member_energies - points[0].member_energies) * KCAL_PER_MOL for one in points]
    wells = [np.var(e, ddof=1) for e, one in zip(energies[1:], points[1:], strict=True) if one.kind != "barrier"]
    barriers = [np.var(e, ddof=1) for e, one in zip(energies, points, strict=True) if one.kind == "barrier"]
    well = float(np.sqrt(3 * np.median(wells) / 2)) if wells else None
    barrier = float(np.sqrt(max(3 * np.median(barriers) - (well or 0.0) ** 2, 0.0))) if barriers else None
    real, imaginary = [], []
    for point in points:
        for one in point.parts:
            assert one.frequencies_std is not None
            relative = one.frequencies_std / np.abs(one.frequencies)
            exponents = np.minimum(reference / np.abs(one.frequencies), most)
            first = 1 if point.kind == "barrier" else 0
            real.append((relative / exponents)[first:])
            imaginary.append(relative[:first])
    return Uncertainties(
        well_uq=None if well is None else max(well, _LEAST_ENERGY),
        barrier_uq=None if barrier is None else max(barrier, _LEAST_ENERGY),
        freq_uq=_factor(np.concatenate(real)),
        imagfreq_uq=_factor(np.concatenate(imaginary)),
    )


def _factor(deviations: np.ndarray) -> float | None:
    """The limit of a log-uniform distribution with the median of these standard deviations of the logarithm."""
    if not len(deviations):
        return None
    return max(float(np.exp(np.sqrt(3) * np.median(deviations))), _LEAST_FACTOR)


def run(input_path: str | os.PathLike, *, workers: int = 1) -> Uncertainties | None:
    """Run KinBot with the models of an input file, in the current folder, as its own command does.

    Parameters
    ----------
    input_path
        KinBot's input (JSON) with ``qc: nn_pes``, ``nn_model``: a list of model files, ``use_sella: 1``. With
        ``queuing: local`` its calculations run here, otherwise by the queue. With ``uq: 1``, ``me: 1`` or 2, and the
        files of an ensemble, the ``*_uq`` that are not in the input are measured; uncertainties.json tells of what.
    workers
        Processes for calculations here.

    Returns
    -------
    Uncertainties or None
        What was measured.

    Raises
    ------
    InputError
        KinBot is not installed, an input that it cannot run with, or it ends before its end; kinbot.log says more.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}: give a number of at least 1")
    path = Path(input_path)
    given = _read(path)
    program = _program()
    ensemble = _checked(path, given)
    measured: list[Uncertainties] = []

    class Mess(program.MESS):  # type: ignore[name-defined]
        def write_input(self, qc: Any) -> Any:
            _complete(self.species, qc, self.par["imagfreq_threshold"])
            if self.par["uq"] and ensemble is not None:
                points = _points(self.species, ensemble, 2 * self.par["sella_fmax"])
                found = uncertainties(points, self.par["freq_uq_ref"], self.par["freq_uq_max_exp"])
                measured.append(found)
                _tell(points, found)
                values = dataclasses.asdict(found)
                self.par |= {key: x for key, x in values.items() if key not in given and x is not None}
            return super().write_input(qc)

    said = _Said()
    kinbot_log = logging.getLogger("KinBot")
    with _Jobs(workers) as jobs, _replaced(program, MESS=Mess, QuantumChemistry=_queue(program, jobs)):
        before = sys.argv, sys.excepthook, warnings.showwarning, list(kinbot_log.handlers)
        kinbot_log.addHandler(said)
        try:
            sys.argv = ["kinbot", str(path)]
            program.main()
        except SystemExit as error:
            if isinstance(error.code, int) and error.code > 0:  # a signal's
                raise
            raise InputError(f"{path}: KinBot gives up ({said.error or error}): see kinbot.log") from error
        except InputError:
            raise
        except Exception as error:
            kinbot_log.exception("KinBot fails")
            raise InputError(f"{path}: KinBot fails ({first_line(error)}): see kinbot.log") from error
        finally:
            sys.argv, sys.excepthook, warnings.showwarning, kept = before
            for handler in set(kinbot_log.handlers) - set(kept):
                kinbot_log.removeHandler(handler)
                handler.close()
    if not said.finished:
        raise InputError(f"{path}: KinBot ends early ({said.error or 'it says no more'}): see kinbot.log")
    return measured[-1] if measured else None


class _Said(logging.Handler):
    """What KinBot logs, shown, and whether it ended well."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.error = ""
        self.finished = False

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().strip()
        if record.levelno >= logging.ERROR:
            self.error = first_line(ValueError(text))
        self.finished = self.finished or text.startswith(("KinBot finished", "Finished KinBot"))
        if text and "\n" not in text:
            log.log(record.levelno, "KinBot: %s", text)


class _Jobs:
    """KinBot's scripts, each run by one of a few processes that stay: Sella takes seconds to be imported."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[str, Future[str | None]] = {}

    def __enter__(self) -> _Jobs:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        # After Ctrl-C nobody waits for a script; from Python 3.14 the pool can end them by a name that is public.
        ended = [] if kind is None else list(self._pool._processes.values())
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        for process in ended:
            process.terminate()

    def start(self, job: str, script: str) -> None:
        """Run the text of a script; `running` says until when."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers, mp_context=get_context("spawn"))
        self._running[job] = self._pool.submit(_run_script, job, script)

    def running(self, job: str) -> bool:
        """Whether a script has not ended; of one that has, what went wrong is logged once."""
        future = self._running.get(job)
        if future is None:
            return False
        if not future.done():
            return True
        del self._running[job]
        try:
            wrong = future.result()
        except BrokenProcessPool:
            self._pool = None
            _record_failure(job, None)
            wrong = "its process was killed"
        if wrong:
            logging.getLogger("KinBot").warning("%s: %s", job, wrong)
        return False


def _run_script(job: str, script: str) -> str | None:
    """Run the text of a script that KinBot wrote, in the current folder; what went wrong, if anything did.

    One that ends without a row in KinBot's database leaves KinBot waiting for ever: it gets one that says so.
    """
    folder = Path.cwd()
    said = _Errors()
    package = logging.getLogger("kinml_fast")
    package.addHandler(said)
    names: dict[str, Any] = {"__name__": "__main__"}
    output = folder / "perm" / f"{job}.err"
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            output.open("w") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            try:
                exec(compile(script, f"{job}.py", "exec"), names)
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                said.texts.append(first_line(error) if isinstance(error, Exception) else "it exits")
                os.chdir(folder)
                _record_failure(job, names.get("mol"))
    finally:
        package.removeHandler(said)
        os.chdir(folder)
    return said.texts[0] if said.texts else None


def _record_failure(job: str, atoms: Atoms | None) -> None:
    """A row of KinBot's database for a script that failed, with the geometry that it came to."""
    if atoms is None or not np.isfinite(atoms.positions).all():
        rows = list(connect("kinbot.db").select(name=job))
        atoms = rows[-1].toatoms() if rows else Atoms("H")
    connect("kinbot.db").write(Atoms(atoms.symbols, atoms.positions), name=job, data={"status": "error"})


class _Errors(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _queue(program: Any, jobs: _Jobs) -> type:
    """KinBot's class of calculations, which starts scripts here if ``queuing`` is local, and has them take models."""

    class Queue(program.QuantumChemistry):
        def get_qc_arguments(self, job: str, mult: int, charge: int, *_: Any, **options: Any) -> dict[str, Any]:
            # KinBot has Gaussian (AM1) make the first steps to a saddle point, also where models are to be used.
            return {"fname": self.par["nn_model"], "charge": charge, "mult": mult}

        def check_qc(self, job: str) -> Any:
            return "running" if jobs.running(job) else super().check_qc(job)

        def submit_qc(self, job: str, nproc: int, singlejob: int = 1, jobtype: str | None = None) -> int:
            script = Path(f"{job}.py")  # KinBot writes it anew while it waits or runs
            text = script.read_text()
            for theirs, ours in _IMPORTS.items():
                text = text.replace(theirs, ours)
            with replacing(script) as temporary:
                temporary.write_text(text)
            if self.queuing != "local":
                return super().submit_qc(job, nproc, singlejob, jobtype)
            check = self.check_qc(job)
            if check == "running" or (singlejob and check):
                return 0
            jobs.start(job, text)
            return 1

    return Queue


def _complete(species: Any, qc: Any, threshold: float) -> None:
    """Frequencies of all points; KinBot has them only after conformers or rotors, and MESS inputs would lack them."""
    from kinbot.frequencies import thermochemical_frequencies

    jobs = [(species, f"{species.chemid}_well")]
    for reaction, done in zip(species.reac_obj, species.reac_ts_done, strict=True):
        if done == -1:
            jobs += [(one.species, f"{one.species.chemid}_well") for one in reaction.prod_opt]
            if "hom_sci" not in reaction.instance_name:
                jobs.append((reaction.ts, reaction.instance_name))
    for one, job in jobs:
        if one.natom > 1 and not len(one.reduced_freqs):
            _, found = qc.get_qc_freq(job, one.natom)
            one.kinbot_freqs = thermochemical_frequencies(found, one.wellorts, threshold)
            one.reduced_freqs = list(one.kinbot_freqs)


def _points(species: Any, calculator: KinMLCalculator, fmax: float) -> list[Point]:
    """The stationary points of KinBot's reactions, each once, the first well first."""
    found = {str(species.chemid): Point(str(species.chemid), "well", [_vibrations(species, calculator, fmax)])}
    for reaction, done in zip(species.reac_obj, species.reac_ts_done, strict=True):
        if done != -1:
            continue
        products = [one.species for one in reaction.prod_opt]
        ends = [(products, "products" if len(products) > 1 else "well")]
        if reaction.do_vdW:
            ends.append(([reaction.irc_prod_opt.species], "well"))
        for parts, kind in ends:
            name = "_".join(sorted(str(one.chemid if one is not reaction.irc_prod else one.name) for one in parts))
            if name not in found:
                found[name] = Point(name, kind, [_vibrations(one, calculator, fmax) for one in parts])
        if "hom_sci" not in reaction.instance_name:  # which has no saddle point
            parts = [_vibrations(reaction.ts, calculator, fmax)]
            found[reaction.instance_name] = Point(reaction.instance_name, "barrier", parts)
    return list(found.values())


def _vibrations(species: Any, calculator: KinMLCalculator, fmax: float) -> Vibrations:
    return vibrate(Atoms(list(species.atom), np.asarray(species.geom, dtype=float)), calculator, fmax=fmax)


def _tell(points: Sequence[Point], found: Uncertainties) -> None:
    """Log the points with their deviations, and write them into uncertainties.json."""
    entries = []
    for point in points:
        relative = (point.member_energies - points[0].member_energies) * KCAL_PER_MOL
        entry = {
            "name": point.name,
            "kind": point.kind,
            "energy": (point.energy - points[0].energy) * KCAL_PER_MOL,
            "energy_std": float(relative.std(ddof=1)),
            "frequencies": [one.frequencies.tolist() for one in point.parts],
            "frequencies_std": [one.frequencies_std.tolist() for one in point.parts if one.frequencies_std is not None],
        }
        entries.append(entry)
        log.info("%-8s %-50s %8.2f ± %.2f kcal/mol", point.kind, point.name, entry["energy"], entry["energy_std"])
    values = dataclasses.asdict(found)
    log.info("measured: %s", ", ".join(f"{key} {x:.4g}" for key, x in values.items() if x is not None))
    with replacing("uncertainties.json") as temporary:
        temporary.write_text(json.dumps({"measured": values, "points": entries}, indent=1), encoding="utf-8")


def _program() -> Any:
    """The module of KinBot's command."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import sella  # noqa: F401 (only the scripts take it)
            from kinbot import kb
    except ImportError as error:
        raise ConfigError(f"KinBot cannot be imported ({error}): pip install kinbot") from error
    return kb


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give an input file of KinBot") from None
    except ValueError as error:
        raise ConfigError(
            f"{path}: cannot be read as JSON ({first_line(error)}): give an input file of KinBot"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no keys and values: give KinBot's input")
    return found


def _checked(path: Path, given: dict[str, Any]) -> KinMLCalculator | None:
    """The calculator of an ensemble; None of a single model or an xTB method."""
    for key, wanted in (("qc", "nn_pes"), ("use_sella", 1)):
        if given.get(key) != wanted:
            raise ConfigError(f"{path}: {key} is {given.get(key)!r}: with models it must be {json.dumps(wanted)}")
    names = given.get("nn_model")
    if not names:
        raise ConfigError(f"{path}: there is no nn_model: give a list of model files")
    first = names[0] if isinstance(names, list) else names
    try:
        if str(first).startswith("tblite:"):
            low_level.make(first, KinMLCalculator)  # says if there is none
            return None
        calculator = KinMLCalculator(model_file.resolve(names))
    except InputError as error:
        raise type(error)(f"{path}: nn_model: {error}") from error
    warn_without_forces(names)
    unknown = sorted(_words(given.get("structure")) - set(calculator.model.elements))
    if unknown:
        raise DataError(
            f"{path}: structure contains {' '.join(unknown)}, but the model knows only "
            f"{' '.join(calculator.model.elements)}: take another molecule or train a model with this element"
        )
    return calculator if isinstance(calculator.model, Ensemble) else None


def _words(structure: Any) -> set[str]:
    """The symbols of atoms in a list of symbols and coordinates, or in lists of such."""
    if isinstance(structure, list):
        return set().union(*map(_words, structure))
    return {structure} if isinstance(structure, str) else set()


@contextlib.contextmanager
def _replaced(module: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
