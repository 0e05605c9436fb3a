from __future__ import annotations

from projects.llava_sam2_rl.report.validations import choose, read_validations
from test_report.hand_made import region, write_lines, write_run


def test_the_most_changed_the_best_and_the_worst(tmp_path):
    first, latest = read_validations(write_run(tmp_path))
    assert (first.step, latest.step) == (0, 40)
    chosen = [(e.kind, e.name[-1], round(e.change, 2)) for e in choose(first, latest, per_kind=1)]
    assert chosen == [
        ('gained most', 'a', 0.70),
        ('lost most', 'b', -0.60),
        ('best', 'c', 0.04),
        ('worst', 'd', -0.01),
    ]


def test_no_region_twice_and_no_fewer_kinds_than_there_are(tmp_path):
    names = [e.name for e in choose(*read_validations(write_run(tmp_path)), per_kind=4)]
    assert sorted(names) == [f'scenes/{c}' for c in 'abcde']


def test_a_single_validation_has_no_before(tmp_path):
    write_lines(tmp_path / 'validations/iter_00000007.jsonl', [region('s/a', 0.5)])
    first, latest = read_validations(tmp_path)
    assert first is None
    assert [(e.kind, e.before) for e in choose(first, latest)] == [('best', None)]


def test_a_validation_of_an_earlier_start_is_not_the_latest(tmp_path):
    for step in (0, 10, 20):
        write_lines(tmp_path / f'validations/iter_{step:08d}.jsonl', [region('s/a', 0.5)])
    assert [v.step for v in read_validations(tmp_path, last_step=15)] == [0, 10]


def test_regions_without_pictures_are_not_chosen(tmp_path):
    plain = {k: v for k, v in region('s/b', 0.9).items() if k != 'found'}
    write_lines(tmp_path / 'validations/iter_00000007.jsonl', [region('s/a', 0.5), plain])
    assert [e.name for e in choose(*read_validations(tmp_path))] == ['s/a']


def test_none(tmp_path):
    assert choose(*read_validations(tmp_path)) == []
