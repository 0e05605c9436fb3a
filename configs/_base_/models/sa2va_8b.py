# Sa2VA-8B: InternVL2.5-8B (InternViT-300M, InternLM2.5-7B) and SAM 2 Hiera-L.
from mmengine.config import read_base

with read_base():
    from .sa2va_4b import *

model['policy']['pretrained'] = 'pretrained/Sa2VA-8B'
