"""What carries the learning signal; the config chooses one."""

from projects.llava_sam2_rl.models.objectives.base import Objective
from projects.llava_sam2_rl.models.objectives.grpo import GRPOObjective
from projects.llava_sam2_rl.models.objectives.gumbel import GumbelObjective
from projects.llava_sam2_rl.models.objectives.rollouts import Rollout
from projects.llava_sam2_rl.models.objectives.sft import SFTObjective

__all__ = ['GRPOObjective', 'GumbelObjective', 'Objective', 'Rollout', 'SFTObjective']
