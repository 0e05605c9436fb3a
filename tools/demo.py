"""The main job in minutes on a CPU: train the tiny Sa2VA, show what changed.

Starts from the pretrained tiny model of this package, trains it by GRPO in both directions with
`tools/train.py` on generated scenes and on collages of real objects, measures both cycles on
held-out regions of both before and after, and saves numbers, pictures and the trained model.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections import deque
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/sa2va_tiny_dual_loop.py'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', type=Path, default=CONFIG, help='default: %(default)s')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--regions', type=int, default=256, help='held-out regions scored, of each')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], help='passed on to `tools/train.py`, key=value …'
    )
    return parser.parse_args()


def train(args: argparse.Namespace, folder: Path) -> Path:
    """Runs `tools/train.py` with a progress bar; returns the last checkpoint."""
    from tqdm import tqdm

    command = [sys.executable, str(ROOT / 'tools/train.py')]
    command += [str(args.config), '--work-dir', str(folder)]
    command += ['--seed', str(args.seed)]
    if args.cfg_options:
        command += ['--cfg-options', *args.cfg_options]
    print(f'$ {" ".join(command)}', flush=True)
    last = folder / 'last_checkpoint'
    last.unlink(missing_ok=True)
    tail: deque[str] = deque(maxlen=40)
    log_path = folder / 'console.log'
    with (
        log_path.open('w', encoding='utf-8') as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
        ) as process,
        tqdm(unit='step', desc='training', dynamic_ncols=True) as bar,
    ):
        for line in process.stdout:
            log.write(line)
            tail.append(line)
            found = re.search(r'Iter\(train\)\s*\[\s*(\d+)/(\d+)\]', line)
            if found:
                bar.total = int(found[2])
                bar.update(int(found[1]) - bar.n)
                bar.set_postfix_str(
                    ' '.join(re.findall(r'loop\d/(?:reward_mean|mask_loss): [\d.]+', line))
                )
    if process.returncode != 0 or not last.is_file():
        print(''.join(tail), file=sys.stderr)
        raise SystemExit(f'training failed; the whole log is {log_path}')
    return Path(last.read_text(encoding='utf-8').strip())


def pictures(path: Path, dataset: Any, before: list[dict], after: list[dict], rows: list[int]):
    """One row per region: what was asked, and the way back before and after training."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(rows), 3, figsize=(10, 3.6 * len(rows)), squeeze=False, layout='constrained'
    )
    for row, index in zip(axes, rows, strict=True):
        sample = dataset[index]['sample']
        show(row[0], sample.image, sample.mask, '#ffd400', f'asked: {sample.caption}')
        for axis, when, results in ((row[1], 'before', before), (row[2], 'after', after)):
            result = results[index]
            image = sample.image if sample.image2 is None else sample.image2
            text = f'{when}: “{result["caption"]}”\nIoU of the way back {iou(result):.2f}'
            show(axis, image, result['masks']['generated'].numpy(), '#00c8ff', text)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def show(axis: Any, image: Any, mask: Any, colour: str, text: str) -> None:
    """An image with a mask over it and a text above."""
    import textwrap

    from projects.llava_sam2_rl.utils.drawing import overlay

    axis.imshow(overlay(image, mask, colour))
    lines = [textwrap.fill(line, 44) for line in text.split('\n')]
    axis.set_title('\n'.join(lines), fontsize=9, loc='left')
    axis.set_axis_off()


def iou(result: dict[str, Any]) -> float:
    """IoU of mask and mask'."""
    from projects.llava_sam2_rl.rewards import mask_iou

    return float(mask_iou(result['masks']['generated'][None], result['target_mask'][None])[0])


def table(title: str, before: dict[str, float], after: dict[str, float]) -> str:
    """Before and after, side by side."""
    names = {
        'return_iou': 'IoU, mask → caption → mask′',
        'meteor': 'METEOR of the caption',
        'caption_reward': 'METEOR, caption → mask′ → caption′',
        'attribute_recall': "share of an object's attributes that are named",
        'wrong_attributes': 'wrong attributes a caption names',
        'own_iou': "IoU from the region's own reference caption",
        'other_iou': "IoU from another region's caption (should be low)",
        'listening_gap': 'own − other: does the segmenter listen?',
    }
    lines = [f'{title:<52}{"before":>8}{"after":>8}{"change":>8}']
    for key, name in names.items():
        a, b = before[key], after[key]
        lines.append(f'{name:<52}{a:>8.3f}{b:>8.3f}{b - a:>+8.3f}')
    return '\n'.join(lines)


def measure(loop: Any, worlds: dict[str, Any]) -> dict[str, tuple[dict[str, float], list[dict]]]:
    """Numbers and predictions of each world's held-out regions."""
    from projects.llava_sam2_rl.evaluation import evaluate_cycle

    return {
        name: evaluate_cycle(loop, world, progress=f'     {name}') for name, world in worlds.items()
    }


