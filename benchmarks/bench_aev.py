"""Atomic environment vectors of 2000 C5H5 and their products with the Jacobian.

The floor is the arithmetic of the method at the rate of torch.mm: for each triple n_angular exponentials (28 FLOP
each), n_sections eighth powers (10 each), about 40 for the geometry, and for each of the n_angular x n_sections
products 2 FLOP (forward), 4 (both products with J) or 8 (second derivative).
"""

from __future__ import annotations

import pytest
import torch
from conftest import count_triples

from kinml_fast import ops
from kinml_fast.nn import AEVParameters
from kinml_fast.ops import System

PARAMETERS = AEVParameters.aevmod(("C", "H"))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("product", ["aev", "vjp", "jvp", "hvp"])
def test_aev(benchmark, c5h5, product, dtype):
    kind = getattr(torch, dtype)
    # 50 structures at a time, as in training: the vectors of a batch stay in cache.
    triples = count_triples(c5h5, PARAMETERS.angular_cutoff)
    per_triple = 8 * 28 + 8 * 10 + 40 + 64 * {"aev": 2, "vjp": 4, "jvp": 4, "hvp": 8}[product]
    benchmark.group = f"{product} {dtype}"
    benchmark.extra_info.update(form=product, dtype=dtype, structures=2000, triples=triples, flops=triples * per_triple)
    generator = torch.Generator().manual_seed(0)
    x = torch.from_numpy(c5h5.coordinates).to(kind)
    species, offsets = torch.from_numpy(c5h5.species[:500]), torch.from_numpy(c5h5.offsets[:51])
    g = torch.randn(500, PARAMETERS.length, dtype=kind, generator=generator)
    v = torch.randn(500, 3, dtype=kind, generator=generator)
    packed = PARAMETERS.packed()
    batches = [part.contiguous() for part in x.split(500)]
    call = {
        "aev": lambda part: ops.aev(System(part, species, offsets), packed),
        "vjp": lambda part: ops.aev_vjp(System(part, species, offsets), g, packed),
        "jvp": lambda part: ops.aev_jvp(System(part, species, offsets), v, packed),
        "hvp": lambda part: ops.aev_hvp(System(part, species, offsets), g, v, packed),
    }[product]

    def everything() -> None:
        for part in batches:
            call(part)

    benchmark.pedantic(everything, rounds=30, warmup_rounds=3)
