"""Use of a trained model: describe what a region shows, segment what a text names."""

from projects.llava_sam2_rl.inference.answers import Segmentation
from projects.llava_sam2_rl.inference.cycles import (
    MaskCycle,
    TextCycle,
    mask_to_caption_to_mask,
    text_to_mask_to_caption,
)
from projects.llava_sam2_rl.inference.pictures import Picture, load_image, load_mask
from projects.llava_sam2_rl.inference.regions import Box, Points, Region, Scribble
from projects.llava_sam2_rl.inference.sa2va import Sa2VA, names_something

__all__ = [
    'Box',
    'MaskCycle',
    'Picture',
    'Points',
    'Region',
    'Sa2VA',
    'Scribble',
    'Segmentation',
    'TextCycle',
    'load_image',
    'load_mask',
    'mask_to_caption_to_mask',
    'names_something',
    'text_to_mask_to_caption',
]
