"""What carries the learning signal; the config chooses one."""

from .grpo import GRPOObjective
from .gumbel import GumbelObjective
from .sft import SFTObjective

__all__ = ['GRPOObjective', 'GumbelObjective', 'SFTObjective']
