from __future__ import annotations

import numpy as np
import pytest
from data_helpers import SHARED, molecules, needs_shared, pykinml_split
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kinml_fast.data import sqlite
from kinml_fast.data.split import PARTS, Split
from kinml_fast.data.splits import make_split, read_tvtmsk, table, write_tvtmsk
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.errors import InputError


def mixture(*sizes: int) -> Structures:
    names = ["C", "CH", "CHH", "CHHH", "OHH", "OH"]
    return concatenate([molecules(name, size) for name, size in zip(names, sizes, strict=False)])


def numbers(split: Split) -> list[int]:
    return [len(getattr(split, part)) for part in PARTS]


def equal(a: Split, b: Split) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in PARTS)


def lines(path, *texts: str):
    path.write_text("".join(text + "\n" for text in texts))
    return path


# Counts and fractions

sizes_of_formulas = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@settings(deadline=None)
@given(sizes_of_formulas, st.tuples(st.integers(1, 90), st.integers(1, 40), st.integers(0, 40)), st.integers(0, 9))
def test_counts_are_exact_disjoint_and_stratified(sizes, amounts, seed):
    assume(sum(amounts) <= sum(sizes))
    structures = mixture(*sizes)
    split = make_split(structures, amounts, seed)
    assert numbers(split) == list(amounts)
    assert len(np.unique(split.used)) == sum(amounts)
    assert split.used.min() >= 0
    assert split.used.max() < len(structures)
    formulas = np.array(structures.formulas())
    for name in set(formulas):
        share = amounts[0] * (formulas == name).sum() / len(formulas)
        assert abs((formulas[split.train] == name).sum() - share) < 1


@settings(deadline=None)
@given(sizes_of_formulas, st.tuples(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(0, 1)), st.floats(0.5, 1))
def test_fractions_add_up(sizes, amounts, used):
    structures = mixture(*sizes)
    total = len(structures)
    fractions = np.array(amounts) * used / sum(amounts)
    assume((fractions[:2] * total >= 1).all() and (fractions[2] * total >= 1 or fractions[2] == 0))
    split = make_split(structures, fractions.tolist())
    assert (np.abs(np.array(numbers(split)) - fractions * total) < 1).all()
    assert len(np.unique(split.used)) == sum(numbers(split))


@pytest.mark.parametrize("fractions", [[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3]])
def test_fractions_of_everything_leave_nothing_out(fractions):
    for total in range(30, 60):
        assert sum(numbers(make_split(mixture(total), fractions))) == total


def test_tenths_of_thirty():
    assert numbers(make_split(mixture(30), [0.8, 0.1, 0.1])) == [24, 3, 3]


def test_formulas_with_one_structure_each_are_drawn_by_lot():
    structures = concatenate([molecules("C" * n, 1) for n in range(1, 31)])
    tests = [tuple(make_split(structures, [0.8, 0.1, 0.1], seed).test) for seed in range(5)]
    assert len(set(tests)) == 5


def test_a_seed_says_it_all():
    structures = mixture(30, 20, 10)
    assert equal(make_split(structures, [40, 10, 10], 7), make_split(structures, [40, 10, 10], 7))
    assert not equal(make_split(structures, [40, 10, 10], 7), make_split(structures, [40, 10, 10], 8))


def test_training_is_in_random_order_the_rest_sorted():
    split = make_split(mixture(50, 50), [60, 20, 20])
    assert (np.diff(split.train) < 0).any()
    assert (np.diff(split.validation) > 0).all()
    assert (np.diff(split.test) > 0).all()


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ([20, 5, 6], r"asks for 31 structures, but there are only 30 in the data: ask for fewer"),
        ([20, 0, 5], r"leaves no validation structures"),
        ([0, 5, 5], r"leaves no train structures"),
        ([1.0, 0.0, 0.0], r"leaves no validation structures"),
        ([0.98, 0.01, 0.01], r"leaves no (validation|test) structures"),
        ([0, 0, 0], r"leaves no train structures"),
        ([20.5, 5, 2], r"neither three counts nor three fractions"),
        ([0.8, 0.3, 0.1], r"neither three counts nor three fractions"),
        ([20, -5, 2], r"give three numbers"),
        ([float("nan"), 0.1, 0.1], r"give three numbers"),
        ([20, 5], r"give three numbers"),
    ],
)
def test_amounts_that_cannot_be(amounts, message):
    with pytest.raises(InputError, match=message):
        make_split(mixture(20, 10), amounts)


def test_overlapping_parts_are_refused():
    with pytest.raises(InputError, match="overlap"):
        Split(np.array([0, 1]), np.array([2]), np.array([1]))
    with pytest.raises(InputError, match="overlap"):
        Split(np.array([0, 0]), np.array([2]), np.array([1]))


# Files


@needs_shared
def test_example_split_file():
    structures = sqlite.read(SHARED / "C5H5.db")
    split = make_split(structures, [2000, 48, 0], 0, SHARED / "sample_tvt.txt")
    assert numbers(split) == [2000, 48, 64]
    assert split.test.tolist() == list(range(2048, 2112))
    assert sorted([*split.train, *split.validation]) == list(range(2048))
    assert equal(split, make_split(structures, [2000, 48, 64], 0, SHARED / "sample_tvt.txt"))
    assert numbers(make_split(structures, [0.8, 0.2, 0], 0, SHARED / "sample_tvt.txt")) == [1638, 410, 64]
    assert numbers(make_split(structures, [100, 20, 0], 0, SHARED / "sample_tvt.txt")) == [100, 20, 64]


