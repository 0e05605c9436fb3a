"""Makes the tiny pretrained Sa2VA of this package from random weights, on scenes and collages.

Everything here exists once, to give users what they get at 4B from a download: a checkpoint in the
official layout that listens and segments, not yet as well as it could, and that describes regions
vaguely.

Joint training from random weights gives a deaf segmenter: it learns "all objects" first and ignores
the prompt. What breaks that is to let the prompts of one image compete: beside cross-entropy and
Dice, on every object pixel the right prompt must have the largest logit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import nn
from tqdm import tqdm
from transformers import Qwen2TokenizerFast

from projects.llava_sam2_rl.datasets import (
    GeneratedCollages,
    GeneratedScenes,
    Sa2VATransform,
    sa2va_collate,
    vague_caption,
    vague_collage_caption,
)
from projects.llava_sam2_rl.datasets.generated import GeneratedDataset, Scene
from projects.llava_sam2_rl.datasets.photographs import ANNOTATIONS
from projects.llava_sam2_rl.evaluation import evaluate_cycle
from projects.llava_sam2_rl.evaluation.attributes import VOCABULARY, compare_attributes
from projects.llava_sam2_rl.models import DualLoopModel, SFTObjective, VideoLLaVASAMModel
from projects.llava_sam2_rl.prompts import (
    REGION_QUESTIONS,
    SEGMENTATION_ANSWERS,
    SEGMENTATION_QUESTIONS,
    ChatTemplate,
    add_special_tokens,
    encode_turns,
    find_template,
    pad_batch,
    region_input,
    region_turns,
    segmentation_input,
)
from projects.llava_sam2_rl.structures import RegionSample
from projects.llava_sam2_rl.utils.pretrained import complete_sizes, image_sizes, resolve

#: How often the captioner is taught to mention an attribute. Its favourite caption names size,
#: colour and what it is and leaves out where, which it does know: there is something to learn.
KEEP = {'size': 0.65, 'colour': 0.65, 'position': 0.35, 'side': 0.35}
#: Side of the generated pictures in pixels: what SAM 2 sees at this size.
SIDE = 128

ROOT = Path(__file__).resolve().parents[1]
# What inference says of the model before it answers.
NOTE = (
    'this tiny model knows generated shapes and the six objects of the collages only (cat, cup, '
    'motorcycle, astronaut, shuttle, coin), and describes any other picture as one of them'
)


def train_tokenizer(
    captions: list[str], template: ChatTemplate, vocab_size: int
) -> Qwen2TokenizerFast:
    """A byte-level BPE tokenizer of the real one's class, with the real special tokens.

    As with the real one the chat markers (``<|end|>``) are plain text of several tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / 'vocab.json').write_text(json.dumps(vocab), encoding='utf-8')
        (path / 'merges.txt').write_text('#version: 0.2\n', encoding='utf-8')
        empty = Qwen2TokenizerFast(str(path / 'vocab.json'), str(path / 'merges.txt'))
    asked = [region_input(1, [1], question) for question in REGION_QUESTIONS]
    asked += [segmentation_input(1, 'it', question) for question in SEGMENTATION_QUESTIONS]
    asked += [segmentation_input(1, caption) for caption in captions]
    corpus = [template.ask(text) for text in asked]
    corpus += [template.answer(text) for text in [*captions, *SEGMENTATION_ANSWERS]]
    tokenizer = empty.train_new_from_iterator(corpus, vocab_size - 16)
    tokenizer.add_special_tokens({'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'})
    add_special_tokens(tokenizer)
    tokenizer.model_max_length = 1024
    if len(tokenizer) > vocab_size:
        raise ValueError(f'{len(tokenizer)} tokens do not fit vocab_size={vocab_size}')
    return tokenizer


def photograph_captions() -> list[str]:
    """Captions of the demo's photographs, so that they are words for the tokenizer too."""
    annotations = json.loads(ANNOTATIONS.read_text(encoding='utf-8'))['annotations']
    return [sentence for annotation in annotations for sentence in annotation['sentences']]


