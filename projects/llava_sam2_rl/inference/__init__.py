"""Use of a trained model: describe what a region shows, segment what a text names."""

from projects.llava_sam2_rl.inference.answers import Segmentation
from projects.llava_sam2_rl.inference.clips import Clip, read_frames
from projects.llava_sam2_rl.inference.cycles import (
    MaskCycle,
    TextCycle,
    mask_to_caption_to_mask,
    text_to_mask_to_caption,
)
from projects.llava_sam2_rl.inference.pictures import Picture, load_image, load_mask
from projects.llava_sam2_rl.inference.regions import Box, Points, Region, Scribble
from projects.llava_sam2_rl.inference.sa2va import Sa2VA, names_something
from projects.llava_sam2_rl.inference.video import VideoSegmentation

__all__ = [
    'Box',
    'Clip',
    'MaskCycle',
    'Picture',
    'Points',
    'Region',
    'Sa2VA',
    'Scribble',
    'Segmentation',
    'TextCycle',
    'VideoSegmentation',
    'load_image',
    'load_mask',
    'mask_to_caption_to_mask',
    'names_something',
    'read_frames',
    'text_to_mask_to_caption',
]
