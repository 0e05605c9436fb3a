"""Says in seconds whether a run would start and survive, without loading any weights.

Looked at: config keys, the checkpoint's files, the first record of every data source and its sizes
against the model, metrics and objective, the GPU against precision and memory, the launcher, the
disk against the checkpoints, and the judge: key, address, one question. tools/train.py and
tools/test.py do the same by themselves, and so does `xtuner train`.
"""

from __future__ import annotations

import argparse
import os

EXAMPLES = """\
examples:
  python tools/check.py configs/sa2va_tiny_dual_loop.py
  python tools/check.py configs/sa2va_4b_dual_loop.py --for train \\
      --cfg-options model.policy.pretrained=/data/Sa2VA-4B

exit status: 0 nothing found, 2 found: one list, each with the option that mends it
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--for',
        dest='stage',
        choices=['train', 'test', 'both'],
        default='both',
        help='the training with its validation, the test, or both (default)',
    )
    parser.add_argument('--work-dir', help='where logs and checkpoints would go')
    parser.add_argument('--deepspeed', metavar='JSON', help='as of tools/train.py')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    return parser


def main(argv: list[str] | None = None) -> None:
    """Prints what was found.

    Raises:
        SystemExit: With status 2, where anything would stop the run.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', '0')
    from projects.llava_sam2_rl.utils.errors import CONFIG_ERRORS

    try:
        from projects.llava_sam2_rl.utils.console import others_are_quiet

        with others_are_quiet():
            from projects.llava_sam2_rl.engine.deepspeed_config import read_deepspeed_config
            from projects.llava_sam2_rl.engine.entry import parse_options, training_config
            from projects.llava_sam2_rl.hooks.config_check import check_layout
            from projects.llava_sam2_rl.preflight import require

        config = training_config(
            args.config,
            parse_options(args.cfg_options),
            work_dir=args.work_dir,
            deepspeed=read_deepspeed_config(args.deepspeed) if args.deepspeed else None,
            launcher=args.launcher,
        )
        check_layout(config)
    # mmengine reports a broken config in many ways; all that matters here is which and why.
    except CONFIG_ERRORS as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')

    stages = ('train', 'test') if args.stage == 'both' else (args.stage,)
    require(config, tuple(stage for stage in stages if config.get(f'{stage}_dataloader')))
    print(f'{args.config}: nothing was found that would stop the run ({", ".join(stages)})')


if __name__ == '__main__':
    main()
