"""PyKinML's modules, name by name: their numbers, and what they refuse."""

from __future__ import annotations

import contextlib
import math
import shutil
import sqlite3
from types import SimpleNamespace

import ase.build
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.optimize import BFGS
from pykinml_helpers import errors, metrics, small
from torch.utils.data import DataLoader

from kinml_fast import KinMLCalculator, datasets, devices, ops, reference
from kinml_fast.data import pykinml_hdf5, read, sqlite, stored
from kinml_fast.data.selection import Selection
from kinml_fast.deploy import model_file, pykinml_checkpoint
from kinml_fast.errors import InputError
from kinml_fast.nn import AEVParameters, EnergyModel
from kinml_fast.pykinml import arguments, daev, multi_fid_loop, nnpes, prepper, state, trainer
from kinml_fast.pykinml.arguments import FORCES, KEPT_ORDER, NO_BIASES
from kinml_fast.pykinml.data import Data_pes, PesDataset, get_data
from kinml_fast.pykinml.model_calculator import Nn_surr
from kinml_fast.train import Trainer
from kinml_fast.units import KCAL_PER_MOL

ELEMENTS = ("C", "H")
SMALL = AEVParameters.aevmod(ELEMENTS, 4, 2, 2)
SAES = np.array([[-100.0, -5.0], [-101.0, -6.0]])


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """PyKinML's training makes float64 the default; plots take time; a log that shows is enough."""
    monkeypatch.setattr(Trainer, "_report", lambda *_: None)
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


def network(two: bool = False, biases: bool = True, add_sae: bool = True, functions=("gaussian", "silu", "identity")):
    torch.manual_seed(0)
    widths = [[5, 3, 1]] * 2
    args = [[SMALL.length] * 2, widths, [list(functions)] * 2]
    sae = SAES if two else SAES[0]
    if two:
        return nnpes.CompositeNetworks_MF(*args, widths, [list(functions)] * 2, sae, add_sae, biases)
    return nnpes.CompositeNetworks(*args, sae_energies=sae, add_sae=add_sae, biases=biases)


