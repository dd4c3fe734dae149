"""Scripts as PyKinML's manual describes its examples, with the import changed, run to the end on PyKinML's data.

The numbers of PyKinML 1.1.2 are those that it publishes beside its examples (single_fid, delta), and for two levels
those of its own code where its forces are right: one formula (it takes wrong rows of padded Jacobians otherwise), with
aevmod's eval_Jac_sac, the true derivative, in the place of eval_Jac.
"""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms
from data_helpers import SHARED, needs_shared
from pykinml_helpers import errors, metrics, run_here, run_script, write_script
from rank_helpers import free_port, together

from kinml_fast import KinMLCalculator, devices
from kinml_fast.deploy import model_file
from kinml_fast.errors import InputError
from kinml_fast.pykinml import state
from kinml_fast.train import Trainer, config, runs

pytestmark = needs_shared

SINGLE = {  # epoch: train MAE, train RMSE, validation RMSE, test MAE, test RMSE; kcal/mol
    0: (20.7265743219, 25.4876383279, 19.8281804296, 27.1253221667, 27.1788924073),
    4: (3.84367930571, 4.65515749707, 5.20885567012, 3.65294883958, 4.31569928885),
    9: (2.25488768851, 2.80692176424, 2.96392338075, 2.78241456998, 3.63709754131),
}
DELTA = {
    0: (27.52276184606848, 28.44062248359016, 30.290662688074505, 31.78016384501165, 32.34647954945126),
    9: (6.698163468102169, 7.2165392622210085, 9.091210744196978, 4.180304875496429, 5.015028701451879),
}
NAMES = ("train MAE", "train RMSE", "valid RMSE", "test MAE", "test RMSE")
TWO_LEVELS_OF_C3H3 = {  # epoch 9
    "train MAE_lf": 72833.49875264274,
    "train RMSE_hf": 72869.99995494977,
    "train FMAE_lf": 11.30873550410783,
    "train FRMSE_lf": 16.817936693844583,
    "train FRMSE_hf": 17.741377261381572,
    "train FLinf_hf": 67.51893229914573,
    "valid RMSE_lf": 72829.30230061091,
    "valid RMSE_hf": 72863.64126282852,
}


def place(folder: Path) -> Path:
    """A folder with PyKinML's examples data in it."""
    (folder / "data_holder").symlink_to(SHARED, target_is_directory=True)
    for name in ("sample_tvt.txt", "mf_tvt.txt"):
        shutil.copy(SHARED / name, folder)
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Path, str]:
    """The folder of train_single_fid, and what it has printed."""
    folder = place(tmp_path_factory.mktemp("single"))
    return folder, run_script("train_single_fid", folder)


def test_single_fid_has_the_published_numbers(single):
    folder, output = single
    printed, rows = errors(output), metrics(folder / "my_model_0_1")
    for epoch, published in SINGLE.items():
        np.testing.assert_allclose([printed[epoch, name] for name in NAMES], published, rtol=1e-9)
        of = {part: rows[epoch, part] for part in ("train", "validation", "test")}
        native = [
            *(of["train"][f"energy_{kind}"] for kind in ("mae", "rmse")),
            of["validation"]["energy_rmse"],
            *(of["test"][f"energy_{kind}"] for kind in ("mae", "rmse")),
        ]
        np.testing.assert_allclose([float(value) for value in native], published, rtol=1e-9)


def test_single_fid_says_what_pykinml_says(single):
    _, output = single
    assert "2112 structures of fidelity 1 from data_holder/C5H5.db" in output
    assert "C -1035.43984380, H -16.97113695" in output
    assert "net: CompositeNetworks(" in output
    assert "Linear(in_features=224, out_features=48, bias=False)" in output
    assert output.count("without biases") == 1
    assert "Time it took" in output


