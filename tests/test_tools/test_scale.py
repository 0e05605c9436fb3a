"""tools/scale.py: every part of the prediction by numbers worked out by hand."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from dataclasses import replace

import pytest
from mmengine.config import Config

from projects.llava_sam2_rl.preflight.memory import Sizes


@pytest.fixture(scope='module')
def tool(root):
    spec = importlib.util.spec_from_file_location('scale', root / 'tools/scale.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['scale'] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def cluster(tool):
    return sys.modules['benchmarks.cluster']


@pytest.fixture
def network(cluster):
    return cluster.Machine(
        node_bandwidth=100.0, node_latency=1.0, bandwidth=10.0, latency=5.0, per_node=4
    )


@pytest.fixture
def job(cluster):
    sizes = Sizes(
        frozen=1000, trained=100, bytes=2, layers=2, width=8, inner=16, heads=2, kv_width=4,
        vocabulary=50, chunk=2, grounding=32, prompt=10, batch=1, group=2, tokens=8,
    )  # fmt: skip
    return cluster.Job(
        sizes=sizes, language=1000, vision=100, patches=5, grounding=10, tensors=3, accumulate=4
    )


def test_a_reduction_by_hand(network):
    # Two ranks: up and down one floor of the tree; half of 50 bytes each way.
    assert network.collective('all_reduce', 50, 1, 2) == 2 * 1 + 2 * 0.5 * 50 / 100
    # Two nodes of four: two floors inside, one between; seven eighths of 40 bytes, over the slow
    # links. Three calls have three latencies, and the bytes of all.
    assert network.collective('all_reduce', 40, 3, 8) == 3 * (4 * 1 + 2 * 5) + 2 * 7 / 8 * 40 / 10
    assert network.collective('all_reduce', 1e9, 9, 1) == 0


def test_gathering_by_hand(network):
    assert network.collective('all_gather', 40, 1, 4) == pytest.approx(3 * 1 + 3 / 4 * 40 / 100)
    # A ring of eight: seven hops, two of which lead to the other node.
    expected = 5 * 1 + 2 * 5 + 7 / 8 * 40 / 10
    assert network.collective('reduce_scatter', 40, 1, 8) == pytest.approx(expected)


def test_the_longest_of_some_captions(cluster):
    assert cluster.longest(mean=3, spread=0, limit=5, count=100) == pytest.approx(3)
    assert cluster.longest(mean=9, spread=0, limit=5, count=1) == pytest.approx(5)
    # Half of the captions have no token, half have one: no token of three in one case of eight.
    assert cluster.longest(mean=0.5, spread=1, limit=1, count=1) == pytest.approx(1 / 2)
    assert cluster.longest(mean=0.5, spread=1, limit=1, count=3) == pytest.approx(7 / 8)


def test_the_expected_maximum_of_draws(cluster):
    # Of two draws from 1 and 2 the larger is 1 in one case of four.
    assert cluster.expected_maximum([2.0, 1.0], 2) == pytest.approx(1.75)
    assert cluster.expected_maximum([3.0], 64) == 3


def test_the_work_of_a_rank_by_hand(cluster, job):
    machine = cluster.Machine(
        flops=1000, mfu=0.5, memory=100, memory_share=0.5, launch=0.1, launches=10
    )
    found = cluster.work(job, machine, tokens=4)
    # InternViT: 100 parameters at 5 positions; SAM 2: 10 at 2 x 2; 500 operations a second.
    assert found['encode'] == pytest.approx(2 * (100 * 5 + 10 * 4) / 500)
    # The prompt of 10 tokens, once for each of two generations.
    assert found['prefill'] == pytest.approx(2 * 1000 * 2 * 10 / 500)
    # 2000 bytes of weights, and of 2 rollouts 12 positions on the average, with keys and values of
    # 2 layers of 4 numbers of 2 bytes; 50 bytes a second; 4 tokens, twice.
    assert found['decode'] == pytest.approx(2 * 4 * (2000 + 24 * 2 * 2 * 4 * 2) / 50)
    # 10 + 2 * 4 tokens: the teacher, the policy, once more, and back.
    assert found['passes'] == pytest.approx(4 * 2 * 1000 * 18 / 500)
    # A host that launches slowly bounds decoding: 20 kernels a token of 10 s each.
    slow = cluster.work(job, replace(machine, launch=10.0), tokens=4)
    assert slow['decode'] == pytest.approx(2 * 4 * 200)


def test_the_traffic_of_each_stage_by_hand(cluster, job):
    small = {'losses and stops': ('all_gather', 4096 * 8, 4)}
    # 100 trained numbers, an update every 4 iterations.
    assert cluster.traffic(job, 8, 0) == {'gradients': ('all_reduce', 100, 1 / 4), **small}
    assert cluster.traffic(job, 8, 2) == {
        'gradients': ('reduce_scatter', 200, 1),
        'updated weights': ('all_gather', 50, 1 / 4),
        'teacher': ('all_reduce', 100, 3 / 4),
        **small,
    }
    assert cluster.traffic(job, 8, 1)['gradients'] == ('reduce_scatter', 50, 1 / 4)
    # In float32 the teacher sees the masters.
    in_float = replace(job, sizes=replace(job.sizes, bytes=4))
    assert 'teacher' not in cluster.traffic(in_float, 8, 2)
    # 1100 weights of 2 bytes, for two generations and three passes of 2 layers.
    parts = cluster.traffic(job, 8, 3)
    assert parts['gathered weights'] == ('all_gather', 5 * 2200, 10)


def test_a_step_waits_for_the_longest_caption_of_all_ranks(cluster, job, network):
    captions = (4.0, 2.0)
    found = cluster.step(job, network, 8, 0, captions)
    own, others = (cluster.longest(4, 2, 8, n) for n in (2, 16))
    whole = sum(cluster.work(job, network, others).values())
    waited = whole - sum(cluster.work(job, network, own).values())
    assert found['longest caption of all'] == pytest.approx(waited)
    assert waited > 0
    assert found['gradients'] == pytest.approx((4 + 10) / 4 + 2 * 7 / 8 * 100 / 10)
    alone = cluster.step(job, network, 1, 0, captions)
    assert alone['longest caption of all'] == alone['gradients'] == 0


def test_four_ranks_from_one_by_hand(tool, cluster, job):
    free = cluster.Machine(node_latency=0.0, node_bandwidth=1e30)
    steps = [{'time': 1.0}, {'time': 2.0}]
    # Of four draws from 1 and 2 all are 1 in one case of sixteen; two cores for four ranks.
    expected = 2 * (1 / 16 + 2 * 15 / 16)
    assert tool.predicted_from(steps, job, free, 4, 2) == pytest.approx(expected)
    assert tool.predicted_from(steps, job, free, 1, 2) == pytest.approx(1.5)
    # Beside six others a rank alone has two cores' seventh part, and each of four their tenth.
    found = tool.predicted_from(steps, job, free, 4, 2, others=6)
    assert found == pytest.approx(expected / 2 * 10 / 7)


def test_what_breaks_first_by_hand(cluster, job, network):
    parts = {**cluster.work(job, network, 1), 'longest caption of all': 1.0, 'gradients': 2.0}
    parts |= dict.fromkeys(cluster.work(job, network, 1), 0.0) | {'encode': 7.0}
    args = argparse.Namespace(judge_rate=24.0, storage=0.6e6, mean=4.0, spread=2.0)
    lines = cluster.what_breaks_first(job, network, {1: parts}, args)
    assert lines[0].startswith('collectives: 20.0% of a step on 1 nodes, most of it "gradients"')
    assert lines[1].startswith('uneven captions: 10.0% on 1 nodes')
    # 4 images of 0.3 MB a step of 10 s and node.
    assert lines[2].startswith('data: storage of 0.0006 GB/s keeps up with 5 nodes (4 images')
    # 4 images of 2 rollouts, six requests about each, from 240 in a step.
    assert lines[3] == ('judge: 24 requests/s keep up with 5.0 nodes (48 requests a step and node)')


def test_the_parts_of_a_config(cluster, root, tiny_model):
    config = Config.fromfile(root / 'configs/sa2va_tiny_dual_loop.py')
    found = cluster.read_job(config, 3, None, None)
    policy = tiny_model.policy
    # A row of the table of embeddings is read for each token, the head whole.
    assert policy.lm_head.weight is not policy.language_model.get_input_embeddings().weight
    whole = sum(p.numel() for p in policy.language_model.parameters())
    assert found.language == whole - 1024 * 128
    assert found.vision == sum(p.numel() for p in policy.vision_model.parameters())
    assert found.patches == (96 // 8) ** 2 + 1
    assert found.tensors == sum(p.requires_grad for p in policy.parameters())
    assert (found.sizes.batch, found.accumulate, found.writes) == (3, 1, 1)
    config.model.objective.caption_to_mask = dict(reward=dict(type='MeteorReward'))
    assert cluster.read_job(config, None, None, None).writes == 2


def test_the_command_prints_a_line_for_each_number_of_nodes(tool, root, capsys):
    config = str(root / 'configs/sa2va_tiny_dual_loop.py')
    assert tool.main([config, '--nodes', '1', '64', '--zero', '2', '--judge-rate', '50']) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r'^\| (\d+) \| (\d+) \| [\d.]+ \| ([\d.]+)% ', printed, re.MULTILINE)
    assert [(int(nodes), int(gpus)) for nodes, gpus, _ in rows] == [(1, 8), (64, 512)]
    assert 100 > float(rows[0][2]) > float(rows[1][2]) > 0
    for name in ('collectives: ', 'uneven captions: ', 'data: ', 'judge: '):
        assert f'\n{name}' in printed
    for options, said in (([], 'name a config'), (['no.py'], 'there is no config no.py')):
        with pytest.raises(SystemExit):
            tool.main(options)
        assert said in capsys.readouterr().err