class Attributes(nn.Module):
    """Linear read-outs that exist during pretraining only.

    Prompt and image each have to hold what the other one is matched against; neither is worth
    anything to the mask without the other, so learning them by the mask loss alone starts slowly.
    Asking both what they know about an object's attributes starts it at once. So it does for what
    the language model sees of a region: by captions alone it learns sizes and places, and guesses
    what an object is from these.

    Args:
        width: Channels of a ``[SEG]`` embedding and of SAM 2's features.
        llm_width: Of an image token.
    """

    def __init__(self, width: int, llm_width: int):
        super().__init__()
        values = VOCABULARY
        self.of_prompt = nn.ModuleDict({k: nn.Linear(width, len(v)) for k, v in values.items()})
        seen = ('size', 'colour', 'shape', 'object')
        self.of_image = nn.ModuleDict({k: nn.Conv2d(width, len(values[k]), 1) for k in seen})
        self.of_region = nn.ModuleDict({k: nn.Linear(llm_width, len(v)) for k, v in values.items()})

    @staticmethod
    def targets(attributes: list[dict[str, str]], texts: list[str] | None = None) -> dict:
        """Class of each attribute by object, -100 where there is none or the text lacks it."""
        found = {key: torch.full((len(attributes),), -100) for key in VOCABULARY}
        for row, attribute in enumerate(attributes):
            named = None if texts is None else compare_attributes(texts[row], attribute)
            for key, value in attribute.items():
                if named is None or named[key].right:
                    found[key][row] = VOCABULARY[key].index(value)
        return found

    def prompt_loss(self, prompts, attributes, texts):
        """Cross-entropy of what the texts name, read from the prompts."""
        targets = self.targets(attributes, texts)
        return sum(
            F.cross_entropy(head(prompts), targets[key], ignore_index=-100)
            for key, head in self.of_prompt.items()
            if (targets[key] != -100).any()
        )

    def region_loss(self, tiles, attributes, grids):
        """Cross-entropy read from the mean image token of each region.

        Args:
            tiles: (images, tokens, D), what the language model sees.
            attributes: Of the regions.
            grids: For each image (regions, h, w) bool.
        """
        targets = self.targets(attributes)
        means = []
        for tokens, regions in zip(tiles, grids, strict=True):
            cells = regions.flatten(1).to(tokens.dtype)
            means.append(cells @ tokens / cells.sum(-1, keepdim=True).clamp(min=1))
        regions = torch.cat(means)
        return sum(
            F.cross_entropy(head(regions), targets[key], ignore_index=-100)
            for key, head in self.of_region.items()
            if (targets[key] != -100).any()
        )

    def image_loss(self, levels, attributes, masks, owners):
        """Cross-entropy at the objects' cells, read from the image features."""
        owners = torch.tensor(owners)
        targets = self.targets(attributes)
        total = 0.0
        for level in levels:
            share = F.interpolate(masks[:, None].float(), size=level.shape[-2:], mode='area')[:, 0]
            at = (share > 0.4).nonzero()  # object, row, column
            for key, head in self.of_image.items():
                wanted = targets[key][at[:, 0]]
                if (wanted != -100).any():
                    scores = head(level)[owners[at[:, 0]], :, at[:, 1], at[:, 2]]
                    total = total + F.cross_entropy(scores, wanted, ignore_index=-100)
        return total


def one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    """A question or answer as it is drawn for training: half of the time the first."""
    return texts[0] if rng.random() < 0.5 else texts[rng.integers(len(texts))]


class Worlds:
    """The generated sources, half of the scenes from each.

    Args:
        sources: With the function that makes vague captions of their objects.
    """

    def __init__(self, sources: Sequence[tuple[GeneratedDataset, Callable[..., str]]]):
        self.sources = list(sources)

    def draw(self, count: int, rng: np.random.Generator) -> list[tuple[Scene, Callable[..., str]]]:
        """Scenes, each with the function that makes vague captions of its objects."""
        drawn = []
        for n in range(count):
            source, vague = self.sources[n % len(self.sources)]
            drawn.append((source.scene(int(rng.integers(len(source)))), vague))
        return drawn


def make_batch(drawn, transform, rng, keep):
    """All objects of some scenes: encoder inputs, captions, masks, image of each object."""
    items, captions, vague, owners, masks, attributes = [], [], [], [], [], []
    for image, (scene, vague_of) in enumerate(drawn):
        items.append(transform(RegionSample(image=scene.image, mask=scene.masks)))
        attributes += scene.attributes
        for i, caption in enumerate(scene.captions):
            short = vague_of(scene.attributes[i], rng, keep)
            # Prompts that name some attributes only, where they are enough, make the segmenter
            # hear each of them: with full captions alone it is content with how objects look.
            part = vague_of(scene.attributes[i], rng, 0.5)
            others = scene.captions[:i] + scene.captions[i + 1 :]
            unique = not any(set(part.split()) <= set(other.split()) for other in others)
            captions.append(part if unique and rng.random() < 0.7 else caption)
            vague.append(short)
            owners.append(image)
            masks.append(torch.from_numpy(scene.masks[i]))
    data = sa2va_collate(items)['data']
    return data, captions, vague, owners, torch.stack(masks), attributes