def shown_rows(before: list[dict], after: list[dict]) -> list[int]:
    """The two that gained most, two in the middle and the one that lost most."""
    gain = [iou(b) - iou(a) for a, b in zip(before, after, strict=True)]
    change = sorted(range(len(gain)), key=gain.__getitem__)
    middle = len(change) // 2
    return [change[-1], change[-2], change[middle], change[middle + 1], change[0]]


def main() -> None:
    warnings.simplefilter('ignore')
    args = parse_args()
    started = time.time()
    folder = args.work_dir.resolve()
    (folder / 'train').mkdir(parents=True, exist_ok=True)
    print('1/4  The tiny pretrained Sa2VA before training', flush=True)

    import torch
    from mmengine.config import Config
    from mmengine.logging import MMLogger
    from mmengine.runner import load_checkpoint
    from mmengine.utils.dl_utils import collect_env

    from projects.llava_sam2_rl.datasets import GeneratedCollages, GeneratedScenes, Photographs
    from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader
    from projects.llava_sam2_rl.registry import MODELS

    torch.set_flush_denormal(True)
    logger = MMLogger.get_instance('demo', log_level=logging.WARNING)
    config = Config.fromfile(args.config)
    val = complete_dataloader(config.val_dataloader, config).dataset
    worlds: dict[str, Any] = {}
    plain: dict[str, Any] = {}  # as they are drawn, for the pictures
    for name, source in (('collages', GeneratedCollages), ('scenes', GeneratedScenes)):
        options = {'length': args.regions, 'split': 'val'}
        worlds[name] = source(**options, transforms=val.transforms)
        plain[name] = source(**options)
    worlds['photographs'] = Photographs(transforms=val.transforms)
    plain['photographs'] = Photographs(transforms=None)
    loop = MODELS.build(config.model)
    before = measure(loop, worlds)

    print('2/4  Training both directions, the return trips by an EMA teacher', flush=True)
    train_started = time.time()
    checkpoint = train(args, folder / 'train')
    train_seconds = time.time() - train_started

    print('3/4  The same measurement after training', flush=True)
    load_checkpoint(loop, str(checkpoint), map_location='cpu', logger=logger)
    after = measure(loop, worlds)

    print('4/4  Saving the model, numbers and pictures', flush=True)
    loop.policy.save_pretrained(folder / 'model')
    for name, data in plain.items():
        results = before[name][1], after[name][1]
        rows = list(range(len(data))) if name == 'photographs' else shown_rows(*results)
        pictures(folder / f'{name}.png', data, *results, rows)
    summary = {
        'seed': args.seed,
        'config': str(args.config),
        'regions': args.regions,
        'seconds': {'training': round(train_seconds), 'all': round(time.time() - started)},
        **{
            name: {'before': before[name][0], 'after': after[name][0]}
            for name in ('collages', 'scenes')
        },
        'photographs': {
            'before': before['photographs'][0],
            'after': after['photographs'][0],
            'captions': [
                {
                    'reference': a['reference'],
                    'before': {'caption': a['caption'], 'iou': iou(a)},
                    'after': {'caption': b['caption'], 'iou': iou(b)},
                }
                for a, b in zip(before['photographs'][1], after['photographs'][1], strict=True)
            ],
        },
        'environment': {k: str(v) for k, v in collect_env().items()},
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (folder / 'summary.json').write_text(text + '\n', encoding='utf-8')

    shown = args.work_dir
    config_name = args.config.relative_to(ROOT) if args.config.is_relative_to(ROOT) else args.config
    collages, scenes, photographs = (
        (before[name][0], after[name][0]) for name in ('collages', 'scenes', 'photographs')
    )
    print(f"""
{table('held-out collages of real objects', *collages)}

{table('held-out generated scenes', *scenes)}

Whole photographs are new to a model this small; nothing much is to be expected of it there:
IoU {photographs[0]['return_iou']:.3f} → {photographs[1]['return_iou']:.3f}, METEOR \
{photographs[0]['meteor']:.3f} → {photographs[1]['meteor']:.3f}.

Look at   {shown}/collages.png  (and scenes, photographs) pictures, before and after
          {shown}/summary.json                           the numbers
          {shown}/train/rollouts/                        sampled captions and masks, their rewards
          {shown}/train/                                 log, TensorBoard curves, checkpoints
          {shown}/model/                                 the model in the official Sa2VA layout
Next      python tools/train.py {config_name} --cfg-options train_cfg.max_iters=600
          README.md, "Training Sa2VA-4B"
Took      {time.time() - started:.0f} s, {train_seconds:.0f} s of it training""")


if __name__ == '__main__':
    main()
