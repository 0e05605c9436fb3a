import importlib.util
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mmengine.config import Config
from torch import nn

from projects.llava_sam2_rl.models.transformers_compat import weights_left_unwritten
from projects.llava_sam2_rl.preflight.memory import Sizes
from projects.llava_sam2_rl.registry import OBJECTIVES
from projects.llava_sam2_rl.rewards import MeteorReward


@pytest.fixture(scope='module')
def tool(root):
    path = root / 'tools/memory.py'
    spec = importlib.util.spec_from_file_location('memory', path)
    module = importlib.util.module_from_spec(spec)
    sys.modules['memory'] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small():
    """A frozen model of 1 GB whose rollouts take 30 MB each."""
    return Sizes(
        frozen=500_000_000, trained=0, bytes=2, layers=1, width=1, inner=0, heads=1, kv_width=1250,
        vocabulary=50_000_000, chunk=0, grounding=0, prompt=0, batch=1, group=1, tokens=2000,
        autocast=False,
    )  # fmt: skip


def test_the_largest_batch_by_hand(tool, small):
    # A rollout: 2000 tokens of keys and values of 1250 numbers of 2 bytes, 10 MB; of activations
    # 2 bytes a token kept, and of the layer being recomputed 2 * 2 * (6 + 2 * 1250) bytes.
    each = 2 * 1250 * 2 * 2000 + 2000 * 2 + 2000 * 2 * 2 * (6 + 2 * 1250)
    assert each == 30_052_000
    assert tool.largest(small, 1e9 + 8 * each, 1, 0) == 8
    assert tool.largest(small, 1e9 + 16 * each - 1, 1, 0) == 8
    assert tool.largest(small, 1e9 + 16 * each, 1, 0) == 16
    assert tool.largest(small, 1e9 + 8 * each - 1, 1, 0) == 4
    assert tool.largest(small, 1e9 + 2 * each, 1, 0) == 2
    assert tool.largest(small, 1e9 + 2 * each - 1, 1, 0) == 0


def test_a_cell_names_the_simplest_way_with_room(tool, small):
    each = 30_052_000
    assert tool.cell(small, 1e9 + 8 * each, 1) == 'one process, 8'
    assert tool.cell(small, 1e9 + 8 * each, 4) == 'DDP, 8'
    # In four parts 0.25 GB; the embeddings put together 0.1 GB.
    assert tool.cell(small, 0.35e9 + 8 * each, 4) == 'ZeRO-3, 8'
    assert tool.cell(small, 0.35e9 + 2 * each, 4) == 'ZeRO-3, 2'
    assert tool.cell(small, 0.35e9, 4) == '–'
    assert tool.cell(small, 0.35e9 + 8 * each, 1) == '–'


def test_the_table_of_the_page_is_what_it_prints(tool, root, capsys):
    assert tool.main(['--table']) == 0
    page = (root / 'docs/distributed.md').read_text()
    (shown,) = re.findall(r'<!-- memory -->\n(.*?)\n<!-- /memory -->', page, re.DOTALL)
    printed = capsys.readouterr().out
    assert printed[printed.index('| model') :].strip() == shown


def test_it_says_which_way_to_decode_a_run_would_choose(tool, small):
    # 1/4 of 1 GB, a language model of 0.6 GB, and a rollout but for its 2 bytes a token and layer
    # that are kept for a backward pass.
    needed = 0.25e9 + 0.6e9 + 30_052_000 - 2000 * 2
    text = tool.way_to_decode(replace(small, language=300_000_000), 4)
    assert f'take {needed / 1e9:.2f} GB' in text
    assert f'chosen where a GPU has {(needed + 3e9) / 1e9:.2f} GB' in text


@pytest.mark.parametrize(
    ('options', 'said'),
    [([], 'name a config, or ask for the --table'), (['no.py'], 'there is no config no.py')],
)
def test_without_a_config_it_says_what_it_wants(tool, capsys, options, said):
    with pytest.raises(SystemExit):
        tool.main(options)
    assert said in capsys.readouterr().err


