"""Shows what the model will see: counts of every source, what is readable, and a contact sheet.

Exits 1 where a source is missing or more of its sample than --max-bad-fraction cannot be read.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

EXAMPLES = """\
examples:
  python tools/verify_datasets.py configs/sa2va_4b_dual_loop.py
  python tools/verify_datasets.py configs/_base_/datasets/original_mixture.py --samples 500
  python tools/verify_datasets.py CONFIG --cfg-options \\
      dataset_defaults.SAVPairsDataset.data_root=/data/sav
"""
PATH_KEYS = ('data_root', 'ann_file', 'image_dir', 'root', 'path')
CELL = 224


@dataclass
class Report:
    """What is known of one source.

    Args:
        name: Of the source.
        path: Where its config says it lies.
        error: Why it cannot be opened, or ``None``.
        records: Records it holds (``max_samples`` applied).
        repeats: How often each comes up an epoch.
        read: Records of the sample that could be used.
        bad: Reasons of the others.
        examples: A bad record's message for each reason.
        changed: What was taken out of the texts of ``read`` or cut off them, by kind.
        changed_examples: A record's name for each kind.
        pairs: Of ``read``, with a second frame; likewise ``captions`` and ``conversations``.
        no_target: Of ``read``, with a caption that nothing in the image fits.
        regions: Regions of ``read``.
        empty_nearest: Of ``regions``, without a cell under nearest sampling alone.
        empty: Of ``regions``, without a cell after the any-pixel fallback.
        seconds: Of reading and transforming the sample in this process.
        shown: The first items for the contact sheet.
    """

    name: str
    path: str
    error: str | None = None
    records: int = 0
    repeats: int = 1
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    changed: Counter[str] = field(default_factory=Counter)
    changed_examples: dict[str, str] = field(default_factory=dict)
    pairs: int = 0
    captions: int = 0
    conversations: int = 0
    no_target: int = 0
    regions: int = 0
    empty_nearest: int = 0
    empty: int = 0
    seconds: float = 0.0
    shown: list[dict[str, Any]] = field(default_factory=list)

    @property
    def effective(self) -> int:
        """Records an epoch."""
        return self.records * self.repeats

    @property
    def sampled(self) -> int:
        """Records that were tried."""
        return self.read + self.bad.total()

    def fails(self, max_bad_fraction: float) -> bool:
        """Whether the source is missing or too bad."""
        if self.error is not None or not self.records:
            return True
        return self.bad.total() > max_bad_fraction * self.sampled


def build_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file with a train_dataloader')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config values by their full path',
    )
    parser.add_argument(
        '--loader', default='train_dataloader', help='which loader (default: %(default)s)'
    )
    parser.add_argument(
        '--samples', type=int, default=100, help='records read of each source (default: 100)'
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/verify_datasets'),
        help='folder of the contact sheets (default: %(default)s)',
    )
    parser.add_argument(
        '--rows', type=int, default=6, help='records on a contact sheet; 0: none (default: 6)'
    )
    parser.add_argument(
        '--max-bad-fraction',
        type=float,
        default=0.2,
        help='share of unreadable records that still passes (default: %(default)s)',
    )
    parser.add_argument('--seed', type=int, default=0, help='of the sample (default: 0)')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.samples < 0 or args.rows < 0 or not 0 <= args.max_bad_fraction <= 1:
        parser.error('--samples and --rows must not be negative, --max-bad-fraction within [0, 1]')
    if not Path(args.config).is_file():
        parser.error(f'there is no config {args.config}')
    configs = source_configs(args.config, args.cfg_options, args.loader)
    reports = []
    for number, config in enumerate(configs, 1):
        print(f'[{number}/{len(configs)}] {kind_of(config)} {path_of(config)}', flush=True)
        report = examine(config, args.samples, args.rows, args.seed)
        if report.error is not None:
            print(f'    cannot be opened: {report.error}', flush=True)
        reports.append(report)
    print()
    print(counts_table(reports))
    if args.samples:
        print()
        print(sample_table(reports))
    for number, report in enumerate(reports, 1):
        if report.shown:
            args.out.mkdir(parents=True, exist_ok=True)
            sheet = args.out / f'{number:02d}_{report.name.replace("/", "_")}.png'
            contact_sheet(report.shown).save(sheet)
            print(f'contact sheet: {sheet}')
    failed = [report.name for report in reports if report.fails(args.max_bad_fraction)]
    if failed:
        print(f'FAILED: {", ".join(failed)} (missing, or more bad records than allowed)')
    return 1 if failed else 0


# -- the sources ---------------------------------------------------------------------------------


def source_configs(path: str, options: Sequence[str] | None, loader: str) -> list[dict]:
    """The configs of a loader's sources.

    Raises:
        SystemExit: The config has no such loader.
    """
    from mmengine.config import Config, DictAction

    from projects.llava_sam2_rl.engine.dataloader_config import complete_dataloader

    config = Config.fromfile(path)
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        config.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    if loader not in config:
        raise SystemExit(f'{path} has no {loader}')
    dataset = complete_dataloader(config[loader], config).dataset
    return list(dataset['datasets']) if 'datasets' in dataset else [dataset]


def kind_of(config: dict) -> str:
    """The class's name."""
    kind = config['type']
    return kind.rsplit('.', 1)[-1] if isinstance(kind, str) else kind.__name__


