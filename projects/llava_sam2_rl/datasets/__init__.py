from projects.llava_sam2_rl.datasets.base import (
    BadRecord,
    MixedRegionDataset,
    RecordDataset,
    RegionDataset,
)
from projects.llava_sam2_rl.datasets.coco_regions import COCORegionDataset
from projects.llava_sam2_rl.datasets.collages import (
    GeneratedCollages,
    collage_caption,
    vague_collage_caption,
)
from projects.llava_sam2_rl.datasets.collate import (
    FRAME_KEYS,
    clip_collate,
    sa2va_collate,
)
from projects.llava_sam2_rl.datasets.conversations import ConversationDataset
from projects.llava_sam2_rl.datasets.describe_anything import DescribeAnythingDataset
from projects.llava_sam2_rl.datasets.folder_regions import FolderRegionDataset
from projects.llava_sam2_rl.datasets.generated import GeneratedDataset, Scene
from projects.llava_sam2_rl.datasets.grasp_any_region import GraspAnyRegionDataset
from projects.llava_sam2_rl.datasets.grefcoco import GRefCOCODataset
from projects.llava_sam2_rl.datasets.hugging_face import HuggingFaceRegionDataset
from projects.llava_sam2_rl.datasets.index_cache import CachedIndex, cached_index
from projects.llava_sam2_rl.datasets.jsonl_regions import JSONLRegionDataset
from projects.llava_sam2_rl.datasets.meta_expressions import MetaExpressionsDataset
from projects.llava_sam2_rl.datasets.moving_scenes import GeneratedMovingScenes
from projects.llava_sam2_rl.datasets.openimages import OpenImagesDataset
from projects.llava_sam2_rl.datasets.photographs import Photographs
from projects.llava_sam2_rl.datasets.refcoco import RefCOCODataset
from projects.llava_sam2_rl.datasets.referring_clips import ReferringClipDataset
from projects.llava_sam2_rl.datasets.referring_videos import (
    MeViSDataset,
    RefDAVIS17Dataset,
    RefSAVDataset,
    RefYouTubeVOSDataset,
    ReVOSDataset,
)
from projects.llava_sam2_rl.datasets.sa1b import SA1BDataset
from projects.llava_sam2_rl.datasets.sa2va_finetune import Sa2VAFinetuneDataset
from projects.llava_sam2_rl.datasets.sampler import ResumableSampler
from projects.llava_sam2_rl.datasets.sav_official import SAVOfficialDataset
from projects.llava_sam2_rl.datasets.sav_pairs import SAVPairsDataset
from projects.llava_sam2_rl.datasets.scenes import (
    GeneratedScenes,
    reference_caption,
    vague_caption,
)
from projects.llava_sam2_rl.datasets.transforms import Sa2VATransform
from projects.llava_sam2_rl.datasets.unpickle import load_plain_pickle

__all__ = [
    'FRAME_KEYS',
    'BadRecord',
    'COCORegionDataset',
    'CachedIndex',
    'ConversationDataset',
    'DescribeAnythingDataset',
    'FolderRegionDataset',
    'GRefCOCODataset',
    'GeneratedCollages',
    'GeneratedDataset',
    'GeneratedMovingScenes',
    'GeneratedScenes',
    'GraspAnyRegionDataset',
    'HuggingFaceRegionDataset',
    'JSONLRegionDataset',
    'MeViSDataset',
    'MetaExpressionsDataset',
    'MixedRegionDataset',
    'OpenImagesDataset',
    'Photographs',
    'ReVOSDataset',
    'RecordDataset',
    'RefCOCODataset',
    'RefDAVIS17Dataset',
    'RefSAVDataset',
    'RefYouTubeVOSDataset',
    'ReferringClipDataset',
    'RegionDataset',
    'ResumableSampler',
    'SA1BDataset',
    'SAVOfficialDataset',
    'SAVPairsDataset',
    'Sa2VAFinetuneDataset',
    'Sa2VATransform',
    'Scene',
    'cached_index',
    'clip_collate',
    'collage_caption',
    'load_plain_pickle',
    'reference_caption',
    'sa2va_collate',
    'vague_caption',
    'vague_collage_caption',
]
