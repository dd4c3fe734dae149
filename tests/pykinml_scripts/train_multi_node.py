"""As PyKinML's manual describes its example train_multi_node: several processes that a cluster starts."""

import os
from pathlib import Path

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP

from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml import trainer

args = prep.parse_arguments_list()
args.epochs = 10
args.save_every = 1
args.my_neurons = [48, 24, 12, 1]
args.my_actfn = ["gaussian", "gaussian", "gaussian", "identity"]
args.input_data_fname = "data_holder/C5H5.db"
args.trtsid_name = ["sample_tvt.txt"]
args.tvt = [2000, 48, 0]
args.tr_batch_size = 50
args.savenm = "my_model_nodes"


def main(args):
    torch.set_default_dtype(torch.float64)
    args.num_species = len(args.present_elements)
    args.world_size = int(os.environ["WORLD_SIZE"])
    args.distributed = args.world_size > 1
    args.rank = int(os.environ["SLURM_PROCID"])
    args.gpu = args.rank % max(torch.cuda.device_count(), 1)
    prep.prep_data(args, fid=args.fidlevel)
    args.pre_saved, args.data_path = True, args.savenm
    init_process_group(backend="gloo", init_method="env://", world_size=args.world_size, rank=args.rank)
    save_path = f"{args.savenm}_gpu_{args.rank}.log"
    Path(save_path[:-4]).mkdir(parents=True, exist_ok=True)
    train, valid, test, model, optimizer, schedule, sae_energies, keys = prep.load_train_objs(args)
    prep.set_up_task_weights(model, args, optimizer)
    model = DDP(model.to(args.gpu), device_ids=[args.gpu])
    model.mtl = model.module.mtl
    loop = trainer.Trainer(
        model,
        train,
        valid,
        test,
        keys,
        optimizer,
        schedule,
        sae_energies,
        args.save_every,
        save_path,
        args.savenm,
        args.gpu,
        force_train=args.floss,
        num_spec=args.num_species,
    )
    loop.train(args.epochs)
    destroy_process_group()


if __name__ == "__main__":
    main(args)