def test_a_saved_split_comes_back_in_order(tmp_path):
    structures = mixture(30, 20, 10)
    split = make_split(structures, [30, 10, 5], 3)
    write_tvtmsk(tmp_path / "split.txt", structures, split)
    again = make_split(structures, [0.8, 0.1, 0.1], 99, tmp_path / "split.txt")
    assert equal(split, again)
    turned = structures.select(np.arange(len(structures))[::-1])
    restored = make_split(turned, [0.8, 0.1, 0.1], 99, tmp_path / "split.txt")
    assert [turned.labels[i] for i in restored.train] == [structures.labels[i] for i in split.train]
    assert [path.name for path in tmp_path.iterdir()] == ["split.txt"]


def test_a_saved_split_reads_like_pykinmls(tmp_path):
    structures = mixture(6)
    split = Split(np.array([4, 0]), np.array([1]), np.array([3, 2]))
    write_tvtmsk(tmp_path / "split.txt", structures, split)
    words = [line.split() for line in (tmp_path / "split.txt").read_text().splitlines()]
    assert [line[:2] for line in words] == [["C/5", "2"], ["C/1", "2"], ["C/2", "2"], ["C/4", "-1"], ["C/3", "-1"]]
    assert [float(line[2]) for line in words] == structures.energies[[4, 0, 1, 3, 2]].tolist()


@needs_shared
def test_pykinmls_own_order_can_be_saved(tmp_path):
    structures = sqlite.read(SHARED / "C5H5.db")
    split = pykinml_split(structures, SHARED / "sample_tvt.txt", 2000, 48, 0)
    assert numbers(split) == [2000, 48, 64]
    write_tvtmsk(tmp_path / "split.txt", structures, split)
    assert equal(split, make_split(structures, [2000, 48, 0], 5, tmp_path / "split.txt"))


def test_plain_split_file(tmp_path):
    structures = mixture(10)
    path = lines(tmp_path / "s.txt", "# comment", "", *(f"C/{i} 2" for i in range(1, 8)), "C/9 -1", "C/8 -1 -5.0")
    split = make_split(structures, [4, 2, 0], 0, path)
    assert split.test.tolist() == [8, 7]
    assert set(split.train) | set(split.validation) < set(range(7))
    assert numbers(split) == [4, 2, 2]
    assert numbers(make_split(structures, [0.7, 0.3, 0], 0, path)) == [5, 2, 2]
    assert read_tvtmsk(path).ids() == {"C": {1, 2, 3, 4, 5, 6, 7, 8, 9}}
    with pytest.raises(InputError, match=r"asks for 8 structures, but there are only 7 in the training and validation"):
        make_split(structures, [6, 2, 0], 0, path)
    with pytest.raises(InputError, match=r"has 2 test structures, but the split asks for 3: write 0"):
        make_split(structures, [4, 2, 3], 0, path)


def test_unknown_labels_are_counted(tmp_path):
    path = lines(tmp_path / "s.txt", *(f"C/{i} 2" for i in range(1, 9)), "O2/1 -1")
    with pytest.raises(InputError, match=r"s\.txt: names structures that are not in the data: C/4, C/5, C/6 … \(6 in"):
        make_split(mixture(3), [2, 1, 0], 0, path)


@pytest.mark.parametrize(
    "line",
    [
        "C/2",
        "C/2 1",
        "C/2 two",
        "C2 2",
        "/2 2",
        "C/x 2",
        "C/2 2 high",
        "C/2 2 1.0 test",
        "C/2 -1 1.0 train",
        "C/2 2 1.0 t",
        "C/2 2 1.0 train more",
    ],
)
def test_malformed_lines(tmp_path, line):
    with pytest.raises(InputError, match=r"s\.txt:2: '.*' is not a line of a split file: expected a label"):
        read_tvtmsk(lines(tmp_path / "s.txt", "C/1 2 -1.0 train" if len(line.split()) > 3 else "C/1 2", line))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["C/1 2", "C/2 2", "C/1 -1"], r"s\.txt:3: C/1 is already in line 1"),
        (["C/1 2 0 train", "C/2 2"], r"s\.txt:2: some lines say train"),
        (["# nothing"], r"s\.txt: names no structures"),
        (["C/1 2", "C/2 2"], r"s\.txt leaves no validation"),
        (["C/1 2 0 train", "C/2 -1 0 test"], r"s\.txt leaves no validation"),
    ],
)
def test_split_files_that_make_no_split(tmp_path, texts, message):
    with pytest.raises(InputError, match=message):
        make_split(mixture(5), [2, 0, 0], 0, lines(tmp_path / "s.txt", *texts))


def test_split_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"missing\.txt: cannot be read as a split file \(No such file"):
        read_tvtmsk(tmp_path / "missing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary: cannot be read as a split file \(it is not text\)"):
        read_tvtmsk(tmp_path / "binary")


def test_equal_labels_cannot_be_split_by_file(tmp_path):
    structures = mixture(3).select([0, 1, 1])
    with pytest.raises(InputError, match="two structures have the label C/2"):
        write_tvtmsk(tmp_path / "s.txt", structures, Split(np.array([0]), np.array([1]), np.array([2])))


def test_table():
    structures = mixture(30, 10)
    text = table(structures, make_split(structures, [20, 8, 4]))
    assert text.splitlines() == [
        "formula  train  validation  test  unused",
        "C           15           6     3       6",
        "CH           5           2     1       2",
        "all         20           8     4       8",
    ]
    many = table(mixture(9, 8, 7, 6), make_split(mixture(9, 8, 7, 6), [20, 5, 5]), limit=2).splitlines()
    assert len(many) == 5
    assert many[3].startswith("2 more")
    assert many[4].split() == ["all", "20", "5", "5", "0"]
