"""Molecular dynamics in i-PI and OpenMM, by the programs themselves: pip install ipi==3.3.1 openmm==8.6.1"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units

from kinml_fast import KinMLCalculator
from kinml_fast.deploy import model_file, openmm_force
from kinml_fast.errors import ConfigError
from kinml_fast.nn import AEVParameters, EnergyModel

ROOT = Path(__file__).parent.parent
RING = [[np.cos(angle), np.sin(angle), 0.0] for angle in 2 * np.pi * np.arange(5) / 5]
C5H5 = Atoms("C5H5", 1.2 * np.array(RING + [[1.9 * x, 1.9 * y, 0.02] for x, y, _ in RING]))
IPI = Path(sys.executable).with_name("i-pi")


@pytest.fixture
def calculator() -> KinMLCalculator:
    torch.manual_seed(0)
    model = EnergyModel(AEVParameters.aevmod(("C", "H"), 8, 4, 4), [8, 4, 1], ["gaussian", "tanh", "identity"])
    model.sae.copy_(torch.tensor([-0.1, -0.2]))  # small: i-PI prints nine digits
    return KinMLCalculator(model)


@pytest.mark.parametrize("periodic", [False, True])
def test_openmm_computes_with_the_energies_and_forces_of_ase(calculator, periodic):
    openmm = pytest.importorskip("openmm", minversion="8.4", reason="pip install 'openmm>=8.4'")
    force = openmm_force.make(calculator, C5H5.get_chemical_symbols(), periodic)
    system = openmm.System()
    atoms, conserved, potential = C5H5.copy(), [], []
    if periodic:  # shorter than twice the cutoff: atoms meet images of themselves
        atoms.cell, atoms.pbc = [[6.5, 0, 0], [0.5, 7, 0], [0, 0.4, 5]], True
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    for mass in C5H5.get_masses():
        system.addParticle(mass)
    system.addForce(openmm.XmlSerializer.clone(force))  # as a saved system has it
    integrator = openmm.VerletIntegrator(0.0002)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(C5H5.positions / 10)
    context.setVelocitiesToTemperature(300, 1)
    for _ in range(50):
        integrator.step(2)
        state = context.getState(positions=True, energy=True, forces=True)
        atoms.positions = state.getPositions(asNumpy=True)._value * 10
        # kJ/mol and nm; OpenMM takes another value of the Avogadro constant only for temperatures
        energy = state.getPotentialEnergy()._value * units.kJ / units.mol
        forces = state.getForces(asNumpy=True)._value * units.kJ / units.mol / 10
        assert energy == pytest.approx(calculator.get_potential_energy(atoms), abs=1e-9)
        np.testing.assert_allclose(forces, calculator.get_forces(atoms), rtol=0, atol=1e-9)
        potential.append(energy)
        conserved.append(energy + state.getKineticEnergy()._value * units.kJ / units.mol)
    assert np.ptp(conserved) < 0.05 * np.ptp(potential)
    assert np.ptp(potential) > 1e-3


def test_openmm_hears_what_is_wrong(calculator):
    openmm = pytest.importorskip("openmm", minversion="8.4", reason="pip install 'openmm>=8.4'")
    system = openmm.System()
    for _ in range(2):
        system.addParticle(1)
    system.addForce(openmm_force.make(calculator, ["H", "H"]))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(np.zeros((2, 3)))
    with pytest.raises(Exception, match=r"are only 0 Å apart"):
        context.getState(energy=True)


def test_without_openmm_a_sentence_says_what_to_install(calculator, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(ConfigError, match=r"pip install 'openmm>=8\.4'"):
        openmm_force.make(calculator, ["H"])


def input_of_docs() -> str:
    """The input file of i-PI in docs/md_codes.md."""
    (text,) = re.findall(r"```xml\n(.*?)```", (ROOT / "docs" / "md_codes.md").read_text(), re.DOTALL)
    return text


def of_binary(path: Path) -> list[np.ndarray]:
    """Frames [n, 3] of a binary trajectory of i-PI's: cell (nine numbers), number of atoms, positions, names, title."""
    contents = path.read_bytes()
    frames = contents.split(contents[:72])[1:]  # the cell is always the same
    return [np.frombuffer(frame, count=30, offset=8).reshape(-1, 3) for frame in frames]


