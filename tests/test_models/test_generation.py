"""Sampling and the log-probs of what was sampled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.models import Sampling, get_token_logprobs, sample_completions
from projects.llava_sam2_rl.models.generation import Completions
from projects.llava_sam2_rl.models.prefix_tree import PackedSequences
from projects.llava_sam2_rl.models.shared_prefix import add_completions, completion_logps
from projects.llava_sam2_rl.prompts import pad_batch, region_prompt


@pytest.fixture
def prompts(tiny_loop):
    """Three region prompts of different length on two random images, padded on the left."""
    policy = tiny_loop.policy.eval()
    torch.manual_seed(3)
    images = {'pixel_values': list(torch.randn(2, 1, 3, 96, 96))}
    images['vp_overall_mask'] = torch.tensor([True, True])
    features = policy.encode_images(images, grounding=False)
    regions = torch.zeros(3, 1, 6, 6, dtype=torch.bool)
    regions[0, 0, 0, 0] = regions[1, 0, 2:4, 2:5] = regions[2, 0, 5] = True
    texts = [region_prompt(36, [int(region.sum())]) for region in regions]
    ids = [policy.tokenizer.encode(text, add_special_tokens=False) for text in texts]
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
    packed = PackedSequences()
    nodes = [packed.add(row[real]) for row, real in zip(embeds, mask, strict=True)]
    behind = add_completions(packed, policy, nodes, drawn)
    hidden = packed.run(policy)
    return completion_logps(policy, hidden, nodes, behind, drawn, temperature, **options)


def test_sampled_logps_equal_the_recomputed_ones(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    for temperature in (1.0, 0.7):
        sampling = Sampling(max_new_tokens=12, temperature=temperature, top_k=20, top_p=0.9)
        drawn = sample_completions(policy, embeds, mask, 4, sampling)
        logps, entropy = recomputed(policy, embeds, mask, drawn, temperature, return_entropy=True)
        assert logps.shape == entropy.shape == drawn.ids.shape
        difference = (logps - drawn.logps).abs()[drawn.mask]
        assert difference.max() < 1e-4
        assert (drawn.logps[~drawn.mask] == 0).all()


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
    weights = torch.randn(drawn.ids.shape) * drawn.mask
    expected_gradients = torch.autograd.grad((shared * weights).sum(), watched)

    plain = torch.zeros(drawn.ids.shape)
    rows = []
    for n in range(6):
        prompt, _ = embed([n // 2])
        length = int(drawn.mask[n].sum())
        text = policy.language_model.get_input_embeddings()(drawn.ids[n : n + 1, :length])
        sequence = torch.cat([prompt, text], dim=1)
        hidden = policy.hidden_states(sequence, torch.ones(sequence.shape[:2], dtype=torch.bool))
        logits = policy.lm_head(hidden[:, prompt.shape[1] - 1 : -1])
        logps = logits.log_softmax(-1).gather(2, drawn.ids[n : n + 1, :length, None])[0, :, 0]
        rows.append((logps * weights[n, :length]).sum())
        plain[n, :length] = logps.detach()
    gradients = torch.autograd.grad(sum(rows), watched)
    torch.testing.assert_close(shared.detach() * drawn.mask, plain, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(expected_gradients, gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_three_by_four_in_one_call_equals_twelve_single_calls(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    drawn = sample_completions(policy, embeds, mask, 4, Sampling(max_new_tokens=8))
    together, _ = recomputed(policy, embeds, mask, drawn, 1.0)
    for n in range(12):
        one = Completions(
            drawn.ids[n : n + 1], drawn.mask[n : n + 1], drawn.logps[n : n + 1], [''],
            drawn.truncated[n : n + 1],
        )  # fmt: skip
        alone, _ = recomputed(policy, *embed([n // 4]), one, 1.0)
        where = drawn.mask[n]
        torch.testing.assert_close(alone[0][where], together[n][where], atol=1e-4, rtol=1e-4)


def test_a_nearly_greedy_sample_equals_generate(prompts):
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
        length = int(drawn.mask[n].sum())
        assert drawn.ids[n, :length].tolist() == expected[n // 2, :length].tolist()


def test_stops_end_each_sequence_by_itself_and_markers_are_never_drawn(prompts, monkeypatch):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    torch.manual_seed(0)
    # So hot that every token is about equally likely: markers would come up.
    drawn = sample_completions(
        policy, embeds, mask, 64, Sampling(max_new_tokens=40, temperature=50.0)
    )
    markers = set(policy.special_token_ids.values())
    assert not markers & set(drawn.ids[drawn.mask].tolist())
    assert drawn.ids[drawn.mask].max() < len(policy.tokenizer)
    stopped = sample_completions(
        policy, embeds, mask, 64, Sampling(max_new_tokens=40, temperature=50.0, stop_strings=('e',))
    )
    decode = policy.tokenizer.decode
    for n in range(len(stopped.ids)):
        tokens = stopped.ids[n][stopped.mask[n]].tolist()
        if stopped.truncated[n]:
            assert len(tokens) == stopped.ids.shape[1]
        elif tokens[-1] != policy.eos_token_id:
            assert 'e' in decode(tokens)
            assert 'e' not in decode(tokens[:-1])
    assert 0 < stopped.truncated.float().mean() < 1 or not stopped.truncated.any()
    assert len(set(stopped.mask.sum(1).tolist())) > 3


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
    decode = policy.decode

    def watched(inputs_embeds, *args):
        calls.append(tuple(inputs_embeds.shape[:2]))
        return decode(inputs_embeds, *args)

    policy.decode = watched
    shared = sample_completions(policy, embeds, mask, 1, greedy, shared=start, sources=[0, 1, 1])
    del policy.decode
    assert calls[:2] == [(2, start), (3, embeds.shape[1] - start)]
    assert torch.equal(plain.ids, shared.ids)
    torch.testing.assert_close(plain.logps, shared.logps, atol=1e-4, rtol=1e-4)


def test_greedy_and_its_least_length_equal_generate(prompts):
    policy, embed, _ = prompts
    embeds, mask = embed([0, 1, 2])
    free = sample_completions(policy, embeds, mask, 1, Sampling(max_new_tokens=20, greedy=True))
    least = int(free.mask.sum(1).min()) + 2
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
        for step in range(int(drawn.mask[n].sum())):
            attended = torch.ones(sequence.shape[:2], dtype=torch.bool)
            logits = policy.lm_head(policy.hidden_states(sequence, attended)[0, -1])
            logits[list(policy.special_token_ids.values())] = -torch.inf
            logits[len(policy.tokenizer) :] = -torch.inf
            if step < least:
                logits[ends] = -torch.inf
            tokens.append(int(logits.argmax()))
            text = policy.language_model.get_input_embeddings()(torch.tensor([tokens[-1:]]))
            sequence = torch.cat([sequence, text], dim=1)
        assert drawn.ids[n, : len(tokens)].tolist() == tokens
        assert int(drawn.mask[n].sum()) > least
