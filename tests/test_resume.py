"""Runs that are killed (kill -9) and resumed end with the same bits as those that are not."""

from __future__ import annotations

import os

import pytest
from training_helpers import assert_same_bits, assert_same_run, finish, kill_and_resume, train, write_config

from kinml_fast.deploy import model_file

OPTIONS = (
    "ema_decay: 0.99, save_every: 40, test_every: 7, checkpoint_seconds: 0.01, "
    "optimizer: {learning_rate: 1e-2}, scheduler: {patience: 3}"
)
KILLS = int(os.environ.get("KINML_KILLS", "3"))
"""How often the run is killed."""
EPOCHS = 200 * KILLS


@pytest.mark.slow
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
    # Every fifth moment lies anywhere from the start of the process on, the others in the training.
    awaited = [None if i % 5 == 4 else last for i in range(KILLS)]
    kill_and_resume(cut, awaited, config, f"training.epochs={EPOCHS}")

    assert_same_run(whole, cut)
    assert_same_bits(*(dict(model_file.load(run / "model.pt").state_dict()) for run in (whole, cut)))
    assert sorted(p.name for p in whole.rglob("*.pt")) == sorted(p.name for p in cut.rglob("*.pt"))
    assert list(cut.rglob("*.part")) == []
