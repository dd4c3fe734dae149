"""As PyKinML's manual describes its example load_model: goes on with the model of train_single_fid, on its data."""

import torch

from kinml_fast.pykinml import prepper as prep
from kinml_fast.pykinml import trainer

args = prep.parse_arguments_list()
args.epochs = 10
args.save_every = 1
args.savenm = "phase_two"
args.data_path = "my_model_0_1/"
args.load_model = True
args.load_model_name = "my_model_0_1/model-0009.pt"
args.load_opt = True
args.pre_saved = True
args.randomseed = [0, 1]
args.tvt = [2000, 48, 0]
args.tr_batch_size = 50
args.floss = False
args.fw = 0.0
args.optimize_force_weight = False
args.ddp = False


def main(args):
    torch.set_default_dtype(torch.float64)
    if not args.pre_saved:
        prep.prep_data(args, fid=args.fidlevel)
        args.pre_saved = True
    trainer.spawned_trainer("cpu", args, 0)


if __name__ == "__main__":
    main(args)
