from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import SHARED, molecules, needs_shared, same

from kinml_fast.data import prepared as module
from kinml_fast.data import sqlite
from kinml_fast.data.files import replacing
from kinml_fast.data.prepared import Prepared, load, prepare, save
from kinml_fast.data.selection import Selection
from kinml_fast.data.split import PARTS
from kinml_fast.data.splits import write_tvtmsk
from kinml_fast.data.structures import concatenate
from kinml_fast.errors import InputError

DESCRIPTOR = {"n_radial": 16, "cutoffs": (5.2, 3.8)}


@pytest.fixture
def files(tmp_path) -> list[Path]:
    for symbols, stem in [("CCHH", "C2H2"), ("CHHH", "CH3")]:
        structures = molecules(symbols, 20, seed=len(stem))
        sqlite.write(tmp_path / f"{stem}.db", {1: structures}, temperatures=[300] * 10 + [500] * 10)
    return [tmp_path / "C2H2.db", tmp_path / "CH3.db"]


def equal(a: Prepared, b: Prepared) -> bool:
    return (
        same(a.structures, b.structures)
        and all(np.array_equal(getattr(a.split, part), getattr(b.split, part)) for part in PARTS)
        and np.array_equal(a.sae, b.sae)
        and a.descriptor == b.descriptor
        and a.hash == b.hash
    )


def test_the_second_run_takes_what_the_first_saved(files, tmp_path, monkeypatch, caplog):
    path = tmp_path / "data.h5"
    first = prepare(files, descriptor=DESCRIPTOR, path=path)
    assert first.descriptor == {"n_radial": 16, "cutoffs": [5.2, 3.8]}
    assert [len(getattr(first.split, part)) for part in PARTS] == [32, 4, 4]
    stamp = path.stat().st_mtime_ns
    monkeypatch.setattr(module.sources, "read", None)  # would fail if it were called
    with caplog.at_level(logging.INFO):
        second = prepare(files, descriptor=DESCRIPTOR, path=path)
    assert equal(first, second)
    assert path.stat().st_mtime_ns == stamp
    assert "up to date, 40 structures" in caplog.text


def test_forces_may_be_absent(tmp_path):
    structures = concatenate([molecules("CH", 8, forces=False), molecules("OH", 8)])
    for part, stem in [(structures.select(range(8)), "CH"), (structures.select(range(8, 16)), "OH")]:
        sqlite.write(tmp_path / f"{stem}.db", {1: part}, temperatures=1)
    both = prepare([tmp_path / "CH.db", tmp_path / "OH.db"], split=[8, 4, 4], path=tmp_path / "a.h5")
    assert equal(load(tmp_path / "a.h5"), both)
    assert np.isnan(both.structures.forces).sum() == 48
    none = prepare(tmp_path / "CH.db", split=[4, 2, 2], path=tmp_path / "b.h5")
    assert equal(load(tmp_path / "b.h5"), none)
    assert none.structures.forces is None


@pytest.mark.parametrize(
    "change",
    [
        {"split": [20, 10, 10]},
        {"split_seed": 1},
        {"selection": Selection(temperature=300)},
        {"selection": Selection(names=["%"])},
        {"sae": "none"},
        {"sae": {"C": 1.0, "H": 2.0}},
        {"selection": Selection(elements=["H", "C"])},
        {"descriptor": {"n_radial": 8}},
        {"selection": Selection(energy_key="energy")},
    ],
)
def test_each_setting_counts(files, tmp_path, change):
    settings = {"split": [10, 5, 5], "descriptor": DESCRIPTOR}
    first = prepare(files, **settings, path=tmp_path / "data.h5")
    second = prepare(files, **{**settings, **change}, path=tmp_path / "data.h5")
    assert first.hash != second.hash
    assert equal(load(tmp_path / "data.h5"), second)


