"""Sizes stand in the checkpoint; what a config gives itself is checked against it."""

from __future__ import annotations

import json
import shutil

import pytest

from projects.llava_sam2_rl.models import VideoLLaVASAMModel
from projects.llava_sam2_rl.utils.errors import CheckpointError
from projects.llava_sam2_rl.utils.pretrained import (
    check_tokenizer_config,
    complete_sizes,
    image_sizes,
    read_config,
    resolve,
)

TINY = 'llava_sam2_rl://assets/sa2va_tiny'


def test_the_checkpoint_alone_gives_every_size():
    sizes = complete_sizes(TINY, {'lora': {'r': 4}})
    config = json.loads((resolve(TINY) / 'config.json').read_text())
    others = ('model_type', 'architectures', 'note')
    assert sizes == {key: value for key, value in config.items() if key not in others}
    assert image_sizes(sizes) == {
        'image_size': 96,
        'patch_size': 8,
        'downsample_ratio': 0.5,
        'grounding_size': 128,
    }


def test_what_is_given_wins_and_a_section_in_part_is_completed():
    sizes = complete_sizes(TINY, {'select_layer': -2, 'llm_config': {'rope_theta': 5.0}})
    assert sizes['select_layer'] == -2
    read = read_config(resolve(TINY))['llm_config']
    assert sizes['llm_config'] == {**read, 'rope_theta': 5.0}


def test_neither_says():
    given = {'vision_config': {'patch_size': 14}, 'llm_config': {}, 'template': 'qwen_chat'}
    sizes = complete_sizes(None, given)
    assert (sizes['select_layer'], sizes['ps_version']) == (-1, 'v2')
    assert 'grounding_encoder_config' not in sizes
    assert image_sizes(sizes) == {
        'image_size': 448,
        'patch_size': 14,
        'downsample_ratio': 0.5,
        'grounding_size': 1024,
    }
    with pytest.raises(
        ValueError, match='^vision_config and llm_config and template must be given'
    ):
        complete_sizes(None, {})
    for key in ('llm_config', 'template'):
        with pytest.raises(ValueError, match=f'^{key} must be given where `pretrained` is not'):
            complete_sizes(None, {k: v for k, v in given.items() if k != key})


@pytest.mark.parametrize(
    ('section', 'key', 'value'),
    [('vision_config', 'hidden_size', 1024), ('llm_config', 'architectures', ['Phi3ForCausalLM'])],
)
def test_a_given_size_of_another_model(section, key, value):
    with pytest.raises(CheckpointError, match=rf'{section}\.{key} is .* leave {section} out'):
        VideoLLaVASAMModel(pretrained=TINY, **{section: {key: value}})


def test_the_model_takes_them_from_its_checkpoint():
    model = VideoLLaVASAMModel(pretrained=TINY)
    assert model.config == {
        'model_type': 'sa2va_chat',
        'architectures': ['Sa2VAChatModel'],
        **complete_sizes(TINY, {}),
    }