def test_single_fid_leaves_files_of_both(single):
    folder, _ = single
    run = folder / "my_model_0_1"
    assert sorted(path.name for path in run.glob("model-*.pt")) == [f"model-{i:04}.pt" for i in range(10)]
    for name in ("metrics.csv", "report", "model.pt", "config.yaml", "split.txt", "train.log", "checkpoints/last.pt"):
        assert (run / name).exists()
    training = torch.load(run / "training1" / "train_engs")  # as scripts read them
    assert len(training) == 2048
    assert training[0].shape == (1,)
    aevs = torch.load(run / "training1" / "train_aevs")
    assert [aev.shape for aev in aevs[7]] == [(5, 224), (5, 224)]
    assert torch.load(run / "training1" / "aev_length") == 224
    assert len(torch.load(run / "testing1" / "test_engs")) == 64
    np.testing.assert_allclose(
        np.load(run / "training1" / "sae_energies.npy"), [-1035.4398438, -16.97113695], atol=1e-7
    )
    text = (folder / "my_model_0_1_device_cpu.log").read_text(encoding="utf-8")
    assert text.startswith("Initial parameters for device: cpu\nNNs.0.0.linear.weight: tensor(")
    (number,) = re.findall(r"\nepoch: 9\ntrain L1 loss: .*\ntrain L2 loss: (.*)\n", text)
    assert float(number) == pytest.approx(SINGLE[9][1], rel=1e-9)
    assert re.search(r"\nTraining time: [\d.]+$", text)


def test_the_native_configuration_of_a_script_repeats_its_run(single, tmp_path, monkeypatch):
    folder, _ = single
    monkeypatch.chdir(folder)
    changes = [f"run={tmp_path / 'again'}", "training.epochs=2", "training.threads=1"]
    with mock.patch.object(Trainer, "_report"):
        runs.start(config.load("my_model_0_1/config.yaml", changes))
    first, again = metrics(folder / "my_model_0_1"), metrics(tmp_path / "again")
    for part in ("train", "validation", "test"):
        for name in ("energy_mae", "energy_rmse"):
            assert float(again[1, part][name]) == pytest.approx(float(first[1, part][name]), rel=1e-9)


def test_a_script_run_is_resumed_natively_with_the_same_bits_as_by_load_model(single, tmp_path, monkeypatch):
    folder, _ = single
    shutil.copytree(folder / "my_model_0_1", tmp_path / "my_model_0_1")
    monkeypatch.chdir(tmp_path)
    with mock.patch.object(Trainer, "_report"):
        runs.resume("my_model_0_1", ["training.epochs=11", "training.threads=1"])
    place(tmp_path)
    printed = errors(run_here("load_model", tmp_path, ("epochs = 10", "epochs = 1")))
    assert float(metrics(tmp_path / "my_model_0_1")[10, "train"]["energy_rmse"]) == printed[0, "train RMSE"]


def test_load_model_goes_on_where_the_training_was(single):
    folder, _ = single
    output = run_script("load_model", folder)
    printed = errors(output)
    assert printed[0, "train RMSE"] < SINGLE[9][1]  # PyKinML begins with 6.58
    assert printed[9, "train RMSE"] < printed[0, "train RMSE"]
    assert (folder / "phase_two" / "model-0009.pt").exists()

    of_pykinml = errors(
        run_here(
            "load_model",
            folder,
            ("my_model_0_1/model-0009.pt", str(SHARED / "single_fid_epoch9.pt")),
            ("epochs = 10", "epochs = 2"),
            ("phase_two", "phase_of_pykinml"),
        )
    )
    for epoch in (0, 1):
        for name in NAMES:
            assert of_pykinml[epoch, name] == pytest.approx(printed[epoch, name], rel=1e-9)


def test_load_model_without_the_optimizer_begins_as_pykinml_does(single):
    folder, _ = single
    changes = [("load_opt = True", "load_opt = False"), ("epochs = 10", "epochs = 1"), ("phase_two", "without")]
    printed = errors(run_here("load_model", folder, *changes))
    # PyKinML's published output, which has no state of the optimizer although it loads one.
    assert printed[0, "train RMSE"] == pytest.approx(6.576938183162765, rel=1e-9)
    assert printed[0, "test RMSE"] == pytest.approx(5.64639433703807, rel=1e-9)


def test_load_model_takes_up_forces(single):
    folder, _ = single
    output = run_here(
        "load_model",
        folder,
        ("floss = False", "floss = True"),
        ("fw = 0.0", "fw = 0.5"),
        ("epochs = 10", "epochs = 2"),
        ("phase_two", "with_forces"),
    )
    printed = errors(output)
    assert printed[1, "train FRMSE"] < printed[0, "train FRMSE"]
    assert printed[0, "train RMSE"] < 5


