"""The ways for files into the program: for each, sound files to break and what is done with one; see fuzzing.py."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import ase.build
import ase.db
import ase.io
import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from fuzzing import Door, of_archive, of_bytes, of_hdf5, of_sqlite, of_text

from kinml_fast import KinMLCalculator, external
from kinml_fast.cli import main
from kinml_fast.data import Structures, hessians, pykinml_hdf5, read, sqlite, stored
from kinml_fast.deploy import export, grade, model_file, plain, server
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble

SMALL = (
    "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\n"
    "network: {layers: [4, 1]}\n"
    "training: {epochs: 2, threads: 1}\n"
)


def model(elements: Sequence[str] = ("C", "H", "O")) -> EnergyModel:
    """A small one with random weights."""
    torch.manual_seed(0)
    return EnergyModel(
        AEVParameters.aevmod(elements, n_radial=4, n_angular=2, n_sections=2), (4, 1), ("tanh", "identity")
    )


def frames() -> list[ase.Atoms]:
    """Molecules and a crystal with energies, forces, a stress."""
    rng, found = np.random.default_rng(0), []
    for name in ("CH4", "H2O", "CH4", "crystal", "H2O", "CH4"):
        atoms = ase.build.bulk("C", cubic=True) if name == "crystal" else ase.build.molecule(name)
        atoms.rattle(0.05, rng=rng)
        results = {"energy": -1000.0 * len(atoms), "forces": rng.normal(size=(len(atoms), 3))}
        if name == "crystal":
            results["stress"] = rng.normal(size=6)
        atoms.calc = SinglePointCalculator(atoms, **results)
        found.append(atoms)
    return found


def few(number: int = 12) -> Structures:
    """Some that are shipped."""
    return read("shipped:C5H5.db").select(range(number))


def said(act: Callable[[], object]) -> int:
    """What the command line does with a user's mistake, for functions of Python."""
    try:
        act()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def config(folder: Path, files: str | Path = "shipped:C2H2.db", more: str = "") -> Path:
    """A configuration of a tiny run."""
    path = folder / "config.yaml"
    path.write_text(f'run: run\ndata: {{files: ["{files}"], temperature: null{more}}}\n{SMALL}')
    return path


def xyz(folder: Path) -> Door:
    ase.io.write(folder / "whole.xyz", frames(), format="extxyz")
    plain_xyz = [f"5\nmethane {i}\n" + "".join(f"{'CHHHH'[k]} {k} {i} {k % 2}.5\n" for k in range(5)) for i in range(3)]
    (folder / "plain.xyz").write_text("".join(plain_xyz))
    model_file.save(folder / "model.pt", model())

    def enter(path: Path, number: int) -> int:
        if number % 2 or path.name == "plain.xyz":
            return main(["predict", str(folder / "model.pt"), str(path), "-o", "out.xyz"])
        return main(["prepare", str(config(Path(), path)), "data.split=[0.5,0.25,0.25]"])

    return Door([folder / "whole.xyz", folder / "plain.xyz"], enter, (of_bytes, of_text, of_text))


def databases(folder: Path) -> Door:
    sqlite.write(folder / "C5H5.db", {1: few(), 2: few()}, temperatures=300.0)

    def enter(path: Path, number: int) -> int:
        return main(["prepare", str(config(Path(), path)), f"data.fidelity={('1', '[1,2]', '2')[number % 3]}"])

    return Door([folder / "C5H5.db"], enter, (of_bytes, of_sqlite, of_sqlite))


def ase_databases(folder: Path) -> Door:
    with ase.db.connect(folder / "ase.db") as database:
        for atoms in frames():
            database.write(atoms)

    def enter(path: Path, number: int) -> int:
        return main(["prepare", str(config(Path(), path)), "data.split=[0.5,0.25,0.25]"])

    return Door([folder / "ase.db"], enter, (of_bytes, of_sqlite, of_sqlite))