def molecules() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Acetylene and methane, away from their minima: coordinates, species, offsets."""
    found = [ase.build.molecule(name) for name in ("C2H2", "CH4")]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.1, seed=seed)
    species = [ELEMENTS.index(symbol) for atoms in found for symbol in atoms.get_chemical_symbols()]
    x = np.concatenate([atoms.positions for atoms in found])
    return torch.from_numpy(x), torch.tensor(species), torch.tensor([0, 4, 9])


def in_pykinmls_form(x: torch.Tensor, species: torch.Tensor, offsets: torch.Tensor, model: EnergyModel) -> tuple:
    """Descriptors, Jacobians and molecules by species."""
    packed = model.aev.packed
    system = ops.System(x, species, offsets)
    vectors, jacobians = ops.aev(system, packed), ops.aev_jacobian(system, 5, packed)
    owners = torch.repeat_interleave(torch.arange(2), offsets.diff())
    parts = [species == s for s in range(2)]
    return tuple([tensor[part].detach() for part in parts] for tensor in (vectors, jacobians, owners))


# nnpes


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("two", [False, True])
def test_a_module_and_its_native_model_give_the_same(two, biases):
    net = network(two, biases)
    model = nnpes.energy_model(net, SMALL, fidelities=(0, 1) if two else (1,))
    model.sae.copy_(torch.from_numpy(SAES if two else SAES[0]))
    x, species, offsets = molecules()
    aevs, jacobians, ids = in_pykinmls_form(x, species, offsets, model)
    aevs = [aev.requires_grad_() for aev in aevs]
    found = net(aevs, ids, 2, train=False)
    found = found if two else (found,)
    energies, forces = model.level_energies_and_forces(x, species, offsets)
    for level, own in enumerate(found):
        assert own.shape == (2, 1)
        torch.testing.assert_close(own[:, 0], energies[level], rtol=1e-13, atol=1e-12)
        pulls = daev.cal_dEdxyz_ddp(aevs, -own, jacobians, ids)
        assert [pull.shape for pull in pulls] == [(15,), (15,)]
        pulled = torch.cat([pulls[0][:12], pulls[1]]).view(-1, 3)
        torch.testing.assert_close(pulled, forces[level], rtol=1e-10, atol=1e-11)
        assert pulls[0][12:].eq(0).all()
    # What trains the one trains the other.
    with torch.no_grad():
        model.networks.weights.mul_(0.5)
    changed = net(aevs, ids, 2, train=False)
    changed = changed if two else (changed,)
    torch.testing.assert_close(changed[-1][:, 0], model(x, species, offsets))
    assert not torch.equal(changed[-1], found[-1])


@pytest.mark.parametrize("two", [False, True])
def test_a_native_model_becomes_a_module(two):
    torch.manual_seed(3)
    fidelities = (0, 1) if two else (1,)
    activations = ("gelu", "celu", "identity")  # which PyKinML does not have
    model = EnergyModel(SMALL, [[4, 3, 1], [5, 2, 1]], activations, True, fidelities=fidelities)
    model.sae.copy_(torch.from_numpy(SAES if two else SAES[0]))
    net = nnpes.from_energy_model(model)
    x, species, offsets = molecules()
    aevs, _, ids = in_pykinmls_form(x, species, offsets, model)
    found = net(aevs, ids, 2, train=False)
    torch.testing.assert_close((found[-1] if two else found)[:, 0], model(x, species, offsets), rtol=1e-13, atol=1e-12)


def test_names_of_the_parameters_are_pykinmls():
    assert list(network().state_dict())[:3] == ["NNs.0.0.linear.weight", "NNs.0.0.linear.bias", "NNs.0.1.linear.weight"]
    assert "NNs_hf.1.2.linear.weight" in network(two=True).state_dict()
    assert network(two=True).NNs_hf[0][0].linear.in_features == SMALL.length + 1
    assert not any("bias" in name for name in network(biases=False).state_dict())
    assert str(network()).startswith("CompositeNetworks(\n  (NNs): ")


def test_weights_are_drawn_as_pykinml_draws_them():
    torch.manual_seed(7)
    net = nnpes.CompositeNetworks([20] * 2, [[5, 1]] * 2, [["gaussian", "identity"]] * 2, biases=False)
    torch.manual_seed(7)
    expected = [torch.nn.Linear(i, o, bias=False).weight for _ in range(2) for i, o in ((20, 5), (5, 1))]
    for parameter, own in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter, own)


def test_a_module_without_atoms_of_a_species_and_without_single_atom_energies():
    net = network(add_sae=False)
    aevs = [torch.randn(2, SMALL.length), torch.zeros(0, SMALL.length)]
    alone = net(aevs, [torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64)], 3, train=False)
    assert alone.shape == (3, 1)
    assert alone[2] == 0
    net.log_sigma = torch.nn.Parameter(torch.zeros(1))
    net.add_sae = True
    energies, log_sigma = net(aevs, [torch.tensor([0, 1]), torch.tensor([], dtype=torch.int64)], 3)
    torch.testing.assert_close(energies[:2], alone[:2] + SAES[0, 0])
    assert torch.equal(log_sigma, net.log_sigma)


@pytest.mark.parametrize("name", ["gaussian", "silu", "my_relu", "identity"])
def test_activation_functions(name):
    x = torch.linspace(-2, 2, 9)
    expected = reference.ACTIVATIONS[name.removeprefix("my_")](x)
    torch.testing.assert_close(getattr(nnpes, name)(x), expected)


def test_networks_that_the_native_model_does_not_have():
    for two, change in (
        (False, lambda net: setattr(net.NNs[1][0], "activation", nnpes.silu)),
        (True, lambda net: setattr(net.NNs_hf[0][0], "activation", nnpes.silu)),
    ):
        net = network(two)
        change(net)
        with pytest.raises(InputError, match="same activation functions"):
            nnpes.energy_model(net, SMALL, fidelities=(0, 1) if two else (1,))
    with pytest.raises(InputError, match="no activation function of the model: take one of gaussian, tanh"):
        nnpes.energy_model(network(functions=(torch.sin, "silu", "identity")), SMALL)
    with pytest.raises(
        InputError, match="2 elements that take 20 numbers for an atom, and the data have 2 elements and 36"
    ):
        nnpes.energy_model(network(), AEVParameters.aevmod(ELEMENTS, 6, 2, 4))
    for name in ("dscr", "pass_eng", "pass_aev"):
        with pytest.raises(InputError, match="leave dscr, pass_eng and pass_aev True"):
            nnpes.CompositeNetworks_MF([20], [[1]], [["identity"]], **{name: False})


# The terms of the loss


def test_units_and_loss():
    assert prepper.kcpm(1.0) == KCAL_PER_MOL
    energies = torch.tensor([[1.0], [2.0], [3.0]])
    ediff = prepper.energy_abs_dif(energies, torch.tensor([[2.0], [2.0], [0.0]]))
    assert ediff[:, 0].tolist() == [1, 0, 3]
    ones = torch.ones(3, 6)
    fdiff = prepper.force_abs_dif(ones * torch.arange(6), ones, [6, 3, 3])
    assert [f.tolist() for f in fdiff] == [[1, 0, 1, 2, 3, 4], [1, 0, 1], [1, 0, 1]]
    assert prepper.my_loss(ediff) == (pytest.approx(10 / 3), 0)
    loss = prepper.my_loss(ediff, fdiff, dEsq=2.0, dfsq=4.0)
    assert [float(x) for x in loss] == pytest.approx([10 / 6, (31 / 6 + 2 / 3 + 2 / 3) / 12])
    assert float(prepper.my_loss(ediff, p=1)[0]) == pytest.approx(4 / 3)


def test_task_weights():
    losses = [torch.tensor(2.0), torch.tensor(5.0)]
    given = prepper.task_weights(traditional=True)
    assert given.log_sigma.tolist() == [0.5]
    assert given(losses, torch.tensor([0.3])).item() == pytest.approx(0.7 * 2 + 0.3 * 5)
    learned = prepper.task_weights(num_tasks=2)
    assert learned.log_sigma.tolist() == [0, 0]
    sigma = torch.tensor([0.2, -0.4])
    expected = 2 * math.exp(-0.2) + 0.2 + 5 * math.exp(0.4) - 0.4
    assert learned(losses, sigma).item() == pytest.approx(expected)


def test_set_up_task_weights():
    net, args = network(), SimpleNamespace(floss=False, optimize_force_weight=True, fw=0.4)
    optimizer = torch.optim.Adam(net.parameters())
    before = len(optimizer.param_groups[0]["params"])
    prepper.set_up_task_weights(net, args, optimizer)
    assert (args.optimize_force_weight, args.fw) == (False, 0.0)
    assert net.log_sigma.tolist() == [0.0]
    assert len(optimizer.param_groups[0]["params"]) == before
    args = SimpleNamespace(floss=True, optimize_force_weight=True, fw=0.4)
    prepper.set_up_task_weights(net, args, optimizer)
    assert net.log_sigma.tolist() == [0.0, 0.0]
    assert optimizer.param_groups[0]["params"][-1] is net.log_sigma
    assert not net.mtl.traditional


# Data


def prepared(args) -> tuple:
    prepper.prep_data(args, fid=args.fidlevel)
    args.pre_saved, args.data_path = True, args.savenm
    return prepper.load_data(args)


@pytest.mark.parametrize(
    ("tvt", "sizes"),
    [
        ([30, 8, 6], (30, 8, 6)),
        ([0.5, 0.25, 0.25], (69, 34, 34)),
        ([0.8, 0.1, 0.1], (110, 13, 14)),
        ([0.2, 0.1, 0.1], (28, 13, 14)),
    ],
)
def test_a_random_division_never_overlaps(tmp_path, tvt, sizes):
    train, valid, test, sae, length, keys = prepared(small(tmp_path, tvt=tvt))
    labels = [set(part.structures.labels) for part in (train, valid, test)]
    assert len(set.union(*labels)) == sum(map(len, labels)) == sum(map(len, (train, valid, test)))
    assert tuple(map(len, (train, valid, test))) == pytest.approx(sizes, abs=1)
    assert (sae.shape, length, keys) == ((2,), 20, ["aevs", "engs"])
    assert len({label.split("/")[0] for label in train.structures.labels}) == 2


def division(tmp_path, lines: int = 60) -> str:
    path = tmp_path / "tvt.txt"
    path.write_text("".join(f"C2H2/{i} {-1 if i % 10 == 0 else 2}\n" for i in range(2, lines)), encoding="utf-8")
    return str(path)


def test_the_rest_of_a_file_is_drawn_from_all_of_it(tmp_path):
    args = small(tmp_path, trtsid_name=[division(tmp_path)], tvt=[20, 6, 0])
    train, valid, test, sae, *_ = prepared(args)
    assert tuple(map(len, (train, valid, test))) == (20, 6, 5)
    numbers = sorted(int(label.split("/")[1]) for label in train.structures.labels + valid.structures.labels)
    assert numbers[-1] > 40  # PyKinML takes the first ones
    counts, energies = train.structures.counts(), train.structures.energies
    both = np.concatenate([energies - counts @ sae, valid.structures.energies - valid.structures.counts() @ sae])
    assert abs(both.mean()) < 1e-9  # the energies of the structures that are used, not of the whole file
    args.tvt = [0.5, 0.25, 0.25]
    train, valid, *_ = prepper.load_data(args)
    assert (len(train), len(valid)) == (35, 18)
    args.randomseed = [1, 1]
    assert prepper.load_data(args)[0].structures.labels != train.structures.labels


def test_temperature_and_names_select(tmp_path):
    found = prepared(small(tmp_path, temp=300, nameset=["acetylene:%"], tvt=[8, 2, 2]))
    assert all(label.startswith("C2H2/") for part in found[:3] for label in part.structures.labels)
    everything = sqlite.read([datasets.path("C2H2.db")], Selection(temperature=300))
    assert set(found[0].structures.labels) <= set(everything.labels)


def test_a_list_of_structures_may_name_those_of_other_temperatures(tmp_path):
    args = small(tmp_path, trtsid_name=[division(tmp_path)], temp=300, tvt=[0.6, 0.2, 0.2])
    args.input_data_fname = "shipped:C2H2.db"
    found = prepared(args)[:3]
    labels = [label for part in found for label in part.structures.labels]
    of_300 = sqlite.read([datasets.path("C2H2.db")], Selection(temperature=300)).labels
    assert sorted(labels) == sorted(set(of_300) - {"C2H2/1", "C2H2/60"})
    args.temp = None
    with open(args.trtsid_name[0], "a", encoding="utf-8") as file:
        file.write("C2H2/9999 2\n")
    with pytest.raises(InputError, match="9999"):
        prepper.prep_data(args)


@pytest.mark.parametrize("mode", [{}, {"multi_fid": True, "fidlevel_lf": 0}])
def test_there_need_be_no_test_structures(tmp_path, mode):
    path = tmp_path / "tvt.txt"
    path.write_text("".join(f"C2H2/{i} 2\n" for i in range(2, 40)), encoding="utf-8")
    args = small(tmp_path, trtsid_name=[str(path)], tvt=[30, 8, 0], input_data_fname="shipped:C2H2.db", **mode)
    (multi_fid_loop if mode else trainer).main(args)
    assert {part for _, part in metrics(tmp_path / "run")} == {"train", "validation"}
    path.write_text("C2H2/3 -1\n", encoding="utf-8")
    args.pre_saved, args.sae_fit = False, False
    with pytest.raises(InputError, match="none of the 1 structures is for training"):
        prepper.prep_data(args)


def test_differences_need_both_levels(tmp_path):
    shutil.copy(datasets.path("C2H2.db"), tmp_path / "C2H2.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "C2H2.db")) as database:
        database.execute("DELETE FROM energy WHERE fidelity = 0 AND xyz_id BETWEEN 10 AND 24")
        database.commit()
    args = small(tmp_path, delta=True, fidlevel_lf=0, input_data_fname=str(tmp_path / "C2H2.db"))
    with pytest.raises(InputError, match=r"fidelity 0: 15\) of C2H2/10, .*, C2H2/19 … \(15 in all\)"):
        prepper.prep_data(args)


def test_functions_that_the_manual_names(tmp_path):
    args = small(tmp_path, input_data_fname="shipped:C2H2.db")
    dpes = get_data(args)
    assert (dpes.ndat, dpes.md[0]) == (len(dpes.structures), dpes.structures.labels[0])
    prepper.prep_training_data(dpes, dpes.md[:40], tmp_path / "training1")
    prepper.prep_testing_data(dpes, dpes.md[40:50], tmp_path / "testing1")
    assert len(torch.load(tmp_path / "training1" / "train_aevs")) == 40
    assert len(torch.load(tmp_path / "testing1" / "test_engs")) == 10
    assert dpes.sae_energies.shape == (2,)


def test_items_are_as_pykinml_has_them(tmp_path):
    args = small(tmp_path, floss=True)
    train, *_, keys = prepared(args)
    assert keys == ["aevs", "forces", "daevs", "fdims", "engs"]
    for item, i in ((train[0], 0), (train[-1], len(train) - 1), (list(train.items())[3], 3)):
        aevs, forces, jacobians, fdims, energy = item
        one = train.structures.select([i])
        n = len(one.species)
        assert fdims == 3 * n
        assert forces.shape == (1, 15)
        np.testing.assert_array_equal(forces[0, :fdims], one.forces.ravel())
        assert forces[0, fdims:].eq(0).all()
        assert energy.tolist() == one.energies.tolist()
        expected = stored.compute(one, SMALL, torch.float64, jacobian=True)
        torch.testing.assert_close(torch.cat(aevs), expected.features)  # C before H in these files
        torch.testing.assert_close(torch.cat(jacobians)[..., :fdims], expected.jacobian)
        assert [len(aev) for aev in aevs] == [len(j) for j in jacobians]
    with pytest.raises(IndexError):
        train[len(train)]
    # With the model of PyKinML's form they give its energies, and the loss can be differentiated.
    loaders = prepper.load_train_objs(args)
    net, optimizer = loaders[3:5]
    prepper.set_up_task_weights(net, args, optimizer)
    batch = next(iter(loaders[0]))
    assert len(batch) == 10
    aevs = [torch.cat([item[0][s] for item in batch]).requires_grad_() for s in range(2)]
    jacobians = [torch.cat([item[2][s] for item in batch]) for s in range(2)]
    ids = [torch.cat([torch.full((len(item[0][s]),), m) for m, item in enumerate(batch)]) for s in range(2)]
    energies, log_sigma = net(aevs, ids, 10)
    ediff = prepper.energy_abs_dif(energies, torch.stack([item[4] for item in batch]))
    pulls = daev.cal_dEdxyz_ddp(aevs, -energies, jacobians, ids)
    fdiff = prepper.force_abs_dif(pulls, [item[1][0] for item in batch], [item[3] for item in batch])
    loss = net.mtl(list(prepper.my_loss(ediff, fdiff)), log_sigma)
    loss.backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


def test_files_of_prepared_data(tmp_path):
    args = small(tmp_path, floss=True)
    prepared(args)
    folder = tmp_path / "run"
    for part in ("train", "test"):
        own = folder / f"{part}ing1"
        names = {path.name for path in own.iterdir()}
        assert names >= {f"{part}_{key}" for key in ("engs", "aevs", "forces", "fdims")}
        assert f"{part}_daevs" not in names
        assert set(torch.load(own / f"{part}_fdims")) == {12, 15}
    assert (args.savepth, args.trpath, args.tspath) == (f"{folder}/", f"{folder}/training1/", f"{folder}/testing1/")


def test_geometries_from_memory():
    x, species, _ = molecules()
    symbols = [ELEMENTS[s] for s in species]
    dpes = Data_pes(atom_types=ELEMENTS)
    dpes.aev_from_xyz([[symbols[:4], x[:4].numpy()], [symbols[4:], x[4:].numpy()]], 4, 2, 2, [5.2, 3.8])
    assert dpes.prep_data() == 0
    assert (dpes.ndat, dpes.num_nn, dpes.dimdat) == (2, 2, SMALL.length)
    assert dpes.full_symb_data == [symbols[:4], symbols[4:]]
    assert [[len(aev) for aev in molecule] for molecule in dpes.aevs] == [[2, 2], [1, 4]]
    assert dpes.daevs[0][0].shape == (2, SMALL.length, 15)


def test_hdf5_files_of_pykinml(tmp_path):
    structures = read("shipped:C2H3.db", Selection(elements=list(ELEMENTS)))
    descriptors = stored.compute(structures, SMALL, torch.float64, jacobian=True)
    pykinml_hdf5.write(tmp_path / "c2h3.h5", structures, descriptors)
    changes = {"trtsid_name": None, "tvt": [30, 8, 6], "floss": True, "fw": 0.5, "epochs": 2}
    from_file = small(tmp_path / "a", input_data_type="aev", input_data_fname=str(tmp_path / "c2h3.h5"), **changes)
    from_database = small(tmp_path / "b", input_data_fname="shipped:C2H3.db", **changes)
    for args in (from_file, from_database):
        trainer.main(args)
    a, b = (metrics(tmp_path / name / "run") for name in "ab")
    for key in a:
        for name in ("energy_rmse", "forces_rmse"):
            assert float(a[key][name]) == pytest.approx(float(b[key][name]), rel=1e-9)


# Models


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs of a few epochs: one level, differences, two levels."""
    folder = tmp_path_factory.mktemp("trained")
    before = torch.get_default_dtype(), Trainer._report
    Trainer._report = lambda *_: None
    try:
        trainer.main(small(folder, savenm=str(folder / "one"), save_every=1))
        trainer.main(small(folder, savenm=str(folder / "other"), randomseed=[0, 2]))
        trainer.main(small(folder, savenm=str(folder / "delta"), delta=True, fidlevel_lf=0))
        multi_fid_loop.main(small(folder, savenm=str(folder / "two"), multi_fid=True, fidlevel_lf=0))
    finally:
        torch.set_default_dtype(before[0])
        Trainer._report = before[1]
    return folder


