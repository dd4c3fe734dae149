"""The members of an ensemble: what each of them is trained with."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np

from kinml_fast.data import splits
from kinml_fast.data.prepared import Prepared
from kinml_fast.data.split import Split
from kinml_fast.data.structures import Structures
from kinml_fast.errors import ConfigError
from kinml_fast.train import continued, single
from kinml_fast.train.config import Config, EnsembleConfig
from kinml_fast.train.folder import MEMBER_PATIENCE, RunFolder
from kinml_fast.train.progress import Progress
from kinml_fast.train.ranks import ALONE, Ranks
from kinml_fast.train.results import Summary


def of_member(config: Config, data: Prepared, number: int) -> tuple[Config, Prepared]:
    """Configuration and data of a member, counted from 1.

    Raises
    ------
    InputError
        There are fewer training and validation structures than folds.
    """
    changed = config.model_copy(
        update={
            "run": str(RunFolder(config.run).member(number)),
            "start": continued.start_of_member(config.start, number),
            "network": config.network.model_copy(update={"seed": config.network.seed + number - 1}),
            "training": config.training.model_copy(update={"seed": config.training.seed + number - 1}),
            "ensemble": EnsembleConfig(),
        }
    )
    if config.ensemble.vary == "folds":
        split = fold(data.structures, data.split, config.ensemble.members, number - 1, config.data.split_seed)
        data = replace(data, split=split)
    return changed, data


def fold(structures: Structures, split: Split, n_folds: int, index: int, seed: int = 0) -> Split:
    """One of the divisions of a cross-validation.

    Parameters
    ----------
    structures, split
        Training and validation structures together are divided; the test set stays.
    n_folds
        Number of parts; each has its share of every formula (and of the structures that lack a level of theory).
    index
        Which part is for validation, from 0.
    seed
        Of the division and of the order of the training structures.

    Raises
    ------
    InputError
        There are fewer structures than parts.
    """
    pool = np.concatenate([split.train, split.validation])
    if len(pool) < n_folds:
        raise ConfigError(
            f"there are {len(pool)} training and validation structures for {n_folds} folds: set ensemble.members to at "
            "most their number or take more data"
        )
    order = np.random.default_rng([seed, n_folds]).permutation(pool)
    # Dealt out like cards, kind after kind.
    formulas, known = np.array(structures.formulas())[order], structures.known_energies[:, order].T
    kinds = [f"{formula} {of_structure}" for formula, of_structure in zip(formulas, known, strict=True)]
    dealt = order[np.argsort(kinds, kind="stable")]
    chosen = dealt[index::n_folds]
    return Split(order[~np.isin(order, chosen)], np.sort(chosen), split.test)


def train_member(
    config: Config, data: Prepared, number: int, progress: Progress | None = None, ranks: Ranks = ALONE
) -> Summary:
    """Train a member, or what is left of it, in its folder.

    Parameters
    ----------
    config, data
        Those of the ensemble.
    number
        The member, counted from 1.
    progress
        What shows the progress.
    ranks
        The processes that train it together.
    """
    if progress is not None:
        progress.member = f"member {number}/{config.ensemble.members}"
    config, data = of_member(config, data, number)
    folder = RunFolder(config.run)
    with contextlib.ExitStack() as stack:

        def opened() -> str:
            stack.enter_context(folder.hold(patience=MEMBER_PATIENCE))
            if folder.last.exists():
                return "begun"
            folder.make()
            splits.write_tvtmsk(folder.split, data.structures, data.split)
            return ""

        if ranks.told(opened):
            return single.go_on(config, data, progress, ranks=ranks)
        config, origin = single.begin(config)
        return single.fit(config, data, origin, progress, resume=True, ranks=ranks)
