"""A program for torchrun --max-restarts: of its first attempt a process ends at once, and the second one goes well."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from kinml_fast.train import joined

if __name__ == "__main__":
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with joined() as ranks:
        number = torch.ones(1)
        dist.all_reduce(number)
        if attempt == 0 and ranks.rank == 1:
            os._exit(9)
        ranks.wait()
    if ranks.is_first:
        sys.stdout.write(f"attempt {attempt}: {int(number)} processes")