def loading(trained, name: str, **changes):
    return small(trained, load_model=True, load_model_name=str(trained / name), **changes)


def test_checkpoints_are_plain_and_have_pykinmls_keys(trained):
    assert sorted(path.name for path in (trained / "one").glob("model-*.pt")) == [
        "model-0000.pt",
        "model-0001.pt",
        "model-0002.pt",
    ]
    assert sorted(path.name for path in (trained / "two").glob("model-*.pt")) == ["model-0000.pt", "model-0002.pt"]
    contents = torch.load(trained / "one" / "model-0002.pt", weights_only=True)
    assert set(contents) == {
        "epoch",
        "optimizer",
        "optimizer_state_dict",
        "lr_scheduler",
        "model_state_dict",
        "sae_energies",
        "params",
        "kinml_fast",
    }
    assert (contents["epoch"], contents["optimizer"], contents["lr_scheduler"]["name"]) == (
        2,
        "Adam",
        "ReduceLROnPlateau",
    )
    assert list(contents["model_state_dict"])[:2] == ["log_sigma", "NNs.0.0.linear.weight"]
    assert contents["params"]["activations"] == [["gaussian", "tanh", "identity"]] * 2
    net = nnpes.CompositeNetworks(**contents["params"])  # as PyKinML builds it
    net.load_state_dict(contents["model_state_dict"], strict=False)
    state_of = contents["optimizer_state_dict"]["state"]
    assert state_of[0]["exp_avg"].shape == contents["model_state_dict"]["NNs.0.0.linear.weight"].shape
    assert state_of[0]["step"] == 3 * 3


