"""Runs that are asked to end, that meet one another in a folder, and processes of several that fail."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from test_cli import wait_for
from training_helpers import (
    HastyClock,
    Interrupter,
    assert_same_bits,
    model,
    rows,
    start_ranks,
    training_data,
    write_config,
)

from kinml_fast import lock, signals
from kinml_fast.cli import main
from kinml_fast.errors import InputError
from kinml_fast.signals import Stopped
from kinml_fast.train import Trainer, TrainingConfig, checkpoint, runs
from kinml_fast.train import config as configuration
from kinml_fast.train.board import fresh
from kinml_fast.train.ranks import restarted

PROGRAM = Path(__file__).parent / "fault_program.py"


# ---- signals ------------------------------------------------------------------------------------


def test_a_signal_has_the_exit_code_that_shells_give_it():
    assert (Stopped(signal.SIGTERM).code, Stopped(signal.SIGUSR1).code) == (143, 138)
    with pytest.raises(Stopped), signals.at_once():
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_the_first_signal_is_noted_and_a_later_one_ends(monkeypatch):
    noted: list[int] = []
    with signals.taken((signal.SIGINT, *signals.ENDING), noted.append):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # of the same request
        assert noted == [signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(signals, "_SECONDS_OF_ONE_REQUEST", -1.0)
    with signals.taken(signals.ENDING, noted.append):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(n) for n in signals.ENDING] == [signal.SIG_DFL] * 2


def test_handlers_of_others_stay():
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with signals.at_once():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert seen == [signal.SIGUSR1]
    thread = threading.Thread(target=lambda: contextlib.ExitStack().enter_context(signals.at_once()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_error_that_is_on_its_way_is_not_replaced_by_a_signal():
    def last_words() -> None:
        try:
            raise InputError("said")
        finally:
            signal.raise_signal(signal.SIGTERM)

    with signals.at_once(), pytest.raises(InputError, match="said"):
        last_words()


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_writes_a_checkpoint_between_two_batches(tmp_path, number, caplog):
    settings = TrainingConfig(epochs=2, batch_size=7, checkpoint_seconds=1e6)
    runs_of = {}
    for name in ("whole", "cut"):
        runs_of[name] = run = tmp_path / name
        act = Interrupter(2 if name == "cut" else 0, lambda: signal.raise_signal(number))
        trainer = Trainer(model(), training_data(), settings, run, progress=act, clock=HastyClock(1.0))
        if name == "whole":
            trainer.fit()
            continue
        with pytest.raises(Stopped) as caught, caplog.at_level(logging.INFO):
            trainer.fit()
        assert caught.value.code == 128 + number
        assert f"{signals.name(number)}: ends after batch 2 of epoch 0" in caplog.text
        state = checkpoint.load(run / "checkpoints/last.pt")
        assert (state["epoch"], state["batch"]) == (0, 2)
        Trainer(model(), training_data(), settings, run, resume=True).fit()
    assert rows(runs_of["whole"]) == rows(runs_of["cut"])
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_signal_in_the_last_validation_ends_the_run(tmp_path, monkeypatch):
    trainer = Trainer(model(), training_data(), TrainingConfig(epochs=1), tmp_path / "run")
    judged = trainer._evaluated_row
    monkeypatch.setattr(trainer, "_evaluated_row", lambda *a: signal.raise_signal(signal.SIGTERM) or judged(*a))
    with pytest.raises(Stopped):
        trainer.fit()
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["epoch"] == 1


def test_a_signal_while_data_are_prepared_leaves_nothing_half_written(tmp_path, monkeypatch, capsys):
    from kinml_fast.data import prepared

    config, run = write_config(tmp_path), tmp_path / "run"
    monkeypatch.setattr(prepared, "save", lambda *a: signal.raise_signal(signal.SIGTERM))
    assert main(["train", str(config)]) == 143
    assert f"ended by SIGTERM; continue with: kinml-fast train --resume {run}" in capsys.readouterr().err
    assert {path.name for path in run.iterdir()} <= {"checkpoints", "config.yaml", "train.log"}
    monkeypatch.undo()
    assert main(["train", "--resume", str(run)]) == 0


def test_sigterm_ends_the_command_with_143(tmp_path):
    config, run = write_config(tmp_path, "checkpoint_seconds: 1000"), tmp_path / "run"
    (process,) = start_ranks(1, config, "training.epochs=100000")
    wait_for(run / "train.log", "epoch ")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"ended by SIGTERM; continue with: kinml-fast train --resume {run}" in err
    assert "Traceback" not in out + err
    assert checkpoint.load(run / "checkpoints/last.pt")["epoch"] > 0


@pytest.mark.slow
def test_members_in_processes_of_their_own_write_their_checkpoints(tmp_path):
    config, run = write_config(tmp_path, "checkpoint_seconds: 1000"), tmp_path / "run"
    (process,) = start_ranks(1, config, "training.epochs=100000", "ensemble={members: 2, processes: 2}")
    for number in (1, 2):
        wait_for(run / f"member-{number}" / "train.log", "epoch ")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in err
    for number in (1, 2):
        assert checkpoint.load(run / f"member-{number}/checkpoints/last.pt")["epoch"] > 0
        assert not (run / f"member-{number}" / lock.NAME).exists()


# ---- one run in a folder ------------------------------------------------------------------------


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[int]:
    """Another process that holds a run folder; gives its number."""
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        held = lock.hold(folder)
        os.write(done, b"x" if held else b"")
        signal.pause()
    os.read(ready, 1)
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(done)


def test_a_folder_in_which_another_process_trains_is_refused_in_every_way(tmp_path, capsys):
    config, run = write_config(tmp_path), tmp_path / "run"
    assert main(["train", str(config)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with elsewhere(run) as other:
        for arguments in (
            ["train", config],
            ["train", config, "--overwrite"],
            ["train", "--resume", run],
            ["train", config, "ensemble.members=2", "--overwrite"],
            ["prepare", config],
        ):
            capsys.readouterr()
            assert main([str(argument) for argument in arguments]) == 2
            said = capsys.readouterr().err
            assert f"{run}: process {other} on {os.uname().nodename}, since 20" in said
            assert "works there: wait for its end, or choose another folder (run=NAME of a run)" in said
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=f"process {other} on"):
                Trainer(model(), training_data(), folder=run, **options)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != lock.NAME} == before
    # The other one was killed: what it left does not stand in the way.
    assert main(["train", "--resume", str(run), "training.epochs=5"]) == 0
    assert not (run / lock.NAME).exists()


def test_a_lock_ends_with_its_process_though_a_child_of_that_lives(tmp_path):
    with elsewhere(tmp_path) as other, pytest.raises(InputError, match=f"process {other} "):
        lock.hold(tmp_path)
    held = lock.hold(tmp_path)
    with elsewhere(tmp_path / "other"):  # forked while this process has the lock
        held.release()
        lock.hold(tmp_path).release()


def test_whoever_is_about_to_end_is_waited_for(tmp_path):
    with elsewhere(tmp_path) as other:
        threading.Timer(0.3, os.kill, (other, signal.SIGKILL)).start()
        lock.hold(tmp_path, patience=60.0).release()


def test_trainers_of_one_process_follow_one_another_in_a_folder(tmp_path):
    settings = TrainingConfig(epochs=2)
    finished = Trainer(model(), training_data(), settings, tmp_path)
    finished.fit()
    with pytest.raises(InputError, match="holds a run already"):
        Trainer(model(), training_data(), settings, tmp_path)
    assert not (tmp_path / lock.NAME).exists()
    abandoned = Trainer(model(), training_data(), settings, tmp_path, overwrite=True)
    assert (tmp_path / lock.NAME).exists()
    told: list[str] = []

    def meanwhile() -> None:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match="this process trains there"):
                Trainer(model(), training_data(), settings, tmp_path, **options)
        told.append("both")

    next_one = Trainer(model(), training_data(), settings, tmp_path, overwrite=True, progress=Interrupter(1, meanwhile))
    next_one.fit()
    assert told == ["both"]
    assert (tmp_path / lock.NAME).exists()  # the abandoned one may still train
    del abandoned
    assert not (tmp_path / lock.NAME).exists()


# ---- starting again -----------------------------------------------------------------------------


def test_what_was_started_again_goes_on_with_its_run(tmp_path, caplog):
    path = write_config(tmp_path)
    config = configuration.load(str(path), [])
    runs.start(config)
    for options in ({}, {"overwrite": True}):
        with caplog.at_level(logging.INFO):
            caplog.clear()
            runs.start(config, restarted=True, **options)
        assert "run: has 4 epochs, training.epochs is 4: nothing to train" in caplog.text
    other = configuration.load(str(path), ["training.seed=1"])
    with pytest.raises(InputError, match="holds a run already"):
        runs.start(other, restarted=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "metrics.csv").unlink()
    runs.start(config, restarted=True)  # it was killed before it had anything
    assert not restarted({})
    assert not restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert restarted({"SLURM_RESTART_COUNT": "1"})
    assert restarted({"TORCHELASTIC_RESTART_COUNT": "2"})


# ---- several processes --------------------------------------------------------------------------


def test_processes_that_are_started_again_do_not_read_what_was_written_before():
    store, found = torch.distributed.HashStore(), {}

    def come(attempt: int, rank: int) -> None:
        found[attempt, rank] = fresh(store, rank, 3, seconds=60.0)

    for attempt in range(3):
        threads = [threading.Thread(target=come, args=(attempt, rank)) for rank in (2, 0, 1)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)  # time to read what is old
        for thread in threads:
            thread.join()
        assert not found[attempt, 0].check(["address"])
        found[attempt, 0].set("address", str(attempt))
        assert {found[attempt, rank].get("address") for rank in range(3)} == {str(attempt).encode()}
    with pytest.raises(RuntimeError, match="not all 3 came in 0 s"):
        fresh(store, 0, 3, seconds=0.0)


def ended(processes: Sequence[subprocess.Popen], codes: Sequence[int]) -> list[str]:
    """What the processes said on their ends, which must have these exit codes; nobody says more than a sentence."""
    said = []
    try:
        for process, code in zip(processes, codes, strict=True):
            _, err = process.communicate(timeout=120)
            assert process.returncode == code, err
            assert "Traceback" not in err
            said += [line for line in err.splitlines() if line.startswith(("kinml-fast: ", "ended by", "interrupted"))]
    finally:
        for process in processes:
            process.kill()
    return said


@pytest.mark.slow
def test_a_signal_to_one_of_several_processes_ends_all_after_the_same_batch(tmp_path):
    """Also with averages, and to the end that early stopping sets."""
    options = "loss: {forces: true}, ema_decay: 0.9, early_stopping: {patience: 2, min_delta: 1e3}, epochs: 100000"
    config, run = write_config(tmp_path, "checkpoint_seconds: 1000", 20, "all"), tmp_path / "run"
    text = config.read_text().replace("epochs: 4, batch_size: 7", f"batch_size: 5, {options}")
    config.write_text(text)
    patient = "training.early_stopping.patience=100000"
    processes = start_ranks(2, config, patient)
    wait_for(run / "train.log", "epoch ")
    processes[1].send_signal(signal.SIGTERM)
    (said,) = ended(processes, [143, 143])
    assert said == f"ended by SIGTERM; continue with: kinml-fast train --resume {run}"
    epoch = checkpoint.load(run / "checkpoints/last.pt")["epoch"]
    # The run goes on until its patience ends, at once after the epochs that were without success.
    end = [f"training.epochs={epoch + 40}", "training.early_stopping.patience=null"]
    assert ended(start_ranks(2, "--resume", run, *end), [0, 0]) == []
    whole = tmp_path / "whole"
    runs.start(configuration.load(str(config), [*end, f"run={whole}"]))
    states = [checkpoint.load(path / "checkpoints/last.pt") for path in (run, whole)]
    assert_same_bits(*({k: v for k, v in state.items() if k not in ("elapsed", "metrics_length")} for state in states))
    # Early stopping ends all of them, or the only one.
    for size in (2, 1):
        shutil.rmtree(run)
        assert ended(start_ranks(size, config), [0] * size) == []
        assert rows(run)[-1]["epoch"] == "2"


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_is_named_by_another(tmp_path, killed):
    config, run = write_config(tmp_path, "loss: {forces: true}", 20, "all"), tmp_path / "run"
    processes = start_ranks(3, config, "training.epochs=100000", "training.batch_size=30")
    wait_for(run / "train.log", "epoch ")
    processes[killed].kill()
    (said,) = ended(processes, [-9 if rank == killed else 2 for rank in range(3)])
    who = f"process {killed} (process id {processes[killed].pid} on {os.uname().nodename})"
    assert said.startswith(f"kinml-fast: {who} is gone: ")
    assert "continue the run with --resume: its last checkpoint is whole" in said
    checkpoint.load(run / "checkpoints/last.pt")


@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_another(tmp_path):
    config, run = write_config(tmp_path, "loss: {forces: true}, rank_timeout_seconds: 3", 20, "all"), tmp_path / "run"
    processes = start_ranks(3, config, "training.epochs=100000", "training.batch_size=30")
    wait_for(run / "train.log", "epoch ")
    processes[1].send_signal(signal.SIGSTOP)
    for process in (processes[0], processes[2]):
        process.wait(120)
    processes[1].kill()
    (said,) = ended(processes, [2, -9, 2])
    assert f"process 1 (process id {processes[1].pid} on " in said
    assert "did not answer in time (training.rank_timeout_seconds)" in said


@pytest.mark.slow
def test_a_full_disk_ends_all_and_leaves_the_last_checkpoint(tmp_path):
    """The limit on file sizes stands for a full disk: write() fails in the middle in the same way."""
    config, run = write_config(tmp_path, "loss: {forces: true}", 20, "all"), tmp_path / "run"
    assert main(["train", str(config), "training.batch_size=30"]) == 0
    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    longer = ["training.epochs=100000", "training.checkpoint_seconds=0"]
    said = ended(start_ranks(2, "--resume", run, *longer, of_first=full), [2, 2])
    assert len(said) == 1, said
    (said,) = said
    assert said.startswith(f"kinml-fast: {run}/checkpoints/")
    assert "could not be written" in said
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before


@pytest.mark.slow
def test_errors_of_all_or_of_one_are_said_once(tmp_path):
    config = write_config(tmp_path)
    (said,) = ended(start_ranks(2, config, "training.loss.forces=true"), [2, 2])
    assert "no training structure has forces" in said
    (said,) = ended(start_ranks(2, config, of_last=["no.such=1"]), [2, 2])
    assert "unknown key no" in said
    (said,) = ended(start_ranks(2, config, of_last=["training.seed=7"]), [2, 2])
    assert "process 1 (process id" in said
    assert "has another training.seed (7 instead of 0) than process 0 (process id" in said


@pytest.mark.slow
def test_what_differs_between_processes_is_named(tmp_path):
    processes = start_ranks(2, program=[PROGRAM])
    out, err = processes[0].communicate(timeout=120)
    assert processes[1].wait(60) == processes[0].returncode == 0, err
    everyone, closed = json.loads(out)
    assert closed, "whoever waits for this process would not notice its end of the block"
    for found, turns in everyone:
        assert found["nothing"] == "nothing"
        assert "process 1 (process id" in found["configuration"]
        assert "has another training.seed (5 instead of 0) than process 0" in found["configuration"]
        assert "has another data (" in found["data"]
        assert "has another weights (" in found["weights"]
        assert turns == ["of the first", "7"]
    config = write_config(tmp_path)
    (said,) = ended(start_ranks(2, config, of_last_environment={"KINML_CPU_ISA": "baseline"}), [2, 2])
    assert "has another instruction set (baseline instead of " in said
