"""Items of a data set into one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from projects.llava_sam2_rl.registry import FUNCTIONS

#: What a frame brings: a list with one tensor per sample, but for ``vp_overall_mask``.
FRAME_KEYS = ('pixel_values', 'vp_overall_mask', 'g_pixel_values', 'prompt_masks', 'masks')


def _frames(items: Sequence[dict[str, Any]], suffix: str = '') -> dict[str, Any]:
    frames: dict[str, Any] = {key: [item[key + suffix] for item in items] for key in FRAME_KEYS}
    frames['vp_overall_mask'] = torch.cat(frames['vp_overall_mask'])
    return frames


def _told(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What data sets have to say of the records they read."""
    return {
        key: [record for item in items for record in item.get(key, ())]
        for key in ('skipped', 'changed')
    }


@FUNCTIONS.register_module()
def sa2va_collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collates what :class:`Sa2VATransform` made of B records.

    Images and masks of a batch differ in size and number, so all but ``vp_overall_mask`` stay
    lists of one tensor per sample.

    Returns:
        ``{'data': ..., 'data_samples': list[RegionMeta]}``. ``data`` holds

        - ``pixel_values`` B × (T, 3, S, S) float32; ``vp_overall_mask`` (sum of T,) bool
        - ``g_pixel_values`` B × (3, G, G) uint8
        - ``prompt_masks`` B × (R, h, w) bool; ``masks`` B × (R, H, W) bool
        - ``captions`` B × (str or None); a caption with R = 0 and no turns describes nothing in
          its image
        - ``region_captions`` B × (R texts or None): a sample with a caption for each region, in
          place of one for all; entries may be ``None``
        - ``seg_per_region`` B bools: the caption is answered with a ``[SEG]`` for each region
        - ``conversations`` B × (``(question, answer)`` turns or None): a sample with turns has no
          region (R = 0) and no caption, and takes part in cross-entropy alone
        - ``pair``: ``None``, or the same five keys for the P second frames there are, and
          ``index`` (P,) int64, the samples they belong to; of a clip of T frames that is the frame
          on which the object is looked for again, and ``frame`` (P,) int64 says which, 0 … T - 1
        - ``clip``: ``None``, or ``g_pixel_values`` and ``masks`` of the M frames of clips that are
          neither first nor second frames, with ``index`` (M,) and ``frame`` (M,) as above; and
          ``pixel_values`` C × (T, 3, S, S) float32 of all frames of the C clips of more than two
          frames, with ``records`` (C,) int64, the samples they are
        - ``skipped``: ``(source, sample_id, reason)`` of every bad record met on the way
        - ``changed``: ``(source, sample_id, kind)`` of every change that was made in a text
    """
    if not items:
        raise ValueError('sa2va_collate needs at least one item')
    data = _frames(items)
    data['captions'] = [item['meta'].caption for item in items]
    data['region_captions'] = [item.get('region_captions') for item in items]
    data['seg_per_region'] = [item.get('seg_per_region', False) for item in items]
    data['conversations'] = [item.get('conversation') for item in items]
    paired = [i for i, item in enumerate(items) if item['pixel_values2'] is not None]
    data['pair'] = None
    if paired:
        data['pair'] = {
            'index': torch.tensor(paired, dtype=torch.int64),
            'frame': torch.tensor([items[i].get('frame2', 1) for i in paired], dtype=torch.int64),
            **_frames([items[i] for i in paired], '2'),
        }
    others = [(i, frame) for i, item in enumerate(items) for frame in item.get('clip', ())]
    seen = [(i, item['clip_pixel_values']) for i, item in enumerate(items) if item.get('clip')]
    data['clip'] = None
    if others:
        data['clip'] = {
            'index': torch.tensor([i for i, _ in others], dtype=torch.int64),
            'frame': torch.tensor([frame['frame'] for _, frame in others], dtype=torch.int64),
            **{key: [frame[key] for _, frame in others] for key in ('g_pixel_values', 'masks')},
            'records': torch.tensor([i for i, _ in seen], dtype=torch.int64),
            'pixel_values': [frames for _, frames in seen],
        }
    return {'data': data | _told(items), 'data_samples': [item['meta'] for item in items]}


@FUNCTIONS.register_module()
def clip_collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collates B records of clips, whose frames are read when the model needs them.

    Returns:
        ``{'data': {'skipped', 'changed'}, 'data_samples': list[ClipSample]}``, as `sa2va_collate`.
    """
    if not items:
        raise ValueError('clip_collate needs at least one item')
    return {'data': _told(items), 'data_samples': [item['clip'] for item in items]}
