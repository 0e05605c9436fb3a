# How batches are made. A data base adds its data set, and changes what differs.
from mmengine.dataset import DefaultSampler

from projects.llava_sam2_rl.datasets import ResumableSampler, clip_collate, sa2va_collate

# For training: without end, and resumable in the middle of an epoch.
shuffled = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type=ResumableSampler, shuffle=True, infinite=True),
    collate_fn=dict(type=sa2va_collate),
)
# For validation and test: every record once.
in_order = dict(
    batch_size=4,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=sa2va_collate),
)
# For tests on clips: neighbours are mostly about one clip, whose frames they then share.
clips_in_order = dict(in_order, collate_fn=dict(type=clip_collate))
