"""Scores captions by DLC-Bench's questions, with a judge behind an OpenAI-compatible endpoint.

The captions are a JSON object by annotation id, as the DLC-Bench test of tools/test.py leaves them
in its work directory, or a list of objects with "id" and "caption".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

EXAMPLES = """\
examples:
  python tools/dlc_bench.py work_dirs/run/dlc_bench_captions.json --data-root data/DLC-Bench \\
      --model meta-llama/Llama-3.1-8B-Instruct --base-url http://127.0.0.1:8000/v1
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('captions', help='JSON file')
    parser.add_argument(
        '--data-root',
        type=Path,
        default=Path('data/DLC-Bench'),
        help='folder with qa.json and class_names.json (default: %(default)s)',
    )
    parser.add_argument('--model', required=True, help='name of the judge at the endpoint')
    parser.add_argument('--base-url', default='http://127.0.0.1:8000/v1', help='(%(default)s)')
    parser.add_argument(
        '--api-key-env', help='environment variable that holds the key (default: no key)'
    )
    parser.add_argument(
        '--template', help='TOML file with the words in which the judge is asked (default: ours)'
    )
    parser.add_argument('--out', help='JSON file for the scores, by region too')
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    from projects.llava_sam2_rl.evaluation.dlc_bench import (
        load_captions,
        load_class_names,
        score_captions,
    )
    from projects.llava_sam2_rl.rewards.base import RewardUnavailableError
    from projects.llava_sam2_rl.rewards.dlc import load_question_file
    from projects.llava_sam2_rl.rewards.llm_judge import LLMJudgeReward

    try:
        scores = score_captions(
            load_captions(args.captions),
            load_question_file(args.data_root / 'qa.json'),
            load_class_names(args.data_root / 'class_names.json'),
            LLMJudgeReward(args.model, args.base_url, args.api_key_env, template=args.template),
        )
    except (OSError, ValueError, RewardUnavailableError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(json.dumps({**scores.numbers, **scores.notes}, indent=2))
    if args.out:
        regions = {
            key: None if region is None else vars(region) for key, region in scores.regions.items()
        }
        content = {
            'numbers': scores.numbers,
            'notes': scores.notes,
            'missing': scores.missing,
            'regions': regions,
        }
        Path(args.out).write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
