from __future__ import annotations

import pytest

from projects.llava_sam2_rl.datasets import GeneratedScenes, sa2va_collate


@pytest.fixture(scope='module')
def batch(tiny_transform) -> dict:
    """Three samples; the second has a second frame, the third no caption."""
    plain = GeneratedScenes(length=8, split='val', transforms=tiny_transform)
    paired = GeneratedScenes(length=8, split='val', paired=True, transforms=tiny_transform)
    collated = sa2va_collate([plain[0], paired[0], plain[1]])
    collated['data']['captions'][2] = None
    return collated
