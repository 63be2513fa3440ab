"The painter of glyphs, and what is found in its pictures."

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest

from collat.config import load_profile
from collat.image_generation import concepts_in, coverage_rows, image_scenes, reader_check, train_reader
from collat.painter import (
    CONCEPTS,
    SIZE,
    compose_picture,
    draw_set,
    found_painter,
    held_out,
    load_painter,
    multi_hot_sets,
    paint,
    shipped_painter,
    train_painter,
    written_states,
)
from collat.text_families import load_text_encoder

SMOKE = load_profile('smoke')


class Listed:
    "Scenes whose labels are given."

    split = 'test'

    def __init__(self, rows):
        self.rows = rows
        self.classes = sorted(set().union(*rows))

    def labels(self, i):
        return self.rows[i % len(self.rows)]


def test_scenes_that_can_be_painted():
    rows = [
        ['violin'],
        ['oboe'],
        ['violin', 'oboe'],
        ['piano', 'harpsichord'],
        ['violin', 'helicopter'],
        ['violin', 'helicopter', 'flute'],
    ]
    got = image_scenes(Listed(rows), 7)
    assert Counter(map(len, got.values())) == {1: 3, 2: 2, 3: 2}
    for i in got:  # no glyph, or one for two
        assert rows[i % 6] not in (['oboe'], ['violin', 'oboe'], ['piano', 'harpsichord'])
    with pytest.raises(ValueError, match='0 of 3'):
        image_scenes(Listed([['oboe'], ['oboe', 'violin'], ['oboe', 'flute']]), 3, look=50)


def test_coverage_is_the_mean_share():
    rng = np.random.default_rng(0)
    sets = [draw_set(rng) for _ in range(40)]
    found = rng.random((40, len(CONCEPTS))) < 0.3
    rows = coverage_rows(found, sets, 50)
    share = []
    invented = []
    for row, s in zip(found, sets):
        right = [row[CONCEPTS.index(c)] for c in s]
        share.append(np.mean(right))
        invented.append(sum(row) - sum(right))
    assert rows[0]['value'] == pytest.approx(np.mean(share)) and rows[0]['invented'] == pytest.approx(np.mean(invented))
    assert sum(r['n'] for r in rows[1:]) == 40 and all(r['lo'] <= r['value'] <= r['hi'] for r in rows)


def test_a_reader_learns_to_name_what_it_sees(tmp_path):
    "A few seconds of training, and it finds most concepts of sets it never saw together (chance: one in 26)."
    reader = train_reader(tmp_path, 60, batch=64)
    check = reader_check(reader, 200)
    assert check['clean']['precision'] > 0.9 and check['clean']['recall'] > 0.8, check
    rng = np.random.default_rng(5)
    sets = [draw_set(rng, tests=True) for _ in range(20)]
    assert all(held_out(s) for s in sets)
    found = concepts_in(reader, np.stack([compose_picture(s, rng) for s in sets]))
    assert found.shape == (20, len(CONCEPTS)) and found.any()
    assert (found & ~multi_hot_sets(sets).bool().numpy()).sum() <= found.sum() / 2


def test_a_painter_learns_a_glyph_and_hears_it(tmp_path):
    """One step beyond noise.

    After a short training the loss is well below its start, and the picture depends on the words."""
    small = dict(diffusion_steps=240, diffusion_captions=32, diffusion_batch=16, diffusion_width=64)
    p = dataclasses.replace(SMOKE, **small, checkpoint_every=1000)
    text = load_text_encoder('minilm')
    painter = train_painter(tmp_path, text, p)
    losses = json.loads((tmp_path / 'config.json').read_text())['losses']
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:3]), losses
    states = written_states(text, ['This is a sound of violin', 'This is a sound of helicopter'], p.n_tokens)
    a = paint(painter, states, seeds=[0, 0], steps=3)
    assert a.shape == (2, SIZE, SIZE, 3) and not np.array_equal(a[0], a[1])
    assert np.array_equal(paint(painter, states, seeds=[0, 0], steps=3), a)
    assert not np.array_equal(paint(painter, states, seeds=[1, 1], steps=3), a)
    bird = written_states(text, 'This is a sound of bird', p.n_tokens)
    no = paint(painter, states, seeds=[0, 0], steps=3, negative=bird)
    assert not np.array_equal(no, a)
    with pytest.raises(ValueError, match='states of width 4'):
        paint(painter, states[..., :4])


def test_the_shipped_painter_is_found_and_one_beside_the_model_comes_first(tmp_path):
    text = load_text_encoder('minilm')
    shipped = shipped_painter(text)
    assert shipped is not None and shipped_painter(text, tmp_path) is None
    before = load_painter(shipped, text).state_dict()
    assert all((before[k] == w).all() for k, w in found_painter(tmp_path / 'model', text).state_dict().items())
    small = dict(diffusion_steps=1, diffusion_captions=4, diffusion_batch=2, diffusion_width=32)
    train_painter(tmp_path / 'painter', text, dataclasses.replace(SMOKE, **small))
    assert found_painter(tmp_path / 'model', text).made['steps'] == 1
    other = load_text_encoder('open_clip:tiny-quickgelu')
    with pytest.raises(ValueError, match='learnt to read another text encoder'):
        found_painter(tmp_path / 'model', other)
    with pytest.raises(FileNotFoundError, match='no painter there.*--stages image_generation'):
        found_painter(tmp_path / 'nowhere/model', other)
