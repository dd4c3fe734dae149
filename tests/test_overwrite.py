"""Nothing that a user has is lost: runs that are replaced, folders with files of their own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from training_helpers import write_config

from kinml_fast.cli import main
from kinml_fast.train.folder import RunFolder


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files by their names in the folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """A configuration whose run is there, with a note of its user among the plots."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    config = write_config(tmp_path)
    assert main(["train", str(config)]) == 0
    (tmp_path / "run/report/notes.txt").write_text("mine")
    return config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.files=[typo.xyz]", "typo.xyz: cannot be read"),
        ("data.split=[1000,1,1]", "there are only"),
        ("training.loss.forces=true", "no training structure has forces"),
        ("ensemble={members: 100, vary: fold}", "folds"),
        ("start.model=missing.pt", "missing.pt"),
    ],
)
def test_a_mistake_leaves_the_run_that_was_to_be_replaced(trained, tmp_path, capsys, override, sentence):
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert main(["train", str(trained), "--overwrite", override]) == 2
    assert sentence in capsys.readouterr().err
    assert contents(tmp_path / "run") == before
    assert main(["train", "--resume", str(tmp_path / "run"), "training.epochs=5"]) == 0


def test_a_run_is_replaced_when_the_new_one_has_begun(trained, tmp_path):
    before = contents(tmp_path / "run")
    assert main(["train", str(trained), "--overwrite", "training.epochs=1"]) == 0
    after = contents(tmp_path / "run")
    assert after["metrics.csv"] != before["metrics.csv"]
    assert after["prepared.h5"] == before["prepared.h5"]
    assert {name for name in after if "tfevents" not in name} == {name for name in before if "tfevents" not in name}
    assert sum("tfevents" in name for name in after) == 1
    assert (tmp_path / "run/report/notes.txt").read_text() == "mine"
    assert main(["train", str(trained), "--overwrite", "ensemble.members=2"]) == 0
    assert main(["train", str(trained), "--overwrite"]) == 0
    assert not [name for name in contents(tmp_path / "run") if name.startswith(("member-", ".previous"))]


@pytest.mark.parametrize("reached", ["set aside", "half set aside", "begun"])
def test_a_process_that_is_killed_while_it_replaces_a_run(trained, tmp_path, reached):
    folder, before = RunFolder(tmp_path / "run"), contents(tmp_path / "run")
    folder.create(overwrite=True)  # by a process that ends here, whose lock has gone with it
    (folder.path / "config.yaml").write_text("of the new run")
    if reached == "half set aside":
        (folder.path / ".previous/complete").unlink()
        (folder.path / "config.yaml").unlink()
    if reached == "begun":
        folder.last.write_text("of the new run")
    with folder.hold():
        after = contents(folder.path)
    after.pop(".lock")
    if reached == "begun":
        assert set(after) == {"config.yaml", "checkpoints/last.pt", "report/notes.txt", "prepared.h5", "split.txt"}
    else:
        assert after == before


def test_prepare_leaves_the_data_of_a_run_alone(trained, tmp_path, capsys):
    before = contents(tmp_path / "run")
    assert main(["prepare", str(trained), "data.split_seed=7"]) == 2
    assert "holds a run, which keeps its data" in capsys.readouterr().err
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["config.yaml", "model.pt"])
@pytest.mark.parametrize("command", ["train", "prepare"])
def test_a_file_that_no_run_has_written_stays(tmp_path, capsys, monkeypatch, name, command):
    config = write_config(tmp_path)
    mine = tmp_path / name
    if name == "config.yaml":
        config = config.rename(mine)
    else:
        mine.write_text("mine")
    text = mine.read_text()
    monkeypatch.chdir(tmp_path)
    assert main([command, str(config), "run=."]) == 2
    assert "choose another folder with run=NAME" in capsys.readouterr().err
    assert mine.read_text() == text
