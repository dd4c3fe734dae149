"""Runs that are killed (kill -9) and resumed end with the same bits as those that are not."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from training_helpers import (
    assert_same_bits,
    assert_same_run,
    finish,
    kill_and_resume,
    start_ranks,
    train,
    write_config,
)

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


@pytest.mark.slow
@pytest.mark.parametrize(("size", "members"), [(2, 1), (3, 2)])
def test_ranks_killed_at_random_moments(tmp_path, size, members):
    """One of the processes is killed, and torchrun starts all again with the command of the beginning."""
    runs, epochs = {}, EPOCHS // 4
    arguments = [f"training.epochs={epochs}", f"ensemble.members={members}"]
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        options = OPTIONS + ", loss: {forces: true, forces_from: 20, weighting: learned}"
        runs[name] = tmp_path / name / "run", write_config(tmp_path / name, options, forces="some")
    whole, config = runs["whole"]
    finish(train(config, *arguments))

    cut, config = runs["cut"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", f"--max-restarts={KILLS}"]
    program = ["-m", "kinml_fast.cli", "train", str(config), *arguments]
    (torchrun,) = start_ranks(1, program=[*launch, *program])
    drain = threading.Thread(target=torchrun.communicate)
    drain.start()
    generator, killed = random.Random(0), 0
    last, seen = cut / ("checkpoints" if members == 1 else "member-1/checkpoints") / "last.pt", set()
    while killed < KILLS and torchrun.poll() is None:
        time.sleep(0.02)
        ranks = ranks_of(torchrun.pid)
        if len(ranks) < size or seen & {*ranks.values()} or not last.exists():
            continue
        # Every fifth moment lies anywhere from the start of the processes on, the others in the training.
        before = last.stat().st_mtime_ns
        while killed % 5 != 4 and torchrun.poll() is None and last.stat().st_mtime_ns == before:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(ranks[generator.randrange(size)], signal.SIGKILL)
        seen |= {*ranks.values()}
        killed += 1
    drain.join(timeout=1800)
    assert torchrun.returncode == 0
    assert killed == KILLS
    for name in ("",) if members == 1 else ("member-1", "member-2"):
        assert_same_run(whole / name, cut / name)
    assert_same_bits(*(dict(model_file.load(run / "model.pt").state_dict()) for run in (whole, cut)))
    assert list(cut.rglob("*.part")) == []


def ranks_of(torchrun: int) -> dict[int, int]:
    """The process ids of the ranks that torchrun has started, by number."""
    found = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
            for entry in Path(f"/proc/{child}/environ").read_text().split("\0"):
                if entry.startswith("RANK="):
                    found[int(entry[5:])] = int(child)
    return found
