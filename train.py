"""Train a face recognition model. From the repository root:

python train.py                                                  # the images in data/, on GPU 0
python train.py --gpu_num=[0,1] --batch_size=256                 # on two GPUs
torchrun --nproc_per_node=8 train.py --batch_size=128            # on eight GPUs, 128 images on each
torchrun --nproc_per_node=8 -- train.py --m=0.35 --s=32          # torchrun stops at --m and --s without --
python train.py --LR_train=True --LR_scale=4 --LR_eval=True      # half of the images in low resolution
python train.py --backbone=MobileFaceNet --head=CosFace --m=0.35 --train_data=/sets/faces --gpu_num=cpu
python train.py --train_data=/sets/faces_emore/train.rec         # InsightFace's records, as they are published
python train.py --resume_dir=checkpoints/HRTRAIN_2022-07-28-19-15  # continue a run
python train.py --init=mobilefacenet_s1_ms1m.pth --freeze_epochs=1 --backbone_lr=0.1   # start from a public network
python train.py --config=run.yaml --print_config                 # the settings as they would be used
"""

from collections.abc import Mapping
from typing import Any

from config import parse_train
from util.distributed import DistEnv, distributed_session
from util.errors import run_script


def main(arguments: list[str]) -> None:
    config = parse_train(arguments, inherit=saved_settings, inherit_init=settings_of_network)

    # torch takes seconds to import: import it after the command line was read without an error.
    from util.training.trainer import Trainer

    env = DistEnv.from_environ()
    with distributed_session(config.gpu_num, env) as devices:
        Trainer(config, devices, env).train()


def saved_settings(resume_dir: str) -> dict[str, Any]:
    """Return the settings of the run to resume. They apply unless the command line or its file gives another value."""
    from util.checkpoint.run_dir import load_state

    return load_state(resume_dir).settings


def settings_of_network(explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file of --init tells. The crop applies unless another is given."""
    from util.public_networks import read_initial_network

    network = read_initial_network(explicit["init"], explicit.get("channel_order"), explicit.get("input_scale"))
    return {"backbone": network.name, "embedding_size": network.embedding_size, "train_crop": network.crop}


if __name__ == "__main__":
    run_script(main)
