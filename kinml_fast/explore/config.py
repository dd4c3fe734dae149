"""The configuration of an exploration: what is started from, how it is labelled, sampled, chosen and trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from kinml_fast.train import config as train_config
from kinml_fast.train.config import (
    Count,
    DescriptorConfig,
    EnsembleConfig,
    LossConfig,
    NetworkConfig,
    NotNegative,
    OptimizerConfig,
    Positive,
    SchedulerConfig,
    Section,
    Seed,
    TrainingConfig,
)

Temperatures = Annotated[list[Positive], Field(min_length=1)]
Members = Annotated[int, Field(ge=2)]


class GeometriesConfig(Section):
    """Where the exploration begins."""

    files: Annotated[list[str], Field(min_length=1)]
    """Files of geometries that ASE reads; one geometry is enough. No energies are taken from them."""
    saddles: list[str] = Field(default=[])
    """Files of guesses of saddle points; they are labelled with the geometries (sampling.saddles)."""
    format: str | None = None
    """Format of these files, by ASE's name; null: what the suffix or the contents say."""
    count: Count = 20
    """Structures that are labelled for the first models: the geometries themselves, and displaced ones, drawn as if
    springs were between their atoms, stiff where a bond is and soft elsewhere, at a temperature."""
    temperatures: Temperatures = Field(default=[300.0, 1000.0, 2000.0])
    """Temperatures of the displacements, K; structures have them in turn."""

    @field_validator("files", "saddles", mode="before")
    @classmethod
    def _one_file(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files


class UpperConfig(Section):
    """A second, better level of theory, which labels only what the network of that level is unsure of: the models then
    have two levels, the upper one a network on top of the lower (docs/levels.md)."""

    calculator: str | None = None
    """As labels.calculator, which is the lower level; null: there is one level."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the calculator."""
    first: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the first structures that it labels too."""


class LabelsConfig(Section):
    """What computes energies and forces."""

    calculator: str = "tblite:GFN2-xTB"
    """tblite:METHOD; pyscf:METHOD/BASIS; ASE's name of a calculator (orca, gaussian, psi4 …); module:Class of another;
    or a model file."""
    options: dict[str, Any] = Field(default={})
    """Keyword arguments of the calculator, such as charge and multiplicity, as it calls them."""
    workers: Count = 1
    """Processes that label at the same time. The labels do not depend on it."""
    seconds: Positive = 3600.0
    """Time for one structure; what takes longer is ended, and counts as a failure. Each failure is tried once more."""
    validation: Annotated[float, Field(gt=0, le=0.5)] = 0.1
    """Share of the structures that the models are validated on. A structure keeps its part in all rounds."""
    upper: UpperConfig = UpperConfig()
    """See the section."""

    @property
    def levels(self) -> list[tuple[str, dict[str, Any]]]:
        """Calculators and their options, lowest level first."""
        found = [(self.calculator, self.options)]
        return found if self.upper.calculator is None else [*found, (self.upper.calculator, self.upper.options)]

    @property
    def fidelities(self) -> list[int]:
        """What the levels are called in the data."""
        return [1] if self.upper.calculator is None else [0, 1]


class SamplingConfig(Section):
    """What the ensemble is made to see in each round."""

    temperatures: Temperatures = Field(default=[300.0, 600.0, 1000.0])
    """Temperatures of the Langevin dynamics and of the normal modes, K."""
    trajectories: Annotated[int, Field(ge=0)] = 2
    """Langevin trajectories of each molecule at each temperature."""
    steps: Count = 2000
    """Steps of a trajectory; it ends before if the deviation is above the window or the molecule is broken."""
    timestep: Positive = 0.5
    """fs."""
    friction: NotNegative = 0.02
    """Friction coefficient of the Langevin dynamics, 1/fs."""
    every: Count = 10
    """Every so many steps a geometry is looked at."""
    modes: Annotated[int, Field(ge=0)] = 100
    """Normal-mode samples of each minimum at each temperature: classical harmonic oscillators of the mean energy."""
    saddles: bool = False
    """Look for saddle points with Sella, from each of geometries.saddles, and from the climbing image of a band between
    each two geometries of the same atoms in the same order, and follow the reaction path down to both sides."""


class SelectionConfig(Section):
    """Which of the geometries are labelled: those whose deviation lies in the window."""

    deviation: Literal["forces", "energy"] = "forces"
    """forces: the largest deviation of the force on an atom (eV/Å), the length of the members' standard deviations
    of its components; energy: the members' standard deviation of the energy, divided by the square root of the number
    of atoms (eV). Both are calibrated on the validation part (docs/running.md)."""
    lower: NotNegative = 0.2
    """Below, the ensemble is certain enough."""
    upper: Positive = 5.0
    """Above, the ensemble has lost its way: such geometries are counted, and end a trajectory. Where the window has
    fewer than rounds.fewest, those with the smallest deviations above it are taken too."""
    most: Count = 40
    """At most so many structures a round, the farthest from all others first. With two levels, those of them are
    labelled at the upper one too of which its own network's deviation lies above `lower`."""
    distinct: NotNegative = 0.01
    """Structures whose descriptors are nearer to each other than this are taken for one: mean and standard deviation of
    the atomic environment vectors of each element, and the Euclidean distance."""

    @model_validator(mode="after")
    def _check_window(self) -> SelectionConfig:
        if self.lower >= self.upper:
            raise ValueError(f"lower must be smaller than upper, which is {self.upper}")
        return self


class RoundsConfig(Section):
    """When the exploration ends."""

    most: Annotated[int, Field(ge=0)] = 10
    """Rounds after the first models at the most. An exploration that has used them up goes on with a larger number."""
    fewest: Count = 10
    """It ends before if a round finds fewer uncertain structures than this, near duplicates apart."""


class ExploreLossConfig(LossConfig):
    """As in a run's configuration (docs/configuration.md), but forces are trained on."""

    forces: bool = True
    """Whether forces are trained on; they have to be."""
    force_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """static: the share of L_F."""


EPOCHS, STEPS = 100, 5000
"""In a round each model is trained for so many epochs, and for so many steps of the optimizer, whatever is more."""


class ExploreTrainingConfig(TrainingConfig):
    """Training in each round: keys, and defaults that are not named here, are those of docs/configuration.md."""

    epochs: Count | None = None  # type: ignore[assignment]
    """Passes over the training structures in each round; null: 100, or, of few structures, as many as make 5,000 steps
    of the optimizer."""
    batch_size: Count = 5
    """Structures in a training batch."""
    dtype: Literal["float64", "float32"] = "float32"
    """Precision of descriptor and networks."""
    loss: ExploreLossConfig = ExploreLossConfig()
    """See the section."""
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-3)
    """See the section."""
    scheduler: SchedulerConfig = SchedulerConfig(name="cosine")
    """See the section."""


