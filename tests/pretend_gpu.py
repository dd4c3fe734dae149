"""A GPU that is not there: what mixes devices on the way of a training or an evaluation shows on any machine.

While `pretended` runs, torch's device "meta" has memory and arithmetic, those of the CPU, and is as strict as a GPU:
tensors of both in one call are an error, but for those calls in which a GPU takes tensors of the CPU too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from kinml_fast import devices

GPU = torch.device("meta")

_BETWEEN = ("copy_", "_foreach_copy_", "index", "index_put_", "_index_put_impl_")
"""Calls that take tensors of the CPU beside those of a GPU: copies, and indices."""


class OnGpu(Tensor):
    """A tensor of the pretended GPU; `inner` is what it holds."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        """The same shape, strides and type, on the other device."""
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        own = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=GPU, **place)
        own.inner = inner
        return own

    @classmethod
    def __torch_dispatch__(cls, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """What the CPU makes of it."""
        return _run(op, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes new tensors of the GPU, and takes those of the CPU there."""

    def __torch_dispatch__(self, op: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Callable, args: tuple, kwargs: dict) -> Any:
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    of_gpu = [x for x in tensors if isinstance(x, OnGpu)]
    name, target = op.overloadpacket.__name__, kwargs.get("device")
    if of_gpu and name not in _BETWEEN and any(x.dim() and not isinstance(x, OnGpu) for x in tensors):
        raise RuntimeError(f"{name} got tensors of the pretended GPU and of the CPU")
    inner_args, inner_kwargs = tree_map_only(OnGpu, lambda x: x.inner, (args, kwargs))
    if target is not None:
        inner_kwargs["device"] = "cpu"
    # In inference mode, too, tensors made here are ordinary ones: those of the GPU are views of each other.
    outside = torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()
    with outside, torch.no_grad():
        found = op(*inner_args, **inner_kwargs)
        if name == "copy_":
            return args[0]
        if not of_gpu if target is None else torch.device(target) != GPU:
            return found
        same = {id(x.inner): x for x in of_gpu}  # of a call that writes to its arguments
        return tree_map_only(Tensor, lambda x: same[id(x)] if id(x) in same else OnGpu(x), found)


@contextlib.contextmanager
def pretended() -> Iterator[torch.device]:
    """While this runs, cuda names the pretended GPU (`devices.resolve`)."""
    resolve, tolist, tensor = devices.resolve, Tensor.tolist, torch.tensor
    patches = (
        mock.patch.object(devices, "resolve", lambda name: GPU if name.startswith("cuda") else resolve(name)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="pretended GPU"),
        # What torch does without asking the mode below.
        mock.patch.object(torch, "tensor", lambda data, device="cpu", **rest: tensor(data, **rest).to(device)),
        mock.patch.object(Tensor, "tolist", lambda x: tolist(x.inner if isinstance(x, OnGpu) else x)),
        mock.patch.object(OnGpu, "data_ptr", lambda x: x.inner.data_ptr()),
    )
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Factories())
        yield GPU