NAMED = [{'name': 'default', 'template': 'a'}, {'name': 'tool_use', 'template': 'b'}]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({}, None),
        ({'chat_template': 'a {{ messages }} ../'}, None),
        ({'chat_template': NAMED}, None),
        ({'tokenizer_class': None}, 'tokenizer_class is None, expected a name'),
        ({'tokenizer_class': ['Qwen2Tokenizer', None]}, 'tokenizer_class is '),
        (
            {'chat_template': [*NAMED, {'name': '../../x', 'template': 'c'}]},
            r"called '\.\./\.\./x'",
        ),
        ({'chat_template': [{'name': '/x', 'template': 'c'}]}, "called '/x'"),
        ({'chat_template': [{'name': '..', 'template': 'c'}]}, r"called '\.\.'"),
        ({'chat_template': [{'template': 'c'}]}, 'called None'),
    ],
)
def test_a_tokenizer_that_makes_transformers_do_more_is_refused(tmp_path, change, message):
    shutil.copytree(resolve(TINY), tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'tokenizer_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    if message is None:
        check_tokenizer_config(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        VideoLLaVASAMModel.from_pretrained(tmp_path)


def test_a_tokenizer_config_that_is_no_json_is_named(tmp_path):
    check_tokenizer_config(tmp_path)  # transformers says what it thinks of a folder without one
    (tmp_path / 'tokenizer_config.json').write_text('{')
    with pytest.raises(CheckpointError, match='is not valid JSON'):
        check_tokenizer_config(tmp_path)


def edited(folder, **changes):
    """The tiny checkpoint with other entries in ``config.json``; ``None`` takes one out."""
    shutil.copytree(resolve(TINY), folder)
    config = {**json.loads((folder / 'config.json').read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_the_template_is_the_checkpoints(tmp_path):
    for name in ('internlm2_chat', 'internlm2-chat'):
        model = VideoLLaVASAMModel(pretrained=edited(tmp_path / name, template=name))
        assert model.template == 'internlm2_chat'
        assert model.config['template'] == name
        assert model.stop_strings == ('<|im_end|>',)
    assert VideoLLaVASAMModel(pretrained=TINY, template='qwen_chat').template == 'qwen_chat'


def test_a_missing_or_unknown_template_is_named_with_file_and_fix(tmp_path):
    folder = edited(tmp_path / 'none', template=None)
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    remedy = r'model\.policy\.template: phi3_chat for Sa2VA-4B, .*qwen_chat for 1B'
    for values, fault in (
        (config, "has no 'template'"),
        ({**config, 'template': None}, "has no 'template'"),
        ({**config, 'template': 'vicuna'}, r"chat template 'vicuna' is unknown.* internlm2_chat\."),
        ({**config, 'template': ''}, "chat template '' is unknown"),
        ({**config, 'template': ['phi3_chat']}, 'is unknown'),
    ):
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=f'{path}.*{fault}.*{remedy}') as error:
            VideoLLaVASAMModel.from_pretrained(folder)
        assert '\n' not in str(error.value)
        # What the config of a run says is enough.
        assert VideoLLaVASAMModel(pretrained=folder, template='qwen_chat').template == 'qwen_chat'
    with pytest.raises(ValueError, match=r"'vicuna' is unknown.* phi3_chat, qwen_chat, internlm2"):
        VideoLLaVASAMModel(pretrained=TINY, template='vicuna')


QWEN = {
    'architectures': ['Sa2VAChatModelQwen'],
    'llm_config': None,
    'text_config': {'model_type': 'qwen'},
}


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({**QWEN, 'vision_config': {'deepstack_visual_indexes': [5]}}, 'Sa2VA on Qwen3-VL'),
        ({**QWEN, 'vision_config': {'fullatt_block_indexes': [7]}}, r'Sa2VA on Qwen2\.5-VL'),
        ({**QWEN, 'vision_config': {'model_type': 'qwen9'}}, 'a Qwen-VL .*vision_config qwen9'),
        ({'architectures': ['Sa2VASAM3Model']}, r'with SAM 3 .*\(Sa2VASAM3Model'),
        ({'grounding_encoder_config': {'type': 'sam_3'}}, 'with SAM 3'),
        ({'vision_config': {'architectures': ['SiglipVisionModel']}}, 'encoder is SiglipVision'),
        ({'llm_config': None}, 'of no known family, it lacks llm_config'),
        ({'model_type': 'internvl_chat'}, "model_type is 'internvl_chat', expected"),
    ],
)
def test_other_families_are_named_in_one_line(changes, named, tmp_path):
    folder = edited(tmp_path / 'model', **changes)
    with pytest.raises(CheckpointError, match=named) as error:
        VideoLLaVASAMModel.from_pretrained(folder)
    assert str(folder / 'config.json') in str(error.value)
    assert 'docs/language_models.md, "What loads"' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('name', 'family'),
    [('sa2va_tiny_qwen25vl', r'Qwen2\.5-VL'), ('sa2va_tiny_qwen3vl', 'Qwen3-VL')],
)
def test_folders_of_the_qwen_families(shared_dir, name, family):
    with pytest.raises(CheckpointError, match=f'Sa2VA on {family} .Sa2VAChatModelQwen'):
        VideoLLaVASAMModel.from_pretrained(shared_dir / 'fixtures' / name)


def test_where_the_model_once_lay_says_nothing(tmp_path):
    folder = edited(tmp_path / 'model', _name_or_path='/data/sam3/runs')
    assert VideoLLaVASAMModel.from_pretrained(folder).template == 'phi3_chat'
