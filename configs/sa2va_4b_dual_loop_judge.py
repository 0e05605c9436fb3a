"""The main config with the original plan's caption reward: a quarter METEOR, three a judge.

The judge needs an OpenAI-compatible endpoint; where that wants a key, `api_key_env` names the
environment variable that holds it.

NPROC_PER_NODE=8 xtuner train configs/sa2va_4b_dual_loop_judge.py --deepspeed deepspeed_zero2
"""

from mmengine.config import read_base

from projects.llava_sam2_rl.rewards import LLMJudgeReward, MeteorReward, WeightedRewards

with read_base():
    from .sa2va_4b_dual_loop import *

model['objective']['caption_to_mask']['reward'] = dict(
    type=WeightedRewards,
    rewards=[
        dict(type=MeteorReward, weight=0.25),
        dict(
            type=LLMJudgeReward,
            weight=0.75,
            model='meta-llama/Llama-3.1-8B-Instruct',
            base_url='http://127.0.0.1:8000/v1',
            cache_dir='work_dirs/judge_cache',
        ),
    ],
)
