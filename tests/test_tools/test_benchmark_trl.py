"""The comparison with TRL: skipped where there is none, else the same work on both sides."""

from __future__ import annotations

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def benchmark(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    import benchmark

    yield benchmark
    for name in [name for name in sys.modules if name.split('.')[0].startswith('benchmark')]:
        sys.modules.pop(name)


@pytest.fixture
def trl(benchmark):
    """The benchmark's module, where TRL can be imported."""
    pytest.importorskip('trl', reason='TRL is not installed')
    module = benchmark.COMMANDS['trl']
    if (reason := module.missing()) is not None:
        pytest.skip(reason)
    return module


SIZES = dict(tokens=6, device='cpu', batch=2, group=3, prompt=20)


def test_without_trl_it_says_how_to_install_it_and_leaves_the_page(
    benchmark, monkeypatch, capsys, tmp_path
):
    page = tmp_path / 'page.md'
    page.write_text('<!-- trl -->\nmeasured before\n<!-- /trl -->\n')
    monkeypatch.setitem(sys.modules, 'trl', None)
    monkeypatch.setattr(benchmark, 'PAGE', page)
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'trl', '--update-docs'])
    assert benchmark.main() is None  # so that it exits with 0
    expected = 'skipped: TRL is not installed (pip install trl==0.16.1)\n'
    assert capsys.readouterr().out == expected
    assert 'measured before' in page.read_text()


def test_trl_that_does_not_go_with_transformers_is_skipped_too(benchmark, monkeypatch):
    module = benchmark.COMMANDS['trl']
    # A package that loads its parts when they are asked for, and finds that it cannot.
    lazy = SimpleNamespace(__name__='trl', __spec__=None, __path__=[])
    monkeypatch.setitem(sys.modules, 'trl', lazy)
    monkeypatch.setattr(module.metadata, 'version', lambda name: {'trl': '9'}.get(name, '4'))
    assert module.missing().startswith('TRL 9 cannot be imported beside transformers 4: ')


def test_our_step_draws_every_token_and_trains_adapters_alone(benchmark):
    from benchmarks import common, trl_ours, trl_step

    args = SimpleNamespace(**SIZES)
    model = trl_step.build('tiny', args)
    trained = {name for name, p in model.policy.named_parameters() if p.requires_grad}
    assert trained == set(model.teacher.names)
    assert all('.lora_' in name for name in trained)
    texts = trl_step.prompts(model.policy.tokenizer, 2, 20)
    assert trl_ours.prompt_embeds(model.policy, trl_ours.TextBatch(texts)).shape[:2] == (2, 20)
    ours = trl_step.Ours(model, texts, args)
    before = [p.detach().clone() for p in ours.trained]
    common.in_turns({'ours': ours.step}, 1)
    assert ours.drawn == [2 * 3 * 6] * 2
    assert all(seconds > 0 for seconds in ours.generation)
    assert any((a != b).any() for a, b in zip(before, ours.trained, strict=True))
    (rollout,) = model.objective.last_rollouts.values()
    assert rollout.rewards.rewards.tolist() == trl_step.letters(rollout.captions)
    assert model.teacher.num_updates == 2


def test_a_round_gives_a_row_of_each(trl):
    parser = argparse.ArgumentParser()
    trl.add_arguments(parser)
    options = '--models tiny --group 2 --prompt 20 --tokens 4 --rounds 1 --device cpu'
    theirs, ours = trl.run(parser.parse_args(options.split()))
    assert theirs['way'].startswith('TRL ')
    assert ours['way'] == 'ours'
    for key in ('model', 'B', 'G', 'prompt', 'trained parameters', 'tokens drawn'):
        assert theirs[key] == ours[key]
    assert ours['tokens drawn'] == 2 * 2 * 4
    assert theirs['faster'] == 1
    assert ours['faster'] == pytest.approx(theirs['step s'] / ours['step s'])
    for row in (theirs, ours):
        assert 0 < row['generation s'] < row['step s']


def test_the_same_completions_give_the_same_loss_and_gradients(trl, monkeypatch, tmp_path):
    from benchmarks import trl_ours

    theirs, ours = trl.both('tiny', SimpleNamespace(**SIZES), str(tmp_path)).values()
    assert theirs.num_trained == ours.num_trained > 0
    torch.manual_seed(0)
    # Policy and reference differ: TRL's reference has no adapter, and neither has the teacher yet.
    for mine, other in zip(ours.trained, theirs.trained, strict=True):
        assert torch.equal(mine, other)
        if not mine.any():  # B of LoRA
            with torch.no_grad():
                mine.normal_(std=0.05)
                other.copy_(mine)
    batch = ours.data['data']
    rollouts = ours.model.rollout(batch)
    losses, metrics = ours.model.losses(batch, rollouts)
    loss = losses['loop1/grpo_loss'].value
    loss.backward()
    (rollout,) = rollouts.values()
    assert rollout.rewards.rewards.std() > 0
    assert metrics['loop1/kl_div'] > 1e-4

    drawn = rollout.completions.completion_ids
    assert drawn.shape == (2 * 3, 6)
    given = []

    def generate(prompt_ids, attention_mask, generation_config):
        assert attention_mask.all()
        assert generation_config.min_new_tokens == generation_config.max_new_tokens == 6
        given.append(prompt_ids)
        return torch.cat([prompt_ids, drawn], dim=1)

    monkeypatch.setattr(theirs.trainer.model, 'generate', generate)
    found = theirs.trainer.training_step(theirs.trainer.model, theirs.inputs)
    # Both read the same prompts, ours once for a group.
    table = ours.model.policy.language_model.get_input_embeddings()
    embeds = trl_ours.prompt_embeds(ours.model.policy, batch).repeat_interleave(3, dim=0)
    assert torch.equal(table(given[0]), embeds)
    torch.testing.assert_close(found, loss.detach(), atol=1e-5, rtol=1e-4)
    for mine, other in zip(ours.trained, theirs.trained, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=2e-5, rtol=2e-3)
