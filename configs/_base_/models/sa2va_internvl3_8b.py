# Sa2VA-InternVL3-8B: InternViT-300M, Qwen2.5-7B, and SAM 2 Hiera-L.
from mmengine.config import read_base

with read_base():
    from .sa2va_4b import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-InternVL3-8B'
# The official recipe's rank for this size.
model['policy']['lora'].update(r=256, lora_alpha=512)
