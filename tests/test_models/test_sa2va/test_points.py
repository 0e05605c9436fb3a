"""Points and boxes are segmented as sam2's own image predictor segments them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sam2.sam2_image_predictor import SAM2ImagePredictor

from projects.llava_sam2_rl.models import VideoLLaVASAMModel

MODEL = 'llava_sam2_rl://assets/sa2va_tiny'


@pytest.fixture(scope='module')
def sam():
    return VideoLLaVASAMModel.from_pretrained(MODEL).eval().grounding_encoder


@pytest.fixture(scope='module')
def image(sam):
    side = sam.image_size
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)


@pytest.mark.parametrize(
    ('points', 'labels', 'box'),
    [
        ([[20, 30]], [1], None),
        ([[20, 30], [50, 60], [5, 5]], [1, 1, 0], None),
        (None, None, [10, 20, 70, 80]),
    ],
    ids=['a point', 'three points', 'a box'],
)
@torch.no_grad()
def test_as_the_predictor_of_sam2(sam, image, points, labels, box):
    predictor = SAM2ImagePredictor(sam.sam2_model)
    # It has the sizes of 1024 px written down.
    predictor._bb_feat_sizes = [(sam.image_size // n,) * 2 for n in (4, 8, 16)]
    predictor.set_image(image)
    several = points is not None and len(points) == 1
    _, scores, expected = predictor.predict(
        point_coords=None if points is None else np.array(points),
        point_labels=None if labels is None else np.array(labels),
        box=None if box is None else np.array(box),
        multimask_output=several,
    )
    assert len(scores) == (3 if several else 1)
    coords = torch.tensor(points or [box[:2], box[2:]]).float()
    features = sam.encode(torch.from_numpy(image).permute(2, 0, 1)[None])
    found = sam.decode_points(features, coords, torch.tensor(labels or [2, 3]))
    assert found.shape == (1, 1, sam.image_size // 4, sam.image_size // 4)
    np.testing.assert_allclose(
        found[0, 0].clamp(-32, 32).numpy(), expected[scores.argmax()], rtol=0, atol=1e-3
    )


@torch.no_grad()
def test_half_precision(sam, image):
    """Coordinates stay float32: SAM 2 would round them to bfloat16, 4 pixels of 1024."""
    half = VideoLLaVASAMModel.from_pretrained(MODEL, torch_dtype='bfloat16').eval()
    half = half.grounding_encoder
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    coords, labels = torch.tensor([[20.0, 30.0], [70.0, 80.0]]), torch.tensor([2, 3])
    exact = sam.decode_points(sam.encode(pixels), coords, labels)
    rough = half.decode_points(half.encode(pixels), coords, labels)
    assert rough.dtype == torch.float32
    assert ((exact > 0) == (rough > 0)).float().mean() > 0.95