@pytest.mark.skipif(not IPI.exists(), reason="pip install ipi==3.3.1")
@pytest.mark.parametrize("periodic", [False, True])
def test_ipi_runs_with_the_energies_and_forces_of_ase(calculator, tmp_path, periodic):
    name, start = f"kinml_{os.getpid()}", C5H5.copy()
    if periodic:
        start.cell, start.pbc = [6.5, 7, 5], True
    start.write(tmp_path / "client.xyz", format="extxyz")
    model_file.save(tmp_path / "model.pt", calculator.model)
    C5H5.write(tmp_path / "c5h5.xyz", format="xyz")
    text = input_of_docs().replace("<address>c5h5</address>", f"<address>{name}</address>")
    text = re.sub(r"<total_steps>\d+", "<total_steps>50", text)
    text = text.replace("trajectory", "trajectory format='bin'").replace("/trajectory format='bin'", "/trajectory")
    text = re.sub("{(electronvolt|angstrom|ev/ang)}", "", text)  # atomic units: those of i-PI and ASE differ by 1e-7
    if periodic:
        text = text.replace("[ 100, 100, 100 ]", "[ 6.5, 7, 5 ]").replace(" ] </prop", ", virial_md ] </prop")
    (tmp_path / "input.xml").write_text(text)
    ipi = subprocess.Popen(
        [IPI, "input.xml"], cwd=tmp_path, stdout=(tmp_path / "log").open("wb"), stderr=subprocess.STDOUT
    )
    try:
        end = time.monotonic() + 60
        while not Path(f"/tmp/ipi_{name}").exists():
            assert ipi.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.05)
        example = [sys.executable, ROOT / "python_examples" / "run_ipi.py", "model.pt", "client.xyz", name]
        client = subprocess.run(example, cwd=tmp_path, timeout=120, capture_output=True, text=True, check=False)
        assert ipi.wait(60) == 0, (tmp_path / "log").read_text() + client.stderr
    finally:
        ipi.kill()
        ipi.wait()
        with contextlib.suppress(FileNotFoundError):
            Path(f"/tmp/ipi_{name}").unlink()
    columns = np.loadtxt(tmp_path / "nve.out")
    conserved, potential = columns[:, 2], columns[:, 3]
    assert len(columns) == 51
    assert np.ptp(potential) > 1e-4  # Hartree
    assert np.ptp(conserved) < 0.05 * np.ptp(potential)
    frames, all_forces = (of_binary(tmp_path / f"nve.{name}_0.bin") for name in ("pos", "frc"))
    assert len(frames) == len(all_forces) == 51
    cell = np.fromfile(tmp_path / "nve.pos_0.bin", count=9).reshape(3, 3).T * units.Bohr
    for frame, forces, energy, row in zip(frames, all_forces, potential, columns, strict=True):
        atoms = Atoms(C5H5.symbols, frame * units.Bohr, cell=cell, pbc=start.pbc)
        assert energy * units.Hartree == pytest.approx(calculator.get_potential_energy(atoms), abs=1e-7)
        of_ipi = forces * units.Hartree / units.Bohr
        np.testing.assert_allclose(of_ipi, calculator.get_forces(atoms), rtol=0, atol=1e-9)
        if periodic:  # xx, yy, zz, xy, xz, yz, divided by the volume, in i-PI's sign
            stress = -calculator.get_stress(atoms)[[0, 1, 2, 5, 4, 3]]
            np.testing.assert_allclose(row[4:] * units.Hartree / units.Bohr**3, stress, rtol=0, atol=1e-9)
            assert np.abs(stress).max() > 1e-6


def test_the_example_of_openmm_runs(calculator, tmp_path):
    pytest.importorskip("openmm", minversion="8.4", reason="pip install 'openmm>=8.4'")
    model_file.save(tmp_path / "model.pt", calculator.model)
    C5H5.write(tmp_path / "c5h5.xyz")
    example = [sys.executable, ROOT / "python_examples" / "run_openmm.py", "model.pt", "c5h5.xyz", "200"]
    lines = subprocess.run(example, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    total = [float(line.split()[-2]) for line in lines]
    assert len(total) == 3
    assert np.ptp(total) < 1.0
