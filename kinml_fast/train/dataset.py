"""The structures of a run: the last stage of data, behind `data.TrainingData` and `data.LargeData`."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from kinml_fast.data.blocks import Piece
from kinml_fast.data.files import first_few
from kinml_fast.data.large import LargeData
from kinml_fast.data.split import PARTS
from kinml_fast.data.structures import Structures
from kinml_fast.data.training_data import TrainingData
from kinml_fast.errors import ConfigError, DataError
from kinml_fast.nn import EnergyModel
from kinml_fast.train.captured import MOST_STEPS
from kinml_fast.train.config import TrainingConfig
from kinml_fast.train.window import Window

WINDOW_BYTES = 1 << 25
"""Structures that are read from disk and shuffled together take about so much there."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, eq=False)
class Stretch:
    """Consecutive batches of an epoch.

    Attributes
    ----------
    window
        Has their structures.
    order
        Places in the window, [n] int64, in the order of the epoch.
    first
        Number of the first batch in the epoch.
    """

    window: Window
    order: Tensor
    first: int


class Dataset(abc.ABC):
    """The structures of a run, part after part.

    Attributes
    ----------
    levels : int, K
    sizes : dict, number of structures of each part
    fingerprint : str, by which a checkpoint knows its data
    trained_components, trained_stress_components : list of int [K], components of the training set with a weight
    known_energies, known_forces, known_stresses : dict, how many structures of each part have them at each level,
        lists [K]
    whole : Window of all structures, part after part; None if they are read from disk while they are needed
    """

    levels: int
    sizes: Mapping[str, int]
    fingerprint: str
    trained_components: Sequence[int]
    trained_stress_components: Sequence[int]
    known_energies: Mapping[str, Sequence[int]]
    known_forces: Mapping[str, Sequence[int]]
    known_stresses: Mapping[str, Sequence[int]]
    whole: Window | None
    _fidelities: Sequence[int]

    @abc.abstractmethod
    def order(self, epoch: int) -> np.ndarray:
        """The training structures in the order of an epoch, int64: it depends on the seed and the epoch only."""

    @abc.abstractmethod
    def epoch(self, epoch: int, size: int, first: int = 0) -> Iterator[Stretch]:
        """An epoch in batches of so many structures, from the stretch on that begins with the batch `first`."""

    @abc.abstractmethod
    def windows(self, part: str) -> Iterator[tuple[Window, slice]]:
        """All structures of a part in their order: windows, and where in them they are."""

    @property
    def has_forces(self) -> bool:
        """Whether any structure has forces."""
        return any(any(counts) for counts in self.known_forces.values())

    def batches(self, size: int) -> int:
        """How many batches an epoch has."""
        return -(-self.sizes["train"] // size)

    def numbers(self, with_forces: bool, with_stresses: bool) -> list[str]:
        """How many structures each part has, and how many of them have energies of several levels, forces, stresses."""
        sentences = [f"structures: {', '.join(f'{size} {part}' for part, size in self.sizes.items())}"]
        several = self.levels > 1
        for level, fidelity in enumerate(self._fidelities):
            if several:
                sentences.append(f"energies of fidelity {fidelity}: {self._shares(self.known_energies, level)}")
            of_level = f" of fidelity {fidelity}" if several else ""
            if with_forces:
                sentences.append(f"forces{of_level}: {self._shares(self.known_forces, level)}")
            if with_stresses:
                sentences.append(f"stresses{of_level}: {self._shares(self.known_stresses, level)}")
        if not with_forces and self.has_forces:
            sentences.append("the data have forces, which training.loss.forces=true would train on")
        if with_forces and not with_stresses and any(map(any, self.known_stresses.values())):
            sentences.append("the data have stresses, which training.loss.stresses=true would train on")
        return sentences

    def _shares(self, known: Mapping[str, Sequence[int]], level: int) -> str:
        """How many of the structures of each part are among those that are known, in words."""
        return ", ".join(f"{known[part][level]} of {self.sizes[part]} {part}" for part in PARTS)

    def _check(self, model: EnergyModel, config: TrainingConfig, files: Sequence[str]) -> None:
        """Refuse data that a model cannot be trained on as the configuration says; `files` is where they come from."""
        if self.levels != len(model.fidelities):
            raise DataError(
                f"the data have {_counted(self.levels)} of theory and the model is for "
                f"{_counted(len(model.fidelities))}: make a model with as many fidelities"
            )
        self._check_levels(config)
        if config.loss.forces:
            self._check_components("forces", self.known_forces, config.score.forces, config, files)
        if config.loss.stresses:
            self._check_components("stresses", self.known_stresses, config.score.stresses, config, files)

    def _check_levels(self, config: TrainingConfig) -> None:
        for name, factors in (("loss", config.loss.level_weights), ("score", config.score.level_weights)):
            if factors is not None and len(factors) != self.levels:
                raise ConfigError(
                    f"training.{name}.level_weights has {len(factors)} entries, but there are {_counted(self.levels)} "
                    "of theory: give a factor for each, lowest first"
                )
        for level, fidelity in enumerate(self._fidelities):
            needed = {"train": config.loss.level_weights, "validation": config.score.level_factors(self.levels)}
            for part, factors in needed.items():
                if (factors is None or factors[level]) and not self.known_energies[part][level]:
                    raise DataError(
                        f"no {part} structure has energies of fidelity {fidelity}: put some into that part, or set "
                        f"the level's factor to 0 (training.{'loss' if part == 'train' else 'score'}.level_weights)"
                    )

    def _check_components(
        self,
        name: str,
        known: Mapping[str, Sequence[int]],
        factor: float,
        config: TrainingConfig,
        files: Sequence[str],
    ) -> None:
        """Refuse data without the forces or stresses that are to be trained on, or are judged by this factor."""
        if not any(known["train"]):
            key = "data.forces_key" if name == "forces" else "data.stress_key"
            raise DataError(
                f"training.loss.{name} is true, but no training structure has {name} (data: {first_few(files)}): take "
                f"data with {name}, name their key in XYZ files by {key}, or set training.loss.{name}=false"
            )
        judged = np.array(config.score.level_factors(self.levels)) > 0
        validated = np.array(known["validation"]) > 0
        if factor and (judged & ~validated).any():
            level = int(np.argmax(judged & ~validated))
            of_level = f" of fidelity {self._fidelities[level]}" if self.levels > 1 else ""
            raise DataError(
                f"training.score.{name} is {factor:g}, but no validation structure has {name}{of_level} "
                f"(data: {first_few(files)}): put some into the validation set, or set training.score.{name}=0"
            )


def make_dataset(model: EnergyModel, data: TrainingData | LargeData, config: TrainingConfig) -> Dataset:
    """The structures of a run.

    Parameters
    ----------
    model
        Its elements, precision, device and single-atom energies; it is given those of the data, if they have any.
    data
        Structures in memory or on disk.
    config
        Says whether forces are needed, whether descriptors are stored ones, what the energies of a structure weigh, and
        the order of epochs.

    Raises
    ------
    InputError
        Elements or levels that the model does not have, an empty training or validation set, no energies, no forces
        where they are asked for, weights that are none, no coordinates where nothing is stored; what a file of
        `LargeData` cannot be used for.
    """
    return OnDisk(model, data, config) if isinstance(data, LargeData) else InMemory(model, data, config)


class InMemory(Dataset):
    """Structures that are in memory as long as the run: one window, in the order of the split.

    So a pass in that order goes through memory in order. An epoch shuffles all training structures together. See
    `make_dataset`.
    """

    def __init__(self, model: EnergyModel, data: TrainingData, config: TrainingConfig) -> None:
        split = {name: np.asarray(getattr(data.split, name), dtype=np.int64) for name in PARTS}
        self.sizes = {name: len(indices) for name, indices in split.items()}
        _check_sizes(self.sizes)
        origin = np.concatenate(list(split.values()))
        structures = data.structures.with_elements(model.elements).select(origin)
        if structures.energies is None:
            raise DataError("the structures have no energies: training needs them")
        if structures.coordinates is None and config.jacobian == "recompute":
            raise DataError(
                f"{structures.labels[0]} has no coordinates, only stored descriptors: set training.jacobian=stored"
            )
        self.levels, self._fidelities = structures.levels, model.fidelities
        known = structures.known_energies, structures.known_forces, structures.known_stresses
        self.known_energies, self.known_forces, self.known_stresses = (
            {part: of_kind[:, self.range(part)].sum(axis=1).tolist() for part in PARTS} for of_kind in known
        )
        self._check(model, config, list(dict.fromkeys(label.rsplit("/", 1)[0] for label in structures.labels)))
        if data.sae is not None:
            model.sae.copy_(_of_elements(data.sae, data.structures.elements, model.elements))
        weights = _weights(data)[origin]
        source = data.source if config.jacobian == "stored" else None
        sae = model.sae.view(self.levels, -1).cpu().numpy()
        window = Window(Piece(structures, origin, weights), sae, model.dtype, config, source)
        self.whole = window.to(model.sae.device)
        self._order_seed = config.seed if config.shuffle else None
        train, atoms = self.range("train"), structures.sizes
        force_weights = window.force_weights.cpu().numpy()
        self.trained_components = [3 * int(atoms[train][row != 0].sum()) for row in force_weights[:, train]]

        self.trained_stress_components = [0] * self.levels
        if window.stress_weights is not None:
            self.trained_stress_components = (9 * (window.stress_weights[:, train] != 0).sum(dim=1)).tolist()

        digest = hashlib.sha256(" ".join(structures.elements).encode())
        targets, forces = (tensor.cpu().numpy() for tensor in (window.energies, window.forces))
        s = structures
        of_crystals = s.cells, s.periodic, s.stresses
        for array in (s.species, s.coordinates, s.offsets, targets, forces, weights, *of_crystals):
            if array is not None:
                digest.update(np.ascontiguousarray(array).data)
        digest.update(repr(self.sizes).encode())
        if source is not None:
            of_files = [file_digest for _, file_digest in source.files]
            digest.update(repr((source.backend, of_files)).encode())
        self.fingerprint = digest.hexdigest()

    def range(self, part: str) -> slice:
        """Where the structures of a part are."""
        first = sum(self.sizes[name] for name in PARTS[: PARTS.index(part)])
        return slice(first, first + self.sizes[part])

    def order(self, epoch: int) -> np.ndarray:
        """See `Dataset`."""
        if self._order_seed is None:
            return np.arange(self.sizes["train"])
        return np.random.default_rng([self._order_seed, epoch]).permutation(self.sizes["train"])

    def epoch(self, epoch: int, size: int, first: int = 0) -> Iterator[Stretch]:
        """See `Dataset`. A stretch is as long as an epoch that a GPU records, which is most of them."""
        assert self.whole is not None
        order = torch.from_numpy(self.order(epoch)).to(self.whole.origin.device)
        for number, some in enumerate(order.split(MOST_STEPS * size)):
            if number * MOST_STEPS >= first:
                yield Stretch(self.whole, some, number * MOST_STEPS)

    def windows(self, part: str) -> Iterator[tuple[Window, slice]]:
        """See `Dataset`."""
        assert self.whole is not None
        yield self.whole, self.range(part)


class OnDisk(Dataset):
    """Structures that are read, window by window, while they are needed; the next window during the steps of this one.

    The order of an epoch is that of blocks: they are shuffled, some of them at a time make a window, and the structures
    of a window are shuffled. What is left of a window after its last whole batch goes to the next one, so that batches
    are as large as they are in memory. Where one window holds all training structures the order is that in memory. See
    `make_dataset`.
    """

    whole = None

    def __init__(self, model: EnergyModel, data: LargeData, config: TrainingConfig) -> None:
        if config.jacobian == "stored":
            raise ConfigError(
                "data that are read from disk and training.jacobian=stored do not go together: set "
                "training.jacobian=recompute, or data.on_disk=false"
            )
        self._file, self._config = data.file, config
        self._elements, self._dtype, self._device = model.elements, model.dtype, model.sae.device
        self.sizes, self.levels, self._fidelities = data.file.sizes, data.file.levels, model.fidelities
        _check_sizes(self.sizes)
        self.known_energies, self.known_forces = data.file.known_energies, data.file.known_forces
        self.known_stresses = data.file.known_stresses
        self._check(model, config, [str(data.file.path)])
        self._species = np.array([_place(element, model, data) for element in data.elements], dtype=np.int64)
        if data.sae is not None:
            model.sae.copy_(_of_elements(data.sae, data.elements, model.elements))
        self._sae = model.sae.view(self.levels, -1).cpu().numpy()
        factors = config.loss.level_weights or [1.0] * self.levels
        self.trained_components, self.trained_stress_components = (
            [count if factor else 0 for count, factor in zip(counts, factors, strict=True)]
            for counts in (data.file.components, data.file.stress_components)
        )
        digest = hashlib.sha256(repr((model.elements, data.file.digest, model.sae.tolist())).encode())
        self.fingerprint = digest.hexdigest()

    def order(self, epoch: int) -> np.ndarray:
        """See `Dataset`. It depends on the size of batches too, if they are larger than windows."""
        found = []
        _, structures, _ = self._file.blocks("train")
        starts = np.concatenate([[0], np.cumsum(structures)])
        for number, blocks in enumerate(self._groups(epoch)):
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in blocks])
            found.append(places[self._shuffled(epoch, number, len(places))])
        return np.concatenate(found)

    def epoch(self, epoch: int, size: int, first: int = 0) -> Iterator[Stretch]:
        """See `Dataset`."""
        for stretch in _ahead(self._stretches(epoch, size, first)):
            window, order = stretch.window.to(self._device), stretch.order.to(self._device)
            yield Stretch(window, order, stretch.first)

    def _stretches(self, epoch: int, size: int, first: int) -> Iterator[Stretch]:
        """Those of an epoch, which are not on the device yet."""
        numbers, structures, _ = self._file.blocks("train")
        groups = self._groups(epoch)
        counts = [int(structures[blocks].sum()) for blocks in groups]
        # The first structure of each window in the order of the epoch, and the batch that it is in.
        places = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        batches = [*(places[:-1] // size).tolist(), self.batches(size)]
        left: Piece | None = None
        for number, blocks in enumerate(groups):
            # Of a window that is done, what it leaves to the next one may be needed.
            leaves = int(places[number + 1] % size) if number < len(groups) - 1 else 0
            if batches[number] < first and (not leaves or batches[number + 1] < first):
                continue
            old = 0 if left is None else len(left)
            piece = self._file.read(numbers[blocks].tolist(), left)
            order = np.concatenate([np.arange(old), old + self._shuffled(epoch, number, counts[number])])
            whole = len(order) - leaves
            left = piece.select(order[whole:]) if leaves else None
            if batches[number] >= first:
                yield Stretch(self._window(piece), torch.from_numpy(order[:whole]), batches[number])

    def _groups(self, epoch: int) -> list[np.ndarray]:
        """The blocks of each window of an epoch, as places among those of the training part."""
        _, structures, lengths = self._file.blocks("train")
        blocks = np.arange(len(structures))
        if self._config.shuffle and lengths.sum() > WINDOW_BYTES:
            blocks = np.random.default_rng([self._config.seed, epoch]).permutation(len(structures))
        groups, first, size, taken = [], 0, 0, 0
        for place, block in enumerate(blocks):
            size, taken = size + int(structures[block]), taken + int(lengths[block])
            if taken >= WINDOW_BYTES and size >= self._config.batch_size:
                groups.append(blocks[first : place + 1])
                first, size, taken = place + 1, 0, 0
        if first < len(blocks):
            groups.append(blocks[first:])
        return groups

    def _shuffled(self, epoch: int, number: int, count: int) -> np.ndarray:
        """The order of the structures of a window."""
        if not self._config.shuffle:
            return np.arange(count)
        seed = [self._config.seed, epoch]
        if count < self.sizes["train"]:
            seed += [number + 1]
        return np.random.default_rng(seed).permutation(count)

    def windows(self, part: str) -> Iterator[tuple[Window, slice]]:
        """See `Dataset`."""
        for window, where in _ahead(self._windows(part)):
            yield window.to(self._device), where

    def _windows(self, part: str) -> Iterator[tuple[Window, slice]]:
        numbers, _, lengths = self._file.blocks(part)
        groups = (np.cumsum(lengths) - lengths) // WINDOW_BYTES
        for group in range(int(groups.max(initial=-1)) + 1):
            chosen = numbers[groups == group].tolist()
            if chosen:
                piece = self._file.read(chosen)
                yield self._window(piece), slice(0, len(piece))

    def _window(self, piece: Piece) -> Window:
        s = piece.structures
        structures = Structures.trusted(
            elements=self._elements,
            species=self._species[s.species],
            coordinates=s.coordinates,
            offsets=s.offsets,
            energies=s.energies,
            forces=s.forces,
            labels=s.labels,
            cells=s.cells,
            periodic=s.periodic,
            stresses=s.stresses,
        )
        read = Piece(structures, piece.origin, piece.weights)
        window = Window(read, self._sae, self._dtype, self._config, lasting=False)
        return window.pinned() if self._device.type == "cuda" else window


def _ahead(items: Iterator[_Item]) -> Iterator[_Item]:
    """The items, each of which is made while the one before it is used."""
    nothing = object()
    with ThreadPoolExecutor(1, "read-ahead") as pool:
        coming = pool.submit(next, items, nothing)
        while (item := coming.result()) is not nothing:
            coming = pool.submit(next, items, nothing)
            yield item  # type: ignore[misc]


def _check_sizes(sizes: Mapping[str, int]) -> None:
    for name in ("train", "validation"):
        if not sizes[name]:
            raise DataError(f"the {name} set is empty: give it at least one structure")


def _place(element: str, model: EnergyModel, data: LargeData) -> int:
    if element not in model.elements:
        raise DataError(
            f"{data.file.path} contains {element}, which is not among the elements {' '.join(model.elements)}: add it "
            "to the list or leave the structures out"
        )
    return model.elements.index(element)


def _weights(data: TrainingData) -> np.ndarray:
    """What each structure counts in the loss, [n_structures]."""
    count = len(data.structures)
    if data.weights is None:
        return np.ones(count)
    weights = np.asarray(data.weights, dtype=np.float64)
    if weights.shape != (count,) or not (np.isfinite(weights) & (weights >= 0)).all():
        raise DataError(f"the weights must be {count} numbers that are not negative, one for each structure")
    if not weights[np.asarray(data.split.train, dtype=np.int64)].any():
        raise DataError("the weights of all training structures are 0: give some of them a weight")
    return weights


def _of_elements(sae: np.ndarray, given: Sequence[str], elements: Sequence[str]) -> Tensor:
    """Single-atom energies [..., n] in another order of elements; 0 for those that are not given."""
    values = torch.from_numpy(np.ascontiguousarray(sae, dtype=np.float64))
    result = torch.zeros(*values.shape[:-1], len(elements), dtype=torch.float64)
    for place, element in enumerate(elements):
        if element in given:
            result[..., place] = values[..., list(given).index(element)]
    return result


def _counted(levels: int) -> str:
    return "one level" if levels == 1 else f"{levels} levels"
