# Sa2VA-4B: InternVL2.5-4B (InternViT-300M, Qwen2.5-3B) and SAM 2 Hiera-L. Sizes, chat template and
# tokenizer are those of the checkpoint; another Sa2VA takes its place by `pretrained` alone.
from projects.llava_sam2_rl.models import DualLoopModel, SFTObjective, VideoLLaVASAMModel

model = dict(
    type=DualLoopModel,
    policy=dict(
        type=VideoLLaVASAMModel,
        pretrained='pretrained/Sa2VA-4B',
        lora=dict(r=128, lora_alpha=256, lora_dropout=0.05),
        trainable=['mlp1', 'lora', 'text_hidden_fcs', 'mask_decoder'],
        torch_dtype='bfloat16',
        gradient_checkpointing=True,
    ),
    objective=dict(type=SFTObjective),
    teacher=dict(decay=0.999),
    mask_to_caption=dict(weight=1.0),
    caption_to_mask=dict(weight=1.0),
    max_new_tokens=128,
)