@pytest.mark.parametrize(("name", "two"), [("one", False), ("delta", False), ("two", True)])
def test_every_kind_of_file_is_loaded(trained, name, two):
    models = {}
    for file in ("model-0002.pt", "model.pt", "checkpoints/last.pt", "checkpoints/best.pt"):
        args = loading(trained, f"{name}/{file}", multi_fid=two, fidlevel_lf=0 if two else None)
        net, scheduler = prepper.load_trained_model(args)
        assert args.my_actfn == ["gaussian", "tanh", "identity"]
        assert args.netparams == net.netparams
        assert bool(scheduler.optimizer.state) == (file in ("model-0002.pt", "checkpoints/last.pt"))
        assert isinstance(prepper.load_trained_model(args, load_opt=False), type(net))
        models[file] = net
    best = model_file.load(trained / name / "model.pt")
    last = pykinml_checkpoint.load(trained / name / "model-0002.pt")[0]
    assert (last.fidelities, last.baseline, last.elements) == (best.fidelities, best.baseline, ELEMENTS)
    for file, native in (("model.pt", best), ("checkpoints/best.pt", best), ("model-0002.pt", last)):
        own = torch.cat([p.reshape(-1) for *_, block in models[file].blocks() for p in block.tensors()])
        assert torch.equal(own, native.networks.weights.detach())
    assert torch.equal(
        models["model-0002.pt"].NNs[0][0].linear.weight, models["checkpoints/last.pt"].NNs[0][0].linear.weight
    )


