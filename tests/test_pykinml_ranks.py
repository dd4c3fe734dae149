"""PyKinML's ways to train in several processes: args.ddp with spawn, ddp_setup, and its batches of each process."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from pykinml_helpers import metrics, small
from pykinml_rank_program import KINDS, arguments, prepare, train
from rank_helpers import free_port
from torch.utils.data import DataLoader, DistributedSampler

from kinml_fast import devices
from kinml_fast.errors import DeviceError
from kinml_fast.pykinml import multi_fid_loop, trainer
from kinml_fast.pykinml.loop import joint_order
from kinml_fast.train import Trainer, config, runs


@pytest.fixture(scope="module")
def spawned(tmp_path_factory) -> Path:
    """A folder with a run of each kind by two processes."""
    folder = tmp_path_factory.mktemp("spawned")
    for kind in KINDS:
        (folder / kind).mkdir()
        prepare(folder, kind)
    torch.multiprocessing.spawn(train, (folder, {kind: free_port() for kind in (*KINDS, "own")}), nprocs=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does_on_the_joint_batch(spawned, kind, tmp_path):
    run = spawned / kind / "run"
    training = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]
    assert (training["batch_size"], training["per_rank"]) == (10, [])
    assert training["optimizer"]["learning_rate"] == 0.01  # PyKinML's manual leaves multiplying it to the user
    with mock.patch.object(Trainer, "_report"):
        runs.start(config.load(run / "config.yaml", [f"run={tmp_path / 'native'}", "training.threads=1"]))
    found, native = metrics(run), metrics(tmp_path / "native")
    assert found.keys() == native.keys()
    names = [name for name in found[0, "train"] if name.startswith(("energy_", "forces_", "log_sigma"))]
    for key, row in found.items():
        both = [[float(values[name]) for name in names if values[name]] for values in (row, native[key])]
        np.testing.assert_allclose(*both, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_process_writes_the_run_and_each_its_log(spawned, kind):
    run = spawned / kind / "run"
    assert sorted(path.name for path in run.glob("model-*.pt")) == ["model-0000.pt", "model-0002.pt"]
    assert (run / "model.pt").exists()
    assert len(metrics(run)) == 3 * 3
    logs = [(spawned / kind / f"run_device_{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    texts = [re.sub(r"Training time: .*", "", log) for log in logs]
    assert texts[0] == texts[1]  # errors are those of all structures, and both end with the same weights
    assert re.search(r"\nepoch: 2\ntrain L1\w* loss: ", texts[0])
    parts = texts[0].split("\nepoch: 2\n")
    begin, end = (re.findall(r"linear.weight: tensor\((.*?)\)\n", part, re.S) for part in parts)
    assert begin
    assert len(begin) == len(end)
    assert begin != end


def test_weights_are_those_of_pykinmls_own_loop(spawned):
    kept = torch.load(spawned / "energies" / "run" / "model-0002.pt")["model_state_dict"]
    for rank in range(2):
        own = torch.load(spawned / f"own-{rank}.pt")
        assert own.keys() == kept.keys()
        for name, value in own.items():
            torch.testing.assert_close(kept[name], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [24, 30, 31])
def test_joint_batches_are_those_of_all_processes(count, shuffle):
    size, batch = 3, 4
    samplers = [DistributedSampler(range(count), size, rank, shuffle=shuffle, seed=5) for rank in range(size)]
    order = joint_order(samplers[1])
    assert sorted(order) == list(range(count))
    loaders = [DataLoader(range(count), batch, sampler=sampler, collate_fn=list) for sampler in samplers]
    for number, parts in enumerate(zip(*loaders, strict=True)):
        joint = order[number * size * batch : (number + 1) * size * batch]
        # Where the processes' shares are not equal, PyKinML doubles structures to fill them; here each is there once.
        assert set(joint) <= {item for part in parts for item in part}
        assert len(joint) == sum(map(len, parts)) or count % size


@pytest.mark.parametrize("module", [trainer, multi_fid_loop])
def test_main_spawns_a_process_for_each(module, tmp_path):
    args = arguments(tmp_path, "levels" if module is multi_fid_loop else "energies")
    args.pre_saved = True
    with mock.patch("torch.multiprocessing.spawn") as spawn:
        module.main(args)
    spawn.assert_called_once_with(module.spawned_trainer, (args, 2), nprocs=2)


def test_main_names_the_gpus_that_are_there(tmp_path, monkeypatch):
    args = small(tmp_path, gpus=[0, 3], pre_saved=True)
    args.ddp = True
    monkeypatch.setattr(devices, "why_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(DeviceError, match="the device is cuda:1, but there is only cuda:0: name a GPU that is there"):
        trainer.main(args)
