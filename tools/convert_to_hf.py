"""Writes a trained model in the official Sa2VA layout: LoRA merged, config, tokenizer, weights.

Reads checkpoints of this project (iter_*.pth), folders that DeepSpeed wrote, and .pth files of the
official recipe.
"""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """\
examples:
  python tools/convert_to_hf.py configs/sa2va_tiny_dual_loop_sft.py \\
      work_dirs/sa2va_tiny_dual_loop_sft/iter_400.pth exported
  python tools/convert_to_hf.py CONFIG iter_1000.pth exported --weights teacher --dtype float32
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='the config that was trained')
    parser.add_argument('checkpoint', help='iter_*.pth, or a folder that DeepSpeed wrote')
    parser.add_argument('out', help='folder to write; must not hold anything yet')
    parser.add_argument('--weights', choices=['policy', 'teacher'], default='policy')
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'float16'],
        help="of the tensors (default: the config's torch_dtype)",
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='as given in training'
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    import torch
    from mmengine.config import Config, DictAction

    from projects.llava_sam2_rl.export import describe_folder, export
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    options = argparse.ArgumentParser()
    options.add_argument('--cfg-options', nargs='*', action=DictAction, default={})
    try:
        config = Config.fromfile(args.config)
        config.merge_from_dict(options.parse_args(['--cfg-options', *args.cfg_options]).cfg_options)
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        export(config, args.checkpoint, args.out, args.weights, dtype)
    except (CheckpointError, MemoryError, OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(f'{args.out}  {args.weights}, {describe_folder(args.out)}')


if __name__ == '__main__':
    sys.exit(main())
