"""Makes WORK_DIR/report.html from what a run left in its folder.

A run with `ReportHook` writes the same page at each checkpoint; this makes it again, or makes it
for a run without the hook, with what there is.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('work_dir', type=Path, help='work directory of a run')
    parser.add_argument('--out', type=Path, help='default: report.html in the work directory')
    args = parser.parse_args(argv)
    folder = args.work_dir
    if not folder.is_dir():
        parser.exit(2, f'{parser.prog}: error: there is no folder {folder}\n')
    if not any(folder.glob('*/vis_data/scalars.json')) and not (folder / 'report').is_dir():
        parser.exit(
            2,
            f'{parser.prog}: error: {folder} is no work directory of a run: it holds neither '
            '*/vis_data/scalars.json nor report/\n',
        )
    from projects.llava_sam2_rl.engine.checkpoint_files import write_atomically
    from projects.llava_sam2_rl.report import FILENAME, make_report

    out = args.out or folder / FILENAME
    write_atomically(out, make_report(folder).html.encode())
    print(out)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