def test_run_model(single):
    folder, _ = single
    output = run_script("run_model", folder)
    first, *rest = [line for line in output.splitlines() if re.match(r"-?\d|tensor|  ", line)][:11]
    native = KinMLCalculator(str(folder / "my_model_0_1" / "model.pt"))  # epoch 9 was the best one
    script = (folder / "run_model.py").read_text(encoding="utf-8")
    positions = eval(re.search(r"np\.array\(\s*(\[.*?\])\s*\)\natoms", script, re.S)[1])
    atoms = Atoms(["C"] * 5 + ["H"] * 5, positions)
    atoms.calc = native
    assert float(first) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    shown = np.array([[float(x) for x in re.findall(r"-?\d+\.\d+", line)] for line in rest])
    np.testing.assert_allclose(shown, atoms.get_forces(), atol=1e-4)


@pytest.fixture
def levels(tmp_path) -> Path:
    return place(tmp_path)


def falls(printed: dict[tuple[int, str], float], *names: str) -> None:
    """All errors are finite, and those named are smaller in the last epoch than in the first."""
    assert all(math.isfinite(value) for value in printed.values())
    for name in names:
        assert printed[9, name] < printed[0, name]


def test_delta_has_the_published_numbers(levels):
    printed = errors(run_script("train_delta", levels))
    for epoch, published in DELTA.items():
        np.testing.assert_allclose([printed[epoch, name] for name in NAMES], published, rtol=1e-9)
    falls(printed, *NAMES)
    model = model_file.load(levels / "delta_model_0_1" / "model.pt")
    assert (model.fidelities, model.baseline) == ((1,), 0)
    assert "baseline: 0" in (levels / "delta_model_0_1" / "config.yaml").read_text(encoding="utf-8")


def test_delta_with_single_atom_energies_and_forces(levels):
    changes = [("sae_fit = False", "sae_fit = True"), ("floss = False", "floss = True")]
    printed = errors(run_here("train_delta", levels, *changes))
    falls(printed, *NAMES, "train FRMSE")


def test_delta_on_one_file(levels):
    lines = [f"C3H3/{i} {2 if i <= 10 else -1}\n" for i in range(1, 15)]
    (levels / "mf_tvt.txt").write_text("".join(lines), encoding="utf-8")
    changes = [("data_holder/C[2-3]H[2-3].db", "data_holder/C3H3.db"), ("[30, 10, 0]", "[8, 2, 0]")]
    falls(errors(run_here("train_delta", levels, *changes)), *NAMES)  # where PyKinML ends with an error


LEVEL_NAMES = [
    f"{part} {kind}_{level}" for part in ("train", "valid") for kind in ("MAE", "RMSE") for level in ("lf", "hf")
]


def test_two_levels_have_pykinmls_numbers(levels):
    lines = [f"C3H3/{i} {2 if i <= 10 else -1}\n" for i in range(1, 15)]
    (levels / "mf_tvt.txt").write_text("".join(lines), encoding="utf-8")
    changes = [("data_holder/C[2-3]H[2-3].db", "data_holder/C3H3.db"), ("[30, 10, 0]", "[8, 2, 0]")]
    printed = errors(run_here("train_multi_fid", levels, *changes))
    for name, value in TWO_LEVELS_OF_C3H3.items():
        assert printed[9, name] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("sae", ["False", "True"])
@pytest.mark.parametrize("forces", ["False", "True"])
def test_two_levels(levels, sae, forces):
    changes = [("sae_fit = False", f"sae_fit = {sae}"), ("floss = True", f"floss = {forces}")]
    run = run_script if (sae, forces) == ("False", "True") else run_here
    output = run("train_multi_fid", levels, *changes)
    printed = errors(output)
    falls(printed, *LEVEL_NAMES)
    assert "net: CompositeNetworks_MF(" in output
    assert ((9, "train FRMSE_hf") in printed) == (forces == "True")
    if sae == "True":
        assert printed[9, "train RMSE_hf"] < 50
    run = levels / "mf_model_0_1"
    rows = metrics(run)
    assert float(rows[9, "train"]["energy_rmse"]) == printed[9, "train RMSE_hf"]
    assert float(rows[9, "train"]["energy_rmse_fidelity0"]) == printed[9, "train RMSE_lf"]
    log = (levels / "mf_model_0_1_device_cpu.log").read_text(encoding="utf-8")
    assert f"test L2_lf loss: {printed[9, 'test RMSE_lf']}\n" in log
    assert (run / "training0" / "train_engs").exists()
    model = model_file.load(run / "model.pt")
    assert model.fidelities == (0, 1)
    net, saved, elements = state.load(run / "model-0009.pt")
    assert elements == ("C", "H")
    assert len(net.by_level()) == 2
    assert saved.family == "Adam or AdamW"