def test_real_steps_are_compared_with_the_prediction(root):
    # A process of its own: memory that other tests leave behind would be counted.
    command = [sys.executable, 'tools/memory.py', 'configs/sa2va_tiny_dual_loop.py', '--measure']
    sizes = ['--batch', '1', '--group', '2', '--tokens', '4']
    done = subprocess.run([*command, *sizes], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for phase in ('encode', 'decode', 'optimizer'):
        assert f'  {phase} ' in done.stdout
    measured = float(re.search(r'^measured (\S+) GB', done.stdout, re.M)[1])
    assert 0 < measured < 2


@pytest.mark.slow
def test_a_step_of_two_ranks_in_parts_is_compared_with_the_prediction(root):
    command = [sys.executable, 'tools/memory.py', 'configs/sa2va_tiny_dual_loop.py', '--measure']
    sizes = ['--gpus', '2', '--zero', '3', '--batch', '1', '--group', '2', '--tokens', '4']
    done = subprocess.run([*command, *sizes], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert f'rank {rank}: holds 0.03 GB of weights' in done.stdout
    for phase in ('encode', 'decode', 'optimizer'):
        assert done.stdout.count(f'  {phase} ') == 2
    measured = [float(x) for x in re.findall(r'^measured (\S+) GB', done.stdout, re.M)]
    assert len(measured) == 2
    assert all(0 < peak < 2 for peak in measured)


def test_weights_are_there_when_they_are_taken_apart(root, monkeypatch):
    """None is written at the build; matrices become random, norms one and biases zero."""
    monkeypatch.syspath_prepend(str(root / 'tools'))
    from benchmarks import split_step

    drawn = torch.full((2,), 7.0)
    with weights_left_unwritten():
        layer, norm = nn.Linear(3, 2), nn.LayerNorm(4)
        nn.init.normal_(drawn)
    assert drawn.tolist() == [7.0, 7.0]
    torch.manual_seed(0)
    for name, param in [*layer.named_parameters(), *norm.named_parameters()]:
        split_step.fill(name, param)
    torch.manual_seed(0)
    torch.testing.assert_close(layer.weight.data, 0.02 * torch.randn(2, 3))
    assert layer.bias.tolist() == [0.0, 0.0]
    assert norm.weight.tolist() == [1.0] * 4
    assert norm.bias.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ('config', 'group'),
    [
        ('sa2va_4b_dual_loop_judge', 3),
        ('sa2va_tiny_dual_loop_sft', None),
        ('sa2va_tiny_dual_loop_gumbel', None),
    ],
)
def test_a_step_is_measured_without_checkpoint_and_judge(root, monkeypatch, config, group):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    from benchmarks import common

    options = Config.fromfile(root / f'configs/{config}.py').model
    kept = {key: options.objective[key] for key in options.objective if key != 'num_generations'}
    changed = common.with_random_weights(options, group=3, tokens=5)
    assert changed.policy['pretrained'] is None
    assert changed.max_new_tokens == 5
    assert changed.objective.get('num_generations') == group
    if group is None:
        # Nothing that the objective would not know.
        assert dict(changed.objective) == kept
        return
    direction = changed.objective.caption_to_mask
    assert type(OBJECTIVES.build(changed.objective).caption_to_mask.reward) is MeteorReward
    # The rest of the direction is the config's.
    assert {**direction, 'reward': None} == {**kept['caption_to_mask'], 'reward': None}


#: `on_rank` of a module of which one rank ends and the other waits for it.
ENDING = """
import os
import torch.distributed as dist

def on_rank(options):
    if dist.get_rank() == options.rank:
        print('said before')
        {ends}
    dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ('ends', 'rank', 'said'),
    [
        ("raise ValueError('a wrong number')", 1, 'ValueError: a wrong number'),
        ('os.kill(os.getpid(), 9)', 0, 'rank 0 of 2 of ending ended with exit code -9'),
    ],
)
def test_the_log_of_a_rank_that_fails_is_shown(root, monkeypatch, tmp_path, ends, rank, said):
    (tmp_path / 'ending.py').write_text(ENDING.format(ends=ends))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    monkeypatch.setenv('PYTHONUNBUFFERED', '1')
    monkeypatch.syspath_prepend(str(root / 'tools'))
    from benchmarks import ranks

    with pytest.raises(RuntimeError, match=f'rank {rank} of 2') as error:
        ranks.run_ranks('ending', 2, {'rank': rank})
    assert 'said before' in str(error.value)
    assert said in str(error.value)


def test_several_ranks_are_measured_in_parts_alone(tool, root, capsys):
    config = str(root / 'configs/sa2va_tiny_dual_loop.py')
    with pytest.raises(SystemExit):
        tool.main([config, '--gpus', '2', '--measure'])
    assert 'several ranks are measured under --zero 3' in capsys.readouterr().err
