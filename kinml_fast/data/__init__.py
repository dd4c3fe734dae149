"""Data, stage by stage.

`Selection` says what to take of files; `read` gives `Structures`; a `Split` divides them; `TrainingData` are both with
single-atom energies and weights, and `prepare` makes `Prepared`, training data of files that are recognised on the next
run. `LargeData` are training data in a file, read while they are needed. `kinml_fast.train` makes of either its
`Dataset`, the tensors of a run.
"""

from kinml_fast.data.fidelities import join as join_fidelities
from kinml_fast.data.large import LargeData
from kinml_fast.data.prepared import Prepared, prepare
from kinml_fast.data.selection import Selection
from kinml_fast.data.sources import DescriptorSource, read
from kinml_fast.data.split import Split
from kinml_fast.data.splits import make_split, write_tvtmsk
from kinml_fast.data.stored import StoredDescriptors
from kinml_fast.data.structures import Structures, concatenate
from kinml_fast.data.training_data import TrainingData

__all__ = [
    "DescriptorSource",
    "LargeData",
    "Prepared",
    "Selection",
    "Split",
    "StoredDescriptors",
    "Structures",
    "TrainingData",
    "concatenate",
    "join_fidelities",
    "make_split",
    "prepare",
    "read",
    "write_tvtmsk",
]
