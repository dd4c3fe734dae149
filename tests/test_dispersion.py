"""D3(BJ) beside a model: in ASE and predictions, refused where it would be left out."""

from __future__ import annotations

import sys

import ase.io
import numpy as np
import pytest
import torch
from ase.build import molecule
from training_helpers import write_config

from kinml_fast import KinMLCalculator, cli, report
from kinml_fast.deploy import model_file
from kinml_fast.deploy.export import export
from kinml_fast.errors import ConfigError, ModelError
from kinml_fast.nn import AEVParameters, Dispersion, EnergyModel, Ensemble

PBE = Dispersion("pbe")
NEED = "pip install dftd3"


def model(dispersion: Dispersion | None = PBE, seed: int = 0) -> EnergyModel:
    torch.manual_seed(seed)
    descriptor = AEVParameters.aevmod(("C", "H", "O"), n_radial=4, n_angular=2, n_sections=2)
    return EnergyModel(descriptor, (6, 1), ("gaussian", "identity"), dispersion=dispersion)


def test_the_calculator_adds_energy_forces_and_stress():
    d3 = pytest.importorskip("dftd3.ase", reason=NEED).DFTD3(method="pbe", damping="d3bj")
    atoms = molecule("CH3CH2OH")
    crystal = atoms.copy()
    crystal.set_cell([6.0, 6.5, 7.0])
    crystal.pbc = True
    for one in (atoms, crystal):
        found, bare = KinMLCalculator(model()), KinMLCalculator(model(None))
        names = ["energy", "forces"] + (["stress"] if one.pbc.any() else [])
        for name in names:
            more = np.array(found.get_property(name, one)) - bare.get_property(name, one)
            expected = np.array(d3.get_property(name, one))
            assert np.abs(expected).max() > 1e-5
            np.testing.assert_allclose(more, expected, rtol=1e-9, atol=1e-11)
        more = found.get_hessian(one, [2, 0]) - bare.get_hessian(one, [2, 0])
        np.testing.assert_allclose(more, d3.get_hessian(one)[[6, 7, 8, 0, 1, 2]], rtol=1e-9, atol=1e-7)
        assert "energies" not in found.implemented_properties
    both = KinMLCalculator(Ensemble([model(), model(seed=1)]))
    both.calculate(atoms)
    means = np.mean([KinMLCalculator(model(seed=seed)).get_property("energy", atoms) for seed in (0, 1)])
    assert both.results["energy"] == pytest.approx(means, rel=1e-12)


def test_parameters_instead_of_a_method():
    DFTD3 = pytest.importorskip("dftd3.ase", reason=NEED).DFTD3
    atoms = molecule("CH4")
    parameters = {"s8": 1.2, "a1": 0.4, "a2": 5.1, "s9": 0.0}
    d3 = DFTD3(damping="d3bj", params_tweaks=parameters)
    energies = [
        KinMLCalculator(model(one)).get_property("energy", atoms) for one in (Dispersion(None, parameters), None)
    ]
    assert energies[0] - energies[1] == pytest.approx(d3.get_property("energy", atoms), rel=1e-9)
    with pytest.raises(ConfigError, match="D3\\(BJ\\) of nonsense: dftd3 has no such parameters"):
        KinMLCalculator(model(Dispersion("nonsense")))
    with pytest.raises(ConfigError, match="parameters of D3\\(BJ\\) are s8, a1, a2"):
        Dispersion(parameters={"s8": 1.0})
    with pytest.raises(ConfigError, match="one of both"):
        Dispersion("pbe", {"s8": 1.0, "a1": 0.4, "a2": 5.0})


def test_without_the_package_the_model_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "dftd3", None)
    monkeypatch.setitem(sys.modules, "dftd3.ase", None)
    with pytest.raises(ConfigError, match=r"D3\(BJ\) of pbe, which needs the package dftd3 .*pip install dftd3"):
        KinMLCalculator(model())
    KinMLCalculator(model(None))


def test_files_keep_it_and_exports_refuse_it(tmp_path):
    model_file.save(tmp_path / "model.pt", model())
    assert torch.load(tmp_path / "model.pt", weights_only=True)["format_version"] == 2
    assert model_file.load(tmp_path / "model.pt").dispersion == PBE
    for name in ("model.kinml", "model.ts"):
        with pytest.raises(ModelError, match=r"exported files do not have: .*hybrid/overlay with dispersion/d3"):
            export(tmp_path / "model.pt", tmp_path / name, kind="plain")
    with pytest.raises(ModelError, match="has the dispersion"):
        Ensemble([model(), model(None)])


def test_a_configured_run_predicts_with_it(tmp_path, monkeypatch):
    """It takes no part in training."""
    monkeypatch.setattr(report, "write_report", lambda *arguments: [])
    path = write_config(tmp_path, forces="all")
    assert cli.main(["train", str(path)]) == 0
    assert cli.main(["train", str(path), f"run={tmp_path / 'd3'}", "network.dispersion.method=pbe"]) == 0
    bare, own = (model_file.load(tmp_path / name) for name in ("run", "d3"))
    assert torch.equal(bare.networks.weights, own.networks.weights)
    assert own.dispersion == PBE
    assert cli.main(["train", str(path), f"run={tmp_path / 'x'}", "network.dispersion.parameters={s8: 1}"]) == 2
    d3 = pytest.importorskip("dftd3.ase", reason=NEED).DFTD3(method="pbe", damping="d3bj")
    for name in ("run", "d3"):
        written = str(tmp_path / f"{name}.xyz")
        assert cli.main(["predict", str(tmp_path / name), str(tmp_path / "data.xyz"), "-o", written]) == 0
    for a, b in zip(ase.io.read(tmp_path / "d3.xyz", ":3"), ase.io.read(tmp_path / "run.xyz", ":3"), strict=True):
        more = a.get_potential_energy() - b.get_potential_energy()
        assert more == pytest.approx(d3.get_property("energy", b), abs=1e-6)
        np.testing.assert_allclose(a.get_forces() - b.get_forces(), d3.get_property("forces", b), atol=1e-6)
