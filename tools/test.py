"""Tests a config: what `xtuner test` does, without xtuner, for policy or teacher.

`xtuner test` loads the policy alone, loads nothing where the model is wrapped for several ranks,
accepts a checkpoint of another config in silence, and exits 0 when the test fails. This launcher
loads either set of weights on every rank, refuses what does not fit, and exits with the test's own
status. Without --checkpoint it tests the base model, for a comparison.
"""

from __future__ import annotations

import argparse
import os

EXAMPLES = """\
examples:
  python tools/test.py configs/sa2va_tiny_dual_loop_sft.py
  python tools/test.py configs/sa2va_tiny_dual_loop_sft.py --checkpoint iter_400.pth \\
      --weights teacher
  torchrun --nproc_per_node 8 tools/test.py configs/sa2va_4b_dual_loop.py --launcher pytorch \\
      --checkpoint iter_1000.pth --benchmark configs/_base_/benchmarks/refcoco_all.py
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='the config that was trained')
    parser.add_argument(
        '--checkpoint',
        help='iter_*.pth, a folder that DeepSpeed wrote, or a .pth of the official recipe '
        '(default: the base model)',
    )
    parser.add_argument('--weights', choices=['policy', 'teacher'], default='policy')
    parser.add_argument(
        '--benchmark', help="config file whose test_* take the place of the config's own"
    )
    parser.add_argument('--work-dir', help='where results go (default: work_dirs/<config name>)')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', default='0', help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Tests and returns the numbers."""
    parser = build_parser()
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', args.local_rank)
    from projects.llava_sam2_rl.utils.console import others_are_quiet

    with others_are_quiet() as others:
        import torch
        from mmengine.config import Config

        from projects.llava_sam2_rl.engine.distributed import unwrapped
        from projects.llava_sam2_rl.engine.entry import (
            build_runner,
            default_work_dir,
            parse_options,
        )
        from projects.llava_sam2_rl.export import load_training_checkpoint
        from projects.llava_sam2_rl.preflight import require
        from projects.llava_sam2_rl.utils.errors import CheckpointError

    try:
        config = Config.fromfile(args.config)
        if args.benchmark is not None:
            benchmark = Config.fromfile(args.benchmark)
            for key in ('test_cfg', 'test_dataloader', 'test_evaluator'):
                config[key] = benchmark[key]
            # What the config says itself of where data lie holds for the benchmark too.
            roots = {**benchmark.get('dataset_defaults', {}), **config.get('dataset_defaults', {})}
            config.dataset_defaults = roots
        config.merge_from_dict(parse_options(args.cfg_options))
    except (OSError, LookupError, AttributeError, ValueError, TypeError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    if config.get('test_evaluator') is None:
        parser.exit(2, f'{parser.prog}: error: {args.config} has no test_*: give --benchmark\n')
    config.launcher = args.launcher
    config.model.predict_with = args.weights
    config.load_from, config.resume = None, False
    config.work_dir = args.work_dir or default_work_dir(config, args.config)
    if args.checkpoint is not None:
        config.test_cfg.checkpoint = args.checkpoint
    require(config, ('test',))
    if args.launcher == 'pytorch' and not torch.cuda.is_available():
        # mmengine's launcher insists on a GPU.
        torch.distributed.init_process_group('gloo')
    runner = build_runner(config)
    others.write_to(runner.logger)
    if args.checkpoint is not None:
        try:
            load_training_checkpoint(unwrapped(runner), args.checkpoint, args.weights)
        except (CheckpointError, OSError) as error:
            parser.exit(2, f'{parser.prog}: error: {error}\n')
    return runner.test()


if __name__ == '__main__':
    main()
