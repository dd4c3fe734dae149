"""What commands write: never over what they read, what its name says; and where nothing can be written or read."""

from __future__ import annotations

import gzip
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import ase.db
import ase.io
import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from training_helpers import write_config

from kinml_fast.cli import main
from kinml_fast.deploy import model_file
from kinml_fast.errors import DeviceError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.train import TrainingConfig
from kinml_fast.train.trainer import _memory_explained


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With a model, d.xyz and a configuration."""
    torch.manual_seed(0)
    model_file.save(tmp_path / "m.pt", EnergyModel(AEVParameters.aevmod(("C", "H"), 4, 2, 2), (8, 4, 4, 1)))
    write_config(tmp_path, forces="all")
    (tmp_path / "data.xyz").rename(tmp_path / "d.xyz")
    config = tmp_path / "small.yaml"
    config.write_text(config.read_text().replace("data.xyz", "d.xyz"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("predict m.pt d.xyz -o d.xyz", "d.xyz: is what is read and would be overwritten"),
        ("predict m.pt d.xyz -o ./sub/../d.xyz", "is what is read and would be overwritten"),
        ("predict m.pt d.xyz -o m.pt", "m.pt: the suffix names no format for structures"),
        ("predict m.pt d.xyz -o out.pdb", "out.pdb: the suffix names no format for structures"),
        ("evaluate m.pt d.xyz --csv d.xyz", "d.xyz: is what is read and would be overwritten"),
        ("evaluate m.pt d.xyz --csv m.pt", "m.pt: is what is read and would be overwritten"),
        ("evaluate m.pt d.xyz --csv notes.txt", "notes.txt: the output is a file of another kind"),
        ("prepare small.yaml data.prepared=notes.txt", "notes.txt: holds no prepared data and would be overwritten"),
        ("prepare small.yaml data.prepared=other.h5", "other.h5: holds no prepared data and would be overwritten"),
        ("convert m.pt -o m.pt", "m.pt: is what is read and would be overwritten"),
    ],
)
def test_no_input_and_no_file_of_another_kind_is_written_over(folder, capsys, command, sentence):
    (folder / "sub").mkdir()
    (folder / "notes.txt").write_text("mine")
    with h5py.File(folder / "other.h5", "w") as file:
        file["mine"] = [1, 2]
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert main(command.split()) == 2
    assert sentence in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", ["out.xyz", "out.extxyz", "out.xyz.gz", "out.traj"])
def test_a_prediction_is_what_its_name_says_and_keeps_what_was_read(folder, name):
    frames = calculated()[:3]
    for atoms in frames:
        atoms.calc.results.update(dipole=np.array([0.0, 0.0, 1.5]), charges=np.linspace(-0.1, 0.1, len(atoms)))
        atoms.info["name"], atoms.arrays["tags2"] = "a b", np.arange(len(atoms))
    ase.io.write("in.xyz", frames)
    assert main(["predict", "m.pt", "in.xyz", "-o", name]) == 0
    found = ase.io.read(name, ":")
    assert len(found) == 3
    if name.endswith(".gz"):
        with gzip.open(name) as file:
            assert file.readline() == f"{len(frames[0])}\n".encode()
    for before, after in zip(frames, found, strict=True):
        assert after.calc.results["energy"] != before.calc.results["energy"]
        for key in ("dipole", "charges"):
            np.testing.assert_allclose(after.calc.results[key], before.calc.results[key], atol=1e-8)
        assert after.info["name"] == "a b"
        if name != "out.traj":  # which has no columns of a user's own
            assert after.arrays["tags2"].tolist() == before.arrays["tags2"].tolist()


def calculated() -> list[Atoms]:
    """The frames of d.xyz with a calculator's energies and forces."""
    frames = ase.io.read("d.xyz", ":")
    for atoms in frames:
        energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return frames


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kinml_fast.cli", *arguments]
    return subprocess.run(command, text=True, timeout=240, **{"capture_output": True, **options})


