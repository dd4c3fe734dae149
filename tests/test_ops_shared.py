"""The ops for a training batch that several processes share, each process in its turn: the results of one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from op_helpers import ON_CPU, SMALL, normal, ragged

from kinml_fast import ops
from kinml_fast.nn import EnergyModel
from kinml_fast.ops import Loss, Model, StepResults, System

OPS = torch.ops.kinml_fast
pytestmark = pytest.mark.usefixtures("on_device")


class Case:
    """A batch of molecules of all sizes in any order, and the loss of a data set that holds them."""

    def __init__(self, dtype: torch.dtype, levels: int) -> None:
        x, z, o = ragged((10, 3, 40, 0, 25, 1, 33, 12, 70, 9), 2, 1)
        self.system = System(x.to(dtype), z, o)
        torch.manual_seed(1)
        model = EnergyModel(
            SMALL,
            layers=(9, 5, 1),
            activations=["gaussian", "gaussian", "identity"],
            dtype=dtype,
            fidelities=tuple(range(levels)),
        )
        model.to(self.system.species.device)
        self.weights, self.model = model.networks.weights.detach(), Model(SMALL.packed(), model.networks.packed)
        self.structures = torch.tensor([4, 0, 8, 1, 2, 6, 5, 7, 3])
        n = len(o) - 1
        self.weight = normal(levels, n, seed=4).abs()
        self.weight[:, 2] = 0
        (counts,) = ops.count_weights(ops.weighted(self.weight, self.weight), self.structures, n)
        scales = torch.tensor([0.3, 0.7], dtype=torch.float64)
        forces = normal(levels, len(z), 3, seed=5)
        self.loss = Loss(normal(levels, n, seed=3), self.weight, forces, self.weight, scales, counts)

    def results(self) -> StepResults:
        levels, count = len(self.weight), len(self.structures)
        shapes = (2,), (levels, count), (levels, count, 3)
        losses, residuals, errors = (torch.full(shape, 7.0, dtype=torch.float64) for shape in shapes)
        return StepResults(losses, torch.empty_like(self.weights), residuals, errors)


def messages_of(case: Case, size: int) -> torch.Tensor:
    """What processes say of the batch."""
    levels, n_weights = len(case.weight), len(case.weights)
    length = ops.message_bytes(case.system, case.structures, levels, n_weights, size)
    assert length % 64 == 0
    messages = torch.full((size, length), 255, dtype=torch.uint8)  # NaN
    for rank in range(size):
        ops.force_step_share(
            case.system, case.structures, case.weights, case.loss, messages[rank], case.model, rank, size
        )
        assert (messages[rank, -16:] == 255).all()  # the caller's
    return messages


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 40])
def test_a_shared_batch_has_the_results_of_one_process(size, dtype, levels):
    case = Case(dtype, levels)
    expected, joint = case.results(), case.results()
    ops.force_step(case.system, case.structures, case.weights, case.loss, expected, case.model)
    ops.force_step_join(case.system, case.structures, case.loss, messages_of(case, size), joint)
    for name in ("losses", "gradient", "energy_residuals", "force_errors"):
        assert torch.equal(getattr(joint, name), getattr(expected, name)), name


def test_a_shared_batch_of_nothing():
    case = Case(torch.float64, 1)
    case.structures = case.structures[:0]
    results = case.results()
    ops.force_step_join(case.system, case.structures, case.loss, messages_of(case, 2), results)
    assert not results.gradient.any()
    assert not results.losses.any()


def test_wrong_messages_are_refused():
    case = Case(torch.float64, 1)
    messages, results = messages_of(case, 2), case.results()

    def share(message: torch.Tensor, rank: int = 0) -> None:
        ops.force_step_share(case.system, case.structures, case.weights, case.loss, message, case.model, rank, 2)

    def refused(expected: str) -> contextlib.AbstractContextManager:
        return pytest.raises(RuntimeError, match=f"^kinml_fast: .*{expected}")

    with refused(r"rank = 2 is not in \[0, 2\)"):
        share(messages[0], 2)
    with refused(r"messages must be uint8 of shape \[\d+\], .*got Byte of shape"):
        share(messages[0, :-1])
    with refused("messages must be uint8 .*got Char"):
        share(messages[0].char())
    with refused(r"messages must be uint8 of shape \[3, \d+\]"):
        three = torch.cat([messages, messages[:1]])
        ops.force_step_join(case.system, case.structures, case.loss, three[:, :-64], results)
    with refused(r"messages must have shape \[n_ranks, bytes\]"):
        ops.force_step_join(case.system, case.structures, case.loss, messages[0], results)


@ON_CPU
def test_structures_that_do_not_exist_have_no_message():
    case = Case(torch.float64, 1)
    with pytest.raises(RuntimeError, match=r"structures\[1\] = 10 is not in \[0, 10\)"):
        ops.message_bytes(case.system, torch.tensor([0, 10]), 1, 5, 2)


@pytest.mark.parametrize("size", [1, 3])
def test_opcheck(size):
    case = Case(torch.float64, 2)
    check, own = torch.library.opcheck, ("test_schema", "test_autograd_registration")
    packed, results = (case.model.descriptor, case.model.networks), case.results()
    messages = messages_of(case, size)
    step = case.system.tensors, case.structures
    check(OPS.message_bytes.default, (*step, 2, len(case.weights), size), test_utils=own)
    shared = (*step, case.weights, case.loss.tensors, messages[0], *packed, 0, size)
    check(OPS.force_step_share.default, shared, test_utils=own)
    check(OPS.force_step_join.default, (*step, case.loss.tensors, messages, results.tensors), test_utils=own)
