"""What is taken of data files: one description, plain as a user writes it, complete as the readers need it."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest

from kinml_fast.data import Selection
from kinml_fast.errors import ConfigError
from kinml_fast.train import config


@pytest.mark.parametrize(
    ("given", "fidelities", "read", "if_incomplete"),
    [
        ({}, (1,), (1,), "keep"),
        ({"fidelity": np.int64(3)}, (3,), (3,), "keep"),
        ({"fidelity": np.array([0, 2])}, (0, 2), (0, 2), "keep"),
        ({"fidelity": [2, 0], "incomplete": "drop"}, (2, 0), (2, 0), "drop"),
        ({"baseline": 0}, (1,), (0, 1), "error"),
        ({"fidelity": [4], "baseline": 5, "incomplete": "drop"}, (4,), (5, 4), "drop"),
    ],
)
def test_what_is_read(given, fidelities, read, if_incomplete):
    selection = Selection(**given)
    assert (selection.fidelities, selection.fidelities_read) == (fidelities, read)
    assert all(type(fidelity) is int for fidelity in selection.fidelities_read)
    assert selection.if_incomplete == if_incomplete


def test_it_cannot_be_changed():
    names = ["a", "b"]
    selection = Selection(names=names)
    names.append("c")
    assert selection.names == ("a", "b")
    assert selection == Selection(names=("a", "b"))
    assert len({selection, Selection(names=("a", "b"))}) == 1
    with pytest.raises(FrozenInstanceError):
        selection.names = None


def test_a_configuration_gives_the_selection_of_its_keys(tmp_path):
    written = {
        "fidelity": 1,
        "baseline": 0,
        "incomplete": "drop",
        "temperature": 300.0,
        "names": ["a%"],
        "energy_key": ["low_energy", "high_energy"],
        "forces_key": ["low_forces", "high_forces"],
        "stress_key": ["low_stress", "high_stress"],
        "format": "extxyz",
        "elements": ["H", "C"],
    }
    assert set(written) == {field.name for field in fields(Selection)} - {"ids"}
    assert config.DataConfig(files=["a.db"], **written).selection == Selection(**written)


def test_a_configuration_without_meaning_is_one_sentence():
    with pytest.raises(ConfigError, match=r"data is not allowed: fidelity and baseline are both 1"):
        config.from_dict({"data": {"files": ["a.db"], "baseline": 1}})
