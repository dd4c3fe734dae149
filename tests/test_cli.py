"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import csv
import os
import pty
import re
import signal
import subprocess
import sys
import time

import ase
import ase.io
import pytest
import torch
from training_helpers import rows, write_config

from kinml_fast import __version__, _library
from kinml_fast.cli import main
from kinml_fast.deploy import model_file

COMMAND = [sys.executable, "-m", "kinml_fast.cli"]


def complaint(capsys, *arguments):
    """The one line that a mistake gives, with exit code 2."""
    capsys.readouterr()  # what came before
    assert main([str(a) for a in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("kinml-fast: ")
    return lines[0]


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    expected = {"kinml_fast": __version__, "torch": torch.__version__, "threads": str(torch.get_num_threads())}
    for name, value in expected.items():
        assert re.search(rf"^{name} +{re.escape(value)}$", text, re.MULTILINE)
    for value in _library.build_info().values():
        assert value in text


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_that_wait_give_their_core_away_soon(given, expected):
    """Decided before torch is loaded, which loads OpenMP, and not against the user."""
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = (
        "import os, sys, kinml_fast.cli as cli; assert 'torch' not in sys.modules; cli.main(['info']); "
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=clean | given, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == expected, done.stderr


def test_from_data_to_predictions(tmp_path, capsys):
    config = write_config(tmp_path)
    run = tmp_path / "run"

    assert main(["prepare", str(config)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"C2H2 +21 ", text)
    assert "single-atom energies, eV: C " in text
    assert sorted(path.name for path in run.iterdir()) == ["prepared.h5", "split.txt"]
    assert len((run / "split.txt").read_text().splitlines()) == 60

    assert main(["train", str(config), "training.epochs=3", "network.layers=[5,1]"]) == 0
    text = capsys.readouterr().out
    assert "prepared.h5: up to date, 60 structures" in text
    assert "epoch 2/2: train RMSE" in text
    assert "best epoch 2 of 3" in text
    assert [r["epoch"] for r in rows(run) if r["split"] == "train"] == ["0", "1", "2"]
    assert {path.name for path in run.iterdir()} >= {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "model.pt",
        "prepared.h5",
        "report",
        "train.log",
    }
    assert len(list(run.glob("events.out.tfevents.*"))) == 1
    assert "layers: [5, 1]" in (run / "config.yaml").read_text()
    assert model_file.load(run / "model.pt").networks.layers[0] == [5, 1]
    log = (run / "train.log").read_text()
    assert "single-atom energies" in log
    assert "epoch 2/2" in log

    data = tmp_path / "data.xyz"
    assert main(["evaluate", str(run / "model.pt"), str(data), "--csv", str(tmp_path / "errors.csv")]) == 0
    assert "C2H2" in capsys.readouterr().out
    assert len((tmp_path / "errors.csv").read_text().splitlines()) == 61

    assert main(["predict", str(run / "model.pt"), str(data), "-o", str(tmp_path / "out.xyz")]) == 0
    frames = ase.io.read(tmp_path / "out.xyz", ":")
    assert len(frames) == 60
    assert frames[0].get_forces().shape == (4, 3)


def test_training_on_forces_with_weights(tmp_path, capsys):
    config = write_config(tmp_path, "loss: {forces: true, weighting: learned}, test_every: 1", forces="some")
    weights = tmp_path / "weights.txt"
    weights.write_text("data.xyz/% 2\ndata.xyz/3 0\n")
    assert main(["train", str(config), f"data.weights={weights}"]) == 0
    text = capsys.readouterr().out
    assert "weights in the loss: 0 (1 structures), 2 (59)" in text
    assert re.search(r"forces: \d+ of 42 train, \d of 9 validation, \d of 9 test", text)
    assert re.search(r"epoch 3/3: train RMSE \S+ and \S+, validation RMSE \S+ and \S+ kcal/mol and kcal/mol/Å", text)
    run = tmp_path / "run"
    (head, *_) = (run / "metrics.csv").read_text().splitlines()
    assert head.endswith("structures_per_second,log_sigma_energy,log_sigma_forces")
    for row in rows(run):
        assert float(row["forces_rmse"]) > 0
        assert (row["log_sigma_forces"] == "") == (row["split"] != "train")

    # The run has its own copy of the weights.
    weights.unlink()
    assert main(["train", "--resume", str(run), "training.epochs=5", "training.loss.forces_until=4"]) == 0
    assert [r["forces_rmse"] == "" for r in rows(run) if r["split"] == "train"] == [False] * 4 + [True]
    assert main(["evaluate", str(run / "model.pt"), str(tmp_path / "data.xyz"), "--plots", str(tmp_path / "p")]) == 0
    assert "forces MAE" in capsys.readouterr().out
    assert (tmp_path / "p" / "parity_evaluated.png").exists()


def test_an_ensemble_from_data_to_predictions(tmp_path, capsys):
    config = write_config(tmp_path, "loss: {forces: true}", forces="all")
    run, data = tmp_path / "run", tmp_path / "data.xyz"
    assert main(["train", str(config), "ensemble.members=2", "training.epochs=2"]) == 0
    text = capsys.readouterr().out
    assert "member 2 of 2" in text
    assert re.search(r"^ *ensemble +- +\d", text, re.MULTILINE)
    assert main(["train", "--resume", str(run), "training.epochs=3"]) == 0
    assert [r["epoch"] for r in rows(run / "member-2") if r["split"] == "train"] == list("012")

    capsys.readouterr()
    assert main(["evaluate", str(run), str(data), "--csv", str(tmp_path / "errors.csv")]) == 0
    whole = capsys.readouterr().out
    assert "rank correlation" in whole
    with (tmp_path / "errors.csv").open() as file:
        assert file.readline().strip().endswith("forces_max,energy_std,forces_std")
    # Its members, by a pattern, are the same ensemble, but for the factors of its deviations.
    assert main(["evaluate", f"{run}/member-*", str(data), "--csv", str(tmp_path / "again.csv")]) == 0
    found = []
    for name in ("errors.csv", "again.csv"):
        with (tmp_path / name).open(newline="") as file:
            found.append([{k: v for k, v in row.items() if "std" not in k} for row in csv.DictReader(file)])
    assert found[0] == found[1]
    assert main(["predict", str(run), str(data), "-o", str(tmp_path / "out.xyz")]) == 0
    assert all(frame.info["energy_std"] > 0 for frame in ase.io.read(tmp_path / "out.xyz", ":"))
    assert "is a member of an ensemble" in complaint(capsys, "train", "--resume", run / "member-1")


def test_levels_and_differences_from_data_to_predictions(tmp_path, capsys):
    shared = (
        "descriptor: {n_radial: 4, n_angular: 2, n_sections: 2}\nnetwork: {layers: [8, 1]}\ntraining: {epochs: 1}\n"
    )
    for name, data in (("levels", "fidelity: [0, 1]"), ("delta", "fidelity: 1, baseline: 0"), ("low", "fidelity: 0")):
        text = f"run: {tmp_path}/{name}\ndata: {{files: ['shipped:C2H2.db'], {data}}}\n{shared}"
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["train", str(tmp_path / f"{name}.yaml")]) == 0
    capsys.readouterr()
    levels, delta = tmp_path / "levels", tmp_path / "delta"
    assert main(["evaluate", str(levels), "shipped:C2H2.db"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines[2:4]] == ["0", "1"]
    assert main(["evaluate", str(levels), "shipped:C2H2.db", "--fidelity", "1"]) == 0
    alone = capsys.readouterr().out.splitlines()
    assert alone[2] == lines[3]
    assert lines[2] not in alone
    assert "has the fidelity 0 and 1, but 3 is asked for" in complaint(
        capsys, "evaluate", levels, "shipped:C2H2.db", "--fidelity", "3"
    )
    with pytest.raises(SystemExit):
        main(["evaluate", str(levels), "shipped:C2H2.db", "--fidelity", "high"])
    assert "'high' is no whole number and no list of such, like 0,1" in capsys.readouterr().err

    assert main(["evaluate", str(delta), "shipped:C2H2.db"]) == 0
    assert "differences of fidelity 1 to fidelity 0" in capsys.readouterr().out
    ase.io.write(tmp_path / "in.xyz", ase.Atoms("C2H2", [[0, 0, 0.6], [0, 0, -0.6], [0, 0, 1.7], [0, 0, -1.7]]))
    out = tmp_path / "out.xyz"
    assert main(["predict", str(levels), str(tmp_path / "in.xyz"), "-o", str(out)]) == 0
    frame = ase.io.read(out)
    assert frame.info["energy_fidelity0"] != frame.get_potential_energy()
    assert "give base" in complaint(capsys, "predict", delta, tmp_path / "in.xyz", "-o", out)
    assert main(["predict", str(delta), str(tmp_path / "in.xyz"), "-o", str(out), "--base", f"{tmp_path}/low"]) == 0
    whole = ase.io.read(out).get_potential_energy()
    assert main(["predict", f"{tmp_path}/low", str(tmp_path / "in.xyz"), "-o", str(out)]) == 0
    assert abs(whole - ase.io.read(out).get_potential_energy()) > 1e-3


def test_forces_that_are_not_there(tmp_path, capsys):
    config = write_config(tmp_path)
    message = complaint(capsys, "train", config, "training.loss.forces=true")
    assert "no training structure has forces (data: data.xyz)" in message
    assert "set training.loss.forces=false" in message


def test_resume_with_more_epochs_from_another_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path)
    text = config.read_text().replace(f"{tmp_path}/", "")
    config.write_text(text)
    assert main(["train", "small.yaml"]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["train", "--resume", str(tmp_path / "run"), "training.epochs=6"]) == 0
    assert [r["epoch"] for r in rows(tmp_path / "run") if r["split"] == "train"] == list("012345")
    assert "epochs: 6" in (tmp_path / "run/config.yaml").read_text()
    assert "single-atom energies" in capsys.readouterr().out


def test_overwrite_may_stand_anywhere(tmp_path, capsys):
    config = write_config(tmp_path)
    assert main(["train", str(config), "training.epochs=1"]) == 0
    message = complaint(capsys, "train", config)
    assert "run: holds a run already: continue it with `kinml-fast train --resume" in message
    assert main(["train", str(config), "--overwrite", "training.epochs=2"]) == 0
    assert len([r for r in rows(tmp_path / "run") if r["split"] == "train"]) == 2


def test_keys_without_effect_are_mentioned(tmp_path, capsys):
    config = write_config(tmp_path)
    assert main(["train", str(config), "training.epochs=1", "training.optimizer.momentum=0.5"]) == 0
    assert "training.optimizer.momentum has no effect with training.optimizer.name = adam" in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys):
    config = write_config(tmp_path)
    assert "did you mean training.epochs?" in complaint(capsys, "train", config, "training.epoch=3")
    assert "no such file" in complaint(capsys, "train", tmp_path / "none.yaml")
    assert "'epochs': " not in complaint(capsys, "train", config, "epochs")
    assert "give a configuration file" in complaint(capsys, "train")
    assert "holds no run" in complaint(capsys, "train", "--resume", tmp_path)
    assert "give one of them" in complaint(capsys, "train", "--resume", tmp_path, "--overwrite")
    assert "gone.db" in complaint(capsys, "prepare", config, f"data.files=['{tmp_path}/gone.db']")
    assert "there are only 60" in complaint(capsys, "prepare", config, "data.split=[1000,1,1]")
    assert "model.pt" in complaint(capsys, "evaluate", tmp_path / "model.pt", tmp_path / "data.xyz")
    assert "model.pt" in complaint(capsys, "predict", tmp_path / "model.pt", tmp_path / "data.xyz", "-o", "x.xyz")
    assert not (tmp_path / "run" / "metrics.csv").exists()


def test_resume_refuses_what_does_not_fit(tmp_path, capsys):
    config = write_config(tmp_path)
    assert main(["train", str(config)]) == 0
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != "train.log"}
    assert "another architecture (layers is [8, 4, 1]" in complaint(
        capsys, "train", "--resume", run, "network.layers=[9,4,1]"
    )
    assert "training.batch_size = 7" in complaint(capsys, "train", "--resume", run, "training.batch_size=9")
    assert "unknown key" in complaint(capsys, "train", "--resume", run, "training.bath_size=9")
    (run / "checkpoints" / "last.pt").write_bytes(b"PK half of it")
    assert "last.pt: is no readable checkpoint" in complaint(capsys, "train", "--resume", run)
    (run / "checkpoints" / "last.pt").write_bytes(before[run / "checkpoints" / "last.pt"])
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_unknown_options_and_commands(capsys):
    for arguments in (["train", "example", "--overwite"], ["fly"], [], ["info", "more"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_run_started_from_python_is_not_resumed_here(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("training: {epochs: 3}\n")
    assert "was started from Python" in complaint(capsys, "train", "--resume", tmp_path)


def test_help_does_not_import_torch():
    code = (
        "import sys; from kinml_fast.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'matplotlib', 'tensorboard', 'rich', 'ase') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--resume RUN" in done.stdout


def test_training_starts_without_the_slow_imports():
    code = (
        "import sys; import kinml_fast.train\n"
        "print([m for m in ('matplotlib', 'tensorboard', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def wait_for(path, text):
    """Wait until a file of another process contains a text."""
    for _ in range(1200):
        if path.exists() and text in path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} does not contain {text}")


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(tmp_path):
    config = write_config(tmp_path, "save_every: 1000")
    command = [*COMMAND, "train", str(config), "training.epochs=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "train.log", "epoch ")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"continue with: kinml-fast train --resume {tmp_path}/run" in err
    assert "Traceback" not in out + err
    epoch = int(rows(tmp_path / "run")[-1]["epoch"])
    assert main(["train", "--resume", str(tmp_path / "run"), f"training.epochs={epoch + 2}"]) == 0


def test_progress_is_live_on_a_terminal(tmp_path):
    config = write_config(tmp_path)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "train", str(config)], stdout=theirs, stderr=theirs, env=os.environ | {"COLUMNS": "160"}
    )
    os.close(theirs)
    drawn = b""
    while True:
        try:
            block = os.read(ours, 4096)
        except OSError:  # how Linux reports that the other side is closed
            break
        if not block:
            break
        drawn += block
    os.close(ours)
    assert process.wait() == 0
    text = drawn.decode()
    assert "\x1b[" in text
    assert "best epoch" in text
    assert "epoch 3/3: train RMSE" not in text
    assert "epoch 3/3: train RMSE" in (tmp_path / "run/train.log").read_text()
