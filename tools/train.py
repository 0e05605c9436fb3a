"""Trains a config: what ``xtuner train`` does, in this process, with checks that come first.

``xtuner train`` starts the training as a child and exits 0 even when that fails; this launcher
exits with the training's own status, so that Slurm, CI and ``&&`` can rely on it: 0 when the
training is complete, 2 for a wrong argument, 85 when it was asked to stop (SIGTERM, SIGUSR1) and
`--resume auto` goes on from there, 124 when the watchdog ended it, 1 for any other error.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

# `hooks.preemption.REQUEUE_EXIT_CODE`, which takes ten seconds to import.
REQUEUE_EXIT_CODE = 85

EXAMPLES = """\
examples:
  python tools/train.py configs/sa2va_tiny_dual_loop.py
  python tools/train.py configs/sa2va_4b_dual_loop.py --cfg-options model.objective.beta=0.05
  python tools/train.py configs/sa2va_4b_dual_loop.py --resume auto
  torchrun --nproc_per_node 8 tools/train.py configs/sa2va_4b_dual_loop.py \\
      --launcher pytorch --deepspeed deepspeed_zero2

exit status: 0 complete, 1 error, 2 wrong argument, 85 asked to stop by SIGTERM or SIGUSR1 (start
again with --resume auto), 124 ended by the watchdog
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
        '--deepspeed', metavar='JSON', help="DeepSpeed config: a file or a name of xtuner's own"
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
    """Checks the arguments, then runs ``xtuner.tools.train.main`` on them.

    Raises:
        SystemExit: An argument is wrong; the message says which, and nothing has been started.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        from projects.llava_sam2_rl.utils.stack import check_versions

        check_versions()
        check_config(Path(args.config))
        args.resume = resolve_resume(args)
        args.cfg_options = with_profile(args)
        if args.deepspeed:
            from projects.llava_sam2_rl.engine.launch import find_deepspeed_config

            args.deepspeed = find_deepspeed_config(args.deepspeed)
    # mmengine reports a broken config in many ways; all that matters here is which and why.
    except (OSError, RuntimeError, ValueError, SyntaxError, ImportError, KeyError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    sys.argv = [sys.argv[0], *xtuner_arguments(args)]

    from xtuner.tools.train import main as xtuner_train

    from projects.llava_sam2_rl.engine.launch import prepare, run

    prepare(args.launcher, args.deepspeed)
    run(xtuner_train)


def exit_on_signals() -> None:
    """Obeys SIGTERM and SIGUSR1 until the training does (`PreemptionHook`), and after it.

    Without a step behind it there is nothing to save: the process ends with the exit code that
    asks to be started again, where the default would look like a crash.
    """
    process = os.getpid()

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker, which leaves signals to its parent
            return
        name = signal.Signals(signum).name
        # Python's own streams may be in use by the code that was interrupted.
        os.write(2, f'{name} outside of the training loop: nothing to save, exit\n'.encode())
        os._exit(REQUEUE_EXIT_CODE)

    for signum in (signal.SIGTERM, signal.SIGUSR1):
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
    """Where ``xtuner train`` will put the run: the option, the config's value, or by its name."""
    if args.work_dir:
        return Path(args.work_dir)
    from mmengine.config import Config

    config = Config.fromfile(args.config, import_custom_modules=False)
    for option in args.cfg_options or []:
        key, _, value = option.partition('=')
        if key == 'work_dir':
            config.work_dir = value
    return Path(config.get('work_dir') or Path('work_dirs') / Path(args.config).stem)


def xtuner_arguments(args: argparse.Namespace) -> list[str]:
    """The same arguments for ``xtuner``'s own parser."""
    given = [args.config]
    for name in ('work_dir', 'resume', 'deepspeed', 'seed', 'launcher', 'local_rank'):
        value = getattr(args, name)
        if value is not None:
            given += [f'--{name.replace("_", "-")}', str(value)]
    if args.cfg_options:
        given += ['--cfg-options', *args.cfg_options]
    return given


if __name__ == '__main__':
    exit_on_signals()
    main()
