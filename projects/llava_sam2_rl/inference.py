"""Sa2VA on one photograph: describe what a mask covers, segment what a text names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from projects.llava_sam2_rl.datasets.base import BadRecord
from projects.llava_sam2_rl.datasets.collate import sa2va_collate
from projects.llava_sam2_rl.datasets.records import read_mask
from projects.llava_sam2_rl.datasets.transforms import Sa2VATransform
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.free_generation import answer_segmentation, describe_regions
from projects.llava_sam2_rl.prompts import clean_caption, strip_final_period
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.pretrained import image_sizes

Picture: TypeAlias = str | Path | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What was found for a text.

    Args:
        mask: ``(H, W)`` bool, at the size of the photograph as it is shown; empty where the model
            pointed at nothing.
        answer: What the model said.
        found: Whether it pointed at anything (its answer has a ``[SEG]``).
    """

    mask: np.ndarray
    answer: str
    found: bool


class Sa2VA:
    """A model in the official layout, ready for questions.

    ``Sa2VA.from_pretrained(folder).describe('photo.jpg', 'mask.png')``

    Args:
        policy: The model, with a tokenizer.
        max_dynamic_patch: Most tiles a photograph is cut into; default what its config.json says
            (12 for the official models), else 1.
    """

    def __init__(self, policy: VideoLLaVASAMModel, max_dynamic_patch: int | None = None) -> None:
        if policy.tokenizer is None:
            raise ValueError('the model has no tokenizer: its folder must hold one')
        self.policy = policy.eval()
        config = policy.config
        self.transform = Sa2VATransform(
            **image_sizes(config),
            max_dynamic_patch=max_dynamic_patch or config.get('max_dynamic_patch') or 1,
        )

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device | None = None,
        torch_dtype: str | torch.dtype | None = None,
        max_dynamic_patch: int | None = None,
    ) -> Sa2VA:
        """Loads a folder in the official layout.

        Args:
            folder: A download, or what ``tools/convert_to_hf.py`` wrote.
            device: Default the first GPU, else the CPU.
            torch_dtype: Default bfloat16 on a GPU and float32 on the CPU.
            max_dynamic_patch: See the class.

        Raises:
            CheckpointError: The folder is missing, damaged, or of another model.
        """
        if device is None:
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        device = torch.device(device)
        if torch_dtype is None:
            torch_dtype = 'float32' if device.type == 'cpu' else 'bfloat16'
        policy = VideoLLaVASAMModel.from_pretrained(
            folder, trainable=(), torch_dtype=torch_dtype
        ).to(device)
        return cls(policy, max_dynamic_patch)

    @torch.no_grad()
    def describe(self, image: Picture, mask: Picture, max_new_tokens: int = 256) -> str:
        """Describes what a mask covers.

        Args:
            image: A file, a PIL image, or ``(H, W, 3)`` uint8 RGB.
            mask: A file or PIL image (what is not black counts), or ``(H, W)`` bool; of the size
                of the photograph as it is shown.
            max_new_tokens: Longest description.

        Raises:
            ValueError: A file cannot be read, the mask is empty, or its size is another.
        """
        pixels = load_image(image)
        region = load_mask(mask)
        if region.shape != pixels.shape[:2]:
            raise ValueError(
                f'the mask is {region.shape[1]} x {region.shape[0]} pixels, the photograph '
                f'{pixels.shape[1]} x {pixels.shape[0]} (width x height, turned as its EXIF tag '
                'says): draw the mask on the photograph as it is shown'
            )
        if not region.any():
            raise ValueError('the mask is empty: there is nothing to describe')
        data, _ = self._batch(pixels, region)
        return describe_regions(self.policy, data, max_new_tokens=max_new_tokens)[0]

    @torch.no_grad()
    def segment(self, image: Picture, text: str, max_new_tokens: int = 256) -> Segmentation:
        """Segments what a text names.

        Args:
            image: As in `describe`.
            text: A noun phrase, as "the cup on the left".
            max_new_tokens: Longest answer.

        Raises:
            ValueError: The file cannot be read, or the text names nothing.
        """
        if not strip_final_period(clean_caption(text)):
            raise ValueError(f'the text {text!r} names nothing: describe what to segment')
        pixels = load_image(image)
        # Any region will do, the question has none.
        data, samples = self._batch(pixels, np.ones(pixels.shape[:2], dtype=bool))
        (answer,) = answer_segmentation(self.policy, data, [text], samples, max_new_tokens)
        return Segmentation(answer.mask.numpy(), answer.text, answer.num_seg > 0)

    def _batch(self, pixels: np.ndarray, mask: np.ndarray) -> tuple[dict[str, Any], list[Any]]:
        batch = sa2va_collate([self.transform(RegionSample(pixels, mask))])
        device = next(self.policy.parameters()).device
        data = {
            key: [x.to(device) for x in batch['data'][key]]
            for key in ('pixel_values', 'g_pixel_values', 'prompt_masks')
        }
        data['vp_overall_mask'] = batch['data']['vp_overall_mask'].to(device)
        return data, batch['data_samples']


def load_image(image: Picture) -> np.ndarray:
    """A photograph as people see it: turned as EXIF says, on white where it is transparent.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ValueError: The file cannot be read, or the array is of another shape or type.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                f'an image must be (H, W, 3) uint8 RGB, got {image.shape} {image.dtype}'
            )
        return image
    if isinstance(image, Image.Image):
        return _shown(image, 'the image')
    try:
        with Image.open(image) as picture:
            return _shown(picture, str(image))
    except FileNotFoundError as error:
        raise ValueError(f'there is no image {image}') from error
    except Image.DecompressionBombError as error:
        raise ValueError(f'{image} is too large: {error}') from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f'{image} is damaged or no image: {error}') from error


def _shown(picture: Image.Image, name: str) -> np.ndarray:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith('I;16') or (picture.mode == 'I' and picture.format == 'PNG'):
        # PIL would clip at 255.
        values = np.asarray(picture).astype(np.uint32) * 255 // 65535
        return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)
    if picture.mode in ('I', 'F'):
        raise ValueError(f'{name} has 32 bits a channel: save it with 8 or 16')
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    return np.array(picture.convert('RGB'))


def load_mask(mask: Picture) -> np.ndarray:
    """A mask as ``(H, W)`` bool: all that is not black.

    Raises:
        ValueError: The file cannot be read, or the array is of another shape.
    """
    if isinstance(mask, str | Path):
        try:
            return read_mask(Path(mask), str(mask))
        except BadRecord as error:
            raise ValueError(f'the mask {mask} cannot be read ({error.detail})') from error
    array = np.asarray(mask)
    if isinstance(mask, Image.Image) and array.ndim == 3:
        array = np.asarray(mask.convert('RGB')).max(axis=2)
    if array.ndim != 2 or not array.size:
        raise ValueError(f'a mask must be (H, W), got {array.shape}')
    return array > 0
