"""The code blocks of docs/rewards.md are run as they stand there."""

import re
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / 'docs' / 'rewards.md'


@pytest.fixture
def blocks():
    return re.findall(r'```python(?: title="([^"]+)")?\n(.*?)```', PAGE.read_text(), re.DOTALL)


def test_the_worked_example_runs(blocks, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names: dict = {}
    files = []
    for title, code in blocks:
        if title:
            (tmp_path / title).write_text(code)
            files.append(title)
        else:
            exec(compile(code, str(PAGE), 'exec'), names)
    assert files == ['spatial_words.py', 'weakest_word.py', 'by_letter.py']
    assert names['output'].rewards.shape == (4,)
    for file in files:
        sys.modules.pop(file.removesuffix('.py'))


def test_the_table_names_every_registered_reward():
    from projects.llava_sam2_rl import rewards

    registered = {name for name in rewards.__all__ if name.endswith(('Reward', 'Rewards'))}
    listed = set(re.findall(r'^\| `(\w+Rewards?)`', PAGE.read_text(), re.MULTILINE))
    # Two of them are what rewards derive from.
    assert listed == registered - {'Reward', 'CompositeReward'}
