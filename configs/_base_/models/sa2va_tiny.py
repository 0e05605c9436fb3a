# A Sa2VA small enough for a CPU: the classes of the 4B model, other numbers.
from projects.llava_sam2_rl.models import DualLoopModel, SFTObjective, VideoLLaVASAMModel

model = dict(
    type=DualLoopModel,
    policy=dict(
        type=VideoLLaVASAMModel,
        # `llava_sam2_rl://` is this package's own folder.
        pretrained='llava_sam2_rl://assets/sa2va_tiny',
        lora=dict(r=16, lora_alpha=32, lora_dropout=0.05),
        trainable=['mlp1', 'lora', 'text_hidden_fcs', 'mask_decoder'],
        torch_dtype='float32',
        gradient_checkpointing=False,
    ),
    objective=dict(type=SFTObjective, return_weight=0.2),
    teacher=dict(decay=0.99),
    mask_to_caption=dict(weight=1.0),
    caption_to_mask=dict(weight=1.0),
    max_new_tokens=32,
)
