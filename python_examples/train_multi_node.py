"""Train a model in several processes, on one computer or on the nodes of a cluster.

    sbatch train_multi_node.slurm                                  # a cluster with SLURM: 8 processes on two nodes
    torchrun --standalone --nproc-per-node=2 train_multi_node.py   # two processes on this computer
    python train_multi_node.py                                     # one; a few seconds on two cores
    python train_multi_node.py --smoke                             # a few epochs

All of these give the same bits. From the command line: srun kinml-fast train forces
"""

import argparse
import logging

from kinml_fast.train import joined, load, start

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--smoke", action="store_true", help="only a few epochs")
options = parser.parse_args()

# The variables of SLURM or torchrun say who this process is and where it finds the others.
with joined() as ranks:
    # The first process reads the data, writes the run folder, and talks.
    logging.basicConfig(level=logging.INFO if ranks.is_first else logging.ERROR, format="%(message)s")
    config = load(
        "forces",
        [
            "run=runs/train_multi_node",  # a folder that all processes see
            # Structures in a batch of all processes together. PyKinML's is that of each process, which would be
            # "training.per_rank=[batch_size]"; with learning_rate in this list, too, that one is multiplied as well.
            "training.batch_size=50",
            f"training.epochs={3 if options.smoke else 60}",
        ],
    )
    summary = start(config, overwrite=True, ranks=ranks)
    # Each process has all errors and the path of the model.
    if ranks.is_first:
        print(f"processes: {ranks.size}, best epoch {summary.best_epoch}, {summary.errors['test'].rmse:.2f} kcal/mol")
