"""Small benchmarks of clips, written in the layouts of the real ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 24, 32

#: Expressions, pictures, masks.
LAYOUTS = {
    'davis17': (
        'meta_expressions/valid/meta_expressions.json',
        'valid/JPEGImages',
        'valid/mask_dict.pkl',
    ),
    'mevis_u': (
        'valid_u/meta_expressions.json',
        'valid_u/JPEGImages',
        'valid_u/mask_dict.json',
    ),
    'mevis': ('valid/meta_expressions.json', 'valid/JPEGImages', None),
    'ref_youtube_vos': (
        'meta_expressions/valid/meta_expressions.json',
        'valid/JPEGImages',
        None,
    ),
    'revos': ('meta_expressions_valid_.json', 'JPEGImages', 'mask_dict.json'),
    'ref_sav': ('meta_expressions_valid.json', 'videos', 'mask_dict.json'),
}


def code(mask):
    """As the JSON files have it."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'size': list(mask.shape), 'counts': rle['counts'].decode('ascii')}


def box(left, width=6, height=HEIGHT, columns=WIDTH):
    mask = np.zeros((height, columns), bool)
    mask[4:12, left : left + width] = True
    return mask


class Clips:
    """Videos of one benchmark, as they are added; `write` puts them into a folder.

    Args:
        root: Where the benchmark goes.
        kind: ``davis17``, ``mevis_u``, ``mevis``, ``ref_youtube_vos``, ``revos`` or ``ref_sav``.
    """

    def __init__(self, root, kind='mevis_u'):
        self.root = Path(root)
        self.kind = kind
        self.expressions_file, self.image_dir, self.mask_file = LAYOUTS[kind]
        self.videos, self.masks, self.foreground = {}, {}, {}

    def video(self, name, pictures, expressions):
        """``pictures``: F arrays; ``expressions``: their content by id."""
        frames = [f'{5 * t:05d}' for t in range(len(pictures))]
        folder = self.root / self.image_dir / name
        folder.mkdir(parents=True)
        for frame, picture in zip(frames, pictures, strict=True):
            Image.fromarray(picture).save(folder / f'{frame}.jpg', quality=95)
        # Not in order, as nothing promises it.
        self.videos[name] = {'frames': frames[::-1], 'expressions': expressions}
        return folder

    def object(self, anno_id, masks):
        """F masks of an object; what is empty becomes null."""
        self.masks[str(anno_id)] = [code(m) if m.any() else None for m in masks]

    def write(self):
        files = {self.expressions_file: {'videos': self.videos}}
        if self.mask_file is not None:
            files[self.mask_file] = self.masks
        if self.kind == 'revos':
            files['mask_dict_foreground.json'] = self.foreground
        for name, content in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == '.pkl':
                path.write_bytes(pickle.dumps(content))
            else:
                path.write_text(json.dumps(content))
        return str(self.root)


def pictures(count, height=HEIGHT, width=WIDTH):
    return [np.full((height, width, 3), 20 * t, np.uint8) for t in range(count)]
