"""By nodes, or by FlexAttention, in the place of a dense mask: the same results, and a way back."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from projects.llava_sam2_rl.models.prefix_tree import NodeInRow, PrefixTree, TreeMask
from projects.llava_sam2_rl.models.sa2va import packed_attention
from projects.llava_sam2_rl.models.sa2va.packed_attention import (
    PackedAttention,
    RowsOfNodes,
    attend,
    block_mask,
    nodes_pay,
)
from projects.llava_sam2_rl.models.transformers_compat import passes_block_masks

needs_block_masks = pytest.mark.skipif(
    not passes_block_masks(), reason='transformers from 4.53 on hands block masks through'
)


@pytest.fixture
def policy(tiny_model):
    """The tiny network, whose way to attend is put back."""
    policy, config = tiny_model.policy, tiny_model.policy.language_model.config
    before = policy.packed_attention, config._attn_implementation
    policy.train()
    yield policy
    policy.packed_attention, config._attn_implementation = before


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(packed_attention, 'print_log', lambda text, **_: lines.append(text))
    return lines


@pytest.fixture
def by_nodes(monkeypatch):
    """However short the rows are."""
    monkeypatch.setattr(packed_attention, '_SCORES_OF_A_CALL', 1)


def forest(policy, lengths=(40, 30, 25, 60, 9), parents=(None, 0, 0, 2, None)):
    """Two trees: a root with two branches, one of which goes on; a root alone."""
    width = policy.language_model.config.hidden_size
    draw = torch.Generator().manual_seed(0)
    tree, leaves = PrefixTree(), []
    for length, parent in zip(lengths, parents, strict=True):
        leaves.append(torch.randn(length, width, generator=draw).requires_grad_())
        tree.add_node(leaves[-1], parent)
    return tree, leaves


def dense_flex(query, key, value, block_mask, scale, enable_gqa):
    """FlexAttention with a way back, which it lacks on a CPU: all scores, by the same mask."""
    assert query.dtype == key.dtype == value.dtype
    rows, heads, width, _ = query.shape
    row, place = torch.arange(rows), torch.arange(width)
    mask = block_mask.mask_mod(
        row[:, None, None], torch.tensor(0), place[None, :, None], place[None, None, :]
    )
    if enable_gqa:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask[:, None], scale=scale
    )


@pytest.fixture
def flex(monkeypatch):
    monkeypatch.setattr(packed_attention, '_flex', lambda device: dense_flex)


def results(policy, choice):
    policy.packed_attention = PackedAttention(choice)
    tree, leaves = forest(policy)
    found = tree.forward(policy)
    total = sum(x.square().mean() for x in found)
    return [*found, *torch.autograd.grad(total, leaves)]


def test_a_tree_says_who_sees_whom():
    # A root of two tokens, two branches of one and two tokens, and padding.
    sees = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    nodes, positions = torch.tensor([[0, 0, 1, 2, 2, 3]]), torch.tensor([[0, 1, 2, 2, 3, 0]])
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 1, 0, 1, 0, 0],
            [1, 1, 0, 1, 1, 0],
            [0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(TreeMask(sees, nodes, positions).dense()[0], expected)


def test_blocks_in_which_nobody_is_seen_are_left_out():
    # A root of one block, and two branches of a block each.
    nodes = torch.arange(3).repeat_interleave(128)[None]
    positions = torch.cat([torch.arange(128), *[torch.arange(128, 256)] * 2])[None]
    sees = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool()
    blocks = block_mask(TreeMask(sees, nodes, positions)).to_dense()[0, 0]
    assert blocks.bool().tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


@needs_block_masks
def test_both_ways_give_the_same(policy, said, flex):
    dense, flex = results(policy, 'sdpa'), results(policy, 'flex')
    assert said == ['Packed passes attend by FlexAttention']
    assert policy.packed_attention.used == 'flex'
    for ours, theirs in zip(flex, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # Ordinary passes still take ordinary masks.
    embeds = torch.randn(2, 7, policy.language_model.config.hidden_size)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    with torch.no_grad():
        padded = policy.hidden_states(embeds, mask)
        alone = policy.hidden_states(embeds[:1, 2:], mask[:1, 2:])
    torch.testing.assert_close(padded[:1, 2:], alone, rtol=1e-4, atol=1e-5)


@needs_block_masks
def test_under_autocast_all_is_of_one_dtype(policy, flex, monkeypatch):
    """FlexAttention casts nothing, as the dense way does; it is tried in that dtype."""
    tried = []
    problem = packed_attention._problem
    monkeypatch.setattr(
        packed_attention, '_problem', lambda *given: tried.append(given[-1]) or problem(*given)
    )
    found = {}
    for choice in ('sdpa', 'flex'):
        policy.packed_attention = PackedAttention(choice)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            found[choice] = forest(policy)[0].forward(policy)
    assert policy.packed_attention.used == 'flex'
    assert tried == [torch.bfloat16]
    for ours, theirs in zip(found['flex'], found['sdpa'], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


@needs_block_masks
def test_checkpointing_recomputes_with_the_same_mask(policy, flex):
    from projects.llava_sam2_rl.models.sa2va.language import decoder_of, enable_checkpointing

    plain = results(policy, 'flex')
    enable_checkpointing(policy.language_model)
    try:
        recomputed = results(policy, 'flex')
    finally:
        decoder_of(policy.language_model).gradient_checkpointing = False
    for ours, theirs in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@needs_block_masks
def test_flex_attention_itself_gives_the_same(policy, monkeypatch):
    """On a CPU without gradients."""
    monkeypatch.setattr(packed_attention, '_problem', lambda *_: None)
    found = {}
    with torch.no_grad():
        for choice in ('sdpa', 'flex'):
            policy.packed_attention = PackedAttention(choice)
            found[choice] = forest(policy)[0].forward(policy)
    assert policy.packed_attention.used == 'flex'
    for ours, theirs in zip(found['flex'], found['sdpa'], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_on_a_cpu_each_node_attends_to_its_branch(policy, said, by_nodes, monkeypatch):
    expected, widths = results(policy, 'sdpa'), []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *rest, **options):
        widths.append((query.shape[2], key.shape[2]))
        return attention(query, key, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', watched)
    found = results(policy, 'auto')
    assert policy.packed_attention.used == 'nodes'
    assert said == []
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    # Lengths of 40, 30, 25, 60 and 9: two branches behind the first node, one of which goes on.
    # The query heads that share a key head stand one behind the other in a branch.
    config = policy.language_model.config
    share = config.num_attention_heads // config.num_key_value_heads
    once = [(40, 40), (30 * share, 70), (25 * share, 65), (60 * share, 125), (9, 9)]
    assert sorted(widths) == sorted(once * config.num_hidden_layers)


def test_by_nodes_also_where_activations_are_recomputed(policy, by_nodes):
    from projects.llava_sam2_rl.models.sa2va.language import decoder_of, enable_checkpointing

    plain = results(policy, 'auto')
    enable_checkpointing(policy.language_model)
    try:
        recomputed = results(policy, 'auto')
    finally:
        decoder_of(policy.language_model).gradient_checkpointing = False
    for ours, theirs in zip(recomputed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_by_nodes_under_autocast(policy, by_nodes):
    found = {}
    for choice in ('sdpa', 'auto'):
        policy.packed_attention = PackedAttention(choice)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
            found[choice] = forest(policy)[0].forward(policy)
    for ours, theirs in zip(found['auto'], found['sdpa'], strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


def test_short_rows_are_not_worth_the_calls():
    """Of 2 rows of 6 places 72 scores are computed densely; 2·2 + 3·5 + 1·6 + 4·4 are needed."""
    rows = (
        (NodeInRow(2, ()), NodeInRow(3, (0,)), NodeInRow(1, (0, 1))),
        (NodeInRow(4, ()),),
    )
    tree = TreeMask(torch.ones(1), torch.zeros(2, 6), torch.zeros(2, 6), rows)
    # 31 are not; four nodes.
    assert nodes_pay(tree, -(-4 * 10**6 // 31)) is True
    assert nodes_pay(tree, 4 * 10**6 // 31) is False
    assert nodes_pay(TreeMask(torch.ones(1), torch.zeros(2, 6), torch.zeros(2, 6)), 10**9) is False


def test_padding_of_a_row_is_read_by_nobody():
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 1, 5, 4, generator=draw) for _ in range(3))
    mask = torch.zeros(2, 1, 5, 5)
    nodes = [[NodeInRow(2, ()), NodeInRow(3, (0,))], [NodeInRow(4, ())]]
    mask.rows_of_nodes = RowsOfNodes(nodes)
    found, _ = attend(None, query, key, value, mask, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.5
    ).transpose(1, 2)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :4], expected[1, :4])
    assert not found[1, 4].any()


@pytest.mark.parametrize(
    ('broken', 'reason'),
    [
        ('compiler', 'RuntimeError: no kernel for this device'),
        ('results', 'its results are 1'),
        ('not finite', 'its results are nan'),
        ('wide', 'its results are '),
        ('gradients', 'its results are '),
        ('dropout', 'the model has attention_dropout=0.1'),
        ('transformers', 'transformers from 4.53 on'),
    ],
)
def test_where_it_does_not_work_one_line_says_so(policy, said, monkeypatch, broken, reason):
    if broken == 'compiler':

        def fails(*_, **__):
            raise RuntimeError('no kernel for this device\nand a page of what was tried')

        monkeypatch.setattr(packed_attention, '_flex', lambda device: fails)
    elif broken == 'results':

        def wrong(query, key, value, **_):
            return 1e3 * query + 0 * (key.sum() + value.sum())

        monkeypatch.setattr(packed_attention, '_flex', lambda device: wrong)
    elif broken in ('not finite', 'wide', 'gradients'):

        def almost_right(query, *args, **options):
            right = dense_flex(query, *args, **options)
            if broken == 'gradients':
                return right + query - query.detach()
            if broken == 'wide':
                return right if query.shape[2] < 300 else 1e3 + right
            return right * torch.nan

        monkeypatch.setattr(packed_attention, '_flex', lambda device: almost_right)
    elif broken == 'dropout':
        monkeypatch.setattr(policy.language_model.config, 'attention_dropout', 0.1)
    else:
        monkeypatch.setattr(packed_attention, 'passes_block_masks', lambda: False)
    if broken != 'transformers' and not passes_block_masks():
        pytest.skip('block masks are refused before')
    expected = results(policy, 'sdpa')
    found = results(policy, 'flex')
    assert policy.packed_attention.used == 'sdpa'
    assert len(said) == 1
    assert said[0].startswith('Packed passes attend by a dense mask, FlexAttention is left out: ')
    assert reason in said[0]
    assert '\n' not in said[0]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_old_gpu_is_named(monkeypatch):
    monkeypatch.setattr(packed_attention, 'passes_block_masks', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (7, 5))
    config = SimpleNamespace(attention_dropout=0.0)
    problem = packed_attention._problem(config, torch.device('cuda'), torch.float16)
    assert problem == 'a GPU of compute capability 8.0 is needed, this one has (7, 5)'


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="auto, sdpa, flex, got 'fast'"):
        PackedAttention('fast')


@pytest.mark.gpu
def test_on_a_gpu_both_ways_give_the_same():
    if not torch.cuda.is_available():
        pytest.skip('needs a CUDA device')
    config = SimpleNamespace(
        attention_dropout=0.0, num_attention_heads=16, num_key_value_heads=2, head_dim=128
    )
    for dtype in (torch.bfloat16, torch.float32):
        assert packed_attention._problem(config, torch.device('cuda'), dtype) is None


def test_heads_are_shared_by_groups():
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 128, 16, generator=draw)
    key, value = (torch.randn(1, 2, 128, 16, generator=draw) for _ in range(2))
    nodes = torch.zeros(1, 128, dtype=torch.long)
    tree = TreeMask(torch.ones(1, 1).bool(), nodes, torch.arange(128)[None])
    found, weights = attend(None, query, key, value, block_mask(tree), scaling=0.3)
    assert weights is None
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    scores = scores.masked_fill(torch.ones(128, 128).triu(1).bool(), float('-inf'))
    expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
