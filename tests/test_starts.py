"""Ways to start several processes, and what is said where they do not find one another or cannot share a run."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import torch
import yaml
from rank_helpers import again, free_port, sentences, start, together
from training_helpers import model, rows, training_data, write_config

from kinml_fast import devices
from kinml_fast.errors import ConfigError, DeviceError, InputError, RankError
from kinml_fast.train import Trainer, TrainingConfig, meeting
from kinml_fast.train.meeting import Meeting, found, hosts
from kinml_fast.train.ranks import ALONE, Ranks, joined, present

TESTS = Path(__file__).parent
TRAIN = ("-m", "kinml_fast.cli", "train")
TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "12345"}
SRUN = {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NODELIST": "node[05-08]",
    "SLURM_JOB_ID": "4711",
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def of_srun(rank: int, size: int, **more: str) -> dict[str, str]:
    """The variables of a task of SLURM on this computer."""
    here = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)}
    return {**SRUN, **here, "SLURM_STEP_NODELIST": "localhost", **more}


# ---- variables ----------------------------------------------------------------------------------


def test_torchrun_says_who_a_process_is():
    assert found(TORCHRUN) == Meeting(3, 4, 1, "here", 12345)
    assert found({**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == Meeting(3, 4, 1, "here", 12345, agent=True)
    assert found(without(TORCHRUN, "LOCAL_RANK")).local == 3
    assert found({**TORCHRUN, meeting.SECONDS: "2.5"}).seconds == 2.5
    assert found({**SRUN, **TORCHRUN}).address == "here"  # torchrun inside of srun


def test_slurm_says_who_a_process_is():
    place = found(SRUN)
    assert (place.rank, place.size, place.local, place.address) == (3, 4, 1, "node07")
    assert found({**SRUN, "SLURM_PROCID": "0"}).port == place.port
    ports = {found({**SRUN, "SLURM_STEP_ID": str(i), "SLURM_JOB_ID": str(j)}).port for i in range(9) for j in range(9)}
    assert len(ports) == 81
    assert all(1024 <= port < 32768 for port in ports)
    mine = found({**SRUN, "MASTER_ADDR": "there", "MASTER_PORT": "777"})
    assert (mine.address, mine.port) == ("there", 777)
    assert found(without(SRUN, "SLURM_STEP_NODELIST")).address == "node05"
    assert found(without(SRUN, "SLURM_STEP_NUM_TASKS")).size == 8


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {**SRUN, "WORLD_SIZE": "1"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of salloc
    ],
)
def test_what_is_no_group_is_one_process(variables):
    assert found(variables) is None
    with joined(variables) as ranks:
        assert ranks.alone
        assert ranks.is_first


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            without(TORCHRUN, "RANK", "MASTER_PORT"),
            "WORLD_SIZE is set but RANK, MASTER_PORT not: start .* with torchrun",
        ),
        ({**TORCHRUN, "RANK": "x"}, "RANK is 'x', which is no number"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT is 70000: give a free port"),
        ({**TORCHRUN, meeting.SECONDS: "soon"}, f"{meeting.SECONDS} is 'soon': give a number of seconds"),
        ({**TORCHRUN, meeting.SECONDS: "0"}, "give a number of seconds"),
        (without(SRUN, "SLURM_PROCID"), "task of SLURM, but SLURM_PROCID is not set: start .* with srun, or set WORLD"),
        (without(SRUN, "SLURM_STEP_ID"), "SLURM_STEP_ID is not set"),
        ({**without(SRUN, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), "SLURM_PROCID": "0"}, "SLURM_NTASKS is not set"),
        (
            {**without(SRUN, "SLURM_NODELIST", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"), "SLURM_PROCID": "0"},
            "SLURM_NODELIST, SLURM_JOB_ID is not",
        ),
        ({**SRUN, "SLURM_STEP_NODELIST": "node[1-"}, r"'node\[1-' is no host list of SLURM, .*: set MASTER_ADDR"),
    ],
)
def test_variables_that_are_not_whole_are_one_sentence(variables, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught, joined(variables):
        pass
    assert "\n" not in str(caught.value)


def test_variables_that_all_lack_are_said_by_the_first():
    for variables in (without(SRUN, "SLURM_JOB_ID"), without(TORCHRUN, "MASTER_ADDR")):
        with pytest.raises(RankError):
            found(variables)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],other", ["node01", "node02", "node03", "node07", "other"]),
        ("n[9-11]-ib.x,m", ["n9-ib.x", "n10-ib.x", "n11-ib.x", "m"]),
        ("r[0-1]n[1-2]", ["r0n1", "r0n2", "r1n1", "r1n2"]),
        ("a,b", ["a", "b"]),
        ("[1-2]", ["1", "2"]),
    ],
)
def test_host_lists(text, names):
    assert hosts(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "a,", "n[1-2", "n]1[", "n[]", "n[a-b]", "n[2-1]", "a b"])
def test_what_is_no_host_list(text):
    with pytest.raises(ConfigError, match="is no host list"):
        hosts(text)


def test_processes_of_one_program_meet_where_those_of_others_do_not(monkeypatch):
    places = [meeting.of_children(rank, 2, {}) for rank in range(2)]
    assert [place.rank for place in places] == [place.local for place in places] == [0, 1]
    assert places[0].port == places[1].port
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert meeting.of_children(0, 2, {}).port != places[0].port
    assert meeting.of_children(0, 2, {"MASTER_PORT": "777", "MASTER_ADDR": "there"}).port == 777


# ---- devices ------------------------------------------------------------------------------------


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    second = Ranks(5, 8, 1)
    assert second.device("cpu") == torch.device("cpu")
    if devices.why_no_gpu():
        assert second.device("auto") == torch.device("cpu")
        with pytest.raises(DeviceError, match="the device is cuda, but"):
            second.device("cuda")
    monkeypatch.setattr(devices, "why_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    assert second.device("cuda") == second.device("auto") == torch.device("cuda:1")
    with pytest.raises(DeviceError, match="process 2 on this computer needs cuda:2, but the last GPU is cuda:1: start"):
        Ranks(6, 8, 2).device("auto")
    with pytest.raises(DeviceError, match=r"training.device is cuda:1, but several processes take a GPU each: give"):
        second.device("cuda:1")
    assert Ranks().device("cuda:1") == torch.device("cuda:1")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(DeviceError, match="has no NCCL"):
        second.device("cuda")


def test_a_group_that_has_nothing_for_the_cpu_is_refused(monkeypatch):
    assert present() is ALONE
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    with pytest.raises(ConfigError, match=r"called with the backend nccl, .* give it gloo, or cpu:gloo,cuda:nccl"):
        present()


# ---- per rank -----------------------------------------------------------------------------------


def test_batch_and_rate_of_each_process_become_those_of_all():
    given = TrainingConfig(batch_size=7, per_rank=["batch_size", "learning_rate"])
    of_three = given.for_ranks(3)
    assert (of_three.batch_size, of_three.optimizer.learning_rate, of_three.per_rank) == (21, 3e-3, [])
    assert of_three.for_ranks(3) == of_three
    only_batch = TrainingConfig(batch_size=7, per_rank=["batch_size"]).for_ranks(2)
    assert (only_batch.batch_size, only_batch.optimizer.learning_rate) == (14, 1e-3)
    assert TrainingConfig(batch_size=7).for_ranks(4) == TrainingConfig(batch_size=7)
    assert Trainer(model(), training_data(), given).config == given.for_ranks(1)


@pytest.mark.slow
def test_a_run_keeps_batch_and_rate_on_another_number_of_processes(tmp_path):
    again(check_per_rank, tmp_path)


def check_per_rank(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, "loss: {forces: true}", 30, "all"))
    run, other = tmp_path / "two", tmp_path / "one"
    both = "training.per_rank=[batch_size, learning_rate]"
    done = start(2, *TRAIN, config, f"run={run}", "training.epochs=2", both)
    assert done.returncode == 0, done.stderr
    assert "2 processes: batches of 14 structures, learning rate 0.002" in done.stdout
    kept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["training"]
    assert (kept["batch_size"], kept["optimizer"]["learning_rate"], kept["per_rank"]) == (14, 2e-3, [])
    done = start(1, *TRAIN, "--resume", str(run), "training.epochs=3", both)
    assert done.returncode == 2
    assert "training.per_rank cannot change" in done.stderr
    assert start(1, *TRAIN, "--resume", str(run), "training.epochs=3").returncode == 0
    values = ["training.batch_size=14", "training.optimizer.learning_rate=2e-3"]
    assert start(1, *TRAIN, config, f"run={other}", "training.epochs=3", *values).returncode == 0
    assert [row for row in rows(run) if row["split"] != "test"] == [
        row for row in rows(other) if row["split"] != "test"
    ]


def test_more_processes_than_structures_in_a_batch():
    data, config = training_data(), TrainingConfig(batch_size=3)
    with pytest.raises(ConfigError, match=r"4 processes cannot share a batch of 3: start fewer, or set .* to 4 or"):
        Trainer(model(), data, config, ranks=Ranks(1, 4, 1))
    Trainer(model(), data, config, ranks=Ranks(1, 3, 1))


# ---- processes ----------------------------------------------------------------------------------


def test_a_mistake_that_all_find_is_said_by_one(tmp_path):
    again(check_mistake_of_all, tmp_path)


def check_mistake_of_all(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    done = start(2, *TRAIN, str(config), "training.batch_size=1")
    sentence = "2 processes cannot share a batch of 1: start fewer, or set training.batch_size to 2 or more"
    assert sentences(done) == [sentence]
    # torchrun itself always ends with 1; its report has our exit code and the sentence.
    assert done.returncode == 1
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert f"traceback : {sentence}\n" in done.stderr


def test_tasks_of_slurm_train_together(tmp_path):
    again(check_tasks_of_slurm, tmp_path)


def check_tasks_of_slurm(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    tasks = [of_srun(rank, 2, MASTER_PORT=free_port()) for rank in range(2)]
    tasks[1]["MASTER_PORT"] = tasks[0]["MASTER_PORT"]
    both = together([[*TRAIN, config]] * 2, tasks)
    assert [one.returncode for one in both] == [0, 0], both
    assert sum(one.stdout.count("best epoch") for one in both) == 1
    assert len(rows(tmp_path / "run")) == 2 * 4 + 1
    both = together([[*TRAIN, config]] * 2, tasks)
    assert [one.returncode for one in both] == [2, 2], both
    assert len(sentences(*both)) == 1
    assert "holds a run already" in sentences(*both)[0]


def test_processes_that_do_not_find_one_another():
    few = {"WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port(), meeting.SECONDS: "0.5"}
    nowhere = {**few, "MASTER_ADDR": "nowhere.invalid"}
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for variables, reason in [
            ({**few, "RANK": "0"}, "1/4 clients joined"),  # waits for those that were not started
            ({**few, "RANK": "2", "LOCAL_RANK": "0"}, "refused"),  # the first one of another computer
            ({**nowhere, "RANK": "0"}, "nowhere.invalid:"),
            ({**nowhere, "RANK": "2", "LOCAL_RANK": "0"}, "nowhere.invalid:"),
            ({**few, "RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}, "in use"),
        ]:
            with pytest.raises(InputError, match=reason) as caught, joined(variables):
                pass
            assert not isinstance(caught.value, RankError)
            sentence = str(caught.value)
            assert sentence.startswith("the 4 processes have not found one another at ")
            assert sentence.endswith(f"or {meeting.SECONDS} to a longer time")
            assert "\n" not in sentence
    # Another one on the same computer leaves saying it to the first one there.
    with pytest.raises(RankError), joined({**nowhere, "RANK": "3", "LOCAL_RANK": "1"}):
        pass


@pytest.mark.slow
def test_two_agents_of_torchrun_stand_for_two_nodes(tmp_path):
    again(check_two_agents, tmp_path)


def check_two_agents(tmp_path: Path) -> None:
    config = str(write_config(tmp_path, "loss: {forces: true}", 30, "all"))
    meet = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}")
    agent = ["-m", "torch.distributed.run", *meet, "--rdzv-id=nodes", *TRAIN, config, f"run={tmp_path / 'nodes'}"]
    both = together([agent, agent], [{}, {}])
    assert [one.returncode for one in both] == [0, 0], both
    assert sum(one.stdout.count("best epoch") for one in both) == 1
    assert start(1, *TRAIN, config, f"run={tmp_path / 'one'}").returncode == 0
    assert rows(tmp_path / "nodes") == rows(tmp_path / "one")


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_find_one_another(tmp_path):
    again(check_second_attempt, tmp_path)


def check_second_attempt(tmp_path: Path) -> None:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=1")
    (done,) = together([[*launch, str(TESTS / "restart_program.py")]])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "attempt 1: 3 processes"


@pytest.mark.slow
def test_a_loop_of_ones_own_with_torchs_data_parallel(tmp_path):
    again(check_own_loop, tmp_path)


def check_own_loop(tmp_path: Path) -> None:
    done = start(2, str(TESTS / "loop_program.py"))
    assert done.returncode == 0, done.stderr
    difference, moved = map(float, done.stdout.split())
    assert moved > 0.05
    assert difference < 1e-12