def test_the_state_of_the_optimizer_is_that_of_the_native_checkpoint(trained):
    states = []
    for file in ("model-0002.pt", "checkpoints/last.pt"):
        _, scheduler = prepper.load_trained_model(loading(trained, f"one/{file}"))
        optimizer = scheduler.optimizer
        states.append([optimizer.state[p] for p in optimizer.param_groups[0]["params"]])
    assert len(states[0]) == 6
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in a.items():
            assert torch.equal(value, b[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"load_model_name": "two/model.pt"},
            "a model for two levels of theory, and args.multi_fid is False: set it to True",
        ),
        ({"multi_fid": True, "fidlevel_lf": 0}, "a model for one level of theory, and args.multi_fid is True"),
        ({"present_elements": ["H", "C"]}, r"for 2 elements \(C H\), and args.present_elements is H C"),
        ({"present_elements": ["C", "H", "O"]}, "args.present_elements is C H O"),
        ({"load_model_name": "none.pt"}, "none.pt: cannot be read"),
        ({"load_model_name": "one/split.txt"}, "is no checkpoint of PyKinML, or damaged"),
    ],
)
def test_models_that_do_not_fit(trained, changes, message):
    name = changes.pop("load_model_name", "one/model-0002.pt")
    with pytest.raises(InputError, match=message):
        prepper.load_trained_model(loading(trained, name, **changes))


def test_an_ensemble_is_no_model_to_go_on_with_but_one_to_calculate_with(trained, tmp_path):
    members = [model_file.load(trained / name / "model.pt") for name in ("one", "other")]
    model_file.save(tmp_path / "both.pt", model_file.resolve(members))
    with pytest.raises(InputError, match="is an ensemble"):
        prepper.load_trained_model(loading(trained, str(tmp_path / "both.pt")))
    surr, several = Nn_surr(tmp_path / "both.pt"), Nn_surr([trained / name / "model.pt" for name in ("one", "other")])
    for calculator in (surr, several):
        calculator.calculate(acetylene())
    torch.testing.assert_close(surr.results["energy_std"], several.results["energy_std"])


