"""A handful of real photographs with outlined and described objects, nothing to download.

The pictures are those that scikit-image carries inside its own package; the outlines and sentences
are this package's ``assets/photographs/annotations.json`` (COCO style; ``pair_id`` names the same
object in the other picture of a stereo pair).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from projects.llava_sam2_rl.datasets.base import RegionDataset
from projects.llava_sam2_rl.datasets.records import path_inside, polygons_to_mask, read_image
from projects.llava_sam2_rl.registry import DATASETS
from projects.llava_sam2_rl.structures import RegionSample

ANNOTATIONS = Path(__file__).parents[1] / 'assets/photographs/annotations.json'


def picture_dir() -> Path:
    """The folder of pictures inside scikit-image.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    # Found without importing skimage.data, whose functions download what is missing.
    spec = importlib.util.find_spec('skimage')
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            'Photographs and GeneratedCollages read pictures of scikit-image: install scikit-image'
        )
    return Path(spec.origin).parent / 'data'


def require_pictures(folder: Path, names: Sequence[str]) -> None:
    """Checks that pictures are there.

    Raises:
        FileNotFoundError: The message names those that are not.
    """
    missing = [name for name in dict.fromkeys(names) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f'{folder} lacks {", ".join(missing)}, which the scikit-image 0.26 wheel carries: '
            'install that version, or give a folder that holds them as image_dir'
        )


@DATASETS.register_module()
class Photographs(RegionDataset):
    """One record per outlined object; one of its sentences is drawn each time.

    Objects of a stereo pair bring the other picture as second frame.

    Args:
        image_dir: Folder of the pictures; the one inside scikit-image by default.
        **kwargs: See :class:`RegionDataset`.

    Raises:
        FileNotFoundError: A picture is not there.
    """

    def __init__(
        self,
        image_dir: str | None = None,
        source: str = 'photographs',
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        self.image_dir = picture_dir() if image_dir is None else Path(image_dir)
        data = json.loads(ANNOTATIONS.read_text(encoding='utf-8'))
        self._images = {image['id']: image for image in data['images']}
        self._categories = {c['id']: c['name'] for c in data['categories']}
        self._annotations = data['annotations']
        self._by_id = {annotation['id']: annotation for annotation in self._annotations}
        require_pictures(self.image_dir, [x['file_name'] for x in self._images.values()])

    @property
    def num_records(self) -> int:
        """Outlined objects."""
        return len(self._annotations)

    def sample_id(self, index: int) -> str:
        """``file-category-id``."""
        annotation = self._annotations[index]
        stem = Path(self._images[annotation['image_id']]['file_name']).stem
        return f'{stem}-{self._categories[annotation["category_id"]]}-{annotation["id"]}'

    def _frame(self, annotation: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
        file_name = self._images[annotation['image_id']]['file_name']
        image = read_image(path_inside(self.image_dir, file_name, name), name)
        height, width = image.shape[:2]
        return image, polygons_to_mask(annotation['segmentation'], height, width, name)

    def read(self, index: int, rng: np.random.Generator) -> RegionSample:
        """Reads an object with one of its sentences, chosen by ``rng``."""
        annotation = self._annotations[index]
        name = f'{self.source}/{self.sample_id(index)}'
        image, mask = self._frame(annotation, name)
        pair: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
        if 'pair_id' in annotation:
            pair = self._frame(self._by_id[annotation['pair_id']], name)
        others = [
            sentence
            for other in self._annotations
            if other['image_id'] == annotation['image_id'] and other is not annotation
            for sentence in other['sentences']
        ]
        sentences = annotation['sentences']
        return RegionSample(
            image=image,
            mask=mask,
            caption=sentences[int(rng.integers(len(sentences)))],
            image2=pair[0],
            mask2=pair[1],
            source=self.source,
            sample_id=self.sample_id(index),
            category=self._categories[annotation['category_id']],
            distractor=others[int(rng.integers(len(others)))] if others else None,
        )