def test_two_levels_go_on_where_the_training_was(levels):
    whole = errors(run_here("train_multi_fid", levels))
    run_here("train_multi_fid", levels, ("epochs = 10", "epochs = 6"), ("mf_model_", "first_"))
    changes = [
        ("epochs = 10", "epochs = 4"),
        ("mf_model_", "second_"),
        ("args.ddp", "args.load_model, args.load_model_name = True, 'first_0_1/model-0005.pt'\nargs.ddp"),
    ]
    rest = errors(run_here("train_multi_fid", levels, *changes))
    assert rest[3, "train RMSE_hf"] == whole[9, "train RMSE_hf"]
    assert rest[3, "test FRMSE_lf"] == whole[9, "test FRMSE_lf"]


ON_CPUS = [
    ("args.gpu = args.rank % max(torch.cuda.device_count(), 1)", 'args.gpu = "cpu"'),
    ("device_ids=[args.gpu]", "device_ids=None"),
    ("epochs = 10", "epochs = 1"),
]


def test_several_nodes_have_the_published_numbers_of_one(levels):
    nodes = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    tasks = [{**nodes, "SLURM_PROCID": str(rank)} for rank in range(2)]
    path = write_script("train_multi_node", levels, *ON_CPUS)
    done = together([[path.name]] * 2, tasks, levels)
    assert [one.returncode for one in done] == [0, 0], done
    printed = errors(done[0].stdout)
    # Without args.ddp the batches are those of one process, in PyKinML as well: all take the same ones there.
    np.testing.assert_allclose([printed[0, name] for name in NAMES], SINGLE[0], rtol=1e-9)
    assert not errors(done[1].stdout)
    logs = [(levels / f"my_model_nodes_gpu_{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    assert len({re.sub(r"Training time: .*", "", log) for log in logs}) == 1
    assert (levels / "my_model_nodes" / "model-0000.pt").exists()


@pytest.mark.slow
def test_ddp_on_two_cpus(levels):
    changes = [
        ("ddp = False", "ddp = True"),
        ("gpus = [0, 1]", "gpus = ['cpu', 'cpu']"),
        ("world_size = torch.cuda.device_count()", "world_size = 2"),
        ("epochs = 10", "epochs = 2"),
    ]
    printed = errors(run_script("train_single_fid", levels, *changes))
    assert printed[1, "train RMSE"] < printed[0, "train RMSE"]
    text = (levels / "my_model_0_1" / "config.yaml").read_text(encoding="utf-8")
    assert "batch_size: 100\n" in text
    for rank in range(2):
        assert (levels / f"my_model_0_1_device_{rank}.log").exists()


@pytest.mark.skipif(devices.why_no_gpu() is None, reason="there is a GPU")
@pytest.mark.parametrize("name", ["train_single_fid", "train_delta", "train_multi_fid"])
def test_ddp_without_gpus_ends_in_one_sentence_before_anything_is_done(levels, name):
    with pytest.raises(InputError, match=r"args.ddp is True and args.gpus is .*'cpu'\] and world_size = 2 for two"):
        run_here(name, levels, ("ddp = False", "ddp = True"))
    assert not list(levels.glob("*_0_1"))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("fidlevel = 1", "fidlevel = 7", "fidelity 7"),
        (
            "[30, 10, 0]",
            "[300, 10, 0]",
            "asks for 300 training and 10 validation structures, and there are 40 for both",
        ),
        ("[30, 10, 0]", "[30, 10, 5]", "asks for 5 test structures, and there are 16"),
        ("mf_tvt.txt", "no.txt", "no.txt: cannot be read as a split file"),
        ("fidlevel_lf = 0", "fidlevel_lf = 1", "args.delta is True and args.fidlevel_lf is 1"),
        ('"identity"]', '"linear"]', "gaussian, tanh, identity, relu, silu"),
    ],
)
def test_mistakes_are_one_sentence(levels, old, new, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        run_here("train_delta", levels, (old, new))
    assert "\n" not in str(caught.value)


def test_data_that_are_not_there_or_that_pykinml_prepared(tmp_path):
    with pytest.raises(InputError, match="my_model_0_1/training1: holds no prepared data: call prep_data before"):
        run_here("load_model", tmp_path)
    (tmp_path / "my_model_0_1" / "training1").mkdir(parents=True)
    torch.save([torch.zeros(1)], tmp_path / "my_model_0_1" / "training1" / "train_engs")
    with pytest.raises(InputError, match=r"training1: was prepared by PyKinML: set args\.pre_saved = False"):
        run_here("load_model", tmp_path)
