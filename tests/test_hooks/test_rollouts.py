from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from projects.llava_sam2_rl.hooks import RolloutHook, rollouts
from projects.llava_sam2_rl.rewards import RewardOutput, RolloutBatch

NAN = math.nan
#: Of rewards 0.5, 1 and 0: mean 0.5, standard deviation 0.5; nothing where nothing was scored.
ADVANTAGES = torch.tensor([0.0, 0.9998, -0.9998, 0.0, 0.0, 0.0])
SIZE = (12, 16)


def square(left: int, width: int = 4) -> torch.Tensor:
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 2:6, left : left + width] = True
    return mask


def logits(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 3.0, -3.0)


def captions() -> SimpleNamespace:
    """Two prompts, three captions each; the second prompt has no scorable reward."""
    batch = RolloutBatch(
        completions=['a dog', 'the "red" dog', 'line\u2028break', 'x', 'y', ''],
        num_generations=3,
        direction='mask_to_caption',
        prompts=['<img>' + '<IMG_CONTEXT>' * 36 + '</img> what?'] * 6,
        references=['a red dog'] * 3 + [None] * 3,
        gt_masks=[square(4)] * 6,
        pred_mask_logits=[logits(square(left)) for left in (4, 6, 10, 4, 4, 4)],
        sample_ids=['set/a'] * 3 + ['set/b'] * 3,
        completion_lengths=[3, 5, 7, 2, 2, 1],
        truncated=[False, False, True, False, False, False],
    )
    parts = torch.tensor([[0.5, 0.1], [1.0, NAN], [0.0, 0.3], [NAN, 0.2], [NAN, 0.2], [NAN, 0.2]])
    return SimpleNamespace(
        reward_inputs=batch,
        rewards=RewardOutput(torch.tensor([0.5, 1.0, 0.0, NAN, NAN, NAN]), parts, ('judge', 'iou')),
        samples=[0, 1],
        records=(),
        regions=(),
        advantages=ADVANTAGES,
    )


def masks() -> SimpleNamespace:
    batch = RolloutBatch(
        completions=['a dog'] * 3,
        num_generations=3,
        direction='caption_to_mask',
        references=['a red dog'] * 3,
        gt_masks=[square(4)] * 3,
        pred_mask_logits=[logits(square(left)) for left in (4, 6, 10)],
    )
    values = torch.full((3,), 0.25)
    return SimpleNamespace(
        reward_inputs=batch,
        rewards=RewardOutput(values, values[:, None], ('meteor',)),
        samples=[0],
        records=(),
        regions=(),
        advantages=torch.zeros(3),
    )


@pytest.fixture
def data() -> dict:
    frames = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (10, 20)]
    second = [torch.full((3, 8, 8), value, dtype=torch.uint8) for value in (90, 200)]
    return {
        'g_pixel_values': frames,
        'masks': [square(4), square(0)],
        'pair': {'index': torch.tensor([2, 1]), 'g_pixel_values': second},
    }


class Model(nn.Module):
    def __init__(self, **last):
        super().__init__()
        self.objective = SimpleNamespace(last_rollouts=last, has_rewards=True)


class Run:
    def __init__(self, work_dir, model):
        self.work_dir, self.model = str(work_dir), model
        self.images, self.said = [], []
        self.visualizer = SimpleNamespace(add_image=lambda *args: self.images.append(args))
        self.logger = SimpleNamespace(info=self.said.append)
        self.iter, self.max_iters = 0, 100

    def steps(self, hook, data, count=1):
        hook.before_train(self)
        for _ in range(count):
            hook.after_train_iter(self, self.iter, {'data': data})
            self.iter += 1


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


def test_a_run_shorter_than_the_interval_has_its_last_step_written(tmp_path, data):
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.max_iters = 3
    run.steps(RolloutHook(interval=100), data, 3)
    assert [path.name for path in (tmp_path / 'rollouts').glob('*.jsonl')] == [
        'iter_00000003.jsonl'
    ]


def test_a_line_for_every_completion(tmp_path, data):
    run = Run(tmp_path, Model(mask_to_caption=captions(), caption_to_mask=masks()))
    run.steps(RolloutHook(interval=1, max_samples=1, max_completions=2), data)
    rows = lines(tmp_path / 'rollouts/iter_00000001.jsonl')
    assert len(rows) == 9  # the limits are the picture's
    assert rows[1] == {
        'iter': 1,
        'direction': 'mask_to_caption',
        'sample': 'set/a',
        'group': 0,
        'prompt': '<img><IMG_CONTEXT>×36</img> what?',
        'completion': 'the "red" dog',
        'reference': 'a red dog',
        'reward': 1.0,
        'rewards': {'judge': 1.0, 'iou': None},
        'advantage': pytest.approx(0.9998, abs=1e-5),
        'length': 5,
        'truncated': False,
        'iou': pytest.approx(2 / 6),  # 2 of 4 columns in common
    }
    assert [row['iou'] for row in rows[:3]] == [1.0, pytest.approx(1 / 3), 0.0]
    assert [row['advantage'] for row in rows[3:6]] == [0.0] * 3
    assert rows[3]['reward'] is None
    assert rows[3]['rewards'] == {'judge': None, 'iou': pytest.approx(0.2)}
    assert rows[2]['truncated'] is True
    assert rows[2]['completion'] == 'line\u2028break'
    assert [row['group'] for row in rows] == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    last = rows[-1]
    assert (last['direction'], last['prompt'], last['length']) == ('caption_to_mask', None, None)


