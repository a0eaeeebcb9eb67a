"""Train a network that enlarges faces: RCAN, for one scale. From the repository root:

python -m applications.super_resolution.train --data data/imgs_casia --scale 4          # the paper's size, on GPU 0
python -m applications.super_resolution.train --data faces.rec --scale 8 --gpu_num [0,1] --batch_size 64
python -m applications.super_resolution.train --data data/imgs --gpu_num cpu --epochs 10 --steps 300   # --size small
python -m applications.super_resolution.train --data data/imgs --val_data data/lfw_align_112/lfw
python -m applications.super_resolution.train --resume_dir checkpoints/SR_x4_2022-07-28-19-15

To keep the identity of faces for a recognition network, add --identity_weight 0.1 --identity_backbone Backbone_Best.pth
"""

from __future__ import annotations

from typing import Any

from applications.super_resolution.settings import parse_train
from util.errors import run_script


def main(arguments: list[str]) -> None:
    settings = parse_train(arguments, inherit=saved_settings)

    # torch takes seconds to import: import it after the command line was read without an error.
    from applications.super_resolution.trainer import SuperResolutionTrainer
    from util.device import select_devices

    devices = select_devices(settings.gpu_num)
    settings = settings.with_size("small" if devices[0].type == "cpu" else "default")
    SuperResolutionTrainer(settings, devices).train()


def saved_settings(resume_dir: str) -> dict[str, Any]:
    """Return the settings of the run to resume. They apply unless the command line or its file gives another value."""
    from util.checkpoint.io import SR_CHECKPOINT_FILES
    from util.checkpoint.run_dir import load_state

    return load_state(resume_dir, SR_CHECKPOINT_FILES).settings


if __name__ == "__main__":
    run_script(main)
