"""Lines of other packages are in the log and off the terminal; errors and one's own stay."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import warnings

import pytest

from projects.llava_sam2_rl.utils.console import OtherPackages, others_are_quiet


@pytest.fixture(autouse=True)
def as_before():
    show, handlers = warnings.showwarning, list(logging.root.handlers)
    # A command that an earlier test started in this process has left one, with its lines.
    logging.root.handlers[:] = [h for h in handlers if not isinstance(h, OtherPackages)]
    yield
    warnings.showwarning = show
    logging.root.handlers[:] = handlers


@pytest.fixture
def log(tmp_path):
    logger = logging.Logger('run')
    logger.addHandler(logging.FileHandler(tmp_path / 'run.log'))
    return logger


def record(name, level, path):
    return logging.LogRecord(name, level, path, 1, f'said by {name}', None, None)


def test_what_is_printed_while_packages_are_imported_is_kept_for_the_log(log, tmp_path, capsys):
    with others_are_quiet() as others:
        print('looking for an accelerator')
        print('no kernels', file=sys.stderr)
    assert capsys.readouterr() == ('', '')
    others.write_to(log)
    assert (tmp_path / 'run.log').read_text() == 'looking for an accelerator\nno kernels\n'


def test_no_garbage_is_looked_for_among_what_imports_make():
    gc.unfreeze()
    with others_are_quiet():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_loggers_that_other_packages_made_write_to_the_log_from_then_on(log, tmp_path, capsys):
    with others_are_quiet() as others:
        theirs = logging.getLogger('a_package_of_somebody')
        theirs.propagate = False
        theirs.addHandler(logging.StreamHandler(sys.stdout))
        theirs.warning('while it is imported')
    theirs.warning('later')
    others.write_to(log)
    theirs.warning('while it trains')
    logging.getLogger('one_without_handlers').info('not asked for')
    lines = (tmp_path / 'run.log').read_text().splitlines()
    assert sorted(lines) == ['later', 'while it is imported', 'while it trains']
    assert len(theirs.handlers) == 1


def test_a_second_run_in_one_process_has_its_own_lines(log, tmp_path):
    with others_are_quiet() as others:
        pass
    earlier = logging.Logger('earlier')
    earlier.addHandler(logging.FileHandler(tmp_path / 'earlier.log'))
    others.write_to(earlier)
    with others_are_quiet() as again:
        print('said before the second log is there')
    again.write_to(log)
    assert (tmp_path / 'earlier.log').read_text() == ''
    assert (tmp_path / 'run.log').read_text() == 'said before the second log is there\n'


def test_a_file_that_was_taken_off_the_log_is_not_opened_again(log, tmp_path):
    with others_are_quiet() as others:
        pass
    others.write_to(log)
    file = log.handlers[0]
    log.removeHandler(file)
    file.close()
    (tmp_path / 'run.log').unlink()
    others.say('theirs', 'after the run')
    assert not (tmp_path / 'run.log').exists()


def test_errors_and_the_warnings_of_ones_own_code_stay(capsys, tmp_path):
    others = OtherPackages()
    installed = f'{sys.prefix}/lib/python3.11/site-packages/theirs/x.py'
    others.handle(record('theirs', logging.WARNING, installed))
    assert capsys.readouterr().err == ''
    others.handle(record('theirs', logging.ERROR, installed))
    others.handle(record('mine', logging.WARNING, str(tmp_path / 'mine.py')))
    assert capsys.readouterr().err == 'theirs: said by theirs\nmine: said by mine\n'


def test_what_mmengine_warns_of_in_every_run_is_in_the_log_alone(log, tmp_path, capsys):
    log.addHandler(logging.StreamHandler(sys.stderr))
    OtherPackages().write_to(log)
    log.warning('"FileClient" will be deprecated in future.')
    log.warning('the loss is not finite')
    assert capsys.readouterr().err == 'the loss is not finite\n'
    assert len((tmp_path / 'run.log').read_text().splitlines()) == 2


def test_a_rank_without_a_log_drops_them():
    others = OtherPackages()
    others.write_to(logging.Logger('rank 1'))
    others.say('theirs', 'x')
    assert others._waiting == []


def test_a_package_that_cannot_be_imported_says_why(capsys):
    def start():
        with others_are_quiet():
            print('built for another version')
            raise ImportError('nothing')

    with pytest.raises(ImportError):
        start()
    assert 'built for another version' in capsys.readouterr().err


@pytest.mark.slow  # a process that imports everything
def test_a_command_starts_in_silence(root):
    """Here bitsandbytes, DeepSpeed and others have something to say."""
    command = [sys.executable, 'tools/check.py', 'configs/sa2va_tiny_dual_loop.py']
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.count('\n') == 1
    assert done.stderr == ''