def test_a_network_with_biases_can_be_asked_for(tmp_path):
    args = small(tmp_path)
    net, optimizer, scheduler = prepper.prep_model(args, din_nn=SMALL.length, biases=True)
    assert net.biases
    assert len(optimizer.param_groups[0]["params"]) == 12
    assert scheduler.optimizer is optimizer
    train, valid, test, _, _, _, sae, keys = (prepared(args), prepper.load_train_objs(args))[1]
    prepper.set_up_task_weights(net, args, optimizer)
    folder = str(tmp_path / "with_biases")
    loop = trainer.Trainer(net, train, valid, test, keys, optimizer, scheduler, sae, 1, folder + ".log", folder, "cpu")
    loop.train(2)
    assert model_file.load(tmp_path / "with_biases" / "model.pt").networks.biases
    assert net.NNs[0][0].linear.bias.abs().sum() > 0


def test_the_trained_module_has_the_weights_of_the_last_epoch(tmp_path):
    args = small(tmp_path, learning_rate=0.3, epochs=6)  # so high that the best epoch is an earlier one
    prepared(args)
    train, valid, test, net, optimizer, scheduler, sae, keys = prepper.load_train_objs(args)
    prepper.set_up_task_weights(net, args, optimizer)
    loop = trainer.Trainer(
        net, train, valid, test, keys, optimizer, scheduler, sae, 1, str(tmp_path / "log"), args.savenm, "cpu"
    )
    loop.train(args.epochs)
    last = torch.load(tmp_path / "run" / "model-0005.pt")
    for name, value in net.state_dict().items():
        assert torch.equal(value, last["model_state_dict"][name])
    best = model_file.load(tmp_path / "run" / "model.pt")
    assert not torch.equal(best.networks.layer(0, 0)[0], net.NNs[0][0].linear.weight)
    for parameter, kept in zip(
        optimizer.param_groups[0]["params"], last["optimizer_state_dict"]["state"].values(), strict=True
    ):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], kept["exp_avg"])
    # And it can be trained further, by the same optimizer.
    first = metrics(tmp_path / "run")[5, "train"]["energy_rmse"]
    loop.train(1)
    assert metrics(tmp_path / "run")[0, "train"]["energy_rmse"] != first


