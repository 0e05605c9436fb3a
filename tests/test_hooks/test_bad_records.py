import pytest

from projects.llava_sam2_rl.hooks import bad_records
from projects.llava_sam2_rl.hooks.bad_records import BadRecordHook
from projects.llava_sam2_rl.structures import RegionMeta


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(bad_records, 'print_log', lambda text, **kwargs: lines.append(text))
    return lines


def visit(hook, source='set', bad=(), good=1, changed=()):
    """One batch of ``good`` samples which skipped records for the reasons in ``bad``."""
    data = {'changed': [(source, f'{source}{i}', kind) for i, kind in enumerate(changed)]}
    data |= {'skipped': [(source, f'{source}{i}', reason) for i, reason in enumerate(bad)]}
    metas = [RegionMeta(source, str(i), None, None, 4, 4) for i in range(good)]
    hook.after_train_iter(None, 0, {'data': data, 'data_samples': metas})


def test_warns_once_per_source_and_reason(logged):
    hook = BadRecordHook()
    for _ in range(3):
        visit(hook, bad=['bad_rle'])
    assert len(logged) == 1
    assert "set: record 'set0'" in logged[0]
    assert 'bad_rle' in logged[0]
    visit(hook, bad=['empty_mask', 'bad_rle'])
    visit(hook, 'other', bad=['bad_rle'])
    assert len(logged) == 3


def test_the_table_comes_at_the_end_of_an_epoch_and_once_more_only_if_it_changed(logged):
    hook = BadRecordHook(min_records=1)
    visit(hook, good=97, bad=['bad_rle'])
    visit(hook, 'other', good=38, bad=['empty_mask', 'empty_mask'])
    visit(hook, good=1, bad=['empty_mask'])
    logged.clear()
    hook.after_train_epoch(None)
    assert logged == [
        'bad records:\n'
        '  other: 2 of 40 (5.0%) empty_mask\n'
        '  set: 1 of 100 (1.0%) bad_rle\n'
        '  set: 1 of 100 (1.0%) empty_mask'
    ]
    hook.after_train(None)
    assert len(logged) == 1


def test_changes_of_texts_are_told_once_and_counted(logged):
    hook = BadRecordHook()
    visit(hook, changed=['mask_token', 'mask_token', 'cut_text'], good=3)
    visit(hook, changed=['mask_token'])
    assert len(logged) == 2
    assert "set: the text of record 'set0' was changed (mask_token)" in logged[0]
    logged.clear()
    hook.after_train_epoch(None)
    hook.after_train(None)
    assert logged == [
        'bad records: none\ntexts changed:\n  set: 1 x cut_text\n  set: 3 x mask_token'
    ]


def test_a_run_without_bad_records_says_so_once(logged):
    hook = BadRecordHook()
    visit(hook, good=5)
    hook.after_train_epoch(None)
    hook.after_train(None)
    assert logged == ['bad records: none']


def test_a_source_that_is_mostly_bad_stops_the_run_with_the_list(logged):
    hook = BadRecordHook(max_bad_fraction=0.05, window=1000)
    visit(hook, 'fine', good=2000)
    for _ in range(24):
        visit(hook, bad=['missing_image'])
    with pytest.raises(
        RuntimeError, match=r'set: 25 of the first 50 .*max_bad_fraction=0\.05'
    ) as e:
        visit(hook, bad=['missing_image'])
    assert str(e.value).count('missing_image') == 20
    assert 'and 5 more' in str(e.value)


def test_the_bound_is_exact_once_the_window_is_full(logged):
    def run(bad):
        hook = BadRecordHook(max_bad_fraction=0.05, window=200)
        # Evenly spread, so that chance explains the share before the window is full.
        for i in range(200 - bad):
            visit(
                hook, bad=['bad_rle'] if i % 17 == 16 and hook.bad['set', 'bad_rle'] < bad else ()
            )
        assert hook.read['set'] == 200
        assert hook.bad['set', 'bad_rle'] == bad
        return hook

    visit(run(10), bad=['bad_rle'] * 300)  # 10 of 200 pass, what comes later is only counted
    with pytest.raises(RuntimeError, match='11 of the first 200'):
        run(11)


def test_the_end_of_the_training_checks_short_runs(logged):
    hook = BadRecordHook(max_bad_fraction=0.05)
    visit(hook, good=56, bad=['bad_rle'] * 4)  # 6.7 %: too many, but not beyond chance
    with pytest.raises(RuntimeError, match='4 of the first 60'):
        hook.after_train(None)
    few = BadRecordHook(max_bad_fraction=0.05)
    visit(few, good=9, bad=['bad_rle'])
    few.after_train(None)
    visit(few, good=0, bad=['bad_rle'] * 5)
    with pytest.raises(RuntimeError, match='6 of the first 15'):
        few.after_train(None)


def test_no_bound_and_no_tolerance(logged):
    lenient = BadRecordHook(max_bad_fraction=1.0)
    visit(lenient, good=0, bad=['bad_rle'] * 100)
    lenient.after_train(None)
    with pytest.raises(RuntimeError, match='1 of the first 100'):
        visit(BadRecordHook(max_bad_fraction=0.0), good=99, bad=['bad_rle'])


def test_ranks_are_added_up(logged, monkeypatch):
    hook = BadRecordHook()
    visit(hook, good=9, bad=['bad_rle'])
    monkeypatch.setattr(bad_records, 'all_gather_object', lambda value: [value, value])
    logged.clear()
    hook.after_train_epoch(None)
    assert logged == ['bad records:\n  set: 2 of 20 (10.0%) bad_rle']
    monkeypatch.setattr(bad_records, 'is_main_process', lambda: False)
    visit(hook, good=1, bad=['bad_rle'])
    hook.after_train_epoch(None)
    assert len(logged) == 1


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match='max_bad_fraction'):
        BadRecordHook(max_bad_fraction=2)
    with pytest.raises(ValueError, match='min_records'):
        BadRecordHook(window=10)
