# Collages of objects in sizes and places that training does not show, for validation and test.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import GeneratedCollages

with read_base():
    from ..transforms import *
    from .scenes import *

val_dataloader.update(
    dataset=dict(type=GeneratedCollages, length=256, split='val', transforms=transform)
)
test_dataloader.update(dataset=val_dataloader['dataset'])
