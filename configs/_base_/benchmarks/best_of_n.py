# How much there is left to learn on collages of real objects, and whether the reward would find it.
# For a config whose objective is GRPOObjective; n is its model.objective.num_generations.
from mmengine.config import read_base

from projects.llava_sam2_rl.evaluation import BestOfNMetric

with read_base():
    from ..evaluation.collages import *

test_dataloader.update(batch_size=8)
test_evaluator = [dict(type=BestOfNMetric)]
