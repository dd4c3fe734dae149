"""Factors of an ensemble's deviations: found by likelihood, kept in files, applied wherever deviations are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from training_helpers import write_config

from kinml_fast import KinMLCalculator, report
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import calibrate, evaluate, members, model_file, plain
from kinml_fast.errors import ConfigError, InputError, ModelError
from kinml_fast.nn import AEVParameters, Calibration, EnergyModel, Ensemble
from kinml_fast.train import config as configuration
from kinml_fast.train import runs

FACTORS = Calibration((2.0,), ((3.0, 5.0),))


def ensemble(n_members: int = 3, calibration: Calibration | None = FACTORS, **options) -> Ensemble:
    models = []
    for seed in range(n_members):
        torch.manual_seed(seed)
        models.append(EnergyModel(AEVParameters.aevmod(("H", "O")), (5, 1), ("tanh", "identity"), **options))
    together = Ensemble(models)
    together.calibration = calibration
    return together.eval()


def water(stretch: float = 0.0) -> Atoms:
    return Atoms("OH2", [[0.0, 0.0, 0.0], [0.97 + stretch, 0.0, 0.0], [-0.24, 0.93, 0.1]])


def drawn(n: int, n_members: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Errors of means and deviations where the truth lies among the members, but they are `scale` times too close."""
    rng = np.random.default_rng(seed)
    widths = rng.uniform(0.1, 3.0, n)
    found = widths[:, None] * rng.normal(size=(n, n_members))
    errors = widths * rng.normal(size=n) * np.sqrt(1 + 1 / n_members)
    return errors, found.std(axis=1, ddof=1) / scale


@pytest.mark.parametrize("n_members", [2, 4, 8, 30])
def test_calibrated_deviations_have_the_errors_that_they_say(n_members):
    errors, deviations = drawn(20_000, n_members, 7.0)
    factor = calibrate.factor(errors, deviations, n_members)
    assert factor is not None
    before = calibrate.Reliability.of(errors, deviations, n_members)
    after = calibrate.Reliability.of(errors, factor * deviations, n_members)
    assert before.within_one < 0.35
    assert abs(after.within_one - 0.6827) < 0.012
    assert abs(after.within_two - 0.95) < 0.006
    assert after.likelihood > before.likelihood + 0.5
    for other in (0.97, 1.03):
        assert calibrate.Reliability.of(errors, other * factor * deviations, n_members).likelihood < after.likelihood
    assert calibrate.factor(errors, 5 * deviations, n_members) == pytest.approx(factor / 5, rel=1e-4)


def test_what_is_too_little_has_no_factor():
    errors, deviations = drawn(19, 4, 1.0)
    assert calibrate.factor(errors, deviations, 4) is None
    assert calibrate.factor(np.append(errors, 1.0), np.append(deviations, 0.0), 4) is None  # an atom by itself
    assert calibrate.factor(np.append(errors, 1.0), np.append(deviations, 1.0), 4) is not None
    assert calibrate.factor(np.zeros(50), np.ones(50), 4) is None


def structures(count: int, seed: int) -> Structures:
    rng = np.random.default_rng(seed)
    n = 3 * count
    return Structures(
        coordinates=np.concatenate([water().positions + rng.normal(0, 0.15, (3, 3)) for _ in range(count)]),
        species=np.tile([1, 0, 0], count),
        offsets=3 * np.arange(count + 1),
        elements=("H", "O"),
        labels=[f"water {i}" for i in range(count)],
        energies=rng.normal(0, 1, count),
        forces=np.concatenate([rng.normal(0, 1, (1, 3)) * [[9], [1], [1]] for _ in range(count)]).reshape(n, 3),
    )


def test_factors_of_energies_and_of_each_element():
    together = ensemble(calibration=None)
    data = structures(60, 1)
    found = evaluate.parts(data, evaluate.evaluate(together, data))
    calibration = calibrate.fit(together, found)
    assert calibration is not None
    (part,) = found
    assert part.predictions.energy_std is not None
    assert part.predictions.forces_std is not None
    assert part.force_residuals is not None
    assert calibration.energies[0] == calibrate.factor(part.energy_residuals, part.predictions.energy_std, 3)
    for s in (0, 1):
        own = data.species == s
        expected = calibrate.factor(part.force_residuals[own].ravel(), part.predictions.forces_std[own].ravel(), 3)
        assert calibration.forces[0][s] == expected
    assert calibration.forces[0][1] > 2 * calibration.forces[0][0]  # forces on O were made nine times as wrong
    few = structures(2, 1)
    assert calibrate.fit(together, evaluate.parts(few, evaluate.evaluate(together, few))) is None