def test_every_interval_a_picture_that_the_visualizer_gets_too(tmp_path, data):
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.steps(RolloutHook(interval=3), data, count=7)
    names = sorted(path.name for path in (tmp_path / 'rollouts').iterdir())
    assert names == [
        *('iter_00000003.jsonl', 'iter_00000003.png'),
        *('iter_00000006.jsonl', 'iter_00000006.png'),
    ]
    assert [(name, step) for name, _, step in run.images] == [('rollouts', 3), ('rollouts', 6)]
    with Image.open(tmp_path / 'rollouts/iter_00000003.png') as picture:
        assert (np.array(picture) == run.images[0][1]).all()


@pytest.fixture
def sections(monkeypatch):
    """What the page is drawn from."""
    seen = []
    draw = rollouts.draw_page
    monkeypatch.setattr(rollouts, 'draw_page', lambda given: (seen.extend(given), draw(given))[1])
    return seen


def test_the_picture_shows_the_winner_first_and_says_what_teaches_nothing(tmp_path, data, sections):
    run = Run(tmp_path, Model(mask_to_caption=captions(), caption_to_mask=masks()))
    run.steps(RolloutHook(interval=1), data)
    first, second = sections[0].rows
    assert [card.caption for card in first.answers] == [
        '“the "red" dog”',
        '“a dog”',
        '“line\u2028break”',
    ]
    assert [card.heading for card in first.answers] == ['#1', '#2', '#3']
    assert first.answers[0].advantage == pytest.approx(0.9998, abs=1e-5)
    assert first.answers[0].scores == [
        *[('reward', 1.0), ('judge', 1.0), ('iou', None)],
        ('IoU (not rewarded)', pytest.approx(1 / 3)),
    ]
    assert 'cut off' in first.answers[2].note
    assert first.question.caption == '“a red dog”'
    assert first.title == 'set/a'
    assert 'no reward could be scored' in second.title
    assert second.answers[0].heading == 'not scored'
    assert '(nothing)' in [card.caption for card in second.answers]
    assert 'no reference' in second.question.note
    assert 'all rewards are equal' in sections[1].rows[0].title


def test_limits_keep_the_best_and_the_worst(tmp_path, data, sections):
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.steps(RolloutHook(interval=1, max_samples=1, max_completions=2), data)
    (row,) = sections[0].rows
    assert [(card.heading, card.caption) for card in row.answers] == [
        ('#1', '“the "red" dog”'),
        ('#3', '“line\u2028break”'),
    ]
    assert 'best 1 and the worst 1 of 3' in row.title
    assert '1 of 2 samples shown' in sections[0].explanation


def test_masks_are_drawn_where_they_belong(tmp_path, data, sections):
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.steps(RolloutHook(interval=1), data)
    plain, paired = sections[0].rows
    # 16 x 12 pixels in a box of 184: a pixel is 11.5 wide. Far from the mask the frame is seen.
    assert plain.question.picture.shape == (138, 184, 3)
    assert plain.question.picture[120, 170].tolist() == [10, 10, 10]
    # Inside the region, columns 4 to 8: 0.55 * 10 + 0.45 * (255, 212, 0)
    assert plain.question.picture[46, 69].tolist() == [120, 101, 6]
    # The second caption's mask starts two columns further right, at pixel 69, and reaches 115.
    # 0.4 * 10 + 0.6 * (0, 200, 255)
    second = plain.answers[1]
    assert second.caption == '“a dog”'
    best = plain.answers[0].picture
    assert best[46, 104].tolist() == [4, 124, 157]
    assert best[46, 58].tolist() == [10, 10, 10]  # inside the true region, not found
    # The paired sample is described on the first frame and looked for on the second.
    assert paired.question.picture[120, 170].tolist() == [20, 20, 20]
    assert paired.answers[0].picture[120, 170].tolist() == [200, 200, 200]
    assert 'another frame' in paired.question.note


def test_a_region_of_several_is_drawn_on_the_image_of_its_record(tmp_path, data, sections):
    """Both samples are of the second record, which has two regions."""
    found = captions()
    found.records, found.regions = [1, 1], [square(0)[0], square(8)[0]]
    run = Run(tmp_path, Model(mask_to_caption=found))
    run.steps(RolloutHook(interval=1), data)
    first, second = (row.question.picture for row in sections[0].rows)
    # 20 is the frame; a pixel is 11.5 wide, 0.55 * 20 + 0.45 * (255, 212, 0) inside.
    inside, outside = [126, 106, 11], [20, 20, 20]
    assert (first[46, 23].tolist(), first[46, 115].tolist()) == (inside, outside)
    assert (second[46, 23].tolist(), second[46, 115].tolist()) == (outside, inside)


