"""A page in your browser: draw a region and read its caption, type a text and see its mask.

Each answer comes with its way back and a score: mask -> caption -> mask' with the IoU of the two
masks, text -> mask -> caption' with METEOR. Two folders are compared side by side, the base model
first. Only this machine can reach the page unless --host says otherwise; nothing is sent anywhere.
"""

from __future__ import annotations

import argparse
import socket
import sys

EXAMPLES = """\
examples:
  python tools/app.py pretrained/Sa2VA-4B
  python tools/app.py pretrained/Sa2VA-4B exported --port 7861
"""
MAX_MODELS = 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models', nargs='+', metavar='MODEL', help='one or two folders in the official layout'
    )
    parser.add_argument(
        '--host', default='127.0.0.1', help='address to listen at (default: 127.0.0.1)'
    )
    parser.add_argument('--port', type=int, default=7860, help='0 takes a free one (default: 7860)')
    parser.add_argument('--device', help='cuda, cuda:1, cpu (default: the GPU where there is one)')
    parser.add_argument(
        '--max-dynamic-patch', type=int, help="most tiles a photograph is cut into (the model's)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(args.models) > MAX_MODELS:
        parser.error(f'{len(args.models)} models: at most {MAX_MODELS} are compared')
    try:
        import uvicorn

        from projects.llava_sam2_rl.inference.web import build_app
        from projects.llava_sam2_rl.inference.web.server import is_local
    except ModuleNotFoundError as error:
        if error.name not in ('uvicorn', 'starlette'):
            raise
        parser.exit(2, f"{parser.prog}: error: {error.name} is missing: pip install '.[app]'\n")
    from projects.llava_sam2_rl.inference import Sa2VA
    from projects.llava_sam2_rl.utils.errors import CheckpointError

    # Before a model is loaded, which takes minutes at 4B.
    try:
        listener = socket.create_server((args.host, args.port))
    except OSError as error:
        parser.exit(
            2,
            f'{parser.prog}: error: port {args.port} of {args.host} cannot be had '
            f'({error.strerror or error}): give another --port, 0 takes a free one\n',
        )
    models = []
    try:
        for folder in args.models:
            model = Sa2VA.from_pretrained(
                folder, args.device, max_dynamic_patch=args.max_dynamic_patch
            )
            models.append((folder, model))
    except (CheckpointError, ValueError) as error:
        listener.close()
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    if not is_local(args.host):
        print(
            f'{parser.prog}: warning: whoever reaches {args.host} can use the models and load '
            'photographs; there is no password',
            file=sys.stderr,
        )
    app = build_app(models, args.host)
    config = uvicorn.Config(app, log_level='warning', access_log=False, server_header=False)
    print(f'http://{args.host}:{listener.getsockname()[1]}  (Ctrl-C ends it)', flush=True)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == '__main__':
    sys.exit(main())
