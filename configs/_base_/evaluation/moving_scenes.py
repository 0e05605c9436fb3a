# Generated clips that training does not see, for validation and test.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GeneratedMovingScenes

with read_base():
    from ..transforms import *
    from .scenes import *

val_dataloader.update(
    dataset=dict(
        type=GeneratedMovingScenes, length=256, num_frames=4, split='val', transforms=transform
    )
)
test_dataloader.update(dataset=val_dataloader['dataset'])