def test_a_wrapped_model_is_looked_into(tmp_path, data):
    run = Run(tmp_path, nn.DataParallel(Model(mask_to_caption=captions())))
    run.steps(RolloutHook(interval=1), data)
    assert len(lines(tmp_path / 'rollouts/iter_00000001.jsonl')) == 6


def test_every_rank_is_told_before_a_step_that_will_be_drawn(tmp_path, monkeypatch):
    """All or none: a rank that wrote captions alone would keep the others waiting."""
    for main in (True, False):
        monkeypatch.setattr(rollouts, 'is_main_process', lambda main=main: main)
        run, hook, told = Run(tmp_path, nn.DataParallel(Model())), RolloutHook(interval=3), []
        for run.iter in range(7):
            hook.before_train_iter(run, run.iter)
            told.append(run.model.module.objective.draw_rollouts)
        assert told == [False, False, True, False, False, True, False]


def test_a_text_that_nobody_wrote_is_unknown(tmp_path, data):
    found = masks()
    inputs = found.reward_inputs
    found.reward_inputs = dataclasses.replace(inputs, completions=None)
    run = Run(tmp_path, Model(caption_to_mask=found))
    run.steps(RolloutHook(interval=1), data)
    rows = lines(tmp_path / 'rollouts/iter_00000001.jsonl')
    assert [row['completion'] for row in rows] == [None] * 3


def test_only_the_main_process_writes(tmp_path, data, monkeypatch):
    monkeypatch.setattr(rollouts, 'is_main_process', lambda: False)
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.steps(RolloutHook(interval=1), data)
    assert list(tmp_path.iterdir()) == []


def test_an_objective_without_rollouts_is_told_once(tmp_path, data):
    model = Model()
    model.objective = SimpleNamespace(has_rewards=False, last_rollouts={})
    run = Run(tmp_path, model)
    run.steps(RolloutHook(interval=1), data, count=3)
    assert len(run.said) == 1
    assert 'samples no rollouts' in run.said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_step_without_rollouts_writes_nothing(tmp_path, data):
    run = Run(tmp_path, Model())
    run.steps(RolloutHook(interval=1), data)
    assert run.said == []
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_clears_up_and_replaces(tmp_path, data):
    folder = tmp_path / 'rollouts'
    folder.mkdir()
    (folder / 'iter_00000001.jsonl').write_text('{"iter": 1}\n' * 50)
    (folder / 'iter_00000002.jsonl.incomplete').write_text('{"it')
    run = Run(tmp_path, Model(mask_to_caption=captions()))
    run.steps(RolloutHook(interval=1), data)
    assert sorted(path.name for path in folder.iterdir()) == [
        'iter_00000001.jsonl',
        'iter_00000001.png',
    ]
    assert len(lines(folder / 'iter_00000001.jsonl')) == 6


@pytest.mark.parametrize(
    'options', [{'interval': 0}, {'max_samples': 0}, {'max_completions': 1}, {'interval': -3}]
)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match='must be at least 1'):
        RolloutHook(**options)


def test_a_clip_is_a_film_strip_with_the_mask_of_each_frame(data):
    """Four frames of their own grey, the last without the object: read line by line."""
    data['pair'] = {
        'index': torch.tensor([0]),
        'frame': torch.tensor([2]),
        'g_pixel_values': [torch.full((3, 8, 8), 120, dtype=torch.uint8)],
    }
    data['clip'] = {
        'index': torch.tensor([1, 0, 0]),
        'frame': torch.tensor([1, 3, 1]),
        'g_pixel_values': [torch.full((3, 8, 8), v, dtype=torch.uint8) for v in (9, 160, 60)],
    }
    frames = rollouts.clip_frames(data, 0)
    assert [int(frame[0, 0, 0]) for frame in frames] == [10, 60, 120, 160]
    found = masks()
    nothing = torch.zeros_like(square(0))
    truth = [square(4), square(5), square(6), nothing]
    batch = dataclasses.replace(
        found.reward_inputs,
        gt_tracks=[truth] * 3,
        pred_tracks=[truth, [nothing] * 4, [square(4)] * 4],
    )
    found.reward_inputs = batch
    records = rollouts.describe(found)
    # Nothing found in three frames that show it, and right in the one that does not; a mask of
    # four columns that stays while the object moves by one and two: 4/4, 3/5, 2/6 and 0.
    expected = [1.0, 1 / 4, (1 + 3 / 5 + 1 / 3 + 0) / 4]
    assert [record['iou'] for record in records] == pytest.approx(expected)
    row = RolloutHook()._row(found, [{**r, 'iter': 1} for r in records], 0, data)
    assert row.question.note == 'the caption that was given; the mask is carried through 4 frames'
    strip = row.answers[0].picture
    assert strip.shape[1] == 184
    corners = [strip[5, 5], strip[5, 100], strip[80, 5], strip[80, 100]]
    assert [int(corner[0]) for corner in corners] == [10, 60, 120, 160]
    # In blue where the object was found: in the first frame, and not in the last.
    blue = strip[..., 2].astype(int) - strip[..., 0]
    assert (blue[:70, :90] > 60).any()
    assert not (blue[72:, 94:] > 60).any()
