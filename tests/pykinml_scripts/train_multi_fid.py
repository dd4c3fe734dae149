"""As PyKinML's manual describes its example train_multi_fid: two levels of theory at once, energies and forces."""

import torch

from kinml_fast.pykinml import multi_fid_loop as pes_mf
from kinml_fast.pykinml import prepper as prep

args = prep.parse_arguments_list()
args.epochs = 10
args.save_every = 1
args.multi_fid = True
args.fidlevel = 1
args.fidlevel_lf = 0
args.sae_fit = False
args.my_neurons = [12, 6, 2, 1]
args.my_actfn = ["gaussian", "gaussian", "gaussian", "identity"]
args.cuttoff_radius = [5.2, 3.8]
args.aev_params = [4, 2, 2]
args.input_data_fname = "data_holder/C[2-3]H[2-3].db"
args.input_data_type = "sqlite"
args.trtsid_name = ["mf_tvt.txt"]
args.tvt = [30, 10, 0]
args.tr_batch_size = 5
args.floss = True
args.fw = 0.5
args.optimize_force_weight = False
args.randomseed = [0, 1]
args.savenm = f"mf_model_{args.randomseed[0]}_{args.randomseed[1]}"
args.ddp = False
args.gpus = [0, 1]


def main(args):
    torch.set_default_dtype(torch.float64)
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel, get_aevs=True)
        prep.prep_data(args, fid=args.fidlevel_lf, get_aevs=False)
        args.pre_saved = True
        args.data_path = args.savenm
    pes_mf.spawned_trainer("cpu", args, 0)


if __name__ == "__main__":
    main(args)
