"""Sa2VA on photographs: describe what a region shows, segment what a text names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from projects.llava_sam2_rl.datasets.collate import sa2va_collate
from projects.llava_sam2_rl.datasets.transforms import Sa2VATransform, resize_bicubic
from projects.llava_sam2_rl.inference.answers import Segmentation, read_answer
from projects.llava_sam2_rl.inference.clips import Clip
from projects.llava_sam2_rl.inference.lists import pair_up
from projects.llava_sam2_rl.inference.pictures import Picture, load_image, load_mask
from projects.llava_sam2_rl.inference.regions import Box, Points, Region, Scribble, prompt_points
from projects.llava_sam2_rl.inference.video import (
    VideoSegmentation,
    describe_video,
    segment_video,
)
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.free_generation import answer_segmentation, describe_regions
from projects.llava_sam2_rl.models.sa2va.grounding import SamFeatures
from projects.llava_sam2_rl.models.sa2va.masks import upsample_masks
from projects.llava_sam2_rl.prompts import clean_caption, strip_final_period
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.pretrained import image_sizes


class Sa2VA:
    """A model in the official layout, ready for questions.

    ``Sa2VA.from_pretrained(folder).describe('photo.jpg', 'mask.png')``

    Args:
        policy: The model, with a tokenizer.
        max_dynamic_patch: Maximum number of tiles a photograph is cut into. Defaults to what the
            model's config.json says (12 for the official ones), else 1.
        batch_size: Maximum number of questions of a list that are answered at a time; memory grows
            with it. Defaults to 8.
    """

    def __init__(
        self,
        policy: VideoLLaVASAMModel,
        max_dynamic_patch: int | None = None,
        batch_size: int = 8,
    ) -> None:
        if policy.tokenizer is None:
            raise ValueError('the model has no tokenizer: its folder must hold one')
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        self.policy = policy.eval()
        self.batch_size = batch_size
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
        batch_size: int = 8,
    ) -> Sa2VA:
        """Loads a folder in the official layout.

        Args:
            folder: A download, or what ``tools/convert_to_hf.py`` wrote.
            device: Where the model runs. Defaults to the first GPU, else the CPU.
            torch_dtype: Dtype of the weights. Defaults to bfloat16 on a GPU and float32 on the CPU.
            max_dynamic_patch: See the class.
            batch_size: See the class.

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
        return cls(policy, max_dynamic_patch, batch_size)

    @property
    def note(self) -> str:
        """What the model's makers say of its limits: ``note`` of its config.json, else ``''``."""
        return str(self.policy.config.get('note') or '')

    @overload
    def describe(self, image: Picture, mask: Region, max_new_tokens: int = ...) -> str: ...

    @overload
    def describe(
        self, image: Picture | list[Any], mask: list[Any], max_new_tokens: int = ...
    ) -> list[Any]: ...

    @torch.no_grad()
    def describe(self, image: Any, mask: Any, max_new_tokens: int = 256) -> Any:
        """Describes what a region shows; greedily.

        Args:
            image: A file, a PIL image, or ``(H, W, 3)`` uint8 RGB; or a list of them.
            mask: A file or PIL image (what is not black counts), or ``(H, W)`` bool, of the size
                of the photograph as it is shown; or a `Box`, `Points` or a `Scribble`, of which
                SAM 2 makes a mask (`region_mask`). A list of them: several regions of the
                photograph, each described by itself. With a list of photographs: an entry, or a
                list of entries, for each.
            max_new_tokens: Maximum length of a description in tokens. Defaults to 256.

        Returns:
            The description; of a list of regions a list, of a list of photographs a list with an
            entry, or a list of entries, for each.

        Raises:
            ValueError: A file cannot be read, the mask is empty, its size is another, or a region
                is no region of the photograph; of lists, the message names the position.
        """
        jobs, like = pair_up(image, mask, 'regions')
        answers: list[str] = []
        for photographs, index, masks in self._chunks(jobs, self._mask):
            own = [
                np.stack([mask for i, mask in zip(index, masks, strict=True) if i == number])
                for number in range(len(photographs))
            ]
            data, _ = self._collate(photographs, own)
            # One sequence a region: its own cells, and the image they lie in.
            grids = torch.cat(data['prompt_masks']).split(1)
            answers += describe_regions(
                self.policy,
                {**data, 'prompt_masks': list(grids), 'image_index': index},
                max_new_tokens=max_new_tokens,
            )
        return like(answers)

    @overload
    def segment(self, image: Picture, text: str, max_new_tokens: int = ...) -> Segmentation: ...

    @overload
    def segment(
        self, image: Picture | list[Any], text: list[Any], max_new_tokens: int = ...
    ) -> list[Any]: ...

    @torch.no_grad()
    def segment(self, image: Any, text: Any, max_new_tokens: int = 256) -> Any:
        """Segments what a text names; greedily.

        Args:
            image: As in `describe`.
            text: A noun phrase, as "the cup on the left". It may name several objects: the masks
                of an answer that points at each are in `Segmentation.masks`. Lists as in
                `describe`.
            max_new_tokens: Maximum length of an answer in tokens. Defaults to 256.

        Returns:
            What was found, ``found=False`` with an empty mask where nothing was; of lists, as in
            `describe`.

        Raises:
            ValueError: A file cannot be read, or a text has no word; of lists, the message names
                the position.
        """
        return self._answer(image, text, None, max_new_tokens)

    @overload
    def ask(self, image: Picture, question: str, max_new_tokens: int = ...) -> Segmentation: ...

    @overload
    def ask(
        self, image: Picture | list[Any], question: list[Any], max_new_tokens: int = ...
    ) -> list[Any]: ...

    @torch.no_grad()
    def ask(self, image: Any, question: Any, max_new_tokens: int = 256) -> Any:
        """Asks anything about a photograph, in the user's own words; greedily.

        A model that was trained on grounded conversations answers "Could you please give me a brief
        description of the image? Please respond with interleaved segmentation masks for the
        corresponding parts of the answer." with a phrase and a mask for each object.

        Args:
            image: As in `describe`.
            question: Sent as it is, without special tokens. Lists as in `describe`.
            max_new_tokens: Maximum length of an answer in tokens. Defaults to 256.

        Returns:
            The answer and the masks of its ``[SEG]``; of lists, as in `describe`.

        Raises:
            ValueError: A file cannot be read, or a question has no word.
        """
        return self._answer(image, question, '{description}', max_new_tokens)

    def segment_video(
        self,
        clip: Clip,
        text: str,
        max_new_tokens: int = 256,
        progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
    ) -> VideoSegmentation:
        """Segments what a text names through a clip; greedily.

        The language model sees the first five frames, SAM 2's memory carries the masks on. Frames
        are read one by one and masks are kept as run lengths: memory hardly grows with the clip.

        Args:
            clip: A video file, a folder of pictures in the order of their names, or the pictures.
            text: A noun phrase as in `segment`, or a question, which is told by its ``?``.
            max_new_tokens: Maximum length of the answer in tokens. Defaults to 256.
            progress: Wraps the iterator over the frames, as `tqdm` does. Defaults to nothing.

        Raises:
            ValueError: The clip cannot be read, or the text has no word.
        """
        return segment_video(self.policy, clip, text, max_new_tokens, progress)

    def _answer(self, image: Any, text: Any, question: str | None, max_new_tokens: int) -> Any:
        jobs, like = pair_up(image, text, 'texts')
        answers: list[Segmentation] = []
        for photographs, index, texts in self._chunks(jobs, _checked_text):
            # Any region will do, the question has none.
            everything = [np.ones(one.pixels.shape[:2], dtype=bool) for one in photographs]
            data, samples = self._collate(photographs, everything)
            found = answer_segmentation(
                self.policy,
                {**data, 'image_index': index},
                texts,
                [samples[i] for i in index],
                max_new_tokens,
                question,
            )
            answers += [read_answer(one, self.policy.stop_strings) for one in found]
        return like(answers)

    def describe_video(
        self, frames: Clip, masks: Sequence[Picture | None], max_new_tokens: int = 256
    ) -> str:
        """Describes what a region of a clip shows; greedily.

        Sa2VA officially describes regions of photographs only: with a clip its inference takes
        masks, and then leaves out what they mark. Here the language model sees five frames, as it
        does officially of any clip, from the first one on that has a mask; the region is marked
        in that one, and asked about in the words for photographs. The official recipe trains no
        such task: whether a checkpoint says more than of the single frame is for you to see.

        Args:
            frames: As in `segment_video`.
            masks: Of the first frames, in order: as in `describe`, without boxes and points;
                ``None``, or an empty mask, where a frame does not show the object. ``[mask]``
                marks it in the first frame.
            max_new_tokens: Maximum length of the description in tokens. Defaults to 256.

        Raises:
            ValueError: The clip or a mask cannot be read, a mask has another size than its frame,
                or none has a pixel.
        """
        return describe_video(self.policy, frames, masks, max_new_tokens)

    @torch.no_grad()
    def region_mask(self, image: Picture, region: Region) -> np.ndarray:
        """The mask of a region: as it is given, or what SAM 2 makes of a box, points or a scribble.

        SAM 2 is that of the checkpoint. Sa2VA's recipe trains its mask decoder on ``[SEG]``, so
        masks of points may be rougher than those of SAM 2 as it was published.

        Args:
            image: As in `describe`.
            region: Likewise.

        Returns:
            ``(H, W)`` bool, at the size of the photograph as it is shown, with at least one pixel.

        Raises:
            ValueError: A file cannot be read, the mask is empty, its size is another, the region
                is no region of the photograph, or SAM 2 finds nothing there.
        """
        return self._mask(_Photograph(load_image(image)), region)

    def _mask(self, photograph: _Photograph, region: Region) -> np.ndarray:
        """As `region_mask`; the photograph is encoded when the first region of it asks for it."""
        height, width = photograph.pixels.shape[:2]
        if not isinstance(region, Box | Points | Scribble):
            return _checked_mask(load_mask(region), photograph.pixels)
        points, labels = prompt_points(region, width, height)
        sam, device = self.policy.grounding_encoder, self.policy.device
        if photograph.features is None:
            side = self.transform.grounding_size
            pixels = resize_bicubic(photograph.pixels, side, side, exact=False)
            photograph.features = sam.encode(pixels[None].to(device))
        logits = sam.decode_points(
            photograph.features,
            torch.from_numpy(points * sam.image_size / (width, height)).to(device),
            torch.from_numpy(labels).to(device),
        )
        mask = upsample_masks(logits, (height, width))[0, 0].cpu().numpy()
        if not mask.any():
            raise ValueError(
                f'SAM 2 finds nothing at {region}: show it in another way, or give a mask'
            )
        return mask

    def _chunks(
        self, jobs: Sequence[tuple[Any, Any]], read: Callable[[_Photograph, Any], Any]
    ) -> Iterator[tuple[list[_Photograph], list[int], list[Any]]]:
        """At most ``batch_size`` questions at a time.

        Args:
            jobs: A photograph and what is asked about it; questions about one stand together.
            read: Checks what is asked and makes it what the model takes.

        Yields:
            The photographs, each once; which of them each question is about; and what ``read``
            made of each.
        """
        for start in range(0, len(jobs), self.batch_size):
            photographs: list[_Photograph] = []
            index: list[int] = []
            asked: list[Any] = []
            last: Any = None
            for position, (image, one) in enumerate(jobs[start : start + self.batch_size], start):
                try:
                    if not photographs or image is not last:
                        photographs.append(_Photograph(load_image(image)))
                        last = image
                    asked.append(read(photographs[-1], one))
                except ValueError as error:
                    if len(jobs) == 1:
                        raise
                    raise ValueError(f'question {position + 1} of {len(jobs)}: {error}') from error
                index.append(len(photographs) - 1)
            yield photographs, index, asked

    def _collate(
        self, photographs: Sequence[_Photograph], masks: Sequence[np.ndarray]
    ) -> tuple[dict[str, Any], list[Any]]:
        """The batch on the model's device, and the records of its photographs.

        Args:
            photographs: N.
            masks: Of each ``(H, W)`` or ``(R, H, W)`` bool.
        """
        samples = [RegionSample(one.pixels, own) for one, own in zip(photographs, masks)]
        batch = sa2va_collate([self.transform(sample) for sample in samples])
        device = self.policy.device
        data = {
            key: [x.to(device) for x in batch['data'][key]]
            for key in ('pixel_values', 'g_pixel_values', 'prompt_masks')
        }
        data['vp_overall_mask'] = batch['data']['vp_overall_mask'].to(device)
        return data, batch['data_samples']


@dataclass
class _Photograph:
    """``(H, W, 3)`` uint8 pixels, and what SAM 2 knows of them once it was asked."""

    pixels: np.ndarray
    features: SamFeatures | None = None


def names_something(text: str) -> bool:
    """Whether a text has a word to ask by, markers and the final full stop left out."""
    return bool(strip_final_period(clean_caption(text)))


def _checked_text(_: _Photograph, text: str) -> str:
    if not names_something(text):
        raise ValueError(f'the text {text!r} names nothing: describe what to segment')
    return text


def _checked_mask(mask: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    if mask.shape != pixels.shape[:2]:
        raise ValueError(
            f'the mask is {mask.shape[1]} x {mask.shape[0]} pixels, the photograph '
            f'{pixels.shape[1]} x {pixels.shape[0]} (width x height, turned as its EXIF tag '
            'says): draw the mask on the photograph as it is shown'
        )
    if not mask.any():
        raise ValueError('the mask is empty: there is nothing to describe')
    return mask
