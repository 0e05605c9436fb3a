"""Asks a Sa2VA model about a photograph: what does this mask cover, where is what this text names?

Writes OUT/NAME_N.png (the mask) and OUT/NAME_N_overlay.png for every text.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --mask cup.png
  python tools/predict.py pretrained/Sa2VA-4B photo.jpg --text "the red cup" "the table" --out found
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help='folder in the official layout')
    parser.add_argument('image', type=Path, help='photograph')
    parser.add_argument(
        '--mask', nargs='+', default=[], metavar='FILE', help='describe what these masks cover'
    )
    parser.add_argument(
        '--text', nargs='+', default=[], metavar='TEXT', help='segment what these texts name'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('.'), help='folder for pictures (default: here)'
    )
    parser.add_argument('--device', help='cuda, cuda:1, cpu (default: the GPU where there is one)')
    parser.add_argument(
        '--max-dynamic-patch', type=int, help="most tiles a photograph is cut into (the model's)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.mask and not args.text:
        parser.error('nothing asked: give --mask FILE or --text TEXT')
    from projects.llava_sam2_rl.inference import Sa2VA, load_image
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    try:
        image = load_image(args.image)
        model = Sa2VA.from_pretrained(
            args.model, args.device, max_dynamic_patch=args.max_dynamic_patch
        )
    except (CheckpointError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    failed = 0
    for file in args.mask:
        try:
            print(f'{file}: {model.describe(image, file)}')
        except ValueError as error:
            failed += 1
            print(f'{parser.prog}: error: {file}: {error}', file=sys.stderr)
    for number, text in enumerate(args.text, start=1):
        try:
            show(model.segment(image, text), image, text, args, number)
        except ValueError as error:
            failed += 1
            print(f'{parser.prog}: error: {error}', file=sys.stderr)
    return 1 if failed else 0


def show(found, image, text: str, args: argparse.Namespace, number: int) -> None:
    """Writes mask and overlay, and says what the model said."""
    from PIL import Image

    from projects.llava_sam2_rl.utils.drawing import FOUND, overlay

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f'{args.image.stem}_{number}.png'
    Image.fromarray(found.mask).save(path)
    drawn = path.with_name(f'{path.stem}_overlay.png')
    Image.fromarray(overlay(image, found.mask, FOUND)).save(drawn)
    share = f'{100 * found.mask.mean():.1f} % of the photograph'
    what = share if found.found else 'nothing: the model pointed at no object'
    print(f'“{text}”: {what}  {path}  {drawn}\n  answer: {found.answer}')


if __name__ == '__main__':
    sys.exit(main())