def descriptors(folder: Path) -> Door:
    structures = few(6)
    parameters = AEVParameters.aevmod(structures.elements, n_radial=4, n_angular=2, n_sections=2)
    found = stored.compute(structures, parameters, torch.float64, jacobian=True)
    pykinml_hdf5.write(folder / "data.hdf5", structures, found)

    def enter(path: Path, number: int) -> int:
        arguments = [str(config(Path(), path)), "data.split=[0.5,0.25,0.25]"]
        if number % 4:
            return main(["prepare", *arguments])
        return main(["train", *arguments, "training.jacobian=stored", "training.epochs=0", "training.loss.forces=true"])

    return Door([folder / "data.hdf5"], enter, (of_bytes, of_hdf5, of_hdf5))


def prepared(folder: Path) -> Door:
    for name, more in (("prepared.h5", "data.on_disk=false"), ("prepared.blocks", "data.on_disk=true")):
        assert main(["prepare", str(config(folder)), f"data.prepared={folder / name}", more]) == 0

    def enter(path: Path, number: int) -> int:
        on_disk = f"data.on_disk={str(path.suffix == '.blocks').lower()}"
        return main(["prepare", str(config(Path())), f"data.prepared={path}", on_disk])

    return Door([folder / "prepared.h5", folder / "prepared.blocks"], enter)


def configurations(folder: Path) -> Door:
    run = folder / "whole.yaml"
    config(folder).rename(folder / "small.yaml")
    assert main(["train", str(folder / "small.yaml"), f"run={folder / 'run'}"]) == 0
    shutil.copy(folder / "run" / "config.yaml", run)

    def enter(path: Path, number: int) -> int:
        return main(["prepare", str(path), "run=run"])

    return Door([folder / "small.yaml", run], enter, (of_bytes, of_text, of_text))


def lists(folder: Path) -> Door:
    labels = read("shipped:C2H2.db").labels[:12]
    rows = [f"{label} {(2, -1)[i % 3 == 0]}\n" for i, label in enumerate(labels)]
    (folder / "split.txt").write_text("".join(rows))
    (folder / "weights.txt").write_text("".join(f"{label} {i / 2}\n" for i, label in enumerate(labels)))

    def enter(path: Path, number: int) -> int:
        key = "split_file" if path.name == "split.txt" else "weights"
        return main(["prepare", str(config(Path())), f"data.{key}={path}", "data.split=[0.5,0.5,0]"])

    return Door([folder / "split.txt", folder / "weights.txt"], enter, (of_bytes, of_text, of_text))


def models(folder: Path) -> Door:
    model_file.save(folder / "model.pt", model(), {"epoch": 3})
    ase.io.write(folder / "in.xyz", frames()[:2], format="extxyz")

    def enter(path: Path, number: int) -> int:
        return main(["predict", str(path), str(folder / "in.xyz"), "-o", "out.xyz"])

    return Door([folder / "model.pt"], enter, (of_bytes, of_archive, of_archive, of_archive))


def checkpoints(folder: Path) -> Door:
    assert main(["train", str(config(folder)), f"run={folder / 'run'}", "training.ema_decay=0.9"]) == 0

    def enter(path: Path, number: int) -> int:
        if number % 2:
            return main(["train", str(config(Path())), f"start.model={path}", "training.epochs=0"])
        shutil.copytree(folder / "run", "run")
        shutil.copy(path, "run/checkpoints")
        return main(["train", "--resume", "run"])

    return Door([folder / "run" / "checkpoints" / "last.pt"], enter, (of_bytes, of_archive, of_archive, of_archive))


def run_folders(folder: Path) -> Door:
    """What a run that is resumed reads beside its checkpoint."""
    assert main(["train", str(config(folder)), f"run={folder / 'run'}"]) == 0
    texts = [path for path in sorted((folder / "run").iterdir()) if path.suffix in (".yaml", ".csv", ".txt", ".tvtmsk")]

    def enter(path: Path, number: int) -> int:
        shutil.copytree(folder / "run", "run")
        shutil.copy(path, "run")
        return main(["train", "--resume", "run", "training.epochs=3"])

    return Door(texts, enter, (of_bytes, of_text, of_text))


def of_pykinml(folder: Path) -> Door:
    import test_pykinml_checkpoint as of_pykinml

    torch.save(of_pykinml.contents(), folder / "one.pt")
    with mock.patch.dict(sys.modules):
        patch = __import__("pytest").MonkeyPatch()
        torch.save(of_pykinml.two_levels(patch), folder / "two.pt")
        patch.undo()

    def enter(path: Path, number: int) -> int:
        arguments = ["--elements", "C", "H", "--aev-params", "16", "8", "8"]
        return main(["convert", str(path), "-o", "out.pt", *arguments])

    return Door([folder / "one.pt", folder / "two.pt"], enter, (of_bytes, of_archive, of_archive, of_archive))


