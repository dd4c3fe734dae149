"""Ensembles: as a module, and as a file."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from test_nn import batch, forces, model

from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel, Ensemble

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")


def members(n: int = 3, dtype: torch.dtype = torch.float64, **changes) -> list[EnergyModel]:
    """Small models of carbon and hydrogen with different weights and single-atom energies."""
    made = [model(dtype, seed, **changes) for seed in range(n)]
    for seed, one in enumerate(made):
        one.sae += seed
    return made


LEVELS = [(1,), (0, 1), (0, 1, 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_members", [1, 2, 5])
@pytest.mark.parametrize("fidelities", LEVELS)
def test_members_are_the_models(n_members, dtype, fidelities):
    alone = members(n_members, dtype, fidelities=fidelities)
    ours = Ensemble(alone)
    inputs = batch(dtype=dtype)
    found = ours.member_energies_and_forces(*inputs)
    assert (found[0].dtype, found[1].dtype) == (torch.float64, dtype)
    expected = [torch.stack(both) for both in zip(*(one.energies_and_forces(*inputs) for one in alone), strict=True)]
    # Energies have the same bits; forces of several members are computed together, and rounded in another way.
    rtol, atol = (1e-11, 1e-13) if dtype == torch.float64 else (1e-4, 1e-6)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=atol)
    of_levels = ours.member_level_energies_and_forces(*inputs)
    assert of_levels[0].shape == (n_members, len(fidelities), 5)
    assert of_levels[1].shape == (n_members, len(fidelities), 17, 3)
    for i, one in enumerate(alone):
        energies, forces = one.level_energies_and_forces(*inputs)
        assert torch.equal(of_levels[0][i], energies)
        torch.testing.assert_close(of_levels[1][i], forces, rtol=rtol, atol=atol)
    assert torch.equal(ours.member_level_energies(*inputs), torch.stack([one.level_energies(*inputs) for one in alone]))
    assert (ours.fidelities, ours.baseline, ours.levels) == (fidelities, None, len(fidelities))
    for i, one in enumerate(alone):
        again = ours.member(i)
        assert again.to_dict() == one.to_dict()
        assert torch.equal(again(*inputs), one(*inputs))
        assert again.networks.weights.data_ptr() != ours.networks.weights[i].data_ptr()


@pytest.mark.parametrize("fidelities", LEVELS)
def test_means_are_those_of_the_members(fidelities):
    alone = members(3, fidelities=fidelities)
    ours = Ensemble(alone)
    inputs = batch()
    energies, mean_forces = ours.energies_and_forces(*inputs)
    torch.testing.assert_close(energies, sum(one(*inputs) for one in alone) / 3, rtol=1e-15, atol=0)
    torch.testing.assert_close(mean_forces, sum(forces(one, *inputs) for one in alone) / 3, rtol=1e-11, atol=1e-12)
    level_energies, level_forces = ours.level_energies_and_forces(*inputs)
    assert torch.equal(level_energies[-1], energies)
    assert torch.equal(level_forces[-1], mean_forces)
    torch.testing.assert_close(
        level_energies, sum(one.level_energies(*inputs) for one in alone) / 3, rtol=1e-14, atol=0
    )
    # The way that autograd goes gives the same.
    torch.testing.assert_close(ours(*inputs), energies, rtol=1e-14, atol=0)
    torch.testing.assert_close(forces(ours, *inputs), mean_forces, rtol=1e-10, atol=1e-11)


def test_derivatives_of_the_mean_are_the_differences():
    ours = Ensemble(members(2))
    ours.sae.zero_()
    x, z, o = batch((4, 2), seed=3)
    assert torch.autograd.gradcheck(lambda x: ours(x, z, o), x.requires_grad_(), rtol=1e-6)
    (gradient,) = torch.autograd.grad(ours(x, z, o).sum(), ours.networks.weights)
    assert gradient.shape == ours.networks.weights.shape
    one = ours.member(1)
    (alone,) = torch.autograd.grad(one(x, z, o).sum() / 2, one.networks.weights)
    torch.testing.assert_close(gradient[1], alone, rtol=1e-13, atol=1e-15)


def test_the_number_of_threads_and_repetition_change_no_bit(any_threads):
    ours = Ensemble(members(4, torch.float32))
    x, z, o = batch((5,) * 400, dtype=torch.float32)  # so many that torch would share the sums among threads
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append((ours(x, z, o), *ours.energies_and_forces(x, z, o), *ours.member_energies_and_forces(x, z, o)))
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)


def test_batches_without_structures_or_atoms():
    ours = Ensemble(members(2))
    for sizes in ((), (0,), (0, 3, 0)):
        x, z, o = batch(sizes)
        energies, found = ours.member_energies_and_forces(x, z, o)
        assert (energies.shape, found.shape) == ((2, len(sizes)), (2, sum(sizes), 3))
        assert ours(x, z, o).shape == (len(sizes),)


def test_coordinates_of_any_layout():
    ours = Ensemble(members(2))
    x, z, o = batch()
    wide = torch.zeros(len(x), 6, dtype=x.dtype)
    wide[:, ::2] = x
    for a, b in zip(ours.energies_and_forces(wide[:, ::2], z, o), ours.energies_and_forces(x, z, o), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fidelities", LEVELS[:2])
def test_scripted_saved_and_loaded_ensemble(dtype, fidelities, tmp_path):
    ours = Ensemble(members(3, dtype, fidelities=fidelities)).eval()
    scripted = torch.jit.script(ours)
    scripted.save(tmp_path / "ensemble.ts")
    loaded = torch.jit.load(tmp_path / "ensemble.ts")
    inputs = batch(dtype=dtype)
    for other in (scripted, loaded):
        assert torch.equal(other(*inputs), ours(*inputs))
        assert torch.equal(forces(other, *inputs), forces(ours, *inputs))
        for name in ("energies_and_forces", "member_energies_and_forces", "member_level_energies_and_forces"):
            for a, b in zip(getattr(other, name)(*inputs), getattr(ours, name)(*inputs), strict=True):
                assert torch.equal(a, b)


def made(descriptor: AEVParameters | None = None, **changes) -> EnergyModel:
    if descriptor is None:
        return model(**changes)
    return EnergyModel(descriptor, [8, 5, 1], ["gaussian", "tanh", "identity"])


CH = AEVParameters.aevmod(("C", "H"), 4, 2, 2)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"descriptor": CH},
            {"descriptor": AEVParameters.aevmod(("C", "O"), 4, 2, 2)},
            "member 2 knows the elements C O, but member 1 C H: models of one ensemble need the same elements",
        ),
        (
            {"descriptor": CH},
            {"descriptor": AEVParameters.aevmod(("H", "C"), 4, 2, 2)},
            "member 2 knows the elements H C, but member 1 C H",
        ),
        (
            {"descriptor": CH},
            {"descriptor": AEVParameters.aevmod(("C", "H"), 4, 2, 2, beta=0.9)},
            "member 2 has the descriptor beta = 0.9, but member 1 beta = 0.95",
        ),
        ({}, {"layers": [8, 4, 1]}, "member 2 has the layers [8, 4, 1], but member 1 [8, 5, 1]"),
        (
            {},
            {"activations": ["tanh", "tanh", "identity"]},
            "member 2 has the activations ['tanh', 'tanh', 'identity'], but member 1",
        ),
        ({}, {"biases": False}, "member 2 has biases = False, but member 1 True"),
        ({}, {"fidelities": (0, 1)}, "member 2 has the fidelities [0, 1], but member 1 [1]"),
        ({}, {"baseline": 0}, "member 2 has the baseline 0, but member 1 None"),
        ({}, {"dtype": torch.float32}, "member 2 computes in float32, but member 1 float64"),
    ],
)
def test_models_that_do_not_go_together(first, second, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        Ensemble([made(**first), made(**second)])


def test_an_ensemble_of_nothing():
    with pytest.raises(InputError, match="needs at least one model"):
        Ensemble([])


# Files


@pytest.mark.parametrize("changes", [{}, {"fidelities": (0, 1)}, {"fidelities": (1,), "baseline": 0}])
def test_models_of_every_kind_are_kept(changes, tmp_path):
    for ours in (model(**changes), Ensemble(members(2, **changes))):
        model_file.save(tmp_path / "model.pt", ours)
        loaded = model_file.load(tmp_path / "model.pt")
        assert type(loaded) is type(ours)
        assert (loaded.fidelities, loaded.baseline) == (changes.get("fidelities", (1,)), changes.get("baseline"))
        for a, b in zip(
            loaded.level_energies_and_forces(*batch()), ours.level_energies_and_forces(*batch()), strict=True
        ):
            assert torch.equal(a, b)


def test_a_saved_ensemble_is_the_same(tmp_path):
    ours = Ensemble(members(3))
    model_file.save(tmp_path / "model.pt", ours, {"origin": "test"})
    loaded = model_file.load(tmp_path / "model.pt")
    assert isinstance(loaded, Ensemble)
    assert (loaded.n_members, loaded.elements, loaded.dtype, loaded.training) == (3, ("C", "H"), torch.float64, False)
    inputs = batch()
    for a, b in zip(loaded.member_energies_and_forces(*inputs), ours.member_energies_and_forces(*inputs), strict=True):
        assert torch.equal(a, b)
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    assert contents["model"] == {"members": 3, **ours.member(0).to_dict()}
    assert contents["state_dict"]["networks.weights"].shape == ours.networks.weights.shape
    assert contents["state_dict"]["sae"].shape == (3, 2)
    assert model_file.load_training(tmp_path) == {"origin": "test"}


def test_an_ensemble_of_several_files(tmp_path):
    alone = members(4)
    for i, one in enumerate(alone[:2]):
        (tmp_path / f"member-{i}").mkdir()
        model_file.save(tmp_path / f"member-{i}" / "model.pt", one)
    model_file.save(tmp_path / "two.pt", Ensemble(alone[2:]))
    inputs = batch()
    expected = Ensemble(alone).member_level_energies(*inputs)[:, 0]
    two = tmp_path / "two.pt"
    for paths in (
        [tmp_path / "member-0", tmp_path / "member-1" / "model.pt", two],
        [str(tmp_path / "member-?"), two],
        [f"{tmp_path}/member-*/model.pt", str(two)],
    ):
        loaded = model_file.load_many(paths)
        assert torch.equal(loaded.member_level_energies(*inputs)[:, 0], expected)
        assert not loaded.training
    assert model_file.load_many(two).n_members == 2


def test_files_that_do_not_go_together_are_named(tmp_path):
    model_file.save(tmp_path / "a.pt", model())
    model_file.save(tmp_path / "b.pt", model(layers=[4, 3, 1]))
    with pytest.raises(InputError, match=r"b\.pt has the layers \[4, 3, 1\], but .*a\.pt \[8, 5, 1\]"):
        model_file.load_many([tmp_path / "a.pt", tmp_path / "b.pt"])
    with pytest.raises(InputError, match=r"c\.pt: cannot be read"):
        model_file.load_many([tmp_path / "a.pt", tmp_path / "c.pt"])
    with pytest.raises(InputError, match=r"x-\*: the pattern matches no file"):
        model_file.load_many(tmp_path / "x-*")
    with pytest.raises(InputError, match="needs at least one model"):
        model_file.load_many([])


def test_models_as_they_come(tmp_path):
    alone = members(2)
    model_file.save(tmp_path / "model.pt", alone[1])
    assert model_file.resolve(alone[0]) is alone[0]
    assert model_file.resolve([alone[0]]) is alone[0]
    for given in (tmp_path, str(tmp_path / "model.pt")):
        assert torch.equal(model_file.resolve(given).networks.weights, alone[1].networks.weights)
        both = model_file.resolve([alone[0], given])
        assert np.array_equal(both.networks.weights.detach(), torch.stack([m.networks.weights.detach() for m in alone]))
    with pytest.raises(InputError, match="int is no model: give a model, its file or run folder, or a list of these"):
        model_file.resolve(3)
    with pytest.raises(InputError, match="model 2 has the layers"):
        model_file.resolve([alone[0], model(layers=[4, 3, 1])])
    with pytest.raises(InputError, match="needs at least one model"):
        model_file.resolve([])
    # A pattern that matches one file is that model, of several their ensemble.
    assert isinstance(model_file.resolve(f"{tmp_path}/m*.pt"), EnergyModel)
    model_file.save(tmp_path / "more.pt", alone[0])
    assert model_file.resolve(f"{tmp_path}/m*.pt").n_members == 2


@pytest.mark.parametrize("change", [{"members": 2}, {"members": "two"}, {"layers": [9, 5, 1]}])
def test_contents_of_an_ensemble_that_do_not_fit(tmp_path, change):
    path = tmp_path / "model.pt"
    model_file.save(path, Ensemble(members(3)))
    contents = torch.load(path, weights_only=True)
    contents["model"].update(change)
    torch.save(contents, path)
    with pytest.raises(InputError, match=r"model\.pt: its parts do not fit together"):
        model_file.load(path)