@pytest.mark.parametrize(
    ("changes", "optimizer", "schedule"),
    [
        ({"optimizer": ["SGD"], "learning_rate": 1e-4}, "SGD", "ReduceLROnPlateau"),
        ({"optimizer": "AdamW", "lrscheduler": ["exp"], "decayrate": 0.9}, "AdamW", "ExponentialLR"),
        ({"lrscheduler": "step", "stepsize": 1}, "Adam", "StepLR"),
    ],
)
def test_optimizers_and_schedules(tmp_path, changes, optimizer, schedule):
    trainer.main(small(tmp_path, epochs=3, **changes))
    kept = torch.load(tmp_path / "run" / "model-0002.pt")
    assert (kept["optimizer"], kept["lr_scheduler"]["name"]) == (optimizer, schedule)
    rates = [float(metrics(tmp_path / "run")[epoch, "train"]["lr"]) for epoch in range(3)]
    factor = {"ReduceLROnPlateau": 1.0, "ExponentialLR": 0.9, "StepLR": 0.5}[schedule]
    assert rates == pytest.approx([rates[0] * factor**epoch for epoch in range(3)])
    assert kept["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(rates[0] * factor**3)
    args = small(tmp_path, load_model=True, load_model_name=str(tmp_path / "run" / "model-0002.pt"), **changes)
    args.epochs, args.savenm, args.data_path, args.pre_saved = 1, str(tmp_path / "more"), str(tmp_path / "run"), True
    trainer.main(args)
    again = metrics(tmp_path / "more")[0, "train"]
    assert float(again["lr"]) == pytest.approx(rates[0] * factor**3)
    assert args.learning_rate == pytest.approx(rates[0] * factor**3)


def test_a_run_in_two_parts_is_the_run_in_one(tmp_path):
    forces = {"floss": True, "optimize_force_weight": True, "LR_patience": 100}
    trainer.main(small(tmp_path, savenm=str(tmp_path / "whole"), epochs=5, **forces))
    trainer.main(small(tmp_path, savenm=str(tmp_path / "first"), epochs=3, **forces))
    args = small(tmp_path, savenm=str(tmp_path / "second"), epochs=2, **forces)
    args.load_model, args.load_model_name = True, str(tmp_path / "first" / "model-0002.pt")
    args.pre_saved, args.data_path = True, str(tmp_path / "first")
    trainer.main(args)
    whole, second = metrics(tmp_path / "whole"), metrics(tmp_path / "second")
    for part in ("train", "validation", "test"):
        for name in ("energy_rmse", "forces_rmse", "log_sigma_energy", "log_sigma_forces"):
            assert whole[4, part][name] == second[1, part][name]


def test_another_optimizer_starts_without_a_state(trained, tmp_path, caplog):
    args = loading(trained, "one/model-0002.pt", optimizer="SGD", savenm=str(tmp_path / "sgd"), epochs=1)
    args.pre_saved, args.data_path = True, str(trained / "one")
    with caplog.at_level("INFO", logger="kinml_fast"):
        trainer.main(args)
    assert "has the state of Adam or AdamW, so that this optimizer starts without one" in caplog.text
    assert torch.load(tmp_path / "sgd" / "model-0000.pt")["optimizer"] == "SGD"


def test_what_a_script_does_to_the_optimizer_counts(tmp_path):
    args = small(tmp_path)
    prepared(args)
    train, valid, test, net, optimizer, scheduler, sae, keys = prepper.load_train_objs(args)
    prepper.set_up_task_weights(net, args, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0123
    shuffled = DataLoader(train.dataset, batch_size=6, shuffle=True, collate_fn=list)
    rest = (keys, optimizer, scheduler, sae, 1, str(tmp_path / "log"), str(tmp_path / "own"), "cpu")
    trainer.Trainer(net, shuffled, valid, test, *rest).train(1)
    text = (tmp_path / "own" / "config.yaml").read_text(encoding="utf-8")
    assert "learning_rate: 0.0123" in text
    assert "batch_size: 6" in text
    assert "shuffle: true" in text
    assert "save_every: 1" in text
    assert not list((tmp_path / "own" / "checkpoints").glob("epoch-*.pt"))


def test_what_cannot_be_trained(tmp_path):
    args = small(tmp_path)
    prepared(args)
    train, valid, test, net, optimizer, scheduler, sae, keys = prepper.load_train_objs(args)
    rest = (sae, 1, str(tmp_path / "log"), args.savenm)

    def make(loader=train, device="cpu", own=optimizer, schedule=scheduler):
        return trainer.Trainer(net, loader, valid, test, keys, own, schedule, *rest, device)

    with pytest.raises(InputError, match="'gpu' is no device: give auto, cpu, cuda or cuda:N"):
        make(device="gpu")
    if devices.why_no_gpu():
        for device, name in ((0, "cuda:0"), ("cuda", "cuda"), (torch.device("cuda:1"), "cuda:1")):
            with pytest.raises(InputError, match=f"the device is {name}, but .*, or take the device cpu$"):
                make(device=device)
    for changes, message in (
        ({"loader": DataLoader(list(range(5)))}, "take those"),
        ({"own": torch.optim.RMSprop(net.parameters())}, "the optimizer is RMSprop: take Adam, AdamW or SGD"),
        (
            {"schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)},
            "the schedule is CosineAnnealingLR: take ReduceLROnPlateau",
        ),
    ):
        with pytest.raises(InputError, match=message):
            make(**changes).train(1)
    args.gpus, args.ddp = ["cpu", "cpu"], True
    with pytest.raises(InputError, match=r"args.ddp is True, but no processes have joined: call trainer.ddp_setup"):
        prepper.load_train_objs(args)


def test_two_levels_of_different_structures(tmp_path):
    args = small(tmp_path, multi_fid=True, fidlevel_lf=0, trtsid_name=[division(tmp_path)], tvt=[20, 6, 0])
    args.input_data_fname = "shipped:C2H2.db"
    prepper.prep_data(args, fid=1)
    args.trtsid_name = [division(tmp_path, 50)]
    prepper.prep_data(args, fid=0, get_aevs=False)
    args.pre_saved, args.data_path = True, args.savenm
    with pytest.raises(InputError, match=r"train structures have energies of one level only: C2H2/\d+, .*: take"):
        multi_fid_loop.spawned_trainer("cpu", args, 0)


def test_what_is_different_is_said_once(tmp_path, caplog):
    arguments.note.cache_clear()
    with caplog.at_level("INFO", logger="kinml_fast"):
        for name in ("a", "b"):
            trainer.main(small(tmp_path, savenm=str(tmp_path / name), epochs=1, floss=True))
    assert caplog.text.count(FORCES) == 1
    assert caplog.text.count(NO_BIASES) == caplog.text.count(KEPT_ORDER) == 1
    assert (0, "test RMSE") in errors("\n".join(caplog.messages))


def test_preparing_from_the_command_line(tmp_path, monkeypatch):
    words = ["prepper.py", "-f", "shipped:C2H2.db", "-sn", str(tmp_path / "run"), "-aev", "4", "2", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--tvt", "20", "5", "0", "--trtsid-name", division(tmp_path)])
    prepper.main()
    assert len(torch.load(tmp_path / "run" / "training1" / "train_engs")) == 53


# Calculators


def acetylene() -> Atoms:
    atoms = ase.build.molecule("C2H2")
    atoms.rattle(0.1, seed=0)
    return atoms


@pytest.mark.parametrize("tnsr", [True, False])
def test_a_calculator_of_one_model(trained, tnsr):
    atoms = acetylene()
    surr = Nn_surr(str(trained / "one" / "model-0002.pt"), tnsr=tnsr, atoms=atoms)
    surr.calculate(atoms)
    model, _ = pykinml_checkpoint.load(trained / "one" / "model-0002.pt")
    native = KinMLCalculator(model)
    native.calculate(atoms)
    kind = torch.Tensor if tnsr else np.ndarray
    assert all(isinstance(value, kind) for value in surr.results.values())
    assert surr.results["energy"].item() == native.results["energy"]
    np.testing.assert_array_equal(surr.results["forces"], native.results["forces"])
    assert surr.results["energy_std"] == surr.results["forces_std"] == 0
    assert float(atoms.get_potential_energy()) == native.results["energy"]


def test_a_calculator_of_several_models(trained):
    names = [str(trained / name / "model-0002.pt") for name in ("one", "other")]
    atoms = acetylene()
    surr = Nn_surr(names)
    surr.calculate(atoms)
    single = []
    for name in names:
        one = Nn_surr(name)
        one.calculate(atoms)
        single.append(one.results)
    energies = torch.stack([results["energy"] for results in single])
    forces = torch.stack([results["forces"] for results in single])
    torch.testing.assert_close(surr.results["all_energies"], energies)
    torch.testing.assert_close(surr.results["all_forces"], forces)
    torch.testing.assert_close(surr.results["energy"], energies.mean())
    torch.testing.assert_close(surr.results["energy_std"], energies.std())
    torch.testing.assert_close(surr.results["forces_std"], forces.std(dim=0))
    assert surr.results["forces_std"].shape == (4, 3)


def test_calculators_of_two_levels_and_of_differences(trained):
    atoms = acetylene()
    two = Nn_surr(str(trained / "two" / "model-0002.pt"), mf=True)
    two.calculate(atoms)
    assert two.results["energy"] == two.results["level_energies"][1]
    difference, low = Nn_surr(str(trained / "delta" / "model-0002.pt")), Nn_surr(str(trained / "one" / "model.pt"))
    whole = Nn_surr(str(trained / "delta" / "model-0002.pt"), base=low)
    for surr in (difference, low, whole):
        surr.calculate(atoms)
    assert abs(difference.results["energy"]) < 20
    torch.testing.assert_close(whole.results["energy"], difference.results["energy"] + low.results["energy"])
    torch.testing.assert_close(whole.results["forces"], difference.results["forces"] + low.results["forces"])


def test_ase_moves_molecules_with_it(trained):
    atoms = acetylene()
    atoms.calc = Nn_surr([str(trained / name / "model.pt") for name in ("one", "other")], tnsr=False)
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=1e-6, steps=3)
    assert atoms.get_potential_energy() < before
    assert atoms.calc.results["energy_std"].item() >= 0


def test_calculators_that_cannot_be_made(trained):
    with pytest.raises(InputError, match="the device is cuda:99, but "):
        Nn_surr(str(trained / "one" / "model.pt"), device=99)
    with pytest.raises(InputError, match=r"none\.pt: cannot be read"):
        Nn_surr(str(trained / "none.pt"))


@pytest.mark.parametrize("two", [False, True])
def test_a_runner(trained, two):
    name = str(trained / ("two" if two else "one") / "model-0002.pt")
    args = SimpleNamespace(load_model_name=name, present_elements=list(ELEMENTS), multi_fid=two)
    runner = trainer.Runner(args, "cpu")
    x, species, offsets = molecules()
    symbols = [ELEMENTS[s] for s in species]
    dpes = Data_pes(ELEMENTS)
    dpes.aev_from_xyz([[symbols[:4], x[:4].numpy()], [symbols[4:], x[4:].numpy()]], 4, 2, 2, [5.2, 3.8])
    dpes.prep_data()
    aevs = [[aev.requires_grad_() for aev in molecule] for molecule in dpes.aevs]
    energies, forces = runner.eval(aevs), runner.eval_force(dpes.daevs)
    model, _ = pykinml_checkpoint.load(name)
    expected = model.level_energies_and_forces(x, species, offsets)
    torch.testing.assert_close(energies[:, 0], expected[0][-1])
    torch.testing.assert_close(torch.cat([forces[0][0][:12], forces[1][0]]).view(-1, 3), expected[1][-1])
    if two:
        torch.testing.assert_close(torch.cat(runner.pred_engs_lf)[:, 0], expected[0][0])


def test_a_checkpoint_says_its_elements_and_descriptor(trained, tmp_path):
    path = trained / "one" / "model-0002.pt"
    model, _ = pykinml_checkpoint.load(path)
    assert model.descriptor == SMALL
    with pytest.raises(InputError, match="was trained with the elements C H, but C O are given: leave them out"):
        pykinml_checkpoint.load(path, elements=["C", "O"])
    contents = torch.load(path)
    contents["kinml_fast"]["layers"] = [9, 4, 1]
    torch.save(contents, tmp_path / "changed.pt")
    with pytest.raises(InputError, match="its description of the model does not fit its tensors"):
        pykinml_checkpoint.load(tmp_path / "changed.pt")


def test_saved_states_of_plain_networks():
    """What is remembered of each layer goes into the flat parameter and comes back."""
    net = network(two=True)
    optimizer = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    kept = {p: {n: v.clone() for n, v in s.items()} for p, s in optimizer.state.items()}
    model = nnpes.energy_model(net, SMALL, fidelities=(0, 1))
    native = torch.optim.Adam(model.parameters())
    state.give(native, optimizer, net)
    flat = native.state[model.networks.weights]
    assert flat["exp_avg"].shape == model.networks.weights.shape
    assert flat["step"] == 1
    optimizer.state.clear()
    state.take(native, optimizer, net)
    for parameter, own in kept.items():
        for name, value in own.items():
            assert torch.equal(optimizer.state[parameter][name], value)


def test_a_folder_can_be_moved(trained, tmp_path):
    shutil.copytree(trained / "one", tmp_path / "moved")
    args = small(tmp_path, savenm=str(tmp_path / "new"), epochs=1, pre_saved=True, data_path=str(tmp_path / "moved"))
    trainer.main(args)
    a, b = metrics(tmp_path / "new")[0, "train"], metrics(trained / "one")[0, "train"]
    assert a["energy_rmse"] == b["energy_rmse"]


def test_a_data_set_of_other_elements(tmp_path):
    structures = read("shipped:C2H2.db")
    data = PesDataset(structures, AEVParameters.aevmod(("H", "C"), 4, 2, 2), ("aevs",))
    (aevs,) = data[0]
    assert [len(aev) for aev in aevs] == [2, 2]
    assert data.structures.elements == ("H", "C")
