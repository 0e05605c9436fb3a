"""What carries the learning signal; the config chooses one."""

from .grpo import GRPOObjective
from .sft import SFTObjective

__all__ = ['GRPOObjective', 'SFTObjective']
