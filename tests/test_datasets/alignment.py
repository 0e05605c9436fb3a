"""Whether an item shows at every size the picture and the region that a source should have read."""

import cv2
import numpy as np
from PIL import Image

from projects.llava_sam2_rl.datasets import Sa2VATransform

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
CELL = 1 / 16
TRANSFORM = Sa2VATransform()


def centre_and_area(mask):
    """Centre (x, y) and area of a mask or grid, all as shares of its sides."""
    mask = np.asarray(mask, dtype=float)
    rows, columns = mask.shape
    y, x = np.mgrid[:rows, :columns] + 0.5
    total = mask.sum()
    return np.array([(mask * x).sum() / total / columns, (mask * y).sum() / total / rows]), (
        total / mask.size
    )


def check_aligned(sample, pixels, mask, pixels2=None, mask2=None, compact=True):
    """Checks a sample and what the transform makes of it against independently read arrays.

    The official sampling catches arbitrary cells of a region in scattered or thin pieces, so that
    the centre of the grid says nothing: ``compact=False`` leaves that out.
    """
    item = TRANSFORM(sample)
    for suffix, wanted, region in (('', pixels, mask), ('2', pixels2, mask2)):
        if wanted is None:
            continue
        assert np.array_equal(getattr(sample, f'image{suffix}'), wanted)
        assert np.array_equal(getattr(sample, f'mask{suffix}'), region)
        for key, size in ((f'pixel_values{suffix}', 448), (f'g_pixel_values{suffix}', 1024)):
            found = item[key].numpy().reshape(3, size, size).transpose(1, 2, 0)
            if size == 448:
                found = (found * STD + MEAN) * 255
            resized = np.asarray(Image.fromarray(wanted).resize((size, size)), dtype=float)
            assert np.abs(found - resized).mean() < 2, key
            # The region is as bright there as in the original: nothing has moved.
            share = cv2.resize(region.astype(np.float32), (size, size), interpolation=3)
            assert np.allclose(
                (found * share[..., None]).sum((0, 1)) / share.sum(),
                wanted[region].mean(0),
                atol=12,
            ), key
            centre, area = centre_and_area(share)
            assert np.allclose(centre, centre_and_area(region)[0], atol=CELL)
            assert abs(area - region.mean()) < CELL
        grid = item[f'prompt_masks{suffix}'].numpy()[0]
        centre, area = centre_and_area(grid)
        if compact:
            assert np.abs(centre - centre_and_area(region)[0]).max() <= CELL
        touched = cv2.resize(region.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA) > 0
        assert 0 < grid.sum() <= touched.sum()
        assert not (grid & ~touched).any()
    return item
