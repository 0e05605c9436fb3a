"""Teaches the tiny Sa2VA's SAM 2 to remember: masks are carried through generated moving scenes.

Runs once, after `pretrain_tiny.py`, to give what SAM 2's weights bring at 4B. Only what no image
passes through is trained: memory encoder and attention, pointers, and the score of an object's
being there. Every answer on images stays bit for bit what it was. Training on clips keeps all this
frozen.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from projects.llava_sam2_rl.datasets import GeneratedMovingScenes, Sa2VATransform, sa2va_collate
from projects.llava_sam2_rl.datasets.generated import Scene
from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.models.batch import encode_batch
from projects.llava_sam2_rl.models.sa2va.masks import upsample_logits
from projects.llava_sam2_rl.models.segmentation import captions_as_descriptions, seg_embeddings
from projects.llava_sam2_rl.rewards import mask_iou
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.pretrained import image_sizes, resolve

#: Below ``grounding_encoder.sam2_model``: what no image passes through.
MEMORY = (
    'memory_encoder',
    'memory_attention',
    'mask_downsample',
    'maskmem_tpos_enc',
    'obj_ptr_proj',
    'no_obj_ptr',
    'sam_mask_decoder.pred_obj_score_head',
)
#: Frames of a clip and how many of its first are prompted, as they are drawn.
LENGTHS, PROMPTED = (3, 4, 6, 8), (1, 1, 2, 3)
#: An object that the prompt does not find cannot be followed: such tracks are not learnt from.
LEAST_IOU = 0.5


def memory_parameters(model: VideoLLaVASAMModel) -> dict[str, nn.Parameter]:
    """What is trained, by its name in the model."""
    prefix = 'grounding_encoder.sam2_model.'
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(prefix + part for part in MEMORY))
    }


class Clip:
    """A clip as the frozen part of the model knows it.

    Args:
        model: The network.
        transform: Of its images.
        scene: T frames with O objects.

    Attributes:
        frames: T `SamFeatures` of one image each.
        prompts: ``(O, D)``, what the ``[SEG]`` of each object's caption prompts SAM 2 with.
        masks: ``(O, T, S, S)`` bool.
    """

    @torch.no_grad()
    def __init__(self, model: VideoLLaVASAMModel, transform: Sa2VATransform, scene: Scene):
        images = [scene.image, scene.image2, *scene.more_images]
        masks = [scene.masks, scene.masks2, *scene.more_masks]
        # Apart from one another: an object may leave the clip, which a `RegionSample` may not.
        items = [
            transform(
                RegionSample(image=image, mask=scene.masks, region_captions=tuple(scene.captions))
            )
            for image in images
        ]
        pixels = torch.stack([item['g_pixel_values'] for item in items])
        features = model.grounding_encoder.encode(pixels)
        self.frames = [features.select(slice(t, t + 1)) for t in range(len(images))]
        batch = encode_batch(model, sa2va_collate(items[:1])['data'])
        self.masks = torch.from_numpy(np.stack(masks, axis=1))
        asked = captions_as_descriptions(model, batch, range(len(batch)))
        self.prompts, _ = seg_embeddings(model, batch, *asked)

    def tracks(
        self, model: VideoLLaVASAMModel, num_cond_frames: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``(O, T, h, w)`` mask logits."""
        return model.propagate(
            self.frames, self.prompts, num_cond_frames=num_cond_frames, memory_dtype=dtype
        )


def track_losses(
    model: VideoLLaVASAMModel, clip: Clip, num_cond_frames: int
) -> dict[str, Tensor] | None:
    """Of the frames behind the prompted ones; ``None`` if no object was found."""
    scores: list[Tensor] = []
    decoder = model.grounding_encoder.mask_decoder
    hook = decoder.register_forward_hook(lambda module, args, output: scores.append(output[3]))
    logits = clip.tracks(model, num_cond_frames)
    hook.remove()
    with torch.no_grad():
        found = ious(logits[:, :1], clip.masks[:, :1])[:, 0] > LEAST_IOU
    if not found.any():
        return None
    behind = slice(num_cond_frames, None)
    exact = clip.masks[found, behind]
    fine = at_size(logits[found, behind], exact)
    probability, flat = fine.sigmoid().flatten(2), exact.flatten(2)
    inter = (probability * flat).sum(-1)
    dice = 1 - (2 * inter + 1) / (probability.sum(-1) + flat.sum(-1) + 1)
    present = clip.masks.flatten(2).any(-1).float()  # (O, T)
    return {
        'bce': 4 * F.binary_cross_entropy_with_logits(fine, exact.float()),
        'dice': dice.mean(),
        'present': 0.2
        * F.binary_cross_entropy_with_logits(torch.cat(scores, dim=1)[found], present[found]),
    }