def path_of(config: dict) -> str:
    """Where a source lies, ``-`` for one that needs no files."""
    return next((str(config[key]) for key in PATH_KEYS if config.get(key)), '-')


def examine(config: dict, samples: int, rows: int, seed: int) -> Report:
    """Opens a source and reads a sample of it."""
    from projects.llava_sam2_rl.datasets import RecordDataset
    from projects.llava_sam2_rl.registry import DATASETS, SCOPE

    report = Report(name=str(config.get('source') or kind_of(config)), path=path_of(config))
    try:
        with DATASETS.switch_scope_and_registry(SCOPE):
            dataset: RecordDataset = DATASETS.build(config)
    # A source may fail to open in any way; which and why is what this tool is for.
    except Exception as error:
        report.error = f'{type(error).__name__}: {error}'
        return report
    report.name = dataset.source
    report.records, report.repeats = dataset.num_used, dataset.repeats
    rng = np.random.default_rng(seed)
    count = min(samples, dataset.num_used)
    # Nothing is read of a source of length 0, and indices are drawn without listing all of them.
    chosen = rng.choice(dataset.num_used, count, replace=False) if count else []
    started = time.perf_counter()
    for position in chosen:
        _read(dataset, dataset.record_number(int(position)), report, rows, rng)
    report.seconds = time.perf_counter() - started
    return report


def _read(dataset: Any, index: int, report: Report, rows: int, rng: np.random.Generator) -> None:
    from projects.llava_sam2_rl.datasets import BadRecord, RegionDataset

    try:
        if not isinstance(dataset, RegionDataset):
            item, changed = dataset.make_item(index, rng)
            _count_clip(item['clip'], changed, report)
            return
        sample, changed = dataset.load(index, rng)
        item = dataset.transforms(sample) if dataset.transforms is not None else None
        if item is None and sample.num_regions and not sample.mask.any():
            raise BadRecord('empty_mask', sample.name)
    except BadRecord as error:
        report.bad[error.reason] += 1
        report.examples.setdefault(error.reason, str(error))
        return
    for _, _, kind in changed:
        report.changed[kind] += 1
        report.changed_examples.setdefault(kind, sample.name)
    report.read += 1
    report.pairs += sample.has_pair
    report.captions += bool(sample.texts)
    report.conversations += bool(sample.conversation)
    report.no_target += bool(sample.texts) and not sample.num_regions
    size = item['prompt_masks'].shape[-2:] if item is not None else (16, 16)
    masks = sample.mask.reshape(-1, *sample.image.shape[:2])
    report.regions += len(masks)
    report.empty_nearest += sum(not _nearest(mask, size).any() for mask in masks)
    if item is not None:
        report.empty += int((~item['prompt_masks'].flatten(1).any(1)).sum())
    if len(report.shown) < rows and item is not None:
        report.shown.append({'sample': sample, 'item': item})


def _count_clip(clip: Any, changed: Sequence[Any], report: Report) -> None:
    """A clip has an expression and no region of a single picture."""
    for _, _, kind in changed:
        report.changed[kind] += 1
        report.changed_examples.setdefault(kind, clip.name)
    report.read += 1
    report.captions += 1
    report.no_target += clip.masks is not None and not any(clip.masks)


def _nearest(mask: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(mask))[None, None].float()
    return torch.nn.functional.interpolate(pixels, size=tuple(size), mode='nearest')


# -- the tables ----------------------------------------------------------------------------------


def counts_table(reports: Sequence[Report]) -> str:
    """Records of every source and the total."""
    rows = [('source', 'records', 'repeats', 'effective', 'path')]
    for report in reports:
        missing = report.error is not None
        rows.append(
            (
                report.name,
                'MISSING' if missing else _number(report.records),
                f'x{report.repeats}' if not missing else '-',
                '-' if missing else _number(report.effective),
                report.path,
            )
        )
    rows.append(('total', '', '', _number(sum(report.effective for report in reports)), ''))
    return _aligned(rows, left=(0, 4))