def of_torchani(folder: Path) -> Door:
    import test_torchani_model as of_torchani

    torch.save({"state_dict": of_torchani.state(), "repr": of_torchani.TEXT}, folder / "ani.pt")

    def enter(path: Path, number: int) -> int:
        return main(["convert", "--from", "torchani", str(path), "-o", "out.pt"])

    return Door([folder / "ani.pt"], enter, (of_bytes, of_archive, of_archive, of_archive))


def exported(folder: Path) -> Door:
    """The file of LAMMPS and of C, read by the C++ core, and what is read of it without the core."""
    one = model(("C", "H"))
    plain.save(folder / "model.kinml", one, grade=grade.fit(one, few()))
    plain.save(folder / "short.kinml", model())
    committee = Ensemble([one, one])
    committee.calibration = Calibration((2.0,), ((3.0, 0.5),))
    plain.save(folder / "committee.kinml", committee)
    positions = ase.build.molecule("CH4").positions

    def enter(path: Path, number: int) -> int:
        def act() -> None:
            potential = plain.PlainPotential(path)
            potential(positions, np.array([0, 1, 1, 1, 1]), hessians=number % 3 == 0)

        return said(act) if number % 4 else said(lambda: export.read_about(path))

    return Door([folder / "model.kinml", folder / "short.kinml", folder / "committee.kinml"], enter)


def requests(folder: Path) -> Door:
    """What ORCA and Gaussian write, and a client of the server."""
    import test_external as of_programs

    of_programs.write_orca()
    of_programs.write_gaussian(2)
    (folder / "request").write_text(
        '{"elements": ["O", "H", 1], "positions": [[0, 0, 0], [0, 0, 1], [1, 0, 0]], '
        '"length": "bohr", "derivatives": 2}\n'
    )
    calculator = KinMLCalculator(model())

    def enter(path: Path, number: int) -> int:
        if path.name == "request":
            line = path.read_bytes().split(b"\n")[0]
            answer = server.answer(calculator, line)
            if "error" in answer:
                print(answer["error"].replace("the server failed", "Traceback"), file=sys.stderr)
            return 2 if "error" in answer else 0
        if path.name == "in":
            return said(lambda: external.read_gaussian(path))
        shutil.copy(folder / "water_EXT.xyz", ".") if path.name != "water_EXT.xyz" else None
        shutil.copy(folder / "water_EXT.extinp.tmp", ".") if path.name == "water_EXT.xyz" else None
        return said(lambda: external.read_orca(Path("water_EXT.extinp.tmp")))

    names = ("request", "in", "water_EXT.xyz", "water_EXT.extinp.tmp")
    return Door([folder / name for name in names], enter, (of_bytes, of_text, of_text))


def second_derivatives(folder: Path) -> Door:
    """Hessians that are trained on, in a database and in a file of their own."""
    import test_hessian_training as of_training

    known = of_training.known(of_training.model(), 2)
    hessians.write(folder / "some.xyz", known)
    of_training.database(folder / "C2H2.db", known[0].values)

    def of_either(rng: random.Random, data: bytes) -> bytes:
        return of_sqlite(rng, data) if data.startswith(b"SQLite") else of_text(rng, data)

    def enter(path: Path, number: int) -> int:
        return said(lambda: hessians.read(path))

    return Door([folder / "some.xyz", folder / "C2H2.db"], enter, (of_bytes, of_either))


DOORS: dict[str, Callable[[Path], Door]] = {
    "xyz": xyz,
    "sqlite": databases,
    "ase.db": ase_databases,
    "hdf5": descriptors,
    "prepared": prepared,
    "yaml": configurations,
    "lists": lists,
    "model": models,
    "checkpoint": checkpoints,
    "run": run_folders,
    "pykinml": of_pykinml,
    "torchani": of_torchani,
    "hessians": second_derivatives,
    "plain": exported,
    "requests": requests,
}
