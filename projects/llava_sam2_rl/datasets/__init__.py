from projects.llava_sam2_rl.datasets.base import BadRecord, MixedRegionDataset, RegionDataset
from projects.llava_sam2_rl.datasets.collate import FRAME_KEYS, sa2va_collate
from projects.llava_sam2_rl.datasets.conversations import ConversationDataset, ConversationSample
from projects.llava_sam2_rl.datasets.describe_anything import DescribeAnythingDataset
from projects.llava_sam2_rl.datasets.grasp_any_region import GraspAnyRegionDataset
from projects.llava_sam2_rl.datasets.index_cache import CachedIndex, cached_index
from projects.llava_sam2_rl.datasets.openimages import OpenImagesDataset
from projects.llava_sam2_rl.datasets.photographs import Photographs
from projects.llava_sam2_rl.datasets.refcoco import RefCOCODataset
from projects.llava_sam2_rl.datasets.sa1b import SA1BDataset
from projects.llava_sam2_rl.datasets.sampler import ResumableSampler
from projects.llava_sam2_rl.datasets.sav_official import SAVOfficialDataset
from projects.llava_sam2_rl.datasets.sav_pairs import SAVPairsDataset
from projects.llava_sam2_rl.datasets.scenes import (
    GeneratedScenes,
    Scene,
    reference_caption,
    vague_caption,
)
from projects.llava_sam2_rl.datasets.transforms import Sa2VATransform
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle
from projects.llava_sam2_rl.prompts import (
    REGION_INSTRUCTION,
    SEGMENTATION_ANSWERS,
    SEGMENTATION_QUESTIONS,
    SPECIAL_TOKENS,
    STOP_STRINGS,
    add_special_tokens,
    caption_answer,
    check_image_tokens,
    check_seg_tokens,
    clean_caption,
    encode_pair,
    encode_prompt,
    pad_batch,
    region_prompt,
    segmentation_answer,
    segmentation_prompt,
    special_token_ids,
    strip_final_period,
    truncate_at_stop,
)
from projects.llava_sam2_rl.utils.masks import prompt_mask_grid

__all__ = [
    'FRAME_KEYS',
    'REGION_INSTRUCTION',
    'SEGMENTATION_ANSWERS',
    'SEGMENTATION_QUESTIONS',
    'SPECIAL_TOKENS',
    'STOP_STRINGS',
    'BadRecord',
    'CachedIndex',
    'ConversationDataset',
    'ConversationSample',
    'DescribeAnythingDataset',
    'GeneratedScenes',
    'GraspAnyRegionDataset',
    'MixedRegionDataset',
    'OpenImagesDataset',
    'Photographs',
    'RefCOCODataset',
    'RegionDataset',
    'ResumableSampler',
    'SA1BDataset',
    'SAVOfficialDataset',
    'SAVPairsDataset',
    'Sa2VATransform',
    'Scene',
    'add_special_tokens',
    'cached_index',
    'caption_answer',
    'check_image_tokens',
    'check_seg_tokens',
    'clean_caption',
    'encode_pair',
    'encode_prompt',
    'load_plain_pickle',
    'pad_batch',
    'prompt_mask_grid',
    'reference_caption',
    'region_prompt',
    'sa2va_collate',
    'segmentation_answer',
    'segmentation_prompt',
    'special_token_ids',
    'strip_final_period',
    'truncate_at_stop',
    'vague_caption',
]
