"""Pages that are made from something else are up to date, and what they show runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import ase
import pytest
import torch

from kinml_fast.data import read
from kinml_fast.deploy import model_file
from kinml_fast.nn import AEVParameters, EnergyModel

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "script",
    ["docs/make_configuration.py", "benchmarks/report.py", "benchmarks/few_high_level.py", "benchmarks/explored.py"],
)
def test_page_is_up_to_date(script):
    done = subprocess.run([sys.executable, ROOT / script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"run: python {script}\n{done.stderr}"


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    monkeypatch.chdir(tmp_path)
    Path("runs/example").mkdir(parents=True)
    model_file.save("runs/example/model.pt", EnergyModel(AEVParameters.aevmod(("C", "H"))))
    names = {
        "coordinates": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.1]], dtype=torch.float64, requires_grad=True),
        "species": torch.tensor([0, 1]),
        "offsets": torch.tensor([0, 2]),
        "atoms": ase.Atoms("CH", [[0, 0, 0], [0, 0, 1.1]]),
    }
    exec(block, names)
    assert names["energies"].shape == (1,)
    torch.testing.assert_close(names["forces"].sum(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert Path("model.ts").exists()
    assert names["atoms"].get_potential_energy() == pytest.approx(names["energies"].item())


def test_python_of_the_page_on_crystals_runs():
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "crystals.md").read_text(encoding="utf-8"), flags=re.S
    )
    names: dict = {}
    exec(block, names)
    assert names["virials"].shape == (1, 3, 3)
    torch.testing.assert_close(names["virials"], names["virials"].transpose(1, 2))
    assert names["virials"].any()


def test_python_of_the_page_on_stored_jacobians_runs(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "stored.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert len(read("c2h3.h5")) == len(names["structures"]) > 0


def test_python_of_the_page_on_running_models_runs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    monkeypatch.chdir(tmp_path)
    Path("runs/example").mkdir(parents=True)
    model_file.save("runs/example/model.pt", EnergyModel(AEVParameters.aevmod(("C", "H"))))
    names: dict = {}
    exec(block, names)
    assert names["forces"].shape == (6, 3)
    assert "forces" in capsys.readouterr().out