@pytest.mark.parametrize(
    ("selection", "settings", "expected"),
    [
        (Selection(), {}, "13a9dcb134cbf38f5a6ce70f857c917ff3ea878865157dae59c36caf940731f0"),
        (
            Selection(fidelity=(0, 1), names=("%md%", "%nm%"), temperature=300, elements=("H", "C")),
            {
                "split": [4, 2, 2],
                "split_seed": 3,
                "sae": ["fit", "none"],
                "weights": {"C2H2/%": 2},
                "descriptor": {
                    "n_radial": 4,
                    "n_angular": 2,
                    "n_sections": 2,
                    "cutoffs": (5.2, 3.8),
                    "beta": 0.95,
                    "backend": "native",
                },
            },
            "6245780048945d5d64ba063839af667e172709120480de777cb8e113f5c7e15b",
        ),
        (
            Selection(baseline=0, incomplete="drop", energy_key=["a", "b"], forces_key=["c", "d"]),
            {"sae": {"C": -1.0, "H": 2}},
            "8128b73cf972df1cbe55b16ed611146a65bb0dbd39e1e4760bdbdfdacf27844a",
        ),
    ],
)
def test_files_of_earlier_versions_are_recognised(selection, settings, expected):
    assert prepare("shipped:C2H2.db", selection, **settings).hash == expected


def test_contents_count_and_folders_do_not(files, tmp_path):
    first = prepare(files).hash
    assert prepare([tmp_path / "." / path.name for path in files]).hash == first
    (tmp_path / "moved").mkdir()
    moved = [path.rename(tmp_path / "moved" / path.name) for path in files]
    assert prepare(moved).hash == first
    assert prepare(moved[::-1]).hash != first
    sqlite.write(moved[0], {1: molecules("CCHH", 20, seed=77)}, temperatures=300)
    assert prepare(moved).hash != first


def test_a_split_file_counts(files, tmp_path):
    data = prepare(files, split=[20, 10, 10])
    path = tmp_path / "split.txt"
    write_tvtmsk(path, data.structures, data.split)
    again = prepare(files, split_file=path)
    assert [again.structures.labels[i] for i in again.split.train] == [
        data.structures.labels[i] for i in data.split.train
    ]
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert prepare(files, split_file=path).hash != again.hash


def test_structures_outside_the_split_are_left_out(files, tmp_path):
    data = prepare(files, split=[10, 4, 2])
    assert len(data.structures) == 16
    assert sorted(data.split.used) == list(range(16))
    everything = sqlite.read(files)
    for i, label in enumerate(data.structures.labels):
        assert data.structures.energies[i] == everything.energies[everything.labels.index(label)]
    (tmp_path / "s.txt").write_text("".join(f"CH3/{i} {2 if i < 9 else -1}\n" for i in range(1, 12)))
    listed = prepare(files, split=[6, 2, 0], split_file=tmp_path / "s.txt")
    assert set(listed.structures.formulas()) == {"CH3"}
    assert len(listed.structures) == 11
    assert [listed.structures.labels[i] for i in listed.split.test] == ["CH3/9", "CH3/10", "CH3/11"]


def test_single_atom_energies_see_no_test_structure(files):
    data = prepare(files, split=[20, 10, 10])
    spoiled = replace(data.structures, energies=data.structures.energies.copy())
    spoiled.energies[data.split.test] += 1000
    counts = spoiled.counts()
    fitted = np.concatenate([data.split.train, data.split.validation])
    assert np.array_equal(data.sae, module.sae_module.fit(counts[fitted], spoiled.energies[fitted], ["C", "H"]))


@needs_shared
def test_example(tmp_path):
    def run():
        return prepare(
            SHARED / "C5H5.db", split=[2000, 48, 0], split_file=SHARED / "sample_tvt.txt", path=tmp_path / "data.h5"
        )

    first = run()
    assert first.sae == pytest.approx([-1035.4398438, -16.97113695], rel=1e-9)
    assert [len(getattr(first.split, part)) for part in PARTS] == [2000, 48, 64]
    assert equal(first, run())


# Bad input