def test_energies_that_are_too_few_have_the_factor_of_all_forces():
    together = ensemble(calibration=None)
    data = structures(10, 1)
    (part,) = evaluate.parts(data, evaluate.evaluate(together, data))
    calibration = calibrate.fit(together, [part])
    assert calibration is not None
    of_all = calibrate.factor(part.force_residuals.ravel(), part.predictions.forces_std.ravel(), 3)
    assert calibration.energies == (of_all,)
    assert calibration.forces[0][1] > 2 * calibration.forces[0][0]


def test_factors_of_what_a_level_adds():
    together = ensemble(calibration=None, fidelities=(0, 1))
    below, step = structures(60, 1), np.random.default_rng(3)
    energies = np.stack([below.energies, below.energies + step.normal(0, 0.01, 60)])
    forces = np.stack([below.forces, below.forces + step.normal(0, 0.01, below.forces.shape)])
    lacking = np.arange(60) % 3 == 0
    energies[1, lacking] = np.nan
    forces[1, np.repeat(lacking, 3)] = np.nan
    both = replace(below, energies=energies, forces=forces)
    steps = calibrate.fit_steps(together, both)
    assert steps is not None
    found = members.energies_and_forces(
        together, both.coordinates_in(together.dtype), torch.from_numpy(both.species), torch.from_numpy(both.offsets)
    )
    added, of_atoms = (values[:, 1] - values[:, 0] for values in found)
    errors = (added.mean(axis=0) - np.diff(energies, axis=0)[0])[~lacking]
    expected = calibrate.factor(errors, added.std(axis=0, ddof=1)[~lacking], 3)
    assert steps.energies[1] == pytest.approx(expected, rel=1e-6)
    own = np.repeat(~lacking, 3) & (both.species == 1)
    errors = (of_atoms.mean(axis=0) - np.diff(forces, axis=0)[0])[own]
    expected = calibrate.factor(errors.ravel(), of_atoms.std(axis=0, ddof=1)[own].ravel(), 3)
    assert steps.forces[1][1] == pytest.approx(expected, rel=1e-6)
    # At the lowest level it is what `fit` finds, at the upper one it is not that of whole energies.
    whole = calibrate.fit(together, evaluate.parts(both, evaluate.evaluate(together, both), "", (0, 1), (0, 1)))
    assert whole is not None
    assert steps.energies[0] == pytest.approx(whole.energies[0], rel=1e-6)
    assert steps.forces[0] == pytest.approx(whole.forces[0], rel=1e-6)
    assert steps.forces[1][1] < 0.5 * whole.forces[1][1]


def test_evaluation_and_calculator_apply_the_factors():
    calibrated, raw = ensemble(), ensemble(calibration=None)
    data = structures(4, 2)
    ours, plainly = evaluate.evaluate(calibrated, data), evaluate.evaluate(raw, data)
    np.testing.assert_allclose(ours.energy_std, 2 * plainly.energy_std, rtol=1e-14)
    by_atom = np.where(data.species == 0, 3.0, 5.0)[:, None]
    np.testing.assert_allclose(ours.forces_std, by_atom * plainly.forces_std, rtol=1e-14)
    np.testing.assert_array_equal(ours.energies, plainly.energies)
    (scaled,) = evaluate.parts(data, plainly)
    scaled = calibrate.applied(scaled, calibrated)
    np.testing.assert_array_equal(scaled.predictions.energy_std, ours.energy_std)
    np.testing.assert_array_equal(scaled.predictions.forces_std, ours.forces_std)
    results = [KinMLCalculator(one) for one in (calibrated, raw)]
    for calculator in results:
        calculator.calculate(water())
    one, other = (calculator.results for calculator in results)
    assert one["energy_std"] == pytest.approx(2 * other["energy_std"], rel=1e-14)
    np.testing.assert_allclose(one["forces_std"], np.array([[5.0], [3], [3]]) * other["forces_std"], rtol=1e-14)
    np.testing.assert_array_equal(one["all_forces"], other["all_forces"])


