"""The commands and code of the pages are run as they stand there, on fewer steps and samples."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from projects.llava_sam2_rl.datasets import GeneratedScenes
from projects.llava_sam2_rl.losses.advantages import group_advantages
from projects.llava_sam2_rl.models import GRPOObjective
from projects.llava_sam2_rl.models.sa2va.internvl import LANGUAGE_MODELS, LORA_TARGETS
from projects.llava_sam2_rl.utils.pretrained import resolve

ROOT_NAMES = ('configs', 'tools', 'docs')
#: What a user has and the test has not: a large model, and a run of 400 steps.
MODEL = 'pretrained/Sa2VA-4B'
CHECKPOINT = 'work_dirs/sa2va_tiny_dual_loop_sft/iter_400.pth'


def blocks(root, page, language):
    text = (root / 'docs' / page).read_text()
    return re.findall(rf'```{language}\n(.*?)```', text, re.DOTALL)


def commands(root, page):
    """Commands without those that need data, are done once, or install something."""
    found = []
    for block in blocks(root, page, 'bash'):
        if not block.startswith(('# data', '# once')):
            found += block.replace('\\\n', ' ').strip().splitlines()
    split = [shlex.split(command, comments=True) for command in found]
    return [command for command in split if command and command[0] != 'pip']


@pytest.fixture
def place(root, tmp_path, monkeypatch, tiny_model):
    """A folder where the paths of the pages lead somewhere."""
    for name in ROOT_NAMES:
        (tmp_path / name).symlink_to(root / name)
    shutil.copytree(resolve('llava_sam2_rl://assets/sa2va_tiny'), tmp_path / MODEL)
    scene = GeneratedScenes(length=1, split='val')[0]['sample']
    Image.fromarray(scene.image).save(tmp_path / 'photo.jpg', quality=95)
    Image.fromarray(scene.mask).save(tmp_path / 'mask.png')
    height, width = scene.mask.shape
    video = cv2.VideoWriter(
        str(tmp_path / 'clip.mp4'), cv2.VideoWriter.fourcc(*'mp4v'), 5, (width, height)
    )
    for _ in range(2):
        video.write(scene.image[..., ::-1].copy())
    video.release()
    (tmp_path / CHECKPOINT).parent.mkdir(parents=True)
    tiny_model.teacher.num_updates = 400
    state = {'meta': {}, 'state_dict': tiny_model.state_dict()}
    torch.save({**state, 'teacher': tiny_model.teacher.state_dict()}, tmp_path / CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command):
    assert command[0] == 'python'
    spec = importlib.util.spec_from_file_location('command', command[1])
    module = importlib.util.module_from_spec(spec)
    sys.modules['command'] = module  # where a dataclass looks its own module up
    spec.loader.exec_module(module)
    return module.main(command[2:])


def serve(command):
    """Runs tools/app.py until it has shown its page."""
    pytest.importorskip('uvicorn', reason='the extra app is not installed')
    command = [sys.executable, *command[1:], '--port', '0']
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(120, process.kill)
        killer.start()
        said = process.stdout.readline()
        killer.cancel()
        assert said.startswith('http://127.0.0.1:'), 'no address within 120 s'
        with urllib.request.urlopen(f'{said.split()[0]}/api/models', timeout=60) as answer:
            models = json.load(answer)['models']
        process.terminate()
    return models


def test_inference(root, place, capsys):
    pages = []
    for command in commands(root, 'inference.md'):
        if command[1] == 'tools/app.py':
            pages.append(command)  # it compares with what a later command exports
        else:
            assert not run(command)
    assert [serve(command) for command in pages] == [[MODEL, 'exported']]
    assert (place / 'found/photo_2_overlay.png').is_file()
    assert (place / 'exported_teacher/model.safetensors').is_file()
    assert (place / 'sa2va_4b.pth').is_file()
    assert (place / 'found/clip_1/00001.png').is_file()
    assert (place / 'found/clip_1_overlay.mp4').is_file()
    for name in ('box_1', 'point_2', 'scribble_1'):
        assert (place / f'found/photo_{name}_overlay.png').is_file(), name
    first, lists = blocks(root, 'inference.md', 'python')
    assert len([line for line in first.splitlines() if line.strip()]) == 3
    capsys.readouterr()
    exec(compile(first, 'inference.md', 'exec'), {})
    assert capsys.readouterr().out.split()[-1].isdecimal()
    exec(compile(lists, 'inference.md', 'exec'), {})
    assert '[SEG]' in capsys.readouterr().out


def test_evaluation(root, place):
    few = ['test_dataloader.dataset.length=2']
    for command in commands(root, 'evaluation.md'):
        assert run([*command, '--cfg-options', *few])['referring/collages/num_samples'] == 2
    written = {path.relative_to(place).as_posix() for path in place.glob('work_dirs/*/test_*.json')}
    assert written == {
        'work_dirs/base/test_policy.json',
        'work_dirs/trained/test_policy.json',
        'work_dirs/trained/test_teacher.json',
    }


def test_tutorial(root, place):
    shorter = {'=60': '=2', '=30': '=1', '=90': '=3', 'iter_90.pth': 'iter_3.pth'}
    work_dirs = set()
    for command in commands(root, 'tutorial.md'):
        for old, new in shorter.items():
            command = [re.sub(rf'{re.escape(old)}$', new, word) for word in command]
        if command[1] == 'tools/train.py':
            command += ['train_dataloader.batch_size=1', 'val_dataloader.dataset.length=2']
            work_dirs.add(command[command.index('--work-dir') + 1])
        if command[1] == 'tools/test.py':
            command += ['--cfg-options', 'test_dataloader.dataset.length=2']
        if command[1] == 'tools/verify_datasets.py':
            command += ['--samples', '4']
        run(command)
    assert work_dirs == {f'work_dirs/{name}' for name in ('mine', 'one_way', 'gumbel', 'sft')}
    for name in work_dirs:
        assert Path(name, 'last_checkpoint').is_file()
    assert Path('work_dirs/mine/last_checkpoint').read_text().endswith('iter_3.pth')
    assert Path('work_dirs/mine/report.html').is_file()
    assert list(Path('work_dirs/mine/rollouts').glob('iter_*.png'))
    assert Path('exported/model.safetensors').is_file()


def test_troubleshooting(root, place, capsys):
    (command,) = commands(root, 'troubleshooting.md')
    assert not run(command)
    assert 'nothing was found that would stop the run' in capsys.readouterr().out


def pages(root):
    names = ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')
    return [*(root / name for name in names), *sorted((root / 'docs').glob('*.md'))]


def test_links_between_the_pages_lead_somewhere(root):
    for page in pages(root):
        for target in re.findall(r'\]\(([^)#]+)', page.read_text()):
            if not target.startswith('https://'):
                assert (page.parent / target).exists(), (page.name, target)


def test_every_make_target_and_file_named_in_the_pages_is_there(root):
    targets = set(re.findall(r'^([a-z-]+):', (root / 'Makefile').read_text(), re.MULTILINE))
    for page in pages(root):
        text = page.read_text()
        code = re.findall(r'```bash\n.*?```|`[^`\n]+`', text, re.DOTALL)
        assert set(re.findall(r'\bmake ([a-z-]+)', '\n'.join(code))) <= targets, page.name
        for path in set(re.findall(r'\b(?:configs|tools|tests)/[\w/]+\.(?:py|sh|json)\b', text)):
            assert path == 'configs/mine.py' or (root / path).is_file(), (page.name, path)


def test_every_option_named_in_a_command_has_a_place_in_its_config(root):
    found = []
    for page in pages(root):
        for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL):
            for command in block.replace('\\\n', ' ').splitlines():
                words = shlex.split(command, comments=True)
                if '--cfg-options' not in words:
                    continue
                file = next(word for word in words if word.startswith('configs/'))
                for option in words[words.index('--cfg-options') + 1 :]:
                    found.append((page.name, file, option.partition('=')[0]))
    assert {page for page, *_ in found} >= {'README.md', 'tutorial.md', 'slurm.md'}
    for page, file, key in found:
        place = Config.fromfile(root / file)
        for part in key.split('.')[:-1]:
            place = place[int(part) if part.isdecimal() else part]
            assert place is not None, (page, file, key)


def test_the_test_that_contributing_shows(root):
    text = (root / 'CONTRIBUTING.md').read_text()
    (code,) = re.findall(r'```python\n(def (test_\w+).*?)```', text, re.DOTALL)
    names = dict(torch=torch, group_advantages=group_advantages)
    exec(compile(code[0], 'CONTRIBUTING.md', 'exec'), names)
    names[code[1]]()


def test_readme(root, place):
    """Its commands on the tiny model; what needs 4B, data or a GPU is not run."""
    text = (root / 'README.md').read_text()
    for path in set(re.findall(r'(?:configs|tools)/[\w/]+\.(?:py|sh)', text)):
        # `mine` is what a command of the page writes.
        assert (root / path).is_file() or Path(path).stem == 'mine', path
    block = next(b for b in re.findall(r'```bash\n(.*?)```', text, re.DOTALL) if 'predict' in b)
    saved = Path('work_dirs/mine/iter_400.pth')
    saved.parent.mkdir(parents=True)
    shutil.copy(CHECKPOINT, saved)
    for command in block.strip().splitlines():
        assert not run(shlex.split(command))
    code = re.search(r'```python\n(from projects.llava_sam2_rl.inference.*?)```', text, re.DOTALL)
    exec(compile(code[1], 'README.md', 'exec'), {})


def test_a_config_of_ones_own(root, place):
    (code,) = blocks(root, 'tutorial.md', 'python')
    shutil.copytree(root / 'configs', 'copy')
    Path('copy/mine.py').write_text(code)
    config = Config.fromfile('copy/mine.py')
    assert config.model.objective.beta == 0.05
    assert config.model.objective.type is GRPOObjective
    assert config.train_cfg.max_iters == 60


def test_a_conversation_in_a_template(root, place):
    names: dict = {}
    code = blocks(root, 'language_models.md', 'python')[0]
    exec(compile(code, 'language_models.md', 'exec'), names)
    said = [i for i in names['labels'] if i != -100]
    assert names['policy'].tokenizer.decode(said) == 'It is [SEG].<|end|>A cross.<|end|>'
    assert names['input_ids'].count(names['policy'].image_token_id) == 36


def test_a_language_model_of_ones_own(root, place, monkeypatch):
    text = (root / 'docs/language_models.md').read_text()
    found = re.findall(r'```python(?: title="([^"]+)")?\n(.*?)```', text, re.DOTALL)
    _, (name, module), (_, code) = found
    Path(name).write_text(module)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setitem(LANGUAGE_MODELS, 'LlamaForCausalLM', None)
    monkeypatch.setitem(LORA_TARGETS, 'LlamaForCausalLM', None)
    names: dict = {}
    exec(compile(code, name, 'exec'), names)
    model = names['model'].eval()
    assert type(model.language_model.get_base_model()).__name__ == 'LlamaForCausalLM'
    ids = torch.randint(3, 200, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.bool)
    table = model.language_model.get_input_embeddings().weight
    with torch.no_grad():
        hidden = model.hidden_states(table[ids], mask)
        weighted = model.hidden_states(table[ids], mask, key_weights=torch.ones(2, 9))
    torch.testing.assert_close(hidden, weighted, rtol=0, atol=1e-5)


def test_every_path_and_class_named_in_the_pages_is_there(root):
    import projects.llava_sam2_rl.evaluation as evaluation

    for page in ('evaluation.md', 'inference.md'):
        text = (root / 'docs' / page).read_text()
        for path in re.findall(r'(?:configs|tools)/[\w/]+\.py', text):
            assert (root / path).is_file(), path
        for name in re.findall(r'\w+(?:Metric|Loop)\b', text):
            assert hasattr(evaluation, name), name
