import json
import socket

import numpy as np
import pytest
from PIL import Image

from projects.llava_sam2_rl.datasets import Photographs, Sa2VATransform
from projects.llava_sam2_rl.datasets.photographs import ANNOTATIONS


@pytest.fixture(scope='module')
def samples():
    return {item['sample'].sample_id: item['sample'] for item in Photographs()}


def test_every_object_has_a_mask_inside_its_picture(samples):
    assert len(samples) == 19
    for sample in samples.values():
        assert 0.004 < sample.mask.mean() < 0.5, sample.name
        assert sample.caption
        assert sample.category


def shoelace(segmentation):
    x, y = np.array(segmentation[0::2]), np.array(segmentation[1::2])
    return 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def test_masks_have_the_area_of_their_outlines(samples):
    data = json.loads(ANNOTATIONS.read_text())
    by_id = {int(name.rsplit('-', 1)[1]): sample for name, sample in samples.items()}
    for annotation in data['annotations']:
        area = sum(shoelace(polygon) for polygon in annotation['segmentation'])
        assert by_id[annotation['id']].mask.sum() == pytest.approx(area, rel=0.05)


def test_masks_lie_on_their_objects(samples):
    """Colours that only the outlined object has."""

    def share(name, test):
        sample = samples[name]
        pixels = sample.image[sample.mask].astype(int)
        return test(*pixels.T).mean()

    assert share('chelsea-nose-7', lambda r, g, b: r - b > 40) > 0.7
    # A black cable of the motorcycle crosses it in the left picture.
    assert share('motorcycle_left-container-16', lambda r, g, b: r - g > 60) > 0.8
    assert share('motorcycle_right-container-17', lambda r, g, b: r - g > 60) > 0.9
    assert share('motorcycle_left-seat-14', lambda r, g, b: r - g < 40) > 0.9
    assert share('coffee-saucer-10', lambda r, g, b: r - g > 20) > 0.8
    assert share('rocket-rocket-11', lambda r, g, b: r > 100) > 0.8


def test_the_stereo_pair_shows_the_same_objects(samples):
    paired = {name: sample for name, sample in samples.items() if sample.has_pair}
    assert {s.category for s in paired.values()} == {'motorcycle', 'seat', 'container'}
    assert len(paired) == 6
    left, right = paired['motorcycle_left-seat-14'], paired['motorcycle_right-seat-15']
    assert np.array_equal(left.image2, right.image)
    assert np.array_equal(left.mask2, right.mask)
    assert np.array_equal(right.image2, left.image)
    assert np.array_equal(right.mask2, left.mask)
    # What is near moves to the left in the right picture.
    for a in paired.values():
        shift = np.argwhere(a.mask2)[:, 1].mean() - np.argwhere(a.mask)[:, 1].mean()
        assert (shift < -10) == a.sample_id.startswith('motorcycle_left')


def test_a_sentence_is_chosen_per_index():
    data = Photographs()
    captions = {data[epoch * len(data)]['sample'].caption for epoch in range(20)}
    annotation = json.loads(ANNOTATIONS.read_text())['annotations'][0]
    assert captions == set(annotation['sentences'])


def test_another_object_of_the_picture_is_the_distractor(samples):
    annotations = json.loads(ANNOTATIONS.read_text())['annotations']
    for annotation, sample in zip(annotations, samples.values()):
        others = [
            sentence
            for a in annotations
            if a['image_id'] == annotation['image_id'] and a['id'] != annotation['id']
            for sentence in a['sentences']
        ]
        assert sample.distractor in (others or [None])
    assert samples['rocket-rocket-11'].distractor is None


def test_it_reads_from_disk_alone(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a connection was opened')

    monkeypatch.setattr(socket, 'socket', refuse)
    data = Photographs(transforms=Sa2VATransform(image_size=56, grounding_size=64))
    assert data[11]['masks2'].shape == (1, 500, 741)


def test_missing_pictures_are_named(tmp_path):
    Image.new('RGB', (512, 512)).save(tmp_path / 'astronaut.png')
    with pytest.raises(FileNotFoundError, match=r'lacks chelsea\.png, coffee\.png') as error:
        Photographs(image_dir=str(tmp_path))
    assert 'astronaut.png' not in str(error.value)
