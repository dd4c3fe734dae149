"""As PyKinML's manual describes its example train_single_fid: one level of theory, energies, a file of the division."""

import os
import time

import torch
import torch.multiprocessing as mp

from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml import trainer

args = prep.parse_arguments_list()
args.epochs = 10
args.save_every = 1
args.my_neurons = [48, 24, 12, 1]
args.my_actfn = ["gaussian", "gaussian", "gaussian", "identity"]
args.cuttoff_radius = [5.2, 3.8]
args.aev_params = [16, 8, 8]
args.input_data_fname = "data_holder/C5H5.db"
args.input_data_type = "sqlite"
args.trtsid_name = ["sample_tvt.txt"]
args.fidlevel = 1
args.pre_saved = False
args.tvt = [2000, 48, 0]
args.tr_batch_size = 50
args.floss = False
args.fw = 0.0
args.optimize_force_weight = False
args.randomseed = [0, 1]
args.savenm = f"my_model_{args.randomseed[0]}_{args.randomseed[1]}"
args.ddp = False
args.gpus = [0, 1]


def main(args):
    begin = time.time()
    torch.set_default_dtype(torch.float64)
    if args.ddp:
        os.environ["CUDA_VISIBLE_DEVICES"] = ", ".join(map(str, args.gpus))
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel)
        args.pre_saved = True
        args.data_path = args.savenm
    world_size = torch.cuda.device_count()
    if args.ddp:
        mp.spawn(trainer.spawned_trainer, args=[args, world_size], nprocs=world_size, join=True)
    else:
        most = mp.cpu_count()
        if 2 * args.num_cores > most:
            args.num_cores = int(most / 2)
            torch.set_num_threads(args.num_cores)
        trainer.spawned_trainer("cpu", args, 0)
    print("Time it took: ", time.time() - begin)


if __name__ == "__main__":
    torch.multiprocessing.freeze_support()
    main(args)