def test_unknown_ids_of_a_split_file(files, tmp_path):
    (tmp_path / "s.txt").write_text("".join(f"CH3/{i} 2\n" for i in range(15, 30)))
    with pytest.raises(InputError, match=r"s\.txt: .*CH3\.db: has no structure CH3/21, CH3/22, CH3/23 … \(9 in all\)"):
        prepare(files, split=[5, 2, 0], split_file=tmp_path / "s.txt")
    (tmp_path / "s.txt").write_text("CH3/1 2\nCH3/2 2\nC9/1 -1\n")
    with pytest.raises(InputError, match=r"s\.txt: names structures that are not in the data: C9/1"):
        prepare(files, split=[1, 1, 0], split_file=tmp_path / "s.txt")


@pytest.mark.parametrize("keep", [0, 5, 500, 5000, -1])
def test_half_a_file_is_made_anew(files, tmp_path, caplog, keep):
    path = tmp_path / "data.h5"
    first = prepare(files, path=path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"data\.h5: is damaged \(.*\): run kinml-fast prepare again"):
        load(path)
    assert equal(prepare(files, path=path), first)
    assert "is damaged" in caplog.text
    assert "anew" in caplog.text
    assert equal(load(path), first)


def test_no_flipped_bit_goes_unnoticed(files, tmp_path):
    path = tmp_path / "data.h5"
    first = prepare(files, path=path)
    image = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.integers(0, len(image), 300):
        path.write_bytes(image[:position] + bytes([image[position] ^ (1 << rng.integers(8))]) + image[position + 1 :])
        try:
            assert equal(load(path), first)  # bits that mean nothing
        except InputError:
            refused += 1
    assert refused > 100


def test_another_version_is_made_anew(files, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_VERSION", 0)
    prepare(files, path=tmp_path / "data.h5")
    monkeypatch.undo()
    with pytest.raises(InputError, match="not prepared data of this version"):
        load(tmp_path / "data.h5")
    prepare(files, path=tmp_path / "data.h5")
    assert "not prepared data of this version" in caplog.text
    assert len(load(tmp_path / "data.h5").structures) == 40


def test_data_files_are_not_overwritten(files):
    before = files[0].read_bytes()
    with pytest.raises(InputError, match="is one of the data files"):
        prepare(files, path=files[0])
    assert files[0].read_bytes() == before


def test_missing_file_and_folder(files, tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        load(tmp_path / "data.h5")
    with pytest.raises(InputError, match=r"data\.h5: cannot be written \(No such file"):
        prepare(files, path=tmp_path / "missing" / "data.h5")


def test_a_full_disk_leaves_nothing_behind(files, tmp_path):
    """The limit on file sizes stands for a full disk: write() fails in the middle in the same way."""
    old = prepare(files, path=tmp_path / "data.h5")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    script = (
        "import resource, sys\n"
        "from kinml_fast.data.prepared import prepare\n"
        "from kinml_fast.data import sqlite\n"
        "from kinml_fast.errors import InputError\n"
        "structures = sqlite.read(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for action in (lambda: prepare(sys.argv[1], split_seed=5, path=sys.argv[2]),\n"
        "               lambda: sqlite.write(sys.argv[1], {1: structures}, temperatures=1)):\n"
        "    try:\n"
        "        action()\n"
        "    except InputError as error:\n"
        "        sys.stdout.write(str(error) + '\\n')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, files[0], tmp_path / "data.h5"], capture_output=True, text=True)
    first, second = run.stdout.splitlines()
    assert first == f"{tmp_path}/data.h5: could not be written (File too large): nothing was changed", run.stderr
    assert second.startswith(f"{files[0]}: could not be written (")
    assert second.endswith("nothing was changed")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert equal(load(tmp_path / "data.h5"), old)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"

    def write(text: str, interrupted: bool) -> None:
        with replacing(path) as temporary:
            temporary.write_text(text)
            if interrupted:
                raise KeyboardInterrupt

    write("old", False)
    with pytest.raises(KeyboardInterrupt):
        write("half", True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write("new", False)
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_saving_twice_gives_the_same_bytes(files, tmp_path):
    data = prepare(files)
    save(tmp_path / "a.h5", data)
    save(tmp_path / "b.h5", data)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