def teach_images(model, heads, worlds, transform, rng, args):
    """Both image encoders alone, by what their features say of the objects.

    Colour is there at once; what objects are and how large takes hundreds of steps, which are cheap
    without the language model.
    """
    parts = (model.grounding_encoder.sam2_model.image_encoder, model.vision_model, model.mlp1)
    parameters = [
        p for part in (*parts, heads.of_image, heads.of_region) for p in part.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=args.image_steps, pct_start=0.1
    )
    progress = tqdm(range(args.image_steps), desc='encoders', dynamic_ncols=True, mininterval=2)
    for _ in progress:
        batch = [scene for scene, _ in worlds.draw(16, rng)]
        items = [transform(RegionSample(image=scene.image, mask=scene.masks)) for scene in batch]
        data = sa2va_collate(items)['data']
        features = model.encode_images(data)
        attributes = [attributes for scene in batch for attributes in scene.attributes]
        image_loss = heads.image_loss(
            (features.sam.embedding, features.sam.stride8),
            attributes,
            torch.cat([torch.from_numpy(scene.masks) for scene in batch]),
            [i for i, scene in enumerate(batch) for _ in scene.attributes],
        )
        region_loss = heads.region_loss(model.project(features), attributes, data['prompt_masks'])
        optimizer.zero_grad(set_to_none=True)
        (image_loss + region_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(f'image {image_loss.item():.3f} region {region_loss.item():.3f}')


def losses(model, heads, batch, rng, tokens):
    """Segmentation with competing prompts, the answers, and vague captions."""
    data, captions, vague, owners, masks, attributes = batch
    features = model.encode_images(data)
    tiles = model.project(features)
    tokenizer, template = model.tokenizer, model.chat_template

    def run(pairs, prompt_masks, images):
        ids, labels = zip(*pairs, strict=True)
        padded = pad_batch(ids, model.pad_token_id, 'right', labels)
        embeds = model.embed(
            padded['input_ids'],
            features,
            prompt_masks=prompt_masks,
            image_index=images,
            tiles=tiles,
        )
        hidden = model.hidden_states(embeds, padded['attention_mask'], padded['position_ids'])
        return hidden, padded, model.caption_loss(hidden, padded['labels'])

    pairs = []
    for text in captions:
        question = segmentation_input(tokens, text, one_of(SEGMENTATION_QUESTIONS, rng))
        answer = one_of(SEGMENTATION_ANSWERS, rng)
        pairs.append(encode_turns(tokenizer, template, [(question, answer)]))
    hidden, padded, answer_loss = run(pairs, None, owners)
    prompts, _ = model.seg_embeddings(hidden, padded['input_ids'])
    _, ious, logits = model.segment(prompts, features, owners)  # (P, 3), (P, 3, h, w)

    # At full resolution: the low-resolution logits have to place an edge between their cells.
    fine = F.interpolate(logits, size=masks.shape[-2:], mode='bilinear', align_corners=False)
    exact = masks[:, None].expand_as(fine)
    bce = F.binary_cross_entropy_with_logits(fine, exact.float())
    probability = fine.sigmoid().flatten(2)
    flat = exact.flatten(2)
    inter = (probability * flat).sum(-1)
    dice = 1 - (2 * inter + 1) / (probability.sum(-1) + flat.sum(-1) + 1)
    target = F.interpolate(masks[:, None].float(), size=logits.shape[-2:], mode='area')[:, 0] > 0.5
    owner = torch.tensor(owners)
    compete = []
    for image in owner.unique():
        mine = owner == image
        scores, objects = logits[mine], target[mine]  # (n, 3, h, w), (n, h, w)
        which = objects.float().argmax(0)[objects.any(0)]
        at_objects = scores[:, :, objects.any(0)]  # (n, 3, pixels)
        compete.append(F.cross_entropy(at_objects.permute(2, 0, 1), which[:, None].expand(-1, 3)))
    with torch.no_grad():
        hit = (fine > 0).flatten(2)
        iou = (hit & flat).sum(-1) / (hit | flat).sum(-1).clamp(min=1)
    quality = F.mse_loss(ious, iou)

    # Captions come easily: two objects of a scene are enough. Now and then they are described in
    # one conversation, turn by turn.
    start, regions, images, pairs = 0, [], [], []
    for image, grids in enumerate(data['prompt_masks']):
        chosen = rng.permutation(len(grids))[:2]
        for group in [chosen] if rng.random() < 0.25 else [[i] for i in chosen]:
            turns = region_turns(
                tokens,
                [int(grids[i].sum()) for i in group],
                [one_of(REGION_QUESTIONS, rng) for _ in group],
                [vague[start + i] for i in group],
            )
            pairs.append(encode_turns(tokenizer, template, turns))
            regions.append(torch.stack([grids[i] for i in group]))
            images.append(image)
        start += len(grids)
    _, _, caption_loss = run(pairs, regions, images)
    levels = (features.sam.embedding, features.sam.stride8)
    return {
        'bce': bce,
        'dice': dice.mean(),
        'compete': 2 * torch.stack(compete).mean(),
        'quality': quality,
        'prompt': 0.3 * heads.prompt_loss(prompts, attributes, captions),
        'image': 0.2 * heads.image_loss(levels, attributes, masks, owners),
        'region': 0.3 * heads.region_loss(tiles, attributes, data['prompt_masks']),
        'answer': 0.3 * answer_loss,
        'caption': caption_loss,
    }


@torch.no_grad()
def evaluate(model, regions):
    """The cycle on held-out regions."""
    loop = DualLoopModel(model, SFTObjective(), max_new_tokens=32)
    return evaluate_cycle(loop, regions)[0]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=str(ROOT / 'configs/_base_/models/sa2va_tiny.py'))
    parser.add_argument('--out', default='llava_sam2_rl://assets/sa2va_tiny')
    parser.add_argument('--steps', type=int, default=1600)
    parser.add_argument('--image-steps', type=int, default=900, help='first, encoders only')
    parser.add_argument('--batch-size', type=int, default=8, help='scenes and collages a step')
    parser.add_argument('--lr', type=float, default=8e-4)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--eval-interval', type=int, default=400)
    parser.add_argument('--eval-regions', type=int, default=128)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(args.seed)
    policy = Config.fromfile(args.config).model.policy
    # The sizes of the checkpoint that is trained anew.
    sizes = complete_sizes(policy.pretrained, policy)
    transform = Sa2VATransform(**image_sizes(sizes))
    train = {'length': 10**6, 'seed': args.seed, 'image_size': SIDE}
    worlds = Worlds(
        [
            (GeneratedScenes(**train), vague_caption),
            (GeneratedCollages(**train), vague_collage_caption),
        ]
    )
    val = {'length': args.eval_regions, 'split': 'val', 'transforms': transform}
    held_out = {'scenes': GeneratedScenes(**val), 'collages': GeneratedCollages(**val)}
    drawn = worlds.draw(800, np.random.default_rng(args.seed))
    corpus = [c for scene, _ in drawn for c in scene.captions] + photograph_captions()
    tokenizer = train_tokenizer(
        corpus, find_template(sizes['template']), sizes['llm_config']['vocab_size']
    )
    options = {k: v for k, v in policy.items() if k not in ('type', 'pretrained', 'lora')}
    options.update(sizes)
    options['trainable'] = ('vision_model', 'mlp1', 'language_model', 'text_hidden_fcs')
    options['trainable'] += ('grounding_encoder',)
    model = VideoLLaVASAMModel(**options, tokenizer=tokenizer)
    model.train()
    heads = Attributes(
        model.grounding_encoder.hidden_dim, model.config['llm_config']['hidden_size']
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    print(f'{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters, {len(tokenizer)} tokens')
    parameters += heads.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = 50
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1, (s + 1) / warmup)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1, s / args.steps))))
        ),
    )
    tokens = model.num_image_tokens
    start, log = time.time(), []
    teach_images(model, heads, worlds, transform, rng, args)
    progress = tqdm(range(args.steps), dynamic_ncols=True, mininterval=2)
    for step in progress:
        drawn = worlds.draw(args.batch_size, rng)
        batch = make_batch(drawn, transform, rng, KEEP if step >= 0.7 * args.steps else 1.0)
        parts = losses(model, heads, batch, rng, tokens)
        total = sum(parts.values())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix_str(' '.join(f'{k} {v.item():.3f}' for k, v in parts.items()))
        if (step + 1) % args.eval_interval == 0 or step + 1 == args.steps:
            for world, regions in held_out.items():
                numbers = {k: round(v, 4) for k, v in evaluate(model, regions).items()}
                seconds = round(time.time() - start)
                log.append({'step': step + 1, 'seconds': seconds, 'world': world, **numbers})
                tqdm.write(json.dumps(log[-1]))
            model.train()
    folder = resolve(args.out)
    model.config['note'] = NOTE
    model.save_pretrained(folder, torch.float16)
    arguments = {**vars(args), 'config': os.path.relpath(args.config, ROOT)}
    (folder / 'pretraining.json').write_text(
        json.dumps({'arguments': arguments, 'log': log}, indent=2) + '\n', encoding='utf-8'
    )
    print(f'saved to {folder}')


if __name__ == '__main__':
    main()
