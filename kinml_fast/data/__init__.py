"""Data: reading, splitting, single-atom energies, the prepared data set."""

from kinml_fast.data.levels import join as join_levels
from kinml_fast.data.prepared import Prepared, prepare
from kinml_fast.data.sources import DescriptorSource, read
from kinml_fast.data.split import Split
from kinml_fast.data.splits import make_split, write_tvtmsk
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures, concatenate

__all__ = [
    "DescriptorSource",
    "Prepared",
    "Split",
    "StoredDescriptors",
    "Structures",
    "concatenate",
    "join_levels",
    "make_split",
    "prepare",
    "read",
    "write_tvtmsk",
]
