# Sa2VA-1B: InternVL2.5-1B (InternViT-300M, Qwen2.5-0.5B) and SAM 2 Hiera-L.
from mmengine.config import read_base

with read_base():
    from .sa2va_4b import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-1B'
