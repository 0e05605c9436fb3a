"""Writes a config that trains on your own pictures, masks and captions, and says what is in them.

It finds out the format: a folder of NAME.jpg, NAME.mask*.png and NAME*.txt; JSON objects, one a
line; COCO instances; the official annotations.json; a Hugging Face data set (docs/datasets.md,
"Data of your own"). Exits 2 for a wrong argument or an unknown format, 1 where nothing in the
files can be used.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

EXAMPLES = """\
examples:
  python tools/new_config.py --images photos --out configs/mine.py
  python tools/new_config.py --images photos --annotations regions.jsonl --out configs/mine.py
  python tools/new_config.py --images train2017 --annotations instances.json \\
      --captions captions.csv --out configs/mine.py --base sa2va_tiny_dual_loop
  python tools/new_config.py --annotations parquet_files --columns image=photo mask=segmentation \\
      --out configs/mine.py
"""
#: An epoch has at least so many records: short ones are all start and end.
EPOCH = 1000
#: Most held-out records that a validation reads.
VALIDATION = 256
#: A mask below this share of its image is smaller than a cell of the 16 x 16 grid of tokens.
TINY = 1 / 256

CONFIG = """\
# {title}
# Made by tools/new_config.py.
from mmengine.config import read_base

from projects.llava_sam2_rl.datasets import {kind}

with read_base():
    from .{base} import *

