"""Runs that are killed (kill -9) and resumed end with the same bits as those that are not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_helpers import assert_same_bits, assert_same_run, write_config

from kinml_fast.deploy import model_file

COMMAND = [sys.executable, "-m", "kinml_fast.cli", "train"]
OPTIONS = (
    "ema_decay: 0.99, save_every: 40, test_every: 7, checkpoint_seconds: 0.01, "
    "optimizer: {learning_rate: 1e-2}, scheduler: {patience: 3}"
)
KILLS = int(os.environ.get("KINML_KILLS", "3"))
"""How often the run is killed."""
EPOCHS = 200 * KILLS


def train(*arguments: object) -> subprocess.Popen:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def written(path: Path) -> int:
    """When the file was last replaced; 0 if it is not there."""
    return path.stat().st_mtime_ns if path.exists() else 0


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err


@pytest.mark.parametrize("forces", [False, True])
def test_killed_at_random_moments(tmp_path, forces):
    runs = {}
    options = OPTIONS + f", loss: {{forces: {str(forces).lower()}, forces_from: 20, weighting: learned}}"
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        runs[name] = tmp_path / name / "run", write_config(tmp_path / name, options, forces="some")
    whole, config = runs["whole"]
    finish(train(config, f"training.epochs={EPOCHS}"))

    cut, config = runs["cut"]
    last = cut / "checkpoints" / "last.pt"
    generator = random.Random(0)
    killed = 0
    while killed < KILLS:
        started = (cut / "config.yaml").exists()
        process = train("--resume", cut) if started else train(config, f"training.epochs={EPOCHS}")
        # Every fifth moment lies anywhere from the start of the process on, the others in the training.
        if killed % 5 != 4:
            before = written(last)
            while process.poll() is None and written(last) == before:
                time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.2))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1
    assert killed > 0
    finish(train("--resume", cut))

    assert_same_run(whole, cut)
    assert_same_bits(*(dict(model_file.load(run / "model.pt").state_dict()) for run in (whole, cut)))
    assert sorted(p.name for p in whole.rglob("*.pt")) == sorted(p.name for p in cut.rglob("*.pt"))
    assert list(cut.rglob("*.part")) == []
