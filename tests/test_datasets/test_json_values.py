import json

import pytest

from projects.llava_sam2_rl.datasets.json_values import iterate_object, read_value

CONTENT = {
    'a': {'b': [1, 2, {'c': 'x, } ] " \\ y'}]},
    'é ü': 'ß 漢 😀',
    '3': 12345,
    '4': [],
    '5': None,
    '6': 'long ' * 40,
    '7': -1.5e3,
}


@pytest.mark.parametrize('ascii_only', [True, False])
@pytest.mark.parametrize('indent', [None, 2])
@pytest.mark.parametrize('chunk', [1, 2, 3, 7, 50, 1 << 20])
def test_each_value_is_found_where_it_lies(tmp_path, ascii_only, indent, chunk):
    path = tmp_path / 'x.json'
    path.write_text(json.dumps(CONTENT, ensure_ascii=ascii_only, indent=indent), 'utf-8')
    found = list(iterate_object(path, chunk))
    assert [key for key, *_ in found] == list(CONTENT)
    for key, value, start, length in found:
        assert read_value(path, start, length) == CONTENT[key]
        assert json.loads(path.read_bytes()[start : start + length]) == CONTENT[key]
        if ascii_only:
            assert value == CONTENT[key]


def test_white_space_a_byte_order_mark_and_an_empty_object(tmp_path):
    path = tmp_path / 'x.json'
    path.write_bytes(b'\xef\xbb\xbf \n{ "a" :\t1 , "b":2 }\n')
    assert [(key, value) for key, value, *_ in iterate_object(path)] == [('a', 1), ('b', 2)]
    path.write_text(' {  } ')
    assert list(iterate_object(path)) == []


WRONG = ['', '[]', '"a"', '{', '{"a"', '{"a":', '{"a": 1', '{"a": 1,', '{"a": 1 "b": 2}', '{1: 2}']
WRONG += ['{"a": nope}', '{"a": [1, 2}', '{"a": "x', '\0\0\0\0', '{"a": ' + '[' * 100_000]


@pytest.mark.parametrize('text', WRONG)
@pytest.mark.parametrize('chunk', [1, 1 << 20])
def test_wrong_json_is_named_with_its_place(tmp_path, text, chunk):
    path = tmp_path / 'wrong.json'
    path.write_text(text)
    if chunk == 1 and len(text) > 1000:
        chunk = 1000
    with pytest.raises(ValueError, match=r'wrong\.json.*at byte \d+'):
        list(iterate_object(path, chunk))


def test_a_place_without_a_value_is_an_error(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text('{"a": [1, 2]}')
    for start, length in ((6, 3), (50, 4)):
        with pytest.raises(ValueError, match=r'Expecting|Extra'):
            read_value(path, start, length)
