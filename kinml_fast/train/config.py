"""The configuration of a run: typed sections, YAML in and out, overrides from the command line."""

from __future__ import annotations

import difflib
import logging
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kinml_fast import datasets, devices
from kinml_fast.data.files import replacing
from kinml_fast.data.selection import Selection
from kinml_fast.errors import ConfigError, InputError
from kinml_fast.nn import ACTIVATIONS, Dispersion, Repulsion

log = logging.getLogger(__name__)

SHIPPED = ("example", "forces")
"""Names that stand for configurations that come with the package: training on energies, on energies and forces."""

Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of the configuration. The text below each key is its documentation (pydantic's `description`)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


AnySection = TypeVar("AnySection", bound=Section)


class DataConfig(Section):
    """Which structures to take, and how to divide them."""

    files: Annotated[list[str], Field(min_length=1)]
    """SQLite databases, extended XYZ files or PyKinML's HDF5 files of descriptors: paths, glob patterns, or
    `shipped:NAME` for data of the package; one, or a list."""
    fidelity: int | list[int] = 1
    """Level of theory to take from SQLite files; a list of several, lowest first, trains a network for each on top of
    those below (multi-fidelity)."""
    baseline: int | None = None
    """Delta learning: train on the differences of fidelity and this lower level, of energies and of forces."""
    incomplete: Literal["error", "drop", "keep"] | None = None
    """Structures that lack a level: error, drop them (the log says how many), or keep them to train the levels that
    they have; null: error with a baseline, keep with several fidelities."""
    temperature: float | None = None
    """SQLite: only structures sampled at this temperature; null: every temperature above 0."""
    names: list[str] | None = None
    """SQLite: only structures whose name is like one of these SQL patterns; null: all."""
    energy_key: str | list[str] | None = None
    """XYZ: key of the energy (eV); null: energy or REF_energy. With several fidelities or a baseline: a list with a key
    for each level, lowest first."""
    forces_key: str | list[str] | None = None
    """XYZ: key of the forces (eV/Å), or a list as for energy_key; null: the key of the energy with `forces` or
    `force` for `energy`. What has `grad` in its key is a gradient, whose sign is changed."""
    stress_key: str | list[str] | None = None
    """XYZ: key of the stress (eV/Å³, ASE's sign) or, if virial is part of its name, of the virial (eV, the other sign),
    or a list as for energy_key; null: the key of the energy with `stress`, `virial` or `virials` for `energy`."""
    format: str | None = None
    """Format of the files that ASE reads, by its name (extxyz, vasp-out …, see `ase info --formats`); null: what the
    suffix of each says, or its contents."""
    split: list[int | float] = [0.8, 0.1, 0.1]
    """Training, validation, test: numbers of structures, or fractions that sum to at most 1."""
    split_file: str | None = None
    """File of lines `C5H5/17 2` (2: training or validation, -1: test) that says which structures are for testing; or
    an HDF5 file of PyKinML, whose tvtmsk says the part of each."""
    split_seed: Seed = 0
    """Seed of the random division."""
    sae: str | dict[str, float] | list[str | dict[str, float]] = "fit"
    """Single-atom energies: `fit` to the training energies, `none`, or an energy (eV) for each element; with several
    fidelities for all, or a list with one of these for each."""
    weights: str | dict[str, float] | None = None
    """Weights of structures in the loss, of their energies and forces: numbers by label (`C5H5/17`) or SQL pattern of
    labels (`C5H5/%`), or a text file with a line `C5H5/17 2.5` for each. The last that fits counts; other structures
    have 1, and 0 leaves one out. They are taken as they are, not normalised, and change no reported error."""
    elements: list[str] | None = None
    """Order of the elements in the descriptor; null: those present, alphabetically."""
    prepared: str | None = None
    """HDF5 file that keeps the prepared data set; null: prepared.h5 in the run folder. Of data that are read from disk
    the name ends in .blocks."""
    on_disk: bool | Literal["auto"] = "auto"
    """Read the structures from disk while training, in little memory, and shuffle them by blocks (docs/large_data.md);
    auto: if the data files of all processes on this computer take more than a quarter of the memory that is free."""

    @field_validator("files", mode="before")
    @classmethod
    def _one_file(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @field_validator("split")
    @classmethod
    def _check_split(cls, split: list[int | float]) -> list[int | float]:
        if len(split) != 3 or min(split) < 0:
            raise ValueError("it must be three numbers that are not negative: training, validation, test")
        return split

    @field_validator("weights", mode="before")
    @classmethod
    def _check_weights(cls, weights: Any) -> Any:
        numbers = _are_numbers(weights) and min(weights.values(), default=0) >= 0
        if not numbers and not isinstance(weights, str | None):
            raise ValueError("it must be a file, or a number that is not negative for each label, like {C5H5/17: 2.5}")
        return weights

    @field_validator("sae", mode="before")
    @classmethod
    def _check_sae(cls, sae: Any) -> Any:
        for one in sae if isinstance(sae, list) else [sae]:
            if not _are_numbers(one) and one not in ("fit", "none"):
                raise ValueError(
                    "it must be fit, none, or an energy in eV for each element, like {C: -1035.4, H: -17.0}, or a list "
                    "with one of these for each fidelity"
                )
        return sae

    @field_validator("fidelity", mode="before")
    @classmethod
    def _check_fidelity(cls, fidelity: Any) -> Any:
        several = fidelity if isinstance(fidelity, list) else [fidelity]
        if not several or not all(isinstance(f, int) and not isinstance(f, bool) for f in several):
            raise ValueError("it must be a whole number, or a list of several, lowest level first, like [0, 1]")
        if len(set(several)) < len(several):
            raise ValueError("it names a level twice: name each once, lowest first")
        return fidelity

    @model_validator(mode="after")
    def _check_levels(self) -> DataConfig:
        try:
            selection = self.selection
        except InputError as error:
            raise ValueError(str(error)) from None
        fidelities, number = selection.fidelities, len(selection.fidelities_read)
        if isinstance(self.sae, list) and len(self.sae) != len(fidelities):
            raise ValueError(
                f"sae has {len(self.sae)} entries and there are {len(fidelities)} fidelities: give one for each, or "
                "one for all"
            )
        for name in ("energy_key", "forces_key", "stress_key"):
            keys = getattr(self, name)
            if keys is not None and number != (len(keys) if isinstance(keys, list) else 1):
                raise ValueError(
                    f"{name} is {keys!r} and there are {number} levels: give a list with a key for each, lowest first"
                    + (" (the baseline's, then that of the fidelity)" if self.baseline is not None else "")
                )
        return self

    @property
    def selection(self) -> Selection:
        """What is taken of the files."""
        return Selection(**self.model_dump(include={field.name for field in fields(Selection)}))


class DescriptorConfig(Section):
    """The atomic environment vector."""

    n_radial: Count = 16
    """Radial shifts."""
    n_angular: Count = 8
    """Distance shifts of the angular part."""
    n_sections: Annotated[int, Field(ge=2)] = 8
    """Angles of the angular part, evenly from 0 to π."""
    cutoffs: Annotated[list[Positive], Field(min_length=2, max_length=2)] = [5.2, 3.8]
    """Radial and angular cutoff, Å."""
    beta: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Factor of the cosine of the angle, which keeps the derivative finite at 0 and π."""
    backend: Literal["native", "aevmod"] = "native"
    """What computes descriptors that are stored (training.jacobian): the op of this package, or the package aevmod."""


class RepulsionConfig(Section):
    """A repulsion of nuclei at short distances, where there are no data, as a part of the model: networks learn what is
    left of energies and forces without it (docs/repulsion.md)."""

    kind: Literal["none", "zbl"] = "none"
    """none, or zbl, the universal screened potential of Ziegler, Biersack and Littmark."""
    inner: NotNegative = 0.4
    """It is whole up to this distance, in sums of the two atoms' covalent radii."""
    outer: Positive = 0.75
    """It has faded out at this distance, in the same unit, energy, forces and their derivatives alike."""

    @model_validator(mode="after")
    def _check_distances(self) -> RepulsionConfig:
        if self.inner >= self.outer:
            raise ValueError(f"inner must be smaller than outer, which is {self.outer}")
        return self

    def made(self, elements: Sequence[str]) -> Repulsion | None:
        """That of a model of some elements."""
        return None if self.kind == "none" else Repulsion.zbl(elements, self.inner, self.outer)

    @classmethod
    def of(cls, repulsion: Repulsion | None) -> RepulsionConfig:
        """What names the repulsion of a model."""
        return cls() if repulsion is None else cls(kind="zbl", inner=repulsion.inner, outer=repulsion.outer)

    def ignored(self) -> list[str]:
        """Keys that were changed but have no effect."""
        return _changed(self, {"inner", "outer"}) if self.kind == "none" else []


class DispersionConfig(Section):
    """D3(BJ), which `KinMLCalculator` adds to the model's energies, forces and stress (docs/repulsion.md). It takes no
    part in training: it is for data of a functional without dispersion, never for data that have it already."""

    method: str | None = None
    """The functional, as the package dftd3 calls it, such as pbe; null: no dispersion."""
    parameters: dict[str, float] = {}
    """Instead of a method: s8, a1, a2 and, if they are not 1, s6 and s9."""

    @model_validator(mode="after")
    def _check_parameters(self) -> DispersionConfig:
        try:
            self.made()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def made(self) -> Dispersion | None:
        """That of a model."""
        return Dispersion(self.method, self.parameters) if self.method or self.parameters else None

    @classmethod
    def of(cls, dispersion: Dispersion | None) -> DispersionConfig:
        """What names the dispersion of a model."""
        return cls() if dispersion is None else cls(method=dispersion.method, parameters=dict(dispersion.parameters))


class NetworkConfig(Section):
    """The networks, one for each element."""

    layers: list[Count] = [48, 24, 12, 1]
    """Nodes of each layer; the last is the atomic energy, 1."""
    activations: list[str] | None = None
    """Activation of each layer; null: gaussian, and identity for the last."""
    biases: bool = True
    """Whether the layers have biases."""
    seed: Seed = 0
    """Seed of the initial weights."""
    repulsion: RepulsionConfig = RepulsionConfig()
    """See the section."""
    dispersion: DispersionConfig = DispersionConfig()
    """See the section."""

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: list[int]) -> list[int]:
        if not layers or layers[-1] != 1:
            raise ValueError("the last layer must be 1, the energy of the atom")
        return layers

    @field_validator("activations")
    @classmethod
    def _check_activations(cls, activations: list[str] | None) -> list[str] | None:
        for name in activations or ():
            if name not in ACTIVATIONS:
                raise ValueError(f"{name!r} is no activation: take {_either(ACTIVATIONS)}")
        return activations

    @model_validator(mode="after")
    def _check_lengths(self) -> NetworkConfig:
        if self.activations is not None and len(self.activations) != len(self.layers):
            raise ValueError(
                f"layers has {len(self.layers)} entries and activations has {len(self.activations)}: "
                "give one activation for each layer"
            )
        return self

    @property
    def layer_activations(self) -> list[str]:
        """The activation of each layer, written out."""
        return self.activations or ["gaussian"] * (len(self.layers) - 1) + ["identity"]


class OptimizerConfig(Section):
    """The optimizer (torch's fused implementations)."""

    name: Literal["adam", "adamw", "sgd"] = "adam"
    """adam (weight decay as L2 penalty), adamw (decoupled weight decay), or sgd."""
    learning_rate: Positive = 1e-3
    """Initial learning rate."""
    weight_decay: NotNegative = 0.0
    """Weight decay."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """adam, adamw: decay of the running means of the gradient and of its square."""
    eps: Positive = 1e-8
    """adam, adamw: added to the denominator."""
    amsgrad: bool = False
    """adam, adamw: the AMSGrad variant."""
    momentum: NotNegative = 0.0
    """sgd: momentum."""
    dampening: NotNegative = 0.0
    """sgd: dampening of the momentum."""
    nesterov: bool = False
    """sgd: Nesterov momentum."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> OptimizerConfig:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")
        return self

    def ignored(self) -> list[str]:
        """Keys that were changed but that this optimizer does not have."""
        adam, sgd = {"betas", "eps", "amsgrad"}, {"momentum", "dampening", "nesterov"}
        return _changed(self, adam if self.name == "sgd" else sgd)


