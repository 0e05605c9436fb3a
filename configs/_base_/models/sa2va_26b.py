# Sa2VA-26B: InternVL2.5-26B (InternViT-6B, InternLM2.5-20B) and SAM 2 Hiera-L.
from mmengine.config import read_base

with read_base():
    from .sa2va_4b import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-26B'
