"""Sampling and the log-probs of what was sampled."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.models import (
    Sampling,
    generation,
    get_token_logprobs,
    sample_completions,
)
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.prefix_tree import PrefixTree
from projects.llava_sam2_rl.models.shared_prefix import (
    CompletionHandles,
    add_completions,
    completion_logps,
)
from projects.llava_sam2_rl.prompts import encode_prompt, pad_batch, region_input


def region_ids(policy, regions):
    texts = [policy.chat_template.ask(region_input(36, [int(region.sum())])) for region in regions]
    return [encode_prompt(policy.tokenizer, text) for text in texts]


@pytest.fixture(autouse=True, params=[1, 3], ids=['looks at every token', 'at every third'])
def looks(request, monkeypatch):
    """As on a CPU and, but for the number, on a GPU: what is drawn behind an end is not seen."""
    monkeypatch.setattr(generation, 'tokens_between_looks', lambda device: request.param)
    return request.param


@pytest.fixture
def prompts(tiny_model):
    """Three region prompts of different length on two random images, padded on the left."""
    policy = tiny_model.policy.eval()
    torch.manual_seed(3)
    images = {'pixel_values': list(torch.randn(2, 1, 3, 96, 96))}
    images['vp_overall_mask'] = torch.tensor([True, True])
    features = policy.encode_images(images, grounding=False)
    regions = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    regions[0, 0, 0, 0] = regions[1, 0, 2:4, 2:5] = regions[2, 0, 5] = True
    ids = region_ids(policy, regions)
    data = pad_batch(ids, policy.pad_token_id, 'left')

    def embed(rows):
        mask = data['attention_mask'][rows]
        width = int(mask.sum(1).max())
        embeds = policy.embed(
            data['input_ids'][rows],
            features,
            prompt_masks=[regions[i] for i in rows],
            image_index=[(0, 1, 1)[i] for i in rows],
        )
        return embeds[:, -width:], mask[:, -width:]

    return policy, embed, ids


def recomputed(policy, embeds, mask, drawn, temperature, **options):
    """Log-probs of completions by the pass with gradients, and their entropy."""
    tree = PrefixTree()
    nodes = [tree.add_node(row[real]) for row, real in zip(embeds, mask, strict=True)]
    ids, completion_mask = drawn.completion_ids, drawn.completion_mask
    before = [node for node in nodes for _ in range(len(ids) // len(nodes))]
    behind = add_completions(tree, policy, before, ids, completion_mask)
    handles = CompletionHandles(before, behind, ids, completion_mask)
    hidden = tree.forward(policy)
    return completion_logps(policy, hidden, handles, temperature, **options)


def test_sampled_logps_equal_the_recomputed_ones(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    for temperature in (1.0, 0.7):
        sampling = Sampling(max_new_tokens=12, temperature=temperature, top_k=20, top_p=0.9)
        drawn = sample_completions(policy, embeds, mask, 4, sampling)
        logps, entropy = recomputed(policy, embeds, mask, drawn, temperature, return_entropy=True)
        assert logps.shape == entropy.shape == drawn.completion_ids.shape
        difference = (logps - drawn.per_token_logps).abs()[drawn.completion_mask]
        assert difference.max() < 1e-4
        assert (drawn.per_token_logps[~drawn.completion_mask] == 0).all()


def test_shared_prefix_equals_full_sequences_in_value_and_gradient(prompts):
    """Against plain forwards of prompt + completion, one by one, full logits and log_softmax."""
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    drawn = sample_completions(policy, embeds, mask, 2, Sampling(max_new_tokens=9))
    names = ('mlp1.1.weight', 'layers.0.self_attn.k_proj.lora_B.default.weight')
    watched = [p for n, p in policy.named_parameters() if n.endswith(names)]
    assert len(watched) == 2
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if 'lora_B' in name:  # at zero the gradient of lora_A would be zero everywhere
                parameter.normal_(std=0.05)
    embeds, mask = embed([0, 1, 2])
    shared, _ = recomputed(policy, embeds, mask, drawn, 1.0)
    weights = torch.randn(drawn.completion_ids.shape) * drawn.completion_mask
    expected_gradients = torch.autograd.grad((shared * weights).sum(), watched)

    plain = torch.zeros(drawn.completion_ids.shape)
    rows = []
    for n in range(6):
        prompt, _ = embed([n // 2])
        length = int(drawn.completion_mask[n].sum())
        ids = drawn.completion_ids[n : n + 1, :length]
        text = policy.language_model.get_input_embeddings()(ids)
        sequence = torch.cat([prompt, text], dim=1)
        hidden = policy.hidden_states(sequence, torch.ones(sequence.shape[:2], dtype=torch.bool))
        logits = policy.lm_head(hidden[:, prompt.shape[1] - 1 : -1])
        logps = logits.log_softmax(-1).gather(2, ids[..., None])[0, :, 0]
        rows.append((logps * weights[n, :length]).sum())
        plain[n, :length] = logps.detach()
    gradients = torch.autograd.grad(sum(rows), watched)
    torch.testing.assert_close(shared.detach() * drawn.completion_mask, plain, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(expected_gradients, gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_three_by_four_in_one_call_equals_twelve_single_calls(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    drawn = sample_completions(policy, embeds, mask, 4, Sampling(max_new_tokens=8))
    together, _ = recomputed(policy, embeds, mask, drawn, 1.0)
    for n in range(12):
        row = slice(n, n + 1)
        one = Completions(
            completion_ids=drawn.completion_ids[row],
            completion_mask=drawn.completion_mask[row],
            per_token_logps=drawn.per_token_logps[row],
            texts=drawn.texts[row],
            truncated=drawn.truncated[row],
        )
        alone, _ = recomputed(policy, *embed([n // 4]), one, 1.0)
        where = drawn.completion_mask[n]
        torch.testing.assert_close(alone[0][where], together[n][where], atol=1e-4, rtol=1e-4)


def test_a_nearly_greedy_sample_equals_transformers_generate(prompts):
    """Ends at different steps, so sequences leave the batch; transformers is the witness."""
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    drawn = sample_completions(
        policy, embeds, mask, 2, Sampling(max_new_tokens=16, temperature=1e-4)
    )
    expected = policy.language_model.generate(
        inputs_embeds=embeds,
        attention_mask=mask.long(),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=policy.pad_token_id,
        eos_token_id=policy.eos_token_id,
        suppress_tokens=[
            *policy.special_token_ids.values(),
            *range(len(policy.tokenizer), policy.lm_head.weight.shape[0]),
        ],
        stop_strings=['<|end|>'],
        tokenizer=policy.tokenizer,
    )
    for n in range(6):
        length = int(drawn.completion_mask[n].sum())
        assert drawn.completion_ids[n, :length].tolist() == expected[n // 2, :length].tolist()


def test_stops_end_each_sequence_by_itself_and_markers_are_never_drawn(prompts, monkeypatch):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    torch.manual_seed(0)
    # So hot that every token is about equally likely: markers would come up.
    drawn = sample_completions(
        policy, embeds, mask, 64, Sampling(max_new_tokens=40, temperature=50.0)
    )
    markers = set(policy.special_token_ids.values())
    assert not markers & set(drawn.completion_ids[drawn.completion_mask].tolist())
    assert drawn.completion_ids[drawn.completion_mask].max() < len(policy.tokenizer)
    stopped = sample_completions(
        policy, embeds, mask, 64, Sampling(max_new_tokens=40, temperature=50.0, stop_strings=('e',))
    )
    decode = policy.tokenizer.decode
    for n in range(len(stopped.completion_ids)):
        tokens = stopped.completion_ids[n][stopped.completion_mask[n]].tolist()
        if stopped.truncated[n]:
            assert len(tokens) == stopped.completion_ids.shape[1]
        elif tokens[-1] != policy.eos_token_id:
            assert 'e' in decode(tokens)
            assert 'e' not in decode(tokens[:-1])
    assert 0 < stopped.truncated.float().mean() < 1 or not stopped.truncated.any()
    assert len(set(stopped.completion_mask.sum(1).tolist())) > 3


def test_get_token_logprobs_of_a_generate_output():
    sequences = torch.tensor([[7, 7, 1, 0], [7, 7, 0, 2]])  # two prompt tokens, two new ones
    logits = (
        torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]),
        torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 4.0]]),
    )
    # By hand: 1 - log(1 + e + e²) and so on.
    e = 2.718281828459045
    expected = torch.tensor(
        [
            [1 - torch.tensor(1 + e + e**2).log(), -torch.tensor(3.0).log()],
            [3 - torch.tensor(e**3 + 2).log(), 4 - torch.tensor(2 + e**4).log()],
        ]
    )
    for name in ('logits', 'scores'):
        output = SimpleNamespace(sequences=sequences, **{name: logits})
        torch.testing.assert_close(get_token_logprobs(output), expected)
    output = SimpleNamespace(sequences=sequences, logits=logits)
    halved = SimpleNamespace(sequences=sequences, logits=tuple(x / 2 for x in logits))
    torch.testing.assert_close(
        get_token_logprobs(output, temperature=2.0), get_token_logprobs(halved)
    )
    empty = SimpleNamespace(sequences=sequences[:, :2], scores=())
    assert get_token_logprobs(empty).shape == (2, 0)
    with pytest.raises(ValueError, match='output_logits=True'):
        get_token_logprobs(SimpleNamespace(sequences=sequences))


@pytest.mark.parametrize(
    ('option', 'value'),
    [('temperature', 0.0), ('top_p', 0.0), ('top_p', 1.5), ('top_k', -1), ('max_new_tokens', 0)],
)
def test_bad_sampling_options(option, value):
    with pytest.raises(ValueError, match=option):
        Sampling(**{option: value})


def test_a_start_that_prompts_share_changes_nothing(prompts):
    """Two regions of one image, of different length: the image runs once."""
    policy, embed, ids = prompts
    embeds, mask = embed([0, 1, 2])
    # Prompts 1 and 2 are about the same image, whose 36 tokens come first.
    image = policy.image_token_id
    start = ids[0].index(image) + 36
    assert len(ids[0]) != len(ids[1])
    assert ids[1][:start] == ids[2][:start]
    assert ids[1][start - 36 : start] == [image] * 36
    greedy = Sampling(max_new_tokens=10, greedy=True)
    plain = sample_completions(policy, embeds, mask, 1, greedy)
    calls = []
    forward = policy.forward_with_cache

    def watched(inputs_embeds, *args):
        calls.append(tuple(inputs_embeds.shape[:2]))
        return forward(inputs_embeds, *args)

    policy.forward_with_cache = watched
    shared = sample_completions(policy, embeds, mask, 1, greedy, shared=start, sources=[0, 1, 1])
    del policy.forward_with_cache
    assert calls[:2] == [(2, start), (3, embeds.shape[1] - start)]
    assert torch.equal(plain.completion_ids, shared.completion_ids)
    torch.testing.assert_close(plain.per_token_logps, shared.per_token_logps, atol=1e-4, rtol=1e-4)


def test_greedy_and_its_least_length_by_definition(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    free = sample_completions(policy, embeds, mask, 1, Sampling(max_new_tokens=20, greedy=True))
    least = int(free.completion_mask.sum(1).min()) + 2
    drawn = sample_completions(
        policy,
        embeds,
        mask,
        1,
        Sampling(max_new_tokens=20, greedy=True, min_new_tokens=least),
    )
    ends = [policy.tokenizer.encode('<|end|>')[0], policy.eos_token_id]
    for n in range(3):
        # The definition: the most likely allowed token, over and over, no cache.
        tokens: list[int] = []
        sequence = embeds[n : n + 1][:, mask[n]]
        for step in range(int(drawn.completion_mask[n].sum())):
            attended = torch.ones(sequence.shape[:2], dtype=torch.bool)
            logits = policy.lm_head(policy.hidden_states(sequence, attended)[0, -1])
            logits[list(policy.special_token_ids.values())] = -torch.inf
            logits[len(policy.tokenizer) :] = -torch.inf
            if step < least:
                logits[ends] = -torch.inf
            tokens.append(int(logits.argmax()))
            text = policy.language_model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            sequence = torch.cat([sequence, text], dim=1)
        assert drawn.completion_ids[n, : len(tokens)].tolist() == tokens
        assert int(drawn.completion_mask[n].sum()) > least


# -- VideoLLaVASAMModel.generate -------------------------------------------------------------------


@pytest.fixture
def questions(tiny_model):
    """Two region prompts about two images, as `VideoLLaVASAMModel.generate` takes them."""
    policy = tiny_model.policy.eval()
    torch.manual_seed(3)
    regions = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    regions[0, 0, 0, 0] = regions[1, 0, 2:4, 2:5] = True
    ids = region_ids(policy, regions)
    data = {
        **pad_batch(ids, policy.pad_token_id, 'right'),
        'pixel_values': list(torch.randn(2, 1, 3, 96, 96)),
        'vp_overall_mask': torch.tensor([True, True]),
        'prompt_masks': list(regions),
    }
    left = pad_batch(ids, policy.pad_token_id, 'left')
    features = policy.encode_images(data, grounding=False)
    embeds = policy.embed(left['input_ids'], features, prompt_masks=data['prompt_masks'])
    return policy, data, embeds, left['attention_mask']


def test_generate_is_greedy_sample_completions(questions):
    policy, data, embeds, mask = questions
    greedy = Sampling(max_new_tokens=30, greedy=True, suppress_tokens=())
    drawn = sample_completions(policy, embeds, mask, 1, greedy)
    ids = policy.generate(data, max_new_tokens=30)
    assert torch.equal(ids, drawn.completion_ids)
    assert ids.dtype == torch.int64


def test_generate_equals_transformers_with_stops_and_a_least_length(questions):
    policy, data, embeds, mask = questions
    least = int((policy.generate(data, 30) != policy.pad_token_id).sum(1).max()) + 3
    ends = [policy.tokenizer.encode('<|end|>')[0], policy.eos_token_id]
    for minimum, suppressed in ((0, []), (least, ends)):
        expected = policy.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=minimum or 30,
            do_sample=False,
            pad_token_id=policy.pad_token_id,
            eos_token_id=policy.eos_token_id,
            suppress_tokens=[
                *suppressed,
                *range(len(policy.tokenizer), policy.lm_head.weight.shape[0]),
            ],
            stop_strings=['<|end|>'],
            tokenizer=policy.tokenizer,
        )
        found = policy.generate(data, 30, min_new_tokens=minimum)
        assert torch.equal(found[:, : expected.shape[1]], expected)
        assert found.shape[1] >= least if minimum else found.shape == expected.shape


def test_generate_draws_by_the_given_generator(questions):
    policy, data, embeds, mask = questions
    options = dict(do_sample=True, temperature=1.3, top_k=20, top_p=0.9)
    ids = policy.generate(data, 12, generator=torch.Generator().manual_seed(4), **options)
    sampling = Sampling(12, temperature=1.3, top_k=20, top_p=0.9, suppress_tokens=())
    generator = torch.Generator().manual_seed(4)
    drawn = sample_completions(policy, embeds, mask, 1, sampling, generator)
    assert torch.equal(ids, drawn.completion_ids)
    other = policy.generate(data, 12, generator=torch.Generator().manual_seed(5), **options)
    assert not torch.equal(ids, other)


def test_the_given_eos_ends_a_sequence(questions):
    policy, data, *_ = questions
    free = policy.generate(data, 12)
    for eos in (int(free[0, 2]), [int(free[0, 2]), int(free[1, 3])]):
        ids = policy.generate(data, 12, eos_token_id=eos)
        ends = {eos} if isinstance(eos, int) else set(eos)
        for found, whole in zip(ids.tolist(), free.tolist(), strict=True):
            at = next((n for n, token in enumerate(whole) if token in ends), len(whole) - 1)
            assert found[: at + 1] == whole[: at + 1]
            assert set(found[at + 1 :]) <= {policy.pad_token_id}
    completions = sample_completions(
        policy, *questions[2:], 1, Sampling(12, greedy=True, eos_token_id=int(free[0, 2]))
    )
    assert completions.completion_mask[0].sum() == 3
    assert not completions.truncated[0]


def test_an_unknown_option_of_generate_names_the_nearest(questions):
    policy, data, *_ = questions
    with pytest.raises(TypeError, match="no option 'temprature': did you mean 'temperature'"):
        policy.generate(data, temprature=0.5)
    with pytest.raises(TypeError, match="'num_beams': valid are: .*do_sample.*top_p"):
        policy.generate(data, num_beams=4)
    with pytest.raises(TypeError, match="'max_tokens': did you mean 'max_new_tokens'"):
        policy.predict(data, max_tokens=4)


def test_what_is_suppressed_is_an_option(questions):
    """Rollouts never write markers; free generation may, and suppresses what it is told to."""
    policy, _, embeds, mask = questions
    hot = Sampling(max_new_tokens=24, temperature=50.0, stop_strings=(), eos_token_id=())
    torch.manual_seed(0)
    with_markers = sample_completions(policy, embeds, mask, 64, replace(hot, suppress_tokens=()))
    markers = set(policy.special_token_ids.values())
    assert markers <= set(with_markers.completion_ids.flatten().tolist())
    assert with_markers.completion_ids.max() < len(policy.tokenizer)
    without = sample_completions(policy, embeds, mask, 64, replace(hot, suppress_tokens=(70,)))
    assert 70 not in without.completion_ids
    assert without.truncated.all()


def test_without_a_tokenizer(questions):
    """Ids alone: the end is an id, and a stop text an error."""
    policy, data, embeds, mask = questions
    pad, eos = policy.pad_token_id, policy.eos_token_id
    greedy = Sampling(max_new_tokens=30, greedy=True, stop_strings=())
    tokenizer, policy.tokenizer = policy.tokenizer, None
    policy.language_model.config.pad_token_id, policy.language_model.config.eos_token_id = pad, eos
    with pytest.raises(ValueError, match='stop_strings are found in decoded text: give the model'):
        policy.generate(data, stop_strings=['<|end|>'])
    end = int(policy.generate(data, 3)[0, 2])
    drawn = sample_completions(policy, embeds, mask, 1, replace(greedy, eos_token_id=end))
    policy.tokenizer = tokenizer
    known = sample_completions(policy, embeds, mask, 1, replace(greedy, eos_token_id=end))
    assert drawn.texts == ['', '']
    assert drawn.completion_mask[0].sum() == 3
    assert torch.equal(drawn.completion_mask, known.completion_mask)
    assert torch.equal(drawn.completion_ids, known.completion_ids)


def test_looking_less_often_changes_no_completion(prompts, monkeypatch):
    """Ends that come at all places between two looks, by stop texts and by ids."""
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    first = sample_completions(policy, embeds, mask, 1, Sampling(max_new_tokens=23, greedy=True))
    drawn = first.completion_ids[first.completion_mask].tolist()
    for eos in sorted(set(drawn)):
        options = Sampling(max_new_tokens=23, greedy=True, eos_token_id=eos, stop_strings=('ed',))
        found = []
        for every in (1, 4, 8, 100):
            monkeypatch.setattr(generation, 'tokens_between_looks', lambda device, n=every: n)
            found.append(sample_completions(policy, embeds, mask, 2, options))
        for other in found[1:]:
            assert torch.equal(other.completion_ids, found[0].completion_ids)
            assert torch.equal(other.completion_mask, found[0].completion_mask)
            assert torch.equal(other.truncated, found[0].truncated)
            assert other.texts == found[0].texts
            torch.testing.assert_close(other.per_token_logps, found[0].per_token_logps)


def test_tokens_are_drawn_as_often_as_their_probabilities_say(tiny_model):
    policy = tiny_model.policy
    size = policy.lm_head.weight.shape[0]
    probabilities = torch.zeros(size)
    probabilities[[40, 41, 42, 43]] = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    for top_p, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.7, [0.625, 0.375, 0.0, 0.0])):
        options = Sampling(top_p=top_p, stop_strings=())
        choose = generation._TokenChooser(policy, options, generator, torch.device('cpu'))
        found = choose(logits, 0).bincount(minlength=size)[40:44] / len(logits)
        # Three standard deviations of the rarest of two is 0.011.
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=0.012)
