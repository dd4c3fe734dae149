"""Training of models with a repulsion: what it is taken off from, and that runs keep it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training_helpers import assert_same_bits, assert_same_run, interrupted_run, structures, training_data, write_config

from kinml_fast import cli, ops, reference, report
from kinml_fast.data.structures import Structures
from kinml_fast.deploy import model_file
from kinml_fast.nn import AEVParameters, EnergyModel, Repulsion
from kinml_fast.train import Trainer, TrainingConfig, TrainingData, checkpoint

LONG = Repulsion.zbl(("C", "H"), 0.5, 1.4)


@pytest.fixture(autouse=True)
def no_drawings(monkeypatch):
    monkeypatch.setattr(report, "write_report", lambda *arguments: [])


def model(repulsion: Repulsion | None = LONG) -> EnergyModel:
    torch.manual_seed(0)
    descriptor = AEVParameters.aevmod(("C", "H"), n_radial=4, n_angular=2, n_sections=2)
    return EnergyModel(descriptor, [8, 4, 1], ["gaussian", "gaussian", "identity"], repulsion=repulsion)


def definition(s: Structures) -> tuple[np.ndarray, np.ndarray]:
    """Energies and forces of the repulsion."""
    x = torch.from_numpy(s.coordinates).requires_grad_()
    species, offsets = torch.from_numpy(s.species), torch.from_numpy(s.offsets)
    numbers = {name: getattr(LONG, name) for name in ("charges", "radii", "inner", "outer")}
    atoms = reference.repulsion(x, species, offsets, **numbers)
    sums = torch.zeros(len(s), dtype=torch.float64)
    sums = sums.index_add(0, torch.repeat_interleave(torch.arange(len(s)), offsets.diff()), atoms)
    return sums.detach().numpy(), -torch.autograd.grad(atoms.sum(), x)[0].numpy()


def with_repulsion(data: TrainingData) -> TrainingData:
    """The data, with energies and forces that it adds to."""
    s = data.structures
    energies, forces = definition(s)
    assert (energies > 0.1).sum() > len(s) / 2
    more = Structures(
        s.elements,
        s.species,
        s.coordinates,
        s.offsets,
        s.energies + energies,
        None if s.forces is None else s.forces + forces,
        s.labels,
    )
    return TrainingData(more, data.split, data.sae, data.weights, data.source)


@pytest.mark.parametrize("jacobian", ["recompute", "stored"])
@pytest.mark.parametrize("forces", ["none", "some"])
def test_networks_learn_what_is_left(forces, jacobian):
    """A run is that of a model without it on data without it, and the model predicts the data with it."""
    settings = TrainingConfig.model_validate(
        {"epochs": 3, "batch_size": 7, "jacobian": jacobian, "loss": {"forces": forces != "none"}}
    )
    data = training_data(forces=forces)
    bare = model(None)
    Trainer(bare, data, settings).fit()
    own = model()
    trainer = Trainer(own, with_repulsion(data), settings)
    trainer.fit()
    torch.testing.assert_close(own.networks.weights, bare.networks.weights, rtol=1e-7, atol=1e-9)
    s = data.structures
    values = torch.from_numpy(s.coordinates), torch.from_numpy(s.species), torch.from_numpy(s.offsets)
    energies, slopes = definition(s)
    found, expected = own.energies_and_forces(*values), bare.energies_and_forces(*values)
    np.testing.assert_allclose((found[0] - expected[0]).detach(), energies, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose((found[1] - expected[1]).detach(), slopes, rtol=1e-6, atol=1e-6)


def test_a_step_on_the_repulsion_itself_is_refused():
    """It would count it twice."""
    own, s = model(), structures(3)
    system = ops.System(*map(torch.from_numpy, (s.coordinates, s.species, s.offsets)))
    n, numbers = len(s), {"dtype": torch.float64}
    targets, weights = torch.zeros(1, n, **numbers), torch.ones(1, n, **numbers)
    loss = ops.Loss(targets, weights, None, None, torch.ones(2, **numbers), torch.ones(2, 1, **numbers))
    weights = own.networks.weights.detach()
    results = ops.StepResults(
        torch.zeros(2, **numbers),
        torch.zeros_like(weights),
        torch.zeros(1, n, **numbers),
        torch.zeros(1, n, 3, **numbers),
    )
    whole = ops.Model(own.aev.packed, own.networks.packed)
    with pytest.raises(RuntimeError, match="takes targets without the repulsion"):
        ops.force_step(system, torch.arange(n), weights, loss, results, whole)


CONFIGURED = "network.repulsion={kind: zbl, inner: 0.5, outer: 1.4}"


def test_runs_keep_it(tmp_path, capsys):
    path = write_config(tmp_path, "loss: {forces: true}", forces="all")
    assert cli.main(["train", str(path), CONFIGURED]) == 0
    made = model_file.load(tmp_path / "run")
    assert made.repulsion == LONG
    # From disk.
    on_disk = ["data.on_disk=true", f"run={tmp_path / 'disk'}"]
    assert cli.main(["train", str(path), CONFIGURED, *on_disk]) == 0
    assert_same_bits(model_file.load(tmp_path / "disk").state_dict(), made.state_dict())
    assert cli.main(["evaluate", str(tmp_path / "run"), str(tmp_path / "data.xyz")]) == 0
    # Another run that starts from it.
    further = ["train", str(path), f"run={tmp_path / 'further'}", f"start.model={tmp_path / 'run'}"]
    assert cli.main(further) == 0
    assert model_file.load(tmp_path / "further").repulsion == LONG
    capsys.readouterr()
    assert cli.main([*further, "--overwrite", "network.repulsion.kind=none"]) == 2
    assert "network.repulsion is" in capsys.readouterr().err
    assert cli.main(["train", str(path), "network.repulsion.outer=0.3", f"run={tmp_path / 'wrong'}"]) == 2
    assert "inner must be smaller than outer" in capsys.readouterr().err


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("training_helpers.model", lambda **keys: model())
    settings = TrainingConfig.model_validate({"epochs": 3, "batch_size": 7, "loss": {"forces": True}})
    data = with_repulsion(training_data(forces="some"))
    Trainer(model(), data, settings, tmp_path / "whole").fit()
    interrupted_run(tmp_path / "resumed", settings, 8, data=data)
    Trainer(model(), data, settings, tmp_path / "resumed", resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    state = checkpoint.load(tmp_path / "resumed" / "checkpoints" / "last.pt")
    assert EnergyModel.from_dict(state["model"]).repulsion == LONG