class SchedulerConfig(Section):
    """The learning rate's schedule."""

    name: Literal["rop", "exp", "step", "cosine", "none"] = "rop"
    """rop (reduce on plateau of the score), exp (every epoch), step (every step_size epochs), cosine (half a wave
    down to min_lr), or none."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """rop: factor of the learning rate."""
    patience: Annotated[int, Field(ge=0)] = 25
    """rop: epochs without improvement that are waited for."""
    threshold: NotNegative = 0.05
    """rop: how much better the score must be to count as improved."""
    threshold_mode: Literal["rel", "abs"] = "rel"
    """rop: whether the threshold is a fraction of the best score (rel) or in kcal/mol (abs)."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """rop: epochs after a reduction during which none are counted."""
    min_lr: NotNegative = 0.0
    """rop, cosine: the learning rate is not reduced below this."""
    gamma: Annotated[float, Field(gt=0, le=1)] | None = None
    """exp, step: factor of the learning rate; null: 0.99 for exp, 0.5 for step."""
    step_size: Count = 30
    """step: epochs between two reductions."""
    length: Count | None = None
    """cosine: epochs of the descent; null: training.epochs, also when a resumed run changes it."""

    def ignored(self) -> list[str]:
        """Keys that were changed but that this schedule does not have."""
        keys_of = {
            "rop": {"factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr"},
            "exp": {"gamma"},
            "step": {"gamma", "step_size"},
            "cosine": {"min_lr", "length"},
            "none": set(),
        }
        return _changed(self, set(type(self).model_fields) - {"name"} - keys_of[self.name])


class LossConfig(Section):
    """What is minimised, batch by batch. L_E is the mean over structures of weight times squared energy error (eV²),
    L_F that of weight times mean squared error of the structure's force components (eV²/Å²), L_S that of weight times
    mean squared error of the nine components of stress · volume / number of atoms (eV²); weights: data.weights."""

    forces: bool = False
    """Whether forces are trained on, judged and reported; structures without forces count with their energies only."""
    stresses: bool = False
    """Whether stresses of crystals are trained on as well, judged and reported: L_S is in the loss in the epochs that
    have L_F. Structures without a stress, and molecules, count with their energies and forces only."""
    forces_from: Annotated[int, Field(ge=0)] = 0
    """forces: first epoch (counted from 0) whose loss has L_F; before it, training is on energies only, and faster."""
    forces_until: Count | None = None
    """forces: first epoch whose loss no longer has L_F; null: it stays."""
    weighting: Literal["static", "learned"] = "static"
    """static: (1 - force_weight) L_E + force_weight L_F + stress_weight L_S; learned: exp(-s_E) L_E + s_E +
    exp(-s_F) L_F + s_F (+ exp(-s_S) L_S + s_S), where the optimizer also moves the s, which start at 0 (Kendall et al.,
    CVPR 2018). A term that stands alone has factor 1."""
    force_weight: Annotated[float, Field(ge=0, le=1)] = 0.7
    """static: the share of L_F."""
    stress_weight: NotNegative = 1.0
    """static: the factor of L_S, beside the shares of the other two."""
    energy_per_atom: bool = False
    """Take L_E of energies divided by the number of atoms, so that molecules of all sizes count alike."""
    level_weights: Annotated[list[NotNegative], Field(min_length=1)] | None = None
    """Several fidelities: factors of the levels in L_E, L_F, L_S, which are sums over them, lowest first; null: all
    1."""
    hessians: list[str] = Field(default=[])
    """Files with second derivatives of some molecules at the (highest) fidelity: databases whose column Hessian has
    them, or files whose frames have hessian=, in eV/Å². L_H, the mean square error of their entries (eV²/Å⁴), is then a
    further term of the loss, by products with random directions."""
    hessian_weight: NotNegative = 0.001
    """static: the factor of L_H; learned: it has an s of its own."""
    hessian_structures: Count = 4
    """So many of these molecules are in each step."""
    extra_weights: dict[str, NotNegative] = {}
    """static: factors, by name, of further terms that a Python program gives (Trainer's extra_losses); by default 1."""

    @field_validator("hessians", mode="before")
    @classmethod
    def _one_file(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @model_validator(mode="after")
    def _check_levels(self) -> LossConfig:
        if self.level_weights is not None and not any(self.level_weights):
            raise ValueError("level_weights are all 0: give a level to train a factor")
        return self

    @model_validator(mode="after")
    def _check_epochs(self) -> LossConfig:
        if self.forces_until is not None and self.forces_until <= self.forces_from:
            raise ValueError(f"forces_until must be later than forces_from, which is {self.forces_from}")
        return self

    @model_validator(mode="after")
    def _check_stresses(self) -> LossConfig:
        if self.stresses and not self.forces:
            raise ValueError("stresses are trained on together with forces: set forces to true as well")
        return self

    def has_forces(self, epoch: int) -> bool:
        """Whether the loss of an epoch has a force term."""
        ended = self.forces_until is not None and epoch >= self.forces_until
        return self.forces and epoch >= self.forces_from and not ended

    def ignored(self) -> list[str]:
        """Keys that were changed but have no effect without forces, and without stresses."""
        keys = [] if self.forces else _changed(self, {"forces_from", "forces_until", "force_weight"})
        keys += [] if self.hessians else _changed(self, {"hessian_weight", "hessian_structures"})
        return keys + ([] if self.stresses else _changed(self, {"stress_weight"}))


class ScoreConfig(Section):
    """What a model is judged by, after each epoch, to choose the best one, to stop early and to lower the learning rate
    (rop): energy · RMSE of the validation energies (kcal/mol) + forces · RMSE of the validation forces (kcal/mol/Å)
    + stresses · RMSE of the validation stresses (GPa).
    With several fidelities these are the errors of the highest, for whose sake there are others."""

    energy: NotNegative = 1.0
    """Factor of the energy RMSE."""
    forces: NotNegative = 1.0
    """Factor of the force RMSE; it counts when training.loss.forces is true, in all epochs."""
    stresses: NotNegative = 1.0
    """Factor of the stress RMSE; it counts when training.loss.stresses is true, in all epochs."""
    level_weights: Annotated[list[NotNegative], Field(min_length=1)] | None = None
    """Several fidelities: factors of the levels, lowest first, to judge by a sum of their errors; null: 1 for the
    highest and 0 for the others. Where no validation structure has forces of a level that counts, set forces to 0."""

    @model_validator(mode="after")
    def _check_levels(self) -> ScoreConfig:
        if self.level_weights is not None and not any(self.level_weights):
            raise ValueError("level_weights are all 0: give a level to judge by a factor")
        return self

    def level_factors(self, levels: int) -> list[float]:
        """The factor of each of so many levels."""
        return self.level_weights or [0.0] * (levels - 1) + [1.0]


class EarlyStoppingConfig(Section):
    """When to stop before the last epoch."""

    patience: Count | None = None
    """Stop after this many epochs without a better score; null: never."""
    min_delta: NotNegative = 0.0
    """Improvement of the score (kcal/mol) that counts as better."""


class TrainingConfig(Section):
    """How to train."""

    epochs: Annotated[int, Field(ge=0)] = 100
    """Passes over the training structures."""
    batch_size: Count = 50
    """Structures in a training batch."""
    validation_batch_size: Count = 1000
    """Structures in a validation batch; changes memory and speed only."""
    test_batch_size: Count = 1000
    """Structures in a test batch; changes memory and speed only."""
    shuffle: bool = True
    """Whether each epoch has its own order; false: always the order of the split."""
    seed: Seed = 0
    """Seed of the orders."""
    dtype: Literal["float64", "float32"] = "float64"
    """Precision of descriptor and networks; energies are summed in float64 in any case."""
    device: str = "auto"
    """Where to train: cpu, cuda (a GPU), cuda:1 (the second one), or auto, a GPU if there is one that this build can
    use. A run may be resumed on another device. (A Trainer made in Python trains where its model is.)"""
    threads: Count | None = None
    """CPU threads; null: PyTorch's choice. The results do not depend on it."""
    gradient_clip: Positive | None = None
    """Longest gradient (Euclidean norm); longer ones are shortened to it. null: off."""
    jacobian: Literal["recompute", "stored"] = "recompute"
    """recompute the derivatives of the descriptor from the coordinates in every step, or take descriptors and, with
    forces, Jacobians that are kept in memory: of descriptor.backend, or from PyKinML's HDF5 files (docs/stored.md)."""
    loss: LossConfig = LossConfig()
    """See the section."""
    score: ScoreConfig = ScoreConfig()
    """See the section."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """See the section."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """See the section."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """See the section."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of an exponential moving average of the weights, which is then what is validated and saved."""
    per_rank: list[Literal["batch_size", "learning_rate"]] = []
    """Several processes: which of batch_size and optimizer.learning_rate are given for each of them, and multiplied by
    their number when the run starts. The run's config.yaml has the products, with which it goes on, on any number."""
    save_every: Count | None = None
    """Keep a checkpoint every so many epochs; null: only the last and the best."""
    test_every: Count | None = None
    """Test every so many epochs; null: with each checkpoint that is kept, and at the end."""
    checkpoint_seconds: NotNegative = 30.0
    """Seconds between two writings of checkpoints/last.pt, from which a run resumes."""
    rank_timeout_seconds: Positive = 600.0
    """Of several processes: seconds that one waits for another in training before it is said which one is missing, and
    the run ends."""

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        if not devices.is_name(device):
            raise ValueError(f"it must be {devices.NAMES}")
        return device

    @model_validator(mode="after")
    def _check_score(self) -> TrainingConfig:
        of_forces = self.score.forces if self.loss.forces else 0.0
        of_stresses = self.score.stresses if self.loss.stresses else 0.0
        if self.score.energy == of_forces == of_stresses == 0:
            raise ValueError("score.energy is 0 and nothing else is judged: give it, or score.forces and loss.forces")
        return self

    @model_validator(mode="after")
    def _check_stored(self) -> TrainingConfig:
        if self.loss.stresses and self.jacobian == "stored":
            raise ValueError("stresses cannot be had from stored Jacobians: set jacobian to recompute")
        return self

    def for_ranks(self, size: int) -> TrainingConfig:
        """The same for all of so many processes together: what per_rank names is multiplied, and it names nothing."""
        if not self.per_rank:
            return self
        changes: dict[str, Any] = {"per_rank": []}
        if "batch_size" in self.per_rank:
            changes["batch_size"] = size * self.batch_size
        if "learning_rate" in self.per_rank:
            rate = size * self.optimizer.learning_rate
            changes["optimizer"] = self.optimizer.model_copy(update={"learning_rate": rate})
        return self.model_copy(update=changes)

    def ignored(self) -> list[str]:
        """Sentences about keys that were changed but have no effect."""
        sections: dict[str, OptimizerConfig | SchedulerConfig] = {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
        }
        sentences = [
            f"training.{name}.{key} has no effect with training.{name}.name = {section.name}"
            for name, section in sections.items()
            for key in section.ignored()
        ]
        for kind, has in (("forces", self.loss.forces), ("stresses", self.loss.stresses)):
            of_stresses = kind == "stresses"
            without = [f"loss.{key}" for key in self.loss.ignored() if (key == "stress_weight") == of_stresses]
            without += [] if has else [f"score.{key}" for key in _changed(self.score, {kind})]
            sentences += [f"training.{key} has no effect with training.loss.{kind} = false" for key in without]
        if self.loss.weighting == "learned":
            keys = _changed(self.loss, {"force_weight", "stress_weight", "extra_weights"})
            sentences += [f"training.loss.{key} has no effect with training.loss.weighting = learned" for key in keys]
        return sentences


CHANGEABLE = {
    "epochs",
    "validation_batch_size",
    "test_batch_size",
    "device",
    "threads",
    "early_stopping",
    "save_every",
    "test_every",
    "checkpoint_seconds",
    "rank_timeout_seconds",
    "loss.forces",
    "loss.forces_from",
    "loss.forces_until",
    "loss.force_weight",
    "loss.stress_weight",
    "loss.level_weights",
    "score",
}
"""Keys and sections of the training configuration that may change when a run is resumed; others make it another run.

Forces can thus be taken up by a run on energies, and given up."""


class StartConfig(Section):
    """Fine-tuning and continued training: a new run that begins with the weights of another one, on any data, whether
    that trained on forces or not. Descriptor, layers and activations are those of the start model, and its precision
    unless training.dtype is given; keys that say otherwise are refused. Elements of the data that it lacks are added
    behind its own: its predictions for molecules of the old ones stay as they are. To go on with an interrupted run,
    or to make one longer, resume it instead (`kinml-fast train --resume`), which keeps everything."""

    model: str | None = None
    """model.pt of a run, or the run's folder, or one of its checkpoints: last.pt, best.pt, epoch-*.pt (where that run
    averaged its weights, their average, but with optimizer: keep the weights that the optimizer moved); for an ensemble
    also the run folder of another one, whose members each begin one; null: new weights."""
    optimizer: Literal["reset", "keep"] = "reset"
    """Begin with a new optimizer, or keep the state of the optimizer (running means, number of steps), the learned
    factors of the loss and the moving average of the weights, which last.pt and epoch-*.pt hold. Learning rate, other
    settings and schedule are those of this configuration in any case."""
    sae: Literal["keep", "data"] = "keep"
    """Keep the model's single-atom energies (those of added elements are found by data.sae with them given), or take
    all of them from the data, which is right for energies of another level of theory."""
    freeze: list[str] = []
    """Layers whose weights stay as they are: names or patterns like C.0 (first layer of carbon's network), H.*, *.0;
    with several fidelities 0:C.0, 0:* (fidelity 0), or C.0 for all of them. They work with new weights too."""


class EnsembleConfig(Section):
    """Several models instead of one, in RUN/member-1, RUN/member-2 …: RUN/model.pt holds all, its predictions are their
    means and standard deviations. A run that was interrupted goes on where it was; members can be added to one that
    varies seeds (`--resume RUN ensemble.members=12`)."""

    members: Count = 1
    """Number of models."""
    vary: Literal["seeds", "folds"] = "seeds"
    """How they differ. seeds: member i adds i - 1 to network.seed and training.seed, so that member 1 is what a run
    without an ensemble gives. folds: this, and training and validation structures together are divided into as many
    parts as there are members, member i is validated on part i and trained on the others. The test set is the same."""
    processes: Count = 1
    """Members that one process lets train at the same time, each with training.threads threads (null: an equal share of
    the cores); results do not depend on it. Several processes (torchrun, srun) train members at the same time anyway,
    in groups, and this has no effect."""


class Config(Section):
    """A whole run."""

    run: str = "runs/example"
    """The run folder; by default runs/ and the name of the configuration file."""
    data: DataConfig
    """See the section."""
    descriptor: DescriptorConfig = DescriptorConfig()
    """See the section."""
    network: NetworkConfig = NetworkConfig()
    """See the section."""
    start: StartConfig = StartConfig()
    """See the section."""
    training: TrainingConfig = TrainingConfig()
    """See the section."""
    ensemble: EnsembleConfig = EnsembleConfig()
    """See the section."""

    def ignored(self) -> list[str]:
        """Sentences about keys that were changed but have no effect."""
        sentences = self.training.ignored()
        sentences += [
            f"network.repulsion.{key} has no effect with network.repulsion.kind = none"
            for key in self.network.repulsion.ignored()
        ]
        if self.start.model is None and self.start.sae != "keep":
            sentences.append("start.sae has no effect without start.model")
        if self.ensemble.members == 1:
            keys = _changed(self.ensemble, {"vary", "processes"})
            sentences += [f"ensemble.{key} has no effect with ensemble.members = 1" for key in keys]
        return sentences

    @model_validator(mode="after")
    def _check_ensemble(self) -> Config:
        if self.ensemble.members > 1 and self.training.epochs == 0:
            raise ValueError("an ensemble needs training.epochs of at least 1")
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Config:
        if self.start.model is None and self.start.optimizer == "keep":
            raise ValueError(
                "start.optimizer is keep, but start.model names no checkpoint whose optimizer that could be"
            )
        return self

    @model_validator(mode="after")
    def _check_backend(self) -> Config:
        if self.descriptor.backend != "native" and self.training.jacobian != "stored":
            raise ValueError(
                f"descriptor.backend is {self.descriptor.backend}, which computes only what is stored: set "
                "training.jacobian=stored too"
            )
        return self


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Parameters
    ----------
    path
        YAML file, or one of `SHIPPED`.
    overrides
        `key=value` with a dotted key and a value in YAML, as in `training.optimizer.learning_rate=1e-4`.

    Raises
    ------
    InputError
        No such file, no YAML, an unknown key, a value that is not allowed.
    """
    path = datasets.path(f"{path}.yaml") if str(path) in SHIPPED else Path(path)
    return with_overrides({"run": f"runs/{path.stem}"} | read_yaml(path), overrides, str(path))


def with_overrides(values: dict[str, Any], overrides: Sequence[str], source: str) -> Config:
    """The configuration of plain values after `key=value` changes; see `load` and `from_dict`."""
    return changed(Config, values, overrides, source)


def changed(kind: type[AnySection], values: dict[str, Any], overrides: Sequence[str], source: str) -> AnySection:
    """As `with_overrides`, of any kind of configuration."""
    changes = parse_overrides(overrides)
    for key, value in changes.items():
        _set(values, key, value)
    return validated(kind, values, source, changes)


def from_dict(values: Mapping[str, Any], source: str = "configuration", overridden: Iterable[str] = ()) -> Config:
    """The configuration of plain values; see `validated`."""
    return validated(Config, values, source, overridden)


def validated(
    kind: type[AnySection], values: Mapping[str, Any], source: str = "configuration", overridden: Iterable[str] = ()
) -> AnySection:
    """The configuration of plain values.

    Parameters
    ----------
    kind
        Which kind of configuration.
    values
        Nested, as in the YAML file.
    source
        What messages call the place where the values come from.
    overridden
        Dotted keys that came from the command line.

    Raises
    ------
    InputError
        An unknown key or a value that is not allowed: one sentence about the first.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error.errors()[0], source, overridden, keys(kind))) from None