def test_levels_have_factors_of_their_own():
    together = ensemble(calibration=Calibration((2.0, 7.0), ((3.0, 5.0), (11.0, 13.0))), fidelities=(0, 1))
    values = np.random.default_rng(0).normal(size=(3, 2, 4))
    raw = members.deviation(values)
    np.testing.assert_allclose(members.energies_deviation(together, values), raw * [[2], [7]], rtol=1e-14)
    forces = np.random.default_rng(1).normal(size=(3, 2, 3, 3))
    found = members.forces_deviation(together, forces, np.array([1, 0, 0]))
    expected = members.deviation(forces) * np.array([[[5], [3], [3]], [[13], [11], [11]]])
    np.testing.assert_allclose(found, expected, rtol=1e-14)


def test_files_keep_the_factors(tmp_path):
    together = ensemble()
    model_file.save(tmp_path / "model.pt", together)
    again = model_file.load(tmp_path / "model.pt")
    assert isinstance(again, Ensemble)
    assert again.calibration == FACTORS
    assert model_file.version_for(again) == 3
    assert model_file.version_for(ensemble(calibration=None)) == 1
    joined = model_file.load_many([tmp_path / "model.pt", tmp_path / "model.pt"])
    assert (joined.n_members, joined.calibration) == (6, None)  # other members, other deviations
    plain.save(tmp_path / "model.kinml", together)
    potential = plain.PlainPotential(tmp_path / "model.kinml")
    assert (potential.energy_factor, potential.forces_factors) == (2.0, (3.0, 5.0))
    plain.save(tmp_path / "raw.kinml", ensemble(calibration=None))
    raw = plain.PlainPotential(tmp_path / "raw.kinml")
    assert (raw.energy_factor, raw.forces_factors) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize("values", [{"energies": [-1.0], "forces": [[1, 1]]}, {"energies": [1.0], "forces": [[1.0]]}])
def test_files_with_impossible_factors_are_refused(tmp_path, values):
    together = ensemble()
    model_file.save(tmp_path / "model.pt", together)
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    contents["model"]["calibration"] = values
    torch.save(contents, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=r"model.pt: its parts do not fit together .*factors of deviations"):
        model_file.load(tmp_path / "model.pt")


def test_a_script_and_members_are_as_without():
    together = ensemble()
    assert torch.equal(together.member(1).networks.weights, together.networks.weights[1])
    torch.jit.script(together)


def test_dynamics_stop_where_the_ensemble_does_not_know():
    together = ensemble()
    calm = KinMLCalculator(together)
    calm.calculate(water())
    largest = float(np.linalg.norm(calm.results["forces_std"], axis=1).max())
    KinMLCalculator(together, stop_above=1.01 * largest).calculate(water())
    strict = KinMLCalculator(together, stop_above=0.99 * largest)
    with pytest.raises(
        InputError, match=r"the force on atom \d \([HO]\) of OH2 is uncertain by .* more than stop_above"
    ):
        strict.calculate(water())
    with pytest.raises(ConfigError, match="stop_above is for an ensemble"):
        KinMLCalculator(together.member(0), stop_above=1.0)
    with pytest.raises(ConfigError, match="more than 0"):
        KinMLCalculator(together, stop_above=0.0)


def test_training_an_ensemble_calibrates_it(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(report, "_save", lambda figure, path: path.touch())
    monkeypatch.setattr(calibrate, "FEWEST", 2)
    path = write_config(tmp_path, "loss: {forces: true}", forces="all")
    config = configuration.load(path, ["ensemble.members=3"])
    with caplog.at_level("INFO"):
        runs.start(config, overwrite=True)
    run = Path(config.run)
    together = model_file.load(run)
    assert isinstance(together, Ensemble)
    assert together.calibration is not None
    data = runs.prepare(config)
    validation = data.structures.select(data.split.validation)
    calibration, together.calibration = together.calibration, None
    assert calibrate.fit(together, evaluate.parts(validation, evaluate.evaluate(together, validation))) == calibration
    assert (run / "report" / "reliability.png").exists()
    assert "energies calibrated" in caplog.text
    assert "calibrated on the validation part" in caplog.text


def test_the_picture_is_drawn(tmp_path):
    together = ensemble(calibration=None)
    data = structures(60, 1)
    before = evaluate.parts(data, evaluate.evaluate(together, data))
    together.calibration = calibrate.fit(together, before)
    after = evaluate.parts(data, evaluate.evaluate(together, data))
    calibrate.draw(tmp_path / "report", before, after)
    assert (tmp_path / "report" / "reliability.png").stat().st_size > 10_000
