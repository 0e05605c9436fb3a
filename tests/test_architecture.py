"""What the contracts of import-linter in pyproject.toml (`make lint`) leave out."""

from __future__ import annotations

import tomllib
from pathlib import Path

import grimp
import pytest

PACKAGE = 'projects.llava_sam2_rl'
MAX_LINES = 400


@pytest.fixture(scope='module')
def graph() -> grimp.ImportGraph:
    """Who imports whom, imports inside functions too."""
    return grimp.build_graph(PACKAGE, cache_dir=None)


def test_no_import_circle(graph):
    """import-linter compares siblings and does not see a module that imports its own package."""
    circles = []
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            way_back = graph.find_shortest_chain(importer=imported, imported=importer)
            if way_back:
                circles.append(' -> '.join((importer, *way_back)))
    assert not circles, '\n'.join(circles)


def test_every_module_of_models_is_on_a_floor(graph, root):
    """A module that the layers contract does not name could import anything."""
    settings = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['importlinter']
    (layers,) = (one['layers'] for one in settings['contracts'] if one['id'] == 'layers')
    named = {name.strip(' ()') for layer in layers for name in layer.split(':')}
    there = {name.removeprefix(f'{PACKAGE}.') for name in graph.find_children(f'{PACKAGE}.models')}
    assert {name for name in named if name.startswith('models.')} == there


def test_no_file_is_too_long_to_read(root):
    lengths = {
        path.relative_to(root).as_posix(): len(path.read_text().splitlines())
        for path in (root / Path(*PACKAGE.split('.'))).rglob('*.py')
    }
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES} == {}
