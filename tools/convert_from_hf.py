"""Writes a model in the official layout as one .pth under the names of the official recipe.

For training code that starts from such a file (here: model.policy.checkpoint=FILE). The configs of
this project read the folder itself (model.policy.pretrained=FOLDER) and need no conversion.
"""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
examples:
  python tools/convert_from_hf.py pretrained/Sa2VA-4B sa2va_4b.pth
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('model', help='folder in the official layout')
    parser.add_argument('out', help='file to write')
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    from projects.llava_sam2_rl.export import official_to_xtuner
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    try:
        count = official_to_xtuner(args.model, args.out)
    except (CheckpointError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'{args.out}  {count} tensors')


if __name__ == '__main__':
    sys.exit(main())
