from __future__ import annotations

import numpy as np
import pytest

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate
from projects.llava_sam2_rl.structures import RegionSample


@pytest.fixture(scope='module')
def batch(tiny_transform) -> dict:
    """Four samples; the last two have a second frame, the second has no caption."""
    plain = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=tiny_transform)
    collated = sa2va_collate([plain[0], plain[1], paired[0], paired[1]])
    collated['data']['captions'][1] = None
    return collated


@pytest.fixture(scope='module')
def mixed(tiny_transform) -> dict:
    """A region, a conversation, a region."""
    scenes = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    photo = np.random.default_rng(0).integers(0, 255, (64, 80, 3), dtype=np.uint8)
    talk = tiny_transform(
        RegionSample(
            image=photo,
            mask=np.zeros((0, 64, 80), bool),
            caption=None,
            source='chat',
            sample_id='talk',
            conversation=(('What is it?', 'a circle.'), ('Where?', 'in the center')),
        )
    )
    return sa2va_collate([scenes[0], {**talk, 'skipped': []}, scenes[1]])