dataset_defaults = dict(
    {kind}=dict({options})
)
own = dict(type={kind}, transforms=transform)
train_dataloader['dataset'] = dict(**own, {train}repeats={repeats})
val_dataloader['dataset'] = dict(**own{val}{most})
test_dataloader['dataset'] = dict(type={kind}, transforms=test_transform{val})
"""


@dataclass
class Contents:
    """What the records that were read have.

    Args:
        total: Records of the source.
        sizes: Of their pictures: width, height.
        pictures: Names of their pictures.
        captions: Words of each caption.
        pairs: Records with a second picture.
        regions: Masks.
        empty: Names of records with a mask without a pixel.
        tiny: Names of records with a mask that is smaller than a cell.
        bad: Message of the first record that cannot be used, by reason.
        changed: What was taken out of texts or cut off them.
    """

    total: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pictures: set[str] = field(default_factory=set)
    captions: list[int] = field(default_factory=list)
    pairs: int = 0
    regions: int = 0
    empty: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)

    @property
    def usable(self) -> int:
        """Records that can be trained on."""
        return len(self.sizes) - len(self.empty)


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=Path, help='folder of the pictures')
    parser.add_argument(
        '--annotations',
        type=Path,
        help='file or folder of the annotations (default: they lie beside the pictures)',
    )
    parser.add_argument(
        '--captions',
        type=Path,
        help='CSV or JSONL with annotation_id and caption, for COCO instances',
    )
    parser.add_argument(
        '--columns',
        nargs='+',
        default=[],
        metavar='WHAT=COLUMN',
        help='columns of a Hugging Face data set: image, mask, caption, image2, mask2, category',
    )
    parser.add_argument(
        '--out', type=Path, required=True, help='the new config, beside the one it inherits'
    )
    parser.add_argument(
        '--base',
        default='sa2va_4b_dual_loop',
        help='config that it inherits: any of the folder, as sa2va_tiny_dual_loop, which runs on a '
        'CPU (default: %(default)s)',
    )
    parser.add_argument(
        '--samples',
        type=int,
        default=500,
        help='records that are looked at, chosen by chance (default: %(default)s)',
    )
    parser.add_argument('--force', action='store_true', help='overwrite --out')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Looks at the data, writes the config and returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    base = args.base.removesuffix('.py')
    if not (args.out.parent / f'{base}.py').is_file():
        parser.error(
            f'{args.out.parent} has no {base}.py to inherit: write the new config beside the '
            'others, as --out configs/mine.py'
        )
    if args.out.suffix != '.py' or not args.out.stem.isidentifier():
        parser.error(f'--out {args.out}: a config is a Python file, as configs/mine.py')
    if args.out.exists() and not args.force:
        parser.error(f'{args.out} is there already: take another name, or --force')
    if args.samples < 1:
        parser.error(f'--samples must be at least 1, got {args.samples}')
    columns = dict(part.partition('=')[::2] for part in args.columns)
    known = ('image', 'mask', 'caption', 'image2', 'mask2', 'category')
    if not all(key in known and column for key, column in columns.items()):
        parser.error(f'--columns takes WHAT=COLUMN with WHAT of {", ".join(known)}')

    from projects.llava_sam2_rl.datasets.detection import detect

    try:
        found = detect(args.images, args.annotations, args.captions, columns)
        dataset = found.kind(**found.options)  # type: ignore[call-arg]
    except (OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    contents = look(dataset, args.samples)
    print(describe(found.what, dataset, contents))
    if not contents.usable:
        print('FAILED: none of the records can be used; nothing is written')
        return 1
    args.out.write_text(config_text(base, found, contents), encoding='utf-8')
    print(f'written      {args.out}, which inherits {base}.py')
    if 'tiny' in base:
        print('             its model knows generated shapes only: it shows that the data runs')
    print(f'look at it   python tools/verify_datasets.py {args.out}')
    print(f'train        python tools/train.py {args.out}')
    return 0


def look(dataset: Any, samples: int) -> Contents:
    """Reads a sample of the records."""
    import numpy as np

    from projects.llava_sam2_rl.datasets import BadRecord

    contents, rng = Contents(len(dataset)), np.random.default_rng(0)
    count = min(samples, len(dataset))
    for record in sorted(rng.choice(len(dataset), count, replace=False).tolist()):
        try:
            sample, changed = dataset.load(record, rng)
        except BadRecord as error:
            contents.bad[error.reason] += 1
            contents.examples.setdefault(error.reason, str(error))
            continue
        height, width = sample.image.shape[:2]
        contents.sizes.append((width, height))
        contents.pictures.add(dataset.image_key(record))
        contents.captions += [len(text.split()) for text in sample.texts]
        contents.pairs += sample.has_pair
        contents.regions += sample.num_regions
        masks = [*sample.mask.reshape(-1, height, width)]
        areas = [mask.mean() for mask in masks]
        if sample.mask2 is not None:
            areas += [mask.mean() for mask in sample.mask2.reshape(-1, *sample.image2.shape[:2])]
        if min(areas) == 0:
            contents.empty.append(sample.name)
        elif min(areas) < TINY:
            contents.tiny.append(sample.name)
        contents.changed.update(kind for _, _, kind in changed)
    return contents


def describe(what: str, dataset: Any, contents: Contents) -> str:
    """The report."""
    read = len(contents.sizes) + contents.bad.total()
    lines = [
        f'format       {what}, read by {type(dataset).__name__}',
        f'records      {len(dataset)}' + (f', {read} looked at' if read < len(dataset) else ''),
    ]
    if contents.sizes:
        sides = [f'{width} x {height}' for width, height in sorted(contents.sizes, key=_area)]
        lines.append(
            f'pictures     {len(contents.pictures)}, {sides[0]} to {sides[-1]} pixels, median '
            f'{sides[len(sides) // 2]}'
        )
        lines.append(
            f'regions      {contents.regions}, {_named(contents.empty, "empty (not used)")}, '
            f'{_named(contents.tiny, "tiny (below 1/256 of the image)")}'
        )
        if contents.captions:
            lines.append(
                f'captions     {len(contents.captions)}, {min(contents.captions)} to '
                f'{max(contents.captions)} words, median {median(contents.captions):.0f}'
            )
        else:
            lines.append(
                'captions     none: mask -> caption -> mask is trained, the other way is not'
            )
        if contents.pairs:
            lines.append(f'pairs        {contents.pairs} records have a second picture')
    for reason, count in contents.bad.most_common():
        lines.append(f'not usable   {count} x {reason}, e.g. {contents.examples[reason]}')
    for kind, count in contents.changed.most_common():
        lines.append(f'texts        {count} x {kind} (docs/datasets.md, "Texts are words")')
    return '\n'.join(lines)


def config_text(base: str, found: Any, contents: Contents) -> str:
    """The config."""
    kind = found.kind.__name__
    parts = held_out(found)
    train, val = parts or (contents.total, contents.total)
    where = printable_path(found.options.get('ann_file') or found.options['data_root'])
    captions = 'with' if contents.captions else 'without'
    most = f', max_samples={VALIDATION}' if val > VALIDATION else ''
    return CONFIG.format(
        title=f'{where}: {contents.total} records {captions} captions, {val} for validation.',
        kind=kind,
        base=base,
        options=', '.join(f'{key}={value!r}' for key, value in found.options.items()),
        train="part='train', " if parts else '',
        repeats=max(1, -(-EPOCH // train)),
        val=(", part='val'" if parts else '') + _literal(per_object(found)),
        most=most,
    )


def per_object(found: Any) -> dict[str, Any]:
    """Options with which a source has a record for each caption, as validation needs it."""
    return {'per_object': True} if found.kind.__name__ == 'Sa2VAFinetuneDataset' else {}


def _literal(options: dict[str, Any]) -> str:
    return ''.join(f', {key}={value!r}' for key, value in options.items())


def held_out(found: Any) -> tuple[int, int] | None:
    """The records of training and validation, ``None`` where there is one picture only."""
    try:
        train = len(found.kind(**found.options, part='train'))
        val = len(found.kind(**found.options, part='val', **per_object(found)))
    except ValueError:
        print('held out     nothing: one picture, which is trained on and validated on')
        return None
    print(f'held out     {val} records for validation, of other pictures than the {train} others')
    return train, val


def printable_path(path: str) -> str:
    """A path for a comment."""
    from projects.llava_sam2_rl.prompts import printable

    return printable(path)


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _named(names: Sequence[str], what: str) -> str:
    return f'{len(names)} {what}' + (f', e.g. {names[0]}' if names else '')


if __name__ == '__main__':
    sys.exit(main())
