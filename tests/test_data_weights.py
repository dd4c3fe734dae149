"""Weights of single structures in the loss: from a mapping, from a file, through the prepared data."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import molecules

from kinml_fast.data import sqlite
from kinml_fast.data.prepared import load, prepare
from kinml_fast.data.weights import resolve, table
from kinml_fast.errors import InputError

LABELS = ("C2H2/1", "C2H2/12", "CH3/1", "a_b.xyz/1", "acb.xyz/1")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"CH3/1": 2.5}, [1, 1, 2.5, 1, 1]),
        ({"C%": 0.5, "C2H2/_": 0}, [0, 0.5, 0.5, 1, 1]),
        ({"CH3/1": 3, "%/1": 2}, [2, 1, 2, 2, 2]),  # the last that fits
        ({"a_b.xyz/1": 4}, [1, 1, 1, 4, 1]),  # a label is itself before it is a pattern
        ({"a_b.xyz/%": 4}, [1, 1, 1, 4, 4]),
    ],
)
def test_labels_and_patterns(tmp_path, weights, expected):
    assert resolve(weights, LABELS).tolist() == expected
    path = tmp_path / "weights.txt"
    lines = [f"  {label}\t{weight}" for label, weight in weights.items()]
    path.write_text("\n".join(["# label weight", "", *lines]) + "\n", encoding="utf-8")
    assert resolve(path, LABELS).tolist() == expected


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"CH3/1": -1.0}, r"data\.weights: CH3/1 has the weight -1.0: give a number that is not negative"),
        ({"CH3/1": float("inf")}, "has the weight inf"),
        ({"CH4/%": 2.0, "ch3/1": 1.0}, r"no structure of the data is called CH4/%, ch3/1 \(the first is C2H2/1\)"),
        ({"c2h2/%": 2.0}, "is called c2h2/%"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(InputError, match=message):
        resolve(weights, LABELS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as a file of weights"),
        (b"\xff\xfe\x00", "it is not text"),
        (b"CH3/1 2\nCH3/1\n", r"w\.txt:2: expected a label and a weight like 'C5H5/17 2.5', found 'CH3/1'"),
        (b"CH3/1 2 3\n", r"w\.txt:1: expected"),
        (b"CH3/1 two\n", r"w\.txt:1: expected"),
        (b"CH3/1 -2\n", r"w\.txt: CH3/1 has the weight -2.0"),
        (b"CH5/1 2\n", r"w\.txt: no structure of the data is called CH5/1"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, text, message):
    if text is not None:
        (tmp_path / "w.txt").write_bytes(text)
    with pytest.raises(InputError, match=message) as caught:
        resolve(tmp_path / "w.txt", LABELS)
    assert str(caught.value).startswith(str(tmp_path / "w.txt"))


def test_counts_as_text():
    assert table(np.array([1, 1, 2.5, 0, 1])) == "0 (1 structures), 1 (3), 2.5 (1)"
    assert table(np.ones(4)) == "1 (4 structures)"
    assert table(np.arange(10.0)) == "10 different ones from 0 to 9, mean 4.5"


def test_prepared_data_keep_the_weights_of_the_chosen_structures(tmp_path):
    sqlite.write(tmp_path / "C2H2.db", {1: molecules("CCHH", 20)}, temperatures=300)
    labels = sqlite.read([tmp_path / "C2H2.db"]).labels
    file, path = tmp_path / "weights.txt", tmp_path / "data.h5"
    file.write_text("".join(f"{label} {i}\n" for i, label in enumerate(labels)))

    data = prepare(tmp_path / "C2H2.db", split=[10, 3, 3], weights=file, path=path)
    assert len(data.weights) == 16
    expected = {label: float(i) for i, label in enumerate(labels)}
    assert data.weights.tolist() == [expected[label] for label in data.structures.labels]
    np.testing.assert_array_equal(load(path).weights, data.weights)

    # Other weights are other data, and none are none.
    hashes = [data.hash]
    for weights in ({"C2H2/%": 2.0, labels[0]: 3.0}, {labels[0]: 3.0, "C2H2/%": 2.0}, None):
        other = prepare(tmp_path / "C2H2.db", split=[10, 3, 3], weights=weights, path=path)
        hashes.append(other.hash)
    assert other.weights is None
    assert load(path).weights is None
    file.write_text("C2H2/% 2\n")
    hashes.append(prepare(tmp_path / "C2H2.db", split=[10, 3, 3], weights=file).hash)
    assert len(set(hashes)) == 5
