"""The judge's key, its address, and one question, of a real server."""

import socket

import pytest
from test_rewards.judge_server import HANG, Fault, judge_server

from projects.llava_sam2_rl.preflight import judge
from projects.llava_sam2_rl.preflight.judge import check_judges
from test_preflight.configs import ROOT, by_key, config

JUDGE = ROOT / 'configs/sa2va_4b_dual_loop_judge.py'
WHERE = 'model.objective.caption_to_mask.reward.rewards.1'


def judged(url, key='None'):
    return config(f'{WHERE}.base_url={url}', f'{WHERE}.api_key_env={key}', file=JUDGE)


def test_a_judge_that_answers_is_asked_once():
    with judge_server(lambda *_: 'Yes') as server:
        assert check_judges(judged(server.url), 'train') == []
        (request,) = server.requests
        assert request['model'] == 'meta-llama/Llama-3.1-8B-Instruct'


def test_a_key_that_is_not_set_is_named_with_its_variable(monkeypatch):
    monkeypatch.delenv('MY_KEY', raising=False)
    with judge_server(lambda *_: 'Yes') as server:
        ((key, text),) = by_key(check_judges(judged(server.url, 'MY_KEY'), 'train')).items()
        assert key == f'{WHERE}.api_key_env'
        assert f'MY_KEY with the key of {server.url} is not set' in text
        assert f'--cfg-options {WHERE}.api_key_env=None' in text
        assert server.requests == []
        monkeypatch.setenv('MY_KEY', 'secret')
        assert check_judges(judged(server.url, 'MY_KEY'), 'train') == []
        assert server.keys == {'Bearer secret'}


def test_nobody_at_the_address():
    with socket.socket() as taken:  # bound and not listening: refused, and nobody else's
        taken.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{taken.getsockname()[1]}/v1'
        ((key, text),) = by_key(check_judges(judged(url), 'train')).items()
    assert key == f'{WHERE}.base_url'
    assert f'at {url} does not answer' in text


@pytest.mark.parametrize('status', [401, 404, 500])
def test_a_server_that_refuses(status):
    with judge_server(lambda *_: Fault('status', status)) as server:
        ((key, text),) = by_key(check_judges(judged(server.url), 'train')).items()
    assert key == f'{WHERE}.base_url'
    assert f'HTTP {status}' in text


def test_a_slow_one_is_a_remark(monkeypatch):
    monkeypatch.setattr(judge, 'SECONDS', 0.3)
    with judge_server(lambda *_: HANG) as server:
        (problem,) = check_judges(judged(server.url), 'train')
    assert not problem.fatal
    assert f'at {server.url} is slow' in problem.message


def test_the_judge_of_a_benchmark_is_the_tests_and_one_address_is_asked_once():
    cfg = config()
    with judge_server(lambda *_: 'Yes') as server:
        own = dict(model='m', base_url=server.url, api_key_env=None)
        metric = dict(type='DLCBenchMetric', questions='q', class_names='c', judge=own)
        cfg.test_evaluator = [dict(metric), dict(metric)]
        assert check_judges(cfg, 'train') == []
        assert server.requests == []
        assert check_judges(cfg, 'test') == []
        assert [request['model'] for request in server.requests] == ['m']