class ExploreEnsembleConfig(EnsembleConfig):
    """The ensemble; its members' disagreement decides what is labelled."""

    members: Members = 4
    """Number of models."""


class ExploreConfig(Section):
    """A whole exploration."""

    run: str
    """The folder of the exploration; by default runs/ and the name of the configuration file."""
    seed: Seed = 0
    """Seed of everything that is drawn."""
    geometries: GeometriesConfig
    """See the section."""
    labels: LabelsConfig = LabelsConfig()
    """See the section."""
    sampling: SamplingConfig = SamplingConfig()
    """See the section."""
    selection: SelectionConfig = SelectionConfig()
    """See the section."""
    rounds: RoundsConfig = RoundsConfig()
    """See the section."""
    test: list[str] = Field(default=[])
    """Files of data that the ensemble is tested on after each round; nothing else is done with them."""
    descriptor: DescriptorConfig = DescriptorConfig()
    """See docs/configuration.md."""
    network: NetworkConfig = NetworkConfig()
    """See docs/configuration.md."""
    training: ExploreTrainingConfig = ExploreTrainingConfig()
    """See the section."""
    ensemble: ExploreEnsembleConfig = ExploreEnsembleConfig()
    """See the section."""

    @field_validator("test", mode="before")
    @classmethod
    def _one_file(cls, files: Any) -> Any:
        return [files] if isinstance(files, str) else files

    @model_validator(mode="after")
    def _check_forces(self) -> ExploreConfig:
        if not self.training.loss.forces:
            raise ValueError(
                "training.loss.forces is false: dynamics of an ensemble that was not trained on forces lead nowhere, "
                "leave it true"
            )
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> ExploreConfig:
        sampling = self.sampling
        if self.rounds.most and not (sampling.trajectories or sampling.modes or sampling.saddles):
            raise ValueError("sampling.trajectories and sampling.modes are both 0: sample something")
        if self.geometries.saddles and not sampling.saddles:
            raise ValueError("geometries.saddles has no use without sampling.saddles: set that to true")
        return self

    def of_training(
        self, run: Path, files: Sequence[Path], split: Path, structures: int, start: Path | None
    ) -> train_config.Config:
        """The configuration of the training run in a folder, from another run's models or from none.

        It is on the files, so many structures of which are for training according to the split.
        """
        shared = self.model_dump(include={"descriptor", "network", "training", "ensemble"})
        if self.training.epochs is None:
            batches = -(-structures // self.training.batch_size)
            shared["training"]["epochs"] = max(EPOCHS, -(-STEPS // batches))
        values = {
            **shared,
            "run": str(run),
            "data": {
                "files": [str(file) for file in files],
                "fidelity": self.labels.fidelities if len(self.labels.fidelities) > 1 else 1,
                "split_file": str(split),
                "on_disk": False,
            },
        }
        if start is not None:
            values["start"] = {"model": str(start)}
        return train_config.from_dict(values, "the configuration of the exploration")


CHANGEABLE = {"labels.workers", "labels.seconds", "rounds.most", "rounds.fewest", "test", "run"}
"""Keys that may change when an exploration goes on; others make it another one."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> ExploreConfig:
    """Read a configuration; see `kinml_fast.train.config.load`."""
    path = Path(path)
    values = {"run": f"runs/{path.stem}"} | train_config.read_yaml(path, ())
    return train_config.changed(ExploreConfig, values, overrides, str(path))


def with_values(values: dict[str, Any], source: str) -> ExploreConfig:
    """The configuration of plain values."""
    return train_config.validated(ExploreConfig, values, source)