def at_size(logits: Tensor, masks: Tensor) -> Tensor:
    """``(O, T, h, w)`` logits at the size of masks ``(O, T, H, W)``."""
    size = (masks.shape[-2], masks.shape[-1])
    return upsample_logits(logits.flatten(0, 1)[:, None], size).view(masks.shape)


def ious(logits: Tensor, masks: Tensor) -> Tensor:
    """``(O, T)``: IoU frame by frame."""
    found = at_size(logits, masks) > 0
    return mask_iou(found.flatten(0, 1), masks.flatten(0, 1)).view(masks.shape[:2])


@torch.no_grad()
def evaluate(model: VideoLLaVASAMModel, clips: Sequence[Clip]) -> dict[str, float]:
    """Mean IoU of all objects in the prompted first frame, behind it, and in the last.

    ``last_by_prompt`` is the last frame's with each frame prompted by itself: what the memory is
    measured against.
    """
    rows = []
    for clip in clips:
        carried = ious(clip.tracks(model, 1, torch.bfloat16), clip.masks)
        prompted = ious(clip.tracks(model, len(clip.frames)), clip.masks)
        rows.append(
            torch.stack(
                [carried[:, 0], carried[:, 1:].mean(1), carried[:, -1], prompted[:, -1]], dim=1
            )
        )
    means = [round(x, 4) for x in torch.cat(rows).mean(0).tolist()]
    return dict(zip(('first', 'behind', 'last', 'last_by_prompt'), means, strict=True))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--model', default='llava_sam2_rl://assets/sa2va_tiny')
    parser.add_argument('--out', help='default: the same folder')
    parser.add_argument('--steps', type=int, default=600)
    parser.add_argument('--batch-size', type=int, default=4, help='clips a step')
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--eval-interval', type=int, default=200)
    parser.add_argument('--eval-clips', type=int, default=64)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(args.seed)
    folder = resolve(args.model)
    model = VideoLLaVASAMModel.from_pretrained(folder, torch_dtype='float32')
    model.eval().requires_grad_(False)
    transform = Sa2VATransform(**image_sizes(model.config))
    trained = memory_parameters(model)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    print(f'{sum(p.numel() for p in trained.values()) / 1e6:.2f} M parameters')
    sources = {
        length: GeneratedMovingScenes(length=10**6, num_frames=length, seed=args.seed)
        for length in LENGTHS
    }
    held_out = GeneratedMovingScenes(length=args.eval_clips, num_frames=4, split='val')
    clips = [Clip(model, transform, held_out.scene(n)) for n in range(args.eval_clips)]
    optimizer = torch.optim.AdamW(
        trained.values(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=args.lr, total_steps=args.steps, pct_start=0.1
    )
    start, log = time.time(), [{'step': 0, 'seconds': 0, **evaluate(model, clips)}]
    print(json.dumps(log[-1]), flush=True)
    progress = tqdm(range(args.steps), dynamic_ncols=True, mininterval=2)
    for step in progress:
        source = sources[int(rng.choice(LENGTHS))]
        parts: list[dict[str, Tensor]] = []
        while not parts:
            for _ in range(args.batch_size):
                clip = Clip(model, transform, source.scene(int(rng.integers(len(source)))))
                count = min(int(rng.choice(PROMPTED)), len(clip.frames) - 1)
                found = track_losses(model, clip, count)
                parts += [] if found is None else [found]
        means = {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(means.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(' '.join(f'{k} {v.item():.3f}' for k, v in means.items()))
        if (step + 1) % args.eval_interval == 0 or step + 1 == args.steps:
            log.append({'step': step + 1, 'seconds': round(time.time() - start)})
            log[-1] |= evaluate(model, clips)
            tqdm.write(json.dumps(log[-1]))
    out = resolve(args.out or args.model)
    record = folder / 'pretraining.json'
    known = json.loads(record.read_text(encoding='utf-8'))
    model.save_pretrained(out, torch.float16)
    known['memory'] = {'arguments': vars(args), 'log': log}
    (Path(out) / record.name).write_text(json.dumps(known, indent=2) + '\n', encoding='utf-8')
    print(f'saved to {out}')


if __name__ == '__main__':
    main()
