"""One step of Adam in one op, against torch's."""

from __future__ import annotations

import pytest
import torch

from kinml_fast import ops

TYPES = pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])


def arguments(n: int, dtype: torch.dtype, device: torch.device, amsgrad: bool) -> list:
    """Parameter, gradient and state, and the numbers of a step."""
    generator = torch.Generator().manual_seed(n)
    parameter, gradient, mean = (torch.randn(n, dtype=dtype, generator=generator).to(device) for _ in range(3))
    square, largest = (torch.rand(n, dtype=dtype, generator=generator).to(device) for _ in range(2))
    given = [parameter, gradient, mean, square, largest if amsgrad else None, 1e-2, 0.9, 0.99, 1e-8, 0.1, False]
    return [*given, torch.zeros((), dtype=torch.float64, device=device)]


@TYPES
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("n", [1, 300, 10_000])
def test_steps_are_those_of_torch(kind, amsgrad, n, dtype, rtol, device):
    generator = torch.Generator().manual_seed(n)
    own = torch.randn(n, dtype=dtype, generator=generator).to(device)
    theirs = own.clone().requires_grad_()
    optimizer = kind([theirs], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, amsgrad=amsgrad)
    state = [torch.zeros_like(own) for _ in range(3)]
    step = torch.zeros((), dtype=torch.float64, device=device)
    for _ in range(5):
        theirs.grad = torch.randn(n, dtype=dtype, generator=generator).to(device)
        largest = state[2] if amsgrad else None
        decoupled = kind is torch.optim.AdamW
        ops.adam_step(own, theirs.grad, state[0], state[1], largest, 1e-2, 0.9, 0.99, 1e-8, 0.1, decoupled, step)
        optimizer.step()
    assert step == 5
    torch.testing.assert_close(own, theirs.detach(), rtol=rtol, atol=rtol)
    for name, tensor in zip(("exp_avg", "exp_avg_sq"), state, strict=False):
        torch.testing.assert_close(tensor, optimizer.state[theirs][name], rtol=rtol, atol=rtol)


@TYPES
def test_every_device_gives_the_numbers_of_the_processor(dtype, rtol, device):
    here, there = arguments(5000, dtype, torch.device("cpu"), True), arguments(5000, dtype, device, True)
    ops.adam_step(*here)
    ops.adam_step(*there)
    for a, b in zip(here[:5], there[:5], strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=rtol, atol=rtol)


def test_steps_are_counted_beyond_what_a_float32_counts(device):
    given = arguments(30, torch.float64, device, False)
    given[-1].fill_(2.0**24)
    for n in range(3):
        before = given[0].clone(), given[2].clone(), given[3].clone()
        beta2 = given[7] = 1 - 1e-8  # its correction is far from 1
        ops.adam_step(*given)
        number = 2**24 + n + 1
        gradient = given[1] + 0.1 * before[0]
        mean, square = torch.lerp(before[1], gradient, 0.1), before[2] + (1 - beta2) * (gradient**2 - before[2])
        size = 1e-2 / (1 - 0.9**number)
        expected = before[0] - size * mean / ((square / (1 - beta2**number)).sqrt() + 1e-8)
        torch.testing.assert_close(given[0], expected, rtol=1e-13, atol=1e-13)
        assert given[-1] == number


def test_no_parameters(device):
    ops.adam_step(*arguments(0, torch.float64, device, True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_opcheck(dtype, amsgrad, device):
    torch.library.opcheck(torch.ops.kinml_fast.adam_step.default, tuple(arguments(30, dtype, device, amsgrad)))


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda t: t.half(), r"parameter must be float64 or float32, got Half"),
        (1, lambda t: t.float(), r"gradient is Float but parameter is Double; both must have one dtype"),
        (1, lambda t: t[1:], r"gradient must be contiguous and have the shape of parameter, \[30\], got \[29\]"),
        (3, lambda t: t.repeat(2)[::2], r"square must be contiguous and have the shape of parameter"),
        (11, lambda t: t.float(), r"step must be one float64 number, got Float of shape \[\]"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(place, change, message, device):
    given = arguments(30, torch.float64, device, False)
    given[place] = change(given[place])
    with pytest.raises(RuntimeError, match=f"kinml_fast: {message}"):
        ops.adam_step(*given)


@pytest.mark.cuda
def test_tensors_on_two_devices(device):
    if device.type == "cpu":
        pytest.skip("needs a second device")
    given = arguments(30, torch.float64, device, False)
    given[2] = given[2].cpu()
    message = "kinml_fast: parameter is on cuda:0 but mean is on cpu; all tensors must be on one device"
    with pytest.raises(RuntimeError, match=message):
        ops.adam_step(*given)
