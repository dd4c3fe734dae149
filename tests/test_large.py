"""Data that are read from disk while they are needed: their file, their preparation, training on them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import threading
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
import torch
from pretend_gpu import GPU, pretended
from rank_helpers import again, start
from training_helpers import (
    Killed,
    assert_same_bits,
    assert_same_run,
    interrupted_run,
    level_data,
    model,
    on_disk,
    rows,
    training_data,
    write_config,
)

from kinml_fast import cli, datasets
from kinml_fast.data import blocks, large, prepared
from kinml_fast.data.blocks import BlockFile
from kinml_fast.data.large import LargeData
from kinml_fast.data.selection import Selection
from kinml_fast.data.split import PARTS
from kinml_fast.errors import DataError, InputError
from kinml_fast.train import Trainer, TrainingConfig, checkpoint, dataset
from kinml_fast.train.dataset import InMemory, OnDisk

ROOT = Path(__file__).parent.parent
FORCES = {"loss": {"forces": True}}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few structures, windows of a few blocks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 600)
    monkeypatch.setattr(dataset, "WINDOW_BYTES", 2500)


def settings(**keys: object) -> TrainingConfig:
    return TrainingConfig(**{"epochs": 3, "batch_size": 7, "optimizer": {"learning_rate": 0.01}, **keys})


# ---- the file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        training_data(),
        training_data(forces="some", weights=np.linspace(0, 2, 60)),
        level_data(levels=3, forces="some"),
    ],
    ids=["energies", "forces and weights", "levels"],
)
def test_what_is_written_is_read(data, small, tmp_path):
    file = on_disk(data, tmp_path).file
    whole = InMemory(model(fidelities=tuple(range(file.levels))), data, settings())
    assert (file.sizes, file.known_energies, file.known_forces) == (
        whole.sizes,
        whole.known_energies,
        whole.known_forces,
    )
    assert file.components == whole.trained_components
    for part in PARTS:
        numbers, counts, lengths = file.blocks(part)
        assert len(numbers) > 1
        assert counts.sum() == file.sizes[part]
        assert (lengths <= 600).all()
        expected = data.structures.select(getattr(data.split, part))
        found = file.read(numbers.tolist())
        for name in ("species", "coordinates", "offsets", "energies", "forces"):
            np.testing.assert_array_equal(getattr(found.structures, name), getattr(expected, name), name)
        assert found.structures.labels == expected.labels
        assert found.origin.tolist() == getattr(data.split, part).tolist()
        if data.weights is not None:
            assert found.weights.tolist() == data.weights[found.origin].tolist()


@pytest.mark.parametrize("place", [0, 0.02, 0.5, 0.999])
def test_a_damaged_file_is_one_sentence(place, small, tmp_path):
    path = on_disk(training_data(forces="all"), tmp_path).file.path
    raw = bytearray(path.read_bytes())
    raw[int(place * len(raw))] ^= 4
    path.write_bytes(raw)

    def read() -> None:
        file = BlockFile(path)
        file.read(np.concatenate([file.blocks(part)[0] for part in PARTS]).tolist())

    with pytest.raises(DataError, match=r"data\.blocks: is (damaged|no data set) .*: run kinml-fast prepare again$"):
        read()


@pytest.mark.parametrize("length", [0, 10, 25, 0.5, -1])
def test_a_file_that_is_cut_off_is_one_sentence(length, small, tmp_path):
    path = on_disk(training_data(), tmp_path).file.path
    size = path.stat().st_size
    os.truncate(path, int(length * size) if isinstance(length, float) else length % size)
    with pytest.raises(DataError, match=r"data\.blocks: is .*: run kinml-fast prepare again$"):
        BlockFile(path)


def test_a_file_that_shrinks_during_a_run_is_one_sentence(small, tmp_path):
    data = on_disk(training_data(), tmp_path)
    trainer = Trainer(model(), data, settings())
    os.truncate(data.file.path, 300)
    with pytest.raises(DataError, match=r"data\.blocks: is damaged \(it is cut off\): run kinml-fast prepare again$"):
        trainer.fit()


def test_a_full_disk_leaves_the_older_file(small, tmp_path, monkeypatch):
    before = on_disk(training_data(), tmp_path).file.path.read_bytes()
    write, left = blocks.BlockWriter._write, iter(range(5))

    def full(*arguments):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    monkeypatch.setattr(blocks.BlockWriter, "_write", full)
    with pytest.raises(InputError, match=r"data\.blocks: could not be written \(No space left .*nothing was changed"):
        on_disk(training_data(forces="all"), tmp_path)
    assert (tmp_path / "data.blocks").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["data.blocks"]


# ---- order --------------------------------------------------------------------------------------


def data_on_disk(folder: Path, **keys: object) -> OnDisk:
    return OnDisk(model(), on_disk(training_data(90), folder), settings(**keys))


def test_an_order_is_one_of_blocks_and_depends_on_seed_and_epoch_only(small, tmp_path):
    data = data_on_disk(tmp_path)
    orders = [data.order(epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(120)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert orders[1] == data_on_disk(tmp_path).order(1).tolist() != data_on_disk(tmp_path, seed=1).order(1).tolist()
    # A window has whole blocks, each of consecutive structures, and mixes them.
    counts = data._file.blocks("train")[1]
    block_of = np.repeat(np.arange(len(counts)), counts)
    seen: set[int] = set()
    for stretch, group in zip(data.epoch(1, 7), data._groups(1), strict=True):
        assert len(stretch.window) >= len(stretch.order)
        place = len(seen) and sum(counts[list(seen)])
        of_window = block_of[orders[1][place : place + counts[group].sum()]]
        assert set(of_window) == set(group.tolist())
        assert not seen & set(of_window)
        assert len(group) == 1 or (np.diff(of_window) != 0).sum() > len(group)
        seen |= set(of_window)
    assert len(data._groups(1)) > 4


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("size", [1, 7, 16, 50, 120, 500])
def test_batches_are_those_of_the_order_from_any_stretch_on(size, shuffle, small, tmp_path):
    data = data_on_disk(tmp_path, batch_size=size, shuffle=shuffle)
    train = training_data(90).split.train
    expected = [train[batch.numpy()].tolist() for batch in torch.from_numpy(data.order(2)).split(size)]
    stretches = list(data.epoch(2, size))
    assert [stretch.first for stretch in stretches] == sorted({stretch.first for stretch in stretches})
    for first in [stretch.first for stretch in stretches]:
        found = []
        for stretch in data.epoch(2, size, first):
            assert stretch.first == first + len(found)
            found += [stretch.window.origin[batch].tolist() for batch in stretch.order.split(size)]
        assert found == expected[first:]
    if not shuffle:
        assert list(itertools.chain(*expected)) == train.tolist()


def test_what_fits_into_a_window_has_the_order_of_memory(tmp_path):
    data = training_data(90)
    there, here = data_on_disk(tmp_path), InMemory(model(), data, settings())
    assert there.order(3).tolist() == here.order(3).tolist()


def test_parts_are_read_in_their_order(small, tmp_path):
    data, given = data_on_disk(tmp_path), training_data(90)
    for part in PARTS:
        windows = list(data.windows(part))
        found = [window.origin[where].tolist() for window, where in windows]
        assert list(itertools.chain(*found)) == getattr(given.split, part).tolist()
        assert len(windows) > 1


# ---- training -----------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict, dict]] = {
    "energies": ({}, {"forces": "all"}),
    "energies in float32": ({"dtype": "float32"}, {"forces": "all"}),
    "forces": (FORCES, {"forces": "all"}),
    "float32": ({**FORCES, "dtype": "float32"}, {"forces": "some"}),
    "learned": ({"loss": {"forces": True, "weighting": "learned", "energy_per_atom": True}}, {"forces": "some"}),
    "weights": ({**FORCES, "ema_decay": 0.9}, {"forces": "some", "weights": np.linspace(0, 2, 60)}),
    "levels": ({"loss": {"forces": True, "level_weights": [0.5, 1.0]}}, {"levels": 2, "forces": "some"}),
    "some epochs": ({"loss": {"forces": True, "forces_from": 1}}, {"forces": "all"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_memory_with_the_same_order(kind, small, tmp_path, monkeypatch):
    keys, form = KINDS[kind]
    data, config = (level_data if "levels" in form else training_data)(**form), settings(**keys)
    there = on_disk(data, tmp_path)
    made = [model(dtype=getattr(torch, config.dtype), fidelities=tuple(range(there.file.levels))) for _ in range(2)]
    disk = Trainer(made[0], there, config)
    monkeypatch.setattr(InMemory, "order", lambda self, epoch: disk.data.order(epoch))
    memory = Trainer(made[1], data, config)
    for epoch in range(3):
        ours, theirs = disk.train_epoch(), memory.train_epoch()
        assert ours.energy.rmse == pytest.approx(theirs.energy.rmse, rel=1e-12), epoch
        if ours.forces is not None:
            assert ours.forces.mae == pytest.approx(theirs.forces.mae, rel=1e-12)
    assert_same_bits(dict(made[0].state_dict()), dict(made[1].state_dict()))
    for part in PARTS:
        for a, b in zip(disk.evaluate(part, True), memory.evaluate(part, True), strict=True):
            assert (a.energies.count, a.forces.count) == (b.energies.count, b.forces.count)
            assert a.forces.square == pytest.approx(b.forces.square, rel=1e-6)


def test_forces_are_reported_beside_energies_alone(small, tmp_path):
    data = training_data(forces="all")
    a, b = (Trainer(model(), given, settings(shuffle=False)).fit() for given in (data, on_disk(data, tmp_path)))
    for part in PARTS:
        assert a.errors[part].rmse == pytest.approx(b.errors[part].rmse, rel=1e-12)
        assert a.forces[part].rmse == pytest.approx(b.forces[part].rmse, rel=1e-12)


@pytest.mark.parametrize("stop_at", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 9, 13))])
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_same_bits(stop_at, small, tmp_path):
    data, config = on_disk(training_data(forces="some"), tmp_path), settings(**FORCES)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    Trainer(model(), data, config, whole).fit()
    interrupted_run(cut, config, stop_at, data=data)
    assert checkpoint.load(cut / "checkpoints" / "last.pt")["residuals"].numel() < 20
    Trainer(model(), data, config, cut, resume=True).fit()
    assert_same_run(whole, cut)


@pytest.mark.parametrize("kind", ["forces", "learned", "some epochs"])
def test_windows_are_copied_to_a_gpu(kind, small, tmp_path):
    keys, form = KINDS[kind]
    data, made = on_disk(training_data(**form), tmp_path), [model(), model()]
    here = Trainer(made[0], data, settings(**keys)).fit()
    with pretended():
        there = Trainer(made[1].to(GPU), data, settings(**keys)).fit()
    torch.testing.assert_close(
        made[1].networks.weights.detach().cpu(), made[0].networks.weights.detach(), rtol=1e-9, atol=0
    )
    assert there.errors["test"].rmse == pytest.approx(here.errors["test"].rmse, rel=1e-9)


def test_a_checkpoint_belongs_to_its_data(small, tmp_path):
    config = settings()
    interrupted_run(tmp_path / "run", config, 3, data=on_disk(training_data(), tmp_path))
    for name, data in {"a": training_data(weights=np.linspace(1, 2, 60)), "b": training_data(31)}.items():
        with pytest.raises(DataError, match="belongs to other data"):
            Trainer(model(), on_disk(data, tmp_path, name), config, tmp_path / "run", resume=True)


def test_further_terms_of_the_loss_get_the_structures_of_their_batch(small, tmp_path):
    data, seen = training_data(forces="all"), []

    def extra(trained, batch):
        seen.append(batch.structures.tolist())
        sizes = data.structures.sizes[batch.structures.numpy()]
        assert batch.offsets.diff().tolist() == sizes.tolist()
        return trained(batch.coordinates, batch.species, batch.offsets).square().mean()

    trainer = Trainer(model(), on_disk(data, tmp_path), settings(**FORCES), extra_losses={"extra": extra})
    trainer.train_epoch()
    order = data.split.train[trainer.data.order(0)].tolist()
    assert list(itertools.chain(*seen)) == order


def test_the_thread_that_reads_ahead_ends_with_the_epoch(small, tmp_path):
    def full(*arguments):
        raise Killed

    trainer = Trainer(model(), on_disk(training_data(), tmp_path), settings())
    trainer.progress.batch = full
    trainer._rhythm.due = lambda: True
    trainer._rhythm.tick = lambda draw, save: draw()
    with pytest.raises(Killed):
        trainer.train_epoch()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"jacobian": "stored"}, "training.jacobian=stored do not go together"),
        ({"loss": {"forces": True}}, r"no training structure has forces \(data: .*data\.blocks\)"),
        ({"loss": {"level_weights": [1.0, 1.0]}}, "level_weights has 2 entries, but there are one level"),
    ],
)
def test_what_does_not_go_is_one_sentence(keys, sentence, tmp_path):
    with pytest.raises(InputError, match=sentence):
        Trainer(model(), on_disk(training_data(), tmp_path), settings(**keys))


# ---- preparation and whole runs -----------------------------------------------------------------


def both(folder: Path, files: list, selection: Selection = Selection(), **keys: object):
    """The same data prepared in memory and on disk."""
    here = prepared.prepare(files, selection, **keys)
    return here, large.prepare(files, selection, **keys, path=folder / "large.blocks")


def check_equal(here: prepared.Prepared, there: LargeData) -> None:
    assert there.elements == here.elements
    assert (there.fidelities, there.baseline, there.file.about["hash"]) == (
        here.fidelities,
        here.baseline,
        here.hash,
    )
    np.testing.assert_allclose(there.sae, here.sae, rtol=0, atol=1e-8)
    for part in PARTS:
        indices = getattr(here.split, part)
        expected, found = here.structures.select(indices), there.file.read(there.file.blocks(part)[0].tolist())
        assert found.structures.labels == expected.labels
        assert found.origin.tolist() == indices.tolist()
        for name in ("species", "coordinates", "offsets", "energies", "forces"):
            np.testing.assert_array_equal(getattr(found.structures, name), getattr(expected, name), name)
        if here.weights is not None:
            assert found.weights.tolist() == here.weights[indices].tolist()


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    """Pieces of a few structures in all stages."""
    monkeypatch.setattr(large, "AT_ONCE", 37)
    monkeypatch.setattr(large, "SORTED_BYTES", 20_000)


@pytest.mark.parametrize(
    ("selection", "keys"),
    [
        (Selection(), {}),
        (Selection(elements=("H", "O", "C")), {"split": (50, 20, 30), "split_seed": 3}),
        (Selection(fidelity=(0, 1)), {"sae": ["fit", "none"]}),
        (Selection(baseline=0), {"weights": {"C3H3/%": 2, "C3H2/2": 0}}),
    ],
    ids=["one level", "some", "levels", "difference"],
)
def test_preparation_in_little_memory_gives_the_same(selection, keys, little, tmp_path):
    files = ["shipped:C3H2.db", "shipped:C3H3.db"]
    check_equal(*both(tmp_path, files, selection, **keys))
    assert [path.name for path in tmp_path.iterdir()] == ["large.blocks"]


def test_preparation_of_frames_and_of_a_split_file(little, tmp_path, caplog):
    config = write_config(tmp_path, forces="some")
    assert cli.main(["prepare", str(config)]) == 0
    split = tmp_path / "run" / "split.txt"
    for keys in ({}, {"split_file": split}, {"weights": {"data.xyz/3": 4.0}}):
        here, there = both(tmp_path, [tmp_path / "data.xyz"], **keys)
        check_equal(here, there)
    large.write_split(tmp_path / "again.txt", there)
    again = prepared.prepare([tmp_path / "data.xyz"], split_file=tmp_path / "again.txt")
    assert again.split.train.tolist() == here.split.train.tolist()


def test_structures_that_lack_a_level_are_left_out(little, tmp_path, caplog):
    frames = []
    for i in range(60):
        frame = ase.Atoms("CH", [[0, 0, 0], [0, 0, 1 + 0.01 * i]], info={"e0": -1.0 * i})
        if i % 3 and i > 40:
            frame.info["e1"] = -2.0 * i
        frames.append(frame)
    ase.io.write(tmp_path / "data.xyz", frames, format="extxyz")
    selection = Selection(fidelity=(0, 1), energy_key=("e0", "e1"), incomplete="drop")
    with caplog.at_level("INFO"):
        check_equal(*both(tmp_path, [tmp_path / "data.xyz"], selection, split=(0.6, 0.2, 0.2)))
    assert "left out 47 of 60 structures" in caplog.text
    with pytest.raises(DataError, match=r"energies are missing \(fidelity 1: 37\)"):
        large.prepare(
            [tmp_path / "data.xyz"],
            Selection(fidelity=(0, 1), energy_key=("e0", "e1"), incomplete="error"),
            path=tmp_path / "x",
        )


def test_prepared_data_are_recognised(little, tmp_path, caplog):
    files, path = ["shipped:C3H2.db"], tmp_path / "x.blocks"
    large.prepare(files, path=path)
    before = path.stat().st_mtime_ns
    with caplog.at_level("INFO"):
        large.prepare(files, path=path)
        assert "up to date" in caplog.text
        assert path.stat().st_mtime_ns == before
        large.prepare(files, path=path, split_seed=1)
        assert "data or settings have changed" in caplog.text
        raw = path.read_bytes()
        path.write_bytes(raw[:-1])
        large.prepare(files, path=path, split_seed=1)
        assert "is damaged" in caplog.text
    assert path.read_bytes() == raw


def test_a_run_from_disk_is_the_run_from_memory(tmp_path):
    config = write_config(tmp_path, "loss: {forces: true}", forces="all")
    for name in ("true", "false"):
        assert cli.main(["train", str(config), f"data.on_disk={name}", f"run={tmp_path / name}"]) == 0
    a, b = tmp_path / "true", tmp_path / "false"
    assert rows(a) == rows(b)
    for name in ("split.txt", "report/errors.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    assert_same_bits(*(checkpoint.load(run / "checkpoints" / "best.pt")["weights"] for run in (a, b)))
    assert (a / "prepared.blocks").exists()
    assert not (a / "prepared.h5").exists()
    assert cli.main(["train", "--resume", str(a), "training.epochs=5"]) == 0


@pytest.mark.slow
def test_data_that_are_large_for_the_memory_are_read_from_disk(tmp_path, monkeypatch):
    config, size = write_config(tmp_path), (tmp_path / "data.xyz").stat().st_size
    for available, expected in ((5 * size, False), (3 * size, True), (None, False)):
        monkeypatch.setattr("kinml_fast.data.stored.available_memory", lambda available=available: available)
        run = tmp_path / f"run{available}"
        assert cli.main(["train", str(config), "training.epochs=1", f"run={run}"]) == 0
        assert (run / "prepared.blocks").exists() == expected
        assert f"on_disk: {str(expected).lower()}" in (run / "config.yaml").read_text()
        # It goes on from where the data are, however much memory there is now.
        monkeypatch.setattr("kinml_fast.data.stored.available_memory", lambda: 1 << 60)
        assert cli.main(["train", "--resume", str(run), "training.epochs=2"]) == 0


@pytest.mark.parametrize("other", ["ensemble.members=2", "training.jacobian=stored"])
def test_what_needs_all_data_in_memory_is_refused(other, tmp_path, capsys):
    config = write_config(tmp_path)
    assert cli.main(["train", str(config), "data.on_disk=true", other]) == cli.USAGE_ERROR
    assert f"data.on_disk does not go together with {other.partition('=')[0]}" in capsys.readouterr().err


def test_python_of_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "large_data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    (tmp_path / "data").mkdir()
    shutil.copy(datasets.path("C3H3.db"), tmp_path / "data")
    exec(block, {"model": model(), "config": settings()})
    assert (tmp_path / "runs" / "large" / "model.pt").exists()


@pytest.mark.slow
def test_several_processes_give_the_same_bits_from_disk(tmp_path):
    again(check_several_processes, tmp_path)


def check_several_processes(tmp_path: Path) -> None:
    config = write_config(tmp_path, "loss: {forces: true}", 60, "all")
    program = (
        "import sys\nfrom kinml_fast import cli\nfrom kinml_fast.data import blocks\n"
        "from kinml_fast.train import dataset\n"
        "blocks.BLOCK_BYTES, dataset.WINDOW_BYTES = 4000, 15000; sys.exit(cli.main(sys.argv[1:]))"
    )
    (tmp_path / "program.py").write_text(program)
    for size in (1, 2):
        arguments = ["training.batch_size=50", "data.on_disk=true", f"run={tmp_path / str(size)}"]
        done = start(size, str(tmp_path / "program.py"), "train", str(config), *arguments)
        assert done.returncode == 0, done.stderr
    states = [checkpoint.load(tmp_path / size / "checkpoints" / "last.pt") for size in "12"]
    assert_same_bits(*({k: v for k, v in state.items() if k not in ("elapsed", "metrics_length")} for state in states))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """Peak memory after an epoch of so many structures, of which the latter take 104 MB more than the former."""
    program = ROOT / "benchmarks" / "large.py"
    peaks = []
    for count in (200_000, 400_000):
        path = tmp_path / f"{count}.blocks"
        assert start(1, str(program), "make", str(path), str(count)).returncode == 0
        done = start(1, str(program), "train", str(path), "--threads", "1", "--batch", "500", "--validate")
        assert done.returncode == 0, done.stderr
        peaks.append(json.loads(done.stdout)["peak_MB"])
    assert peaks[1] - peaks[0] < 52  # with other programs beside it the peak was seen to vary by 40
