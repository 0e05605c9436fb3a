"""Asks a Sa2VA model about a photograph or a clip: what is here, where is what this text names?

A region is a mask, or what SAM 2 makes of a box, of points or of a scribble. Coordinates are pixels
of the photograph as it is shown, from its upper left corner. A line is printed for every region and
text. Written are, for every text, OUT/NAME_N.png (the mask), OUT/NAME_N_overlay.png, and a
OUT/NAME_N_object_M.png for each object where the answer points at several; for what SAM 2 made,
OUT/NAME_box_N.png, OUT/NAME_point_N.png, OUT/NAME_scribble_N.png and their overlays.

Of a clip, a video or a folder of frames, only texts can be asked. Written are, for every text,
OUT/NAME_N/00000.png (a mask a frame), OUT/NAME_N.json (each object as COCO's run lengths) and
OUT/NAME_N_overlay.mp4.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --mask cup.png plate.png
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --text "the red cup" "the table" --out found
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --box 10,20,200,180 --scribble 40,50 90,60
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --point 30,40 50,60 200,10,0 --point 300,80
  python tools/predict.py pretrained/Sa2VA-4B clip.mp4 --text "the dog that runs" --out found
"""


def numbers(text: str, counts: tuple[int, ...], form: str) -> tuple[float, ...]:
    """Numbers between commas.

    Args:
        text: As it stands on the command line.
        counts: How many there may be.
        form: What the message asks for.
    """
    try:
        found = tuple(float(part) for part in text.split(','))
    except ValueError:
        found = ()
    if len(found) not in counts:
        raise argparse.ArgumentTypeError(f'{text!r} is not {form}')
    return found


def box(text: str) -> tuple[float, ...]:
    return numbers(text, (4,), 'LEFT,TOP,RIGHT,BOTTOM in pixels')


def point(text: str) -> tuple[float, ...]:
    found = numbers(text, (2, 3), 'X,Y in pixels, or X,Y,0 for a point beside the object')
    if found[2:] not in ((), (0.0,), (1.0,)):
        raise argparse.ArgumentTypeError(f'{text!r}: the third number is 0 or 1')
    return found


def place(text: str) -> tuple[float, ...]:
    return numbers(text, (2,), 'X,Y in pixels')


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help='folder in the official layout')
    parser.add_argument(
        'image', type=Path, help='photograph, or a clip: a video or a folder of frames'
    )
    parser.add_argument(
        '--mask',
        nargs='+',
        action='extend',
        default=[],
        metavar='FILE',
        help='describe what these masks cover',
    )
    parser.add_argument(
        '--box',
        nargs='+',
        action='extend',
        default=[],
        type=box,
        metavar='LEFT,TOP,RIGHT,BOTTOM',
        help='describe what these boxes hold',
    )
    parser.add_argument(
        '--point',
        nargs='+',
        action='append',
        default=[],
        type=point,
        metavar='X,Y',
        help='describe what these points lie on, X,Y,0 beside it; again for another region',
    )
    parser.add_argument(
        '--scribble',
        nargs='+',
        action='append',
        default=[],
        type=place,
        metavar='X,Y',
        help='describe what the line through these points lies on; again for another region',
    )
    parser.add_argument(
        '--text',
        nargs='+',
        action='extend',
        default=[],
        metavar='TEXT',
        help='segment what these texts name',
    )
    parser.add_argument(
        '--out', type=Path, default=Path('.'), help='folder for pictures (default: here)'
    )
    parser.add_argument('--device', help='cuda, cuda:1, cpu (default: the GPU where there is one)')
    parser.add_argument(
        '--max-dynamic-patch', type=int, help="most tiles a photograph is cut into (the model's)"
    )
    parser.add_argument(
        '--batch-size', type=int, default=8, help='most questions at a time (default: 8)'
    )
    return parser


def regions_of(args: argparse.Namespace) -> list[tuple[str, str, Any]]:
    """Every region that was asked about: kind, what it is called, and the region."""
    from projects.llava_sam2_rl.inference import Box, Points, Scribble

    found: list[tuple[str, str, Any]] = [('mask', file, file) for file in args.mask]
    for corners in args.box:
        found.append(('box', f'box {said(corners)}', Box(*corners)))
    for points in args.point:
        labels = tuple(int(one[2]) if len(one) == 3 else 1 for one in points)
        region = Points(tuple((one[0], one[1]) for one in points), labels)
        found.append(('point', f'point {" ".join(map(said, points))}', region))
    for points in args.scribble:
        found.append(('scribble', f'scribble {" ".join(map(said, points))}', Scribble(points)))
    return found