_MARK = "# A run of kinml_fast: its configuration, which the run has written.\n"


def save(config: Config, path: Path) -> None:
    """Write a configuration as YAML, every key written out."""
    save_yaml(path, config.model_dump())


def save_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write the configuration of a run as YAML."""
    text = _MARK + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def written_by_run(path: Path) -> bool:
    """Whether a configuration is one that `save_yaml` has written."""
    try:
        return path.read_text(encoding="utf-8").startswith(_MARK)
    except (OSError, UnicodeDecodeError):
        return False


def read_yaml(path: Path, shipped: Sequence[str] = SHIPPED) -> dict[str, Any]:
    """The mapping in a YAML file; `shipped` are the names that could have been given instead."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = f", or {_either(shipped)} for those of the package" if shipped else ""
        raise ConfigError(f"{path}: no such file; give a configuration file{others}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration ({error}): give a YAML file") from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold sections with keys, like `data:` and `training:`")
    return values


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted keys and values of `key=value` arguments."""
    changes = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} on the command line: expected key=value, like training.epochs=50")
        # A pattern of files, where YAML would look for the anchor of an alias.
        quoted = re.sub(r"""(^|[\[,]\s*)(\*[^,\]"']*?)(?=\s*(?:[,\]]|$))""", r'\1"\2"', text)
        changes[key] = _parse(quoted, f"{key} on the command line")
    return changes


def keys(section: type[Section] = Config, prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration and its description."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        # list[int] passes for a type in Python 3.10, but not as an argument of issubclass.
        if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section):
            found |= keys(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found


def flat(values: Mapping[str, Any], depth: int | None = None) -> dict[str, Any]:
    """Values of nested sections by dotted keys; with a depth, sections that lie deeper stay as they are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and depth != 0:
            inner = flat(value, None if depth is None else depth - 1)
            found |= {f"{key}.{name}": item for name, item in inner.items()}
        else:
            found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars (1e-3 is a number, `No` is nobelium and no truth value), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is no word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}  # not those of the base class
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))
# SafeLoader reads 010 as an octal number and 1:30 as sixty-based; here digits are decimal.
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also numbers and brackets without end
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        is_alias = "alias" in f"{problem} {getattr(error, 'context', '')}"
        remedy = 'put it into quotes, like "*.xyz"' if is_alias else "correct it"
        raise ConfigError(f"{source}{where}: cannot be understood as YAML ({problem}): {remedy}") from None


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = value


def _sentence(error: Mapping[str, Any], source: str, overridden: Iterable[str], known: Mapping[str, str]) -> str:
    # Parts of `loc` behind the key are indices of lists or the members of a union.
    parts: list[str] = []
    for part in error["loc"]:
        if ".".join(parts) in known:
            break
        parts.append(str(part))
    key = ".".join(parts)
    if any(key == changed or changed.startswith(key + ".") or key.startswith(changed + ".") for changed in overridden):
        source = "command line"
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown key {key}{_nearest(key, list(known))}"
    if error["type"] == "missing":
        return f"{source}: {key} is missing: {' '.join(known.get(key, '').split()) or 'give this section'}"
    if error["type"] == "value_error":
        remedy = str(error["ctx"]["error"])
    elif error["type"] == "model_type":
        inside = ", ".join(k.rsplit(".", 1)[-1] for k in known if k.startswith(key + "."))
        remedy = f"it must be a section with keys ({inside})"
    else:
        remedy = error["msg"].replace("Input should be", "it must be").replace("List should", "the list must")
    value = error["input"]
    shown = "" if isinstance(value, dict | Section) and error["type"] == "value_error" else f" = {_shown(value)}"
    return f"{source}: {key}{shown} is not allowed: {remedy}"


def _shown(value: Any) -> str:
    """A value in a sentence, of a long or deep one the beginning."""
    shortened = reprlib.Repr()
    shortened.maxlevel, shortened.maxlist, shortened.maxdict = 3, 12, 12
    shortened.maxstring = shortened.maxother = 120
    return shortened.repr(value)


def _nearest(key: str, known: Sequence[str]) -> str:
    parent, _, name = key.rpartition(".")
    prefix = parent + "." if parent else ""
    beside = sorted({k[len(prefix) :].split(".")[0] for k in known if k.startswith(prefix)})
    if close := difflib.get_close_matches(name, beside, 1):
        return f": did you mean {prefix}{close[0]}?"
    last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    if close := difflib.get_close_matches(name, last, 1):
        return f": did you mean {last[close[0]]}?"
    return f": the keys there are {', '.join(beside)}"


def _are_numbers(value: Any) -> bool:
    """Whether it is a mapping of text to numbers."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, int | float) and not isinstance(v, bool) for k, v in value.items()
    )


def _changed(section: Section, names: set[str]) -> list[str]:
    fields = type(section).model_fields
    return sorted(name for name in names if getattr(section, name) != fields[name].default)


def _either(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}"
