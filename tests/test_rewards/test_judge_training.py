"""Training runs whose caption reward is a judge behind a real HTTP server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image

from projects.llava_sam2_rl.engine.checkpoint_files import load_from_local
from test_rewards.judge_server import judge_server

KEY = 'sk-loopback-5f1d9c7e2b'
QUESTIONS = {
    'class_name': 'shape',
    'positive': [
        {
            'question': 'What color is it?',
            'choices': [['red', 1], ['reddish', 0.5], ['not mentioned', 0], ['blue', -1]],
        }
    ],
    'negative': [
        {'question': 'Is a dog mentioned?', 'choices': [['a dog', -1], ['nothing of it', 1]]}
    ],
}
OPTIONS = [
    'train_dataloader.batch_size=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=50',
    'val_dataloader.dataset.length=2',
]


def answer(prompt: str, number: int) -> str:
    """Knows a shape when it reads one, and calls every second caption red."""
    if 'Write multiple-choice questions' in prompt:
        return json.dumps(QUESTIONS)
    if 'object likely a' in prompt:
        return 'Yes'
    if 'What color' in prompt:
        caption = prompt.split('Description: ')[1].split('\n')[0]
        return 'red' if len(caption) % 2 else 'not mentioned'
    return 'nothing of it'


def make_config(root: Path, folder: Path, url: str) -> Path:
    config = Config.fromfile(root / 'configs/sa2va_tiny_dual_loop.py')
    objective = config.model.objective
    objective.num_generations = 4
    objective.mask_to_caption.reward = dict(
        type='WeightedRewards',
        rewards=[
            dict(type='MeteorReward', weight=0.25),
            dict(
                type='LLMJudgeReward',
                weight=0.75,
                model='judge',
                base_url=url,
                api_key_env='OPENAI_API_KEY',
                cache_dir=str(folder / 'run/judge_cache'),
                max_retries=1,
                backoff=0.01,
                timeout=5.0,
                max_consecutive_failures=6,
            ),
        ],
    )
    config.default_hooks.rollouts.interval = 1
    path = folder / 'judged.py'
    config.dump(path)
    return path


def start(entry: list[str], config: Path, *options: str, resume: Path | None = None):
    args = [sys.executable, *entry, str(config), '--work-dir', str(config.parent / 'run')]
    args += [] if resume is None else ['--resume', str(resume)]
    return subprocess.Popen(
        [*args, '--cfg-options', *OPTIONS, *options],
        cwd=config.parent,
        env={
            **os.environ,
            'OPENAI_API_KEY': KEY,
            'NO_PROXY': '127.0.0.1',
            'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore',
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(work_dir: Path) -> dict[int, dict]:
    """Logged training numbers by step."""
    found = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            if 'total_loss' in row:
                found[row['step']] = row
    return found


def log(work_dir: Path) -> str:
    return ''.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))


def assert_key_is_nowhere(work_dir: Path, output: str) -> None:
    assert KEY not in output
    files = [path for path in work_dir.rglob('*') if path.is_file()]
    kinds = {path.suffix for path in files}
    assert {'.pth', '.log', '.json', '.jsonl', '.py', '.png'} <= kinds, 'nothing to look at'
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


@pytest.fixture(scope='module')
def judged(root, tmp_path_factory):
    """Two steps with a judge that answers: the work directory, the output and the server."""
    folder = tmp_path_factory.mktemp('judged')
    with judge_server(answer) as server:
        config = make_config(root, folder, server.url)
        process = start([str(root / 'tools/train.py')], config, 'train_cfg.max_iters=2')
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return folder / 'run', output, server


@pytest.mark.slow
def test_a_judge_that_answers_rewards_captions(judged):
    work_dir, _, server = judged
    found = rows(work_dir)
    assert sorted(found) == [1, 2]
    for row in found.values():
        assert row['loop1/frac_reward_unscorable'] == 0
        # (0 or 1, + 1) / 2, so all scores are 0.5 or 1
        assert 0.5 <= row['loop1/rewards/llm_judge/mean'] <= 1
        assert row['loop1/reward_mean'] == pytest.approx(
            0.25 * row['loop1/rewards/meteor/mean'] + 0.75 * row['loop1/rewards/llm_judge/mean'],
            abs=1e-5,
        )
    assert server.keys == {f'Bearer {KEY}'}
    assert len(list((work_dir / 'judge_cache').glob('*.json'))) >= 1


@pytest.mark.slow
def test_rollouts_of_a_run_are_written(judged):
    work_dir, _, _ = judged
    folder = work_dir / 'rollouts'
    assert {path.name for path in folder.iterdir()} == {
        *('iter_00000001.jsonl', 'iter_00000001.png'),
        *('iter_00000002.jsonl', 'iter_00000002.png'),
    }
    written = [json.loads(line) for line in (folder / 'iter_00000002.jsonl').open()]
    captions = [row for row in written if row['direction'] == 'mask_to_caption']
    assert len(captions) == 8  # batch 2, 4 generations
    for row in captions:
        meteor, judge = row['rewards']['meteor'], row['rewards']['llm_judge']
        assert row['reward'] == pytest.approx(0.25 * meteor + 0.75 * judge, abs=1e-5)
    assert rows(work_dir)[2]['loop1/reward_mean'] == pytest.approx(
        sum(row['reward'] for row in captions) / 8, abs=1e-5
    )
    for group in (0, 1):
        advantages = [row['advantage'] for row in captions if row['group'] == group]
        assert sum(advantages) == pytest.approx(0, abs=1e-4)
    with Image.open(folder / 'iter_00000002.png') as picture:
        assert min(picture.size) > 500
    assert list(work_dir.glob('*/vis_data/vis_image/rollouts_2.png'))


@pytest.mark.slow
def test_the_log_has_the_names_users_look_for_and_says_how_meteor_matches(judged):
    work_dir, _, _ = judged
    for row in rows(work_dir).values():
        assert row['step_time'] == row['time'] > 0
        assert row['learning_rate'] == row['lr'] > 0
    assert log(work_dir).count('METEOR: exact') == 1


@pytest.mark.slow
def test_the_key_is_in_no_file_of_a_run(judged):
    work_dir, output, _ = judged
    assert_key_is_nowhere(work_dir, output)


@pytest.mark.slow
def test_a_judge_that_goes_down_stops_the_run_and_it_can_go_on(root, tmp_path):
    served = threading.Event()

    def until_the_second_step(prompt: str, number: int) -> str:
        # The first step asks at most 2 * (1 + 4 * 3) = 26 times.
        if number == 30:
            served.set()
        return answer(prompt, number)

    work_dir = tmp_path / 'run'
    with judge_server(until_the_second_step) as server:
        config = make_config(root, tmp_path, server.url)
        process = start([str(root / 'tools/train.py')], config, 'train_cfg.max_iters=40')
        assert served.wait(240), 'the judge was never asked'
    # The server is gone; nobody listens at its port any more.
    output, _ = process.communicate(timeout=240)
    assert process.returncode not in (0, None)
    last = max(rows(work_dir))
    assert 2 <= last < 40
    reason = f"6 requests in a row to 'judge' at {server.url} failed"
    assert f'The run stops after iteration {last}: {reason}' in log(work_dir)
    assert reason in output.splitlines()[-1]
    checkpoint = work_dir / f'iter_{last}.pth'
    assert (work_dir / 'last_checkpoint').read_text() == str(checkpoint)
    loaded = load_from_local(str(checkpoint), 'cpu')
    assert loaded['meta']['iter'] == last
    # What could not be asked about is not scored, and never 0.
    written = [json.loads(line) for line in (work_dir / f'rollouts/iter_{last:08d}.jsonl').open()]
    unscored = [row for row in written if row['direction'] == 'mask_to_caption']
    assert {row['reward'] for row in unscored} == {None}
    assert {row['advantage'] for row in unscored} == {0.0}
    assert_key_is_nowhere(work_dir, output)

    with judge_server(answer) as server:
        config = make_config(root, tmp_path, server.url)
        process = start(
            [str(root / 'tools/train.py')],
            config,
            f'train_cfg.max_iters={last + 1}',
            resume=checkpoint,
        )
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    assert rows(work_dir)[last + 1]['loop1/frac_reward_unscorable'] == 0