def said(values: tuple[float, ...]) -> str:
    return ','.join(f'{value:g}' for value in values)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not (args.mask or args.box or args.point or args.scribble or args.text):
        parser.error(
            'nothing asked: give --mask FILE, --box LEFT,TOP,RIGHT,BOTTOM, --point X,Y, '
            '--scribble X,Y X,Y or --text TEXT'
        )
    from projects.llava_sam2_rl.utils.console import others_are_quiet

    with others_are_quiet():
        from projects.llava_sam2_rl.inference import Sa2VA, load_image
        from projects.llava_sam2_rl.inference.clips import is_clip
        from projects.llava_sam2_rl.utils.errors import CheckpointError

    of_clip = is_clip(args.image)
    if of_clip and (args.mask or args.box or args.point or args.scribble):
        parser.error(f'{args.image} is a clip: of clips only --text can be asked')
    try:
        image = None if of_clip else load_image(args.image)
        model = Sa2VA.from_pretrained(
            args.model,
            args.device,
            max_dynamic_patch=args.max_dynamic_patch,
            batch_size=args.batch_size,
        )
    except (CheckpointError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    if model.note:
        print(f'note: {model.note}', file=sys.stderr)
    if of_clip:
        errors = segment_clip(model, args)
    else:
        errors = [*describe(model, image, args), *segment(model, image, args)]
    for error in errors:
        print(f'{parser.prog}: error: {error}', file=sys.stderr)
    return 1 if errors else 0


def describe(model: Any, image: Any, args: argparse.Namespace) -> list[str]:
    """Prints a caption for every region, writes what SAM 2 made, and returns what went wrong."""
    errors, names, masks = [], [], []
    counts: dict[str, int] = {}
    for kind, name, region in regions_of(args):
        try:
            mask = model.region_mask(image, region)
        except ValueError as error:
            errors.append(f'{name}: {error}')
            continue
        names.append(name)
        masks.append(mask)
        if kind != 'mask':
            counts[kind] = counts.get(kind, 0) + 1
            path, drawn = write(mask, image, args, f'{kind}_{counts[kind]}')
            names[-1] = f'{name} ({path}, {drawn})'
    for name, caption in zip(names, model.describe(image, masks), strict=True):
        print(f'{name}: {caption}')
    return errors


def segment(model: Any, image: Any, args: argparse.Namespace) -> list[str]:
    """Prints and writes what was found for every text, and returns what went wrong."""
    from projects.llava_sam2_rl.inference import names_something

    texts = [(n, text) for n, text in enumerate(args.text, start=1) if names_something(text)]
    found = model.segment(image, [text for _, text in texts])
    for (number, text), one in zip(texts, found, strict=True):
        path, drawn = write(one.mask, image, args, str(number))
        share = f'{100 * one.mask.mean():.1f} % of the photograph'
        what = share if one.found else 'nothing: the model pointed at no object'
        print(f'“{text}”: {what}  {path}  {drawn}\n  answer: {one.answer}')
        if len(one.masks) < 2:
            continue
        for place, (mask, phrase) in enumerate(zip(one.masks, one.phrases, strict=True), start=1):
            path, _ = write(mask, image, args, f'{number}_object_{place}', overlaid=False)
            print(f'  object {place}{f" ({phrase})" if phrase else ""}: {path}')
    return [
        f'the text {text!r} names nothing: describe what to segment'
        for text in args.text
        if not names_something(text)
    ]


def segment_clip(model: Any, args: argparse.Namespace) -> list[str]:
    """Prints and writes what was found in a clip for every text, and returns what went wrong."""
    from tqdm import tqdm

    from projects.llava_sam2_rl.inference import video_files

    args.out.mkdir(parents=True, exist_ok=True)
    errors = []
    for number, text in enumerate(args.text, start=1):
        try:
            found = model.segment_video(
                args.image, text, progress=lambda frames: tqdm(frames, unit=' frames')
            )
        except ValueError as error:
            errors.append(str(error))
            continue
        base = args.out / f'{args.image.stem}_{number}'
        drawn = base.with_name(f'{base.name}_overlay.mp4')
        video_files.write_masks(found, base)
        video_files.write_run_lengths(found, base.with_name(f'{base.name}.json'))
        video_files.write_overlay(args.image, found, drawn)
        seen = sum(bool(found.mask(frame).any()) for frame in range(len(found)))
        what = f'in {seen} of {len(found)} frames'
        if not found.rles[0]:
            what = 'nothing: the model pointed at no object'
        print(f'“{text}”: {what}  {base}  {drawn}\n  answer: {found.answer}')
    return errors


def write(
    mask: Any, image: Any, args: argparse.Namespace, name: str, overlaid: bool = True
) -> tuple[Path, Path]:
    """Writes a mask, and the photograph with the mask on it; returns both files."""
    from PIL import Image

    from projects.llava_sam2_rl.utils.drawing import FOUND, overlay

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f'{args.image.stem}_{name}.png'
    drawn = path.with_name(f'{path.stem}_overlay.png')
    Image.fromarray(mask).save(path)
    if overlaid:
        Image.fromarray(overlay(image, mask, FOUND)).save(drawn)
    return path, drawn


if __name__ == '__main__':
    sys.exit(main())
