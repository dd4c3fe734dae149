"""From a SQLite file to descriptors: what the user waits for before the first epoch."""

from __future__ import annotations

import torch
from tasks import c5h5_file

from kinml_fast.data import sqlite
from kinml_fast.data.structures import Structures
from kinml_fast.nn import AEV, AEVParameters


def test_read_database(benchmark):
    benchmark.group = "prepare"
    structures = benchmark.pedantic(lambda: sqlite.read([c5h5_file()]), rounds=15, warmup_rounds=2)
    benchmark.extra_info.update(form="read SQLite", structures=len(structures))


def test_read_and_describe(benchmark):
    benchmark.group = "prepare"
    aev = AEV(AEVParameters.aevmod(("C", "H")))

    def prepare() -> Structures:
        structures = sqlite.read([c5h5_file()])
        aev(*(torch.from_numpy(a) for a in (structures.coordinates, structures.species, structures.offsets)))
        return structures

    structures = benchmark.pedantic(prepare, rounds=15, warmup_rounds=2)
    benchmark.extra_info.update(form="read SQLite and compute AEVs", structures=len(structures))