def test_an_output_that_takes_no_more(folder):
    ascii_only = run("evaluate", "m.pt", "d.xyz", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert ascii_only.returncode == 0, ascii_only.stderr
    assert "kcal/mol/\\xc5" in ascii_only.stdout
    with open("/dev/full", "w") as full:
        done = run("evaluate", "m.pt", "d.xyz", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kinml-fast: standard output: could not be written (No space left")
    assert "Traceback" not in done.stderr
    with open("/dev/full", "w") as full:  # what training makes is in its folder
        done = run("train", "small.yaml", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (folder / "run/report/errors.csv").exists()
    reader, writer = os.pipe()
    os.close(reader)  # as of `| head`, when it has ended
    done = run("evaluate", "m.pt", "d.xyz", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_backend_of_a_notebook_does_not_matter(folder):
    done = run("train", "small.yaml", env={**os.environ, "MPLBACKEND": "module://not.there"})
    assert done.returncode == 0, done.stderr
    assert (folder / "run/report/learning_curves.png").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~nosuchuser9/d.xyz", "home directory"),
        ("ring", "loop"),
        (" ".join(f"frame{i:04d}.xyz" for i in range(40)), "File name too long"),
    ],
)
def test_paths_that_are_none(folder, capsys, name, reason):
    (folder / "ring").symlink_to("ring2")
    (folder / "ring2").symlink_to("ring")
    assert main(["prepare", "small.yaml", f"data.files=['{name}']"]) == 2
    said = capsys.readouterr().err
    assert "is no path of a file (" in said
    assert reason.lower() in said.lower()


def test_files_and_folders_without_rights(folder):
    """Each command in turn, by a process that may neither read nor write what belongs to somebody else."""
    assert main(["train", "small.yaml"]) == 0
    for name in ("secret.pt", "secret.xyz", "secret.yaml", "secret.txt"):
        source = {"pt": "m.pt", "xyz": "d.xyz", "yaml": "small.yaml", "txt": "run/split.txt"}[name.rpartition(".")[2]]
        shutil.copy(source, name)
    commands = [
        "train --resume run",
        "train small.yaml --overwrite",
        "train small.yaml run=other",
        "prepare small.yaml run=open/r data.prepared=here.h5",
        "prepare small.yaml run=open/r data.files=secret.xyz",
        "prepare small.yaml run=open/r data.split_file=secret.txt",
        "prepare small.yaml run=open/r data.weights=secret.txt",
        "train small.yaml run=open/r start.model=secret.pt",
        "prepare secret.yaml run=open/r",
        "predict secret.pt d.xyz -o open/o.xyz",
        "predict m.pt secret.xyz -o open/o.xyz",
        "predict m.pt d.xyz -o o.xyz",
        "evaluate m.pt d.xyz --csv e.csv",
        "evaluate m.pt d.xyz --plots plots",
        "export m.pt -o m.kinml",
        "convert secret.pt -o open/c.pt",
        "serve m.pt --socket s",
    ]
    (folder / "open").mkdir()
    program = (
        "import sys\nfrom kinml_fast.cli import main\n"
        "for line in sys.stdin.read().splitlines():\n    print(main(line.split()), file=sys.stderr)\n"
    )
    prefix = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may do everything")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, 65533, 65533)
        os.chown(folder / "open", 0, 0)
        without = "-dac_override,-dac_read_search,-fowner,-chown"
        prefix = ["setpriv", f"--inh-caps={without}", f"--bounding-set={without}"]
    for path in folder.glob("secret*"):
        path.chmod(0o600 if prefix else 0)
    for path in (folder / "run", folder / "run/report", folder / "run/checkpoints", folder):
        path.chmod(0o755 if prefix else 0o555)
    done = subprocess.run(
        [*prefix, sys.executable, "-c", program], input="\n".join(commands), capture_output=True, text=True, timeout=240
    )
    folder.chmod(0o755)
    said = done.stderr.splitlines()
    assert done.returncode == 0, done.stderr
    assert said[1::2] == ["2"] * len(commands), done.stderr
    for command, sentence in zip(commands, said[::2], strict=True):
        assert "(Permission denied)" in sentence or "[Errno 13]" in sentence, (command, sentence)


def test_a_lock_is_no_damage(folder, capsys, monkeypatch):
    from kinml_fast import datasets
    from kinml_fast.data import sqlite

    monkeypatch.setattr(sqlite, "_PATIENCE", 0.1)
    shutil.copy(datasets.path("C2H2.db"), "C2H2.db")
    holder = sqlite3.connect("C2H2.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    assert main(["prepare", "small.yaml", "data.files=[C2H2.db]"]) == 2
    assert "C2H2.db: is locked by another program, which writes to it" in capsys.readouterr().err
    holder.close()


def test_a_database_of_ase_is_read_as_ase_reads_it(folder):
    frames = calculated()
    with ase.db.connect("molecules.db") as database:
        for atoms in frames:
            database.write(atoms)
    shutil.move("molecules.db", "C2H2.db")  # whatever its name is
    assert main(["prepare", "small.yaml", "data.files=[C2H2.db]"]) == 0
    assert len((folder / "run/split.txt").read_text().splitlines()) >= len(frames)


def test_descriptors_that_do_not_fit_into_memory():
    sentence = r"the memory of this computer is too small .*, 8000.0 GB more: set data\.on_disk=true"
    with pytest.raises(DeviceError, match=sentence), _memory_explained(TrainingConfig()):
        torch.empty(10**12, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), _memory_explained(TrainingConfig()):
        torch.ones(2, 3) @ torch.ones(2, 3)
