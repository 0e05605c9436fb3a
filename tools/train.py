"""Trains a config: what ``xtuner train`` does, without xtuner, with checks that come first.

It takes the arguments of ``xtuner train``, and the run is the same, bit for bit. It works on every
supported stack; xtuner 0.2.0 cannot be imported beside transformers 5. What a run could not survive
is found before anything is loaded (tools/check.py says what is looked at). ``xtuner train`` starts
the training as a child and exits 0 even when that fails; this launcher exits with the training's
own status, so that Slurm, CI and ``&&`` can rely on it: 0 when the training is complete, 2 for a
wrong argument or config, 85 when it was asked to stop (SIGTERM, SIGUSR1) and `--resume auto` goes
on from there, 124 when the watchdog ended it, 130 after Ctrl-C, which saves as well and prints how
to go on, 1 for any other error.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
from pathlib import Path
from types import FrameType

# Those of `hooks.preemption`, which takes ten seconds to import.
REQUEUE_EXIT_CODE = 85
INTERRUPT_EXIT_CODE = 130

EXAMPLES = """\
examples:
  python tools/train.py configs/sa2va_tiny_dual_loop.py
  python tools/train.py configs/sa2va_4b_dual_loop.py --cfg-options model.objective.beta=0.05
  python tools/train.py configs/sa2va_4b_dual_loop.py --resume auto
  torchrun --nproc_per_node 8 tools/train.py configs/sa2va_4b_dual_loop.py \\
      --launcher pytorch --deepspeed deepspeed_zero2

exit status: 0 complete, 1 error, 2 wrong argument, 85 asked to stop by SIGTERM or SIGUSR1 (start
again with --resume auto), 124 ended by the watchdog, 130 Ctrl-C (saved, where a step was done)
"""


def build_parser() -> argparse.ArgumentParser:
    """The options of ``xtuner train``, with ``auto`` for ``--resume``."""
    parser = argparse.ArgumentParser(
        description='Train a config. Takes the arguments of `xtuner train`.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--work-dir', help='where logs and checkpoints go (default: work_dirs/<config name>)'
    )
    parser.add_argument(
        '--resume',
        metavar='PATH|auto',
        help='checkpoint to go on from; "auto" takes the newest of the work directory and starts '
        'from the beginning where there is none',
    )
    parser.add_argument(
        '--deepspeed', metavar='JSON', help='DeepSpeed config: a file, or a name as deepspeed_zero2'
    )
    parser.add_argument('--seed', type=int, help='random seed (on resume the checkpoint has it)')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config values by their full path, as model.objective.beta=0.05',
    )
    parser.add_argument(
        '--profile',
        type=int,
        nargs='?',
        const=5,
        default=0,
        metavar='STEPS',
        help='trace so many iterations (default: 5) and say where their time goes: '
        '<work-dir>/profile/',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes of a distributed run were started (default: %(default)s)',
    )
    parser.add_argument('--local_rank', '--local-rank', help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Checks the arguments, then trains.

    Raises:
        SystemExit: An argument is wrong; the message says which, and nothing has been started.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    from projects.llava_sam2_rl.utils.errors import CONFIG_ERRORS

    try:
        from projects.llava_sam2_rl.utils.console import others_are_quiet
        from projects.llava_sam2_rl.utils.stack import check_versions

        check_versions()
        with others_are_quiet() as others:
            check_config(Path(args.config))
            from projects.llava_sam2_rl.engine.deepspeed_config import read_deepspeed_config
            from projects.llava_sam2_rl.engine.entry import (
                build_runner,
                parse_options,
                training_config,
            )
            from projects.llava_sam2_rl.engine.launch import prepare, run
            from projects.llava_sam2_rl.preflight import require
        args.resume = resolve_resume(args)
        config = training_config(
            args.config,
            parse_options(with_profile(args)),
            work_dir=args.work_dir,
            resume=args.resume,
            deepspeed=read_deepspeed_config(args.deepspeed) if args.deepspeed else None,
            seed=args.seed,
            launcher=args.launcher,
        )
    # mmengine reports a broken config in many ways; all that matters here is which and why.
    except CONFIG_ERRORS as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')

    def train() -> None:
        runner = build_runner(config)
        others.write_to(runner.logger)
        runner.train()

    os.environ.setdefault('LOCAL_RANK', str(args.local_rank or 0))
    require(config)
    prepare(args.launcher, args.deepspeed)
    run(train)


def exit_on_signals() -> None:
    """Obeys SIGTERM, SIGUSR1 and Ctrl-C until the training does (`PreemptionHook`), and after it.

    Without a step behind it there is nothing to save: the process ends with the exit code that
    asks to be started again, where the default would look like a crash, or with that of Ctrl-C.
    """
    process = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker, which leaves signals to its parent
            return
        name = signal.Signals(signum).name
        # Python's own streams may be in use by the code that was interrupted.
        os.write(2, f'{name} outside of the training loop: nothing to save, exit\n'.encode())
        os._exit(INTERRUPT_EXIT_CODE if signum == signal.SIGINT else REQUEUE_EXIT_CODE)

    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, stop)


def check_config(config: Path) -> None:
    """Refuses a config that is not there, or of an earlier layout.

    Raises:
        FileNotFoundError: There is no such file; the message names the nearest.
        ValueError: Keys have moved; the message names each and its new place.
    """
    if config.is_file():
        from mmengine.config import Config

        from projects.llava_sam2_rl.hooks.config_check import check_layout

        check_layout(Config.fromfile(config, import_custom_modules=False))
        return
    there = sorted(str(path) for path in config.parent.glob('*.py'))
    close = difflib.get_close_matches(str(config), there, n=1)
    hint = f'did you mean {close[0]}?' if close else 'the configs of this project lie in configs/'
    raise FileNotFoundError(f'there is no config {config}: {hint}')


def resolve_resume(args: argparse.Namespace) -> str | None:
    """The checkpoint to go on from, found to be there and not cut off.

    Raises:
        FileNotFoundError, CheckpointError: There is no such checkpoint, or it is damaged.
    """
    if args.resume is None:
        return None
    path = args.resume
    if path == 'auto':
        work_dir = find_work_dir(args)
        last = work_dir / 'last_checkpoint'
        if not last.is_file():
            print(f'Nothing to resume in {work_dir}: starting from the beginning', flush=True)
            return None
        path = last.read_text().strip()
        print(f'Resuming from {path}', flush=True)

    from projects.llava_sam2_rl.engine.checkpoint_files import check_file

    check_file(path)
    return path


def with_profile(args: argparse.Namespace) -> list[str] | None:
    """The config options, with those of the ``ProfileHook`` where ``--profile`` is given.

    Raises:
        ValueError: The config has no such hook.
    """
    if not args.profile:
        return args.cfg_options
    from mmengine.config import Config

    hooks = Config.fromfile(args.config, import_custom_modules=False).get('default_hooks') or {}
    if hooks.get('profile') is None:
        raise ValueError(f'--profile needs a ProfileHook as default_hooks.profile of {args.config}')
    return [*(args.cfg_options or []), f'default_hooks.profile.steps={args.profile}']


def find_work_dir(args: argparse.Namespace) -> Path:
    """Where the run will be put: the option, the config's value, or by its name."""
    if args.work_dir:
        return Path(args.work_dir)
    from mmengine.config import Config

    from projects.llava_sam2_rl.engine.entry import default_work_dir, parse_options

    config = Config.fromfile(args.config, import_custom_modules=False)
    config.merge_from_dict(parse_options(args.cfg_options))
    return Path(default_work_dir(config, args.config))


if __name__ == '__main__':
    exit_on_signals()
    main()