def sample_table(reports: Sequence[Report]) -> str:
    """What a sample of every source looks like."""
    head = ('source', 'readable', 'pairs', 'captions', 'chats', 'no target')
    rows = [(*head, 'empty grids', 'after fallback', 'samples/s')]
    reasons, changes = [], []
    for report in reports:
        if not report.sampled:
            continue
        speed = report.sampled / report.seconds if report.seconds else 0.0
        rows.append(
            (
                report.name,
                f'{report.read}/{report.sampled}',
                _share(report.pairs, report.read),
                _share(report.captions, report.read),
                _share(report.conversations, report.read),
                _share(report.no_target, report.read),
                f'{report.empty_nearest}/{report.regions}',
                f'{report.empty}/{report.regions}',
                f'{speed:.1f}',
            )
        )
        for reason, count in report.bad.most_common():
            reasons.append(f'  {report.name}: {count} x {reason}, e.g. {report.examples[reason]}')
        for kind, count in report.changed.most_common():
            name = report.changed_examples[kind]
            changes.append(f'  {report.name}: {count} x {kind}, e.g. {name}')
    lines = [_aligned(rows, left=(0,))]
    if reasons:
        lines += ['not readable:', *reasons]
    if changes:
        lines += ['taken out of texts or cut off them:', *changes]
    return '\n'.join(lines)


def _number(value: int) -> str:
    return f'{value:,}'.replace(',', ' ')


def _share(part: int, whole: int) -> str:
    return f'{part / whole:.0%}' if whole else '-'


def _aligned(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return '\n'.join(
        '  '.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


# -- the contact sheet ---------------------------------------------------------------------------


def contact_sheet(shown: Sequence[dict[str, Any]]) -> Image.Image:
    """A row per record: image with the mask's outline, paired frame, grid on the input, caption."""
    sheet = Image.new('RGB', (4 * CELL + 50, len(shown) * (CELL + 10) + 10), 'white')
    draw = ImageDraw.Draw(sheet)
    for row, record in enumerate(shown):
        sample, item = record['sample'], record['item']
        top = 10 + row * (CELL + 10)
        sheet.paste(_outlined(sample.image, sample.mask), (10, top))
        if sample.has_pair:
            sheet.paste(_outlined(sample.image2, sample.mask2), (20 + CELL, top))
        else:
            draw.text((30 + CELL, top + CELL // 2), 'no second frame', fill='grey')
        sheet.paste(_with_grid(item), (30 + 2 * CELL, top))
        spoken = ' / '.join(f'Q: {q} A: {a}' for q, a in sample.conversation)
        said = ' / '.join(sample.texts) or spoken or '-'
        if sample.texts and not sample.num_regions:
            said += ' (no target)'
        lines = [sample.name, f'category: {sample.category}', said]
        text = '\n'.join(part for line in lines for part in textwrap.wrap(line, 36)[:10])
        # The built-in font has Latin-1 only.
        text = text.encode('latin-1', 'replace').decode('latin-1')
        draw.text((40 + 3 * CELL, top), text, 'black')
    return sheet


def _outlined(image: np.ndarray, mask: np.ndarray) -> Image.Image:
    import cv2

    scale = CELL / max(image.shape[:2])
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    picture = np.array(Image.fromarray(image).resize(size))
    for region in mask.reshape(-1, *image.shape[:2]):
        small = cv2.resize(region.astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        outlines, _ = cv2.findContours(small, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, (255, 0, 255), 2)
    return Image.fromarray(picture)


def _with_grid(item: dict[str, Any]) -> Image.Image:
    from projects.llava_sam2_rl.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD

    # The last tile shows the whole image.
    pixels = item['pixel_values'][-1].permute(1, 2, 0).numpy()
    pixels = np.clip((pixels * IMAGENET_STD + IMAGENET_MEAN) * 255, 0, 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels).resize((CELL, CELL))
    draw = ImageDraw.Draw(picture, 'RGBA')
    rows, columns = item['prompt_masks'].shape[-2:]
    union = item['prompt_masks'].any(dim=0)
    for y in range(rows):
        for x in range(columns):
            box = (
                *(x * CELL // columns, y * CELL // rows),
                *((x + 1) * CELL // columns, (y + 1) * CELL // rows),
            )
            fill = (255, 0, 255, 90) if union[y, x] else None
            draw.rectangle(box, fill=fill, outline=(255, 255, 255, 60))
    return picture


if __name__ == '__main__':
    sys.exit(main())
