"Prompts: properties over random label lists (single cases are tested in nbs/02_prompts.ipynb)."

import random
from collections import Counter

import pytest

from collat.prompts import (
    TEMPLATES,
    class_prompts,
    fit_prompt,
    join_labels,
    label_hash,
    label_to_words,
    prompt,
    protocol,
)

NAMES = [
    'dog_bark',
    'Male speech, man speaking',
    'Keyboard_(musical)',
    'Dishes, pots, and pans',
    'Rain',
    'Crying_and_sobbing',
    'C{}3',
    'éclair',
]


def words(text):
    return len(text.split())


def bag(text):
    return Counter(w.strip(',.') for w in text.split())


@pytest.mark.parametrize('template', TEMPLATES)
def test_every_label_is_read_once_and_in_order(template):
    rng = random.Random(0)
    for _ in range(200):
        labels = rng.sample(NAMES, rng.randint(1, len(NAMES)))
        text = prompt(labels, template)
        assert '_' not in text
        at = [text.index(label_to_words(l)) for l in labels]
        assert at == sorted(at)
        # nothing but labels, separators and the template
        expected = bag(TEMPLATES[template].removesuffix('{}.').replace('{}', ''))
        for l in labels:
            expected += bag(label_to_words(l))
        expected['and'] += len(labels) > 1 and template != 'concat'
        assert bag(text) == +expected


def test_the_printed_forms():
    assert prompt(['A']) == 'This is a sound of A'
    assert prompt(['A', 'B']) == 'This is a sound of A, and B'
    assert prompt(['A', 'B', 'C']) == 'This is a sound of A, B, and C'


def test_fit_keeps_the_longest_prefix_that_fits():
    rng = random.Random(1)
    for _ in range(300):
        labels = rng.sample(NAMES, rng.randint(1, 6))
        room = rng.randint(1, 25)
        fits = [k for k in range(1, len(labels) + 1) if words(prompt(labels[:k])) <= room]
        if not fits:
            with pytest.raises(ValueError, match=f'{room} are allowed'):
                fit_prompt(labels, words, room)
        else:
            assert fit_prompt(labels, words, room) == (prompt(labels[: max(fits)]), len(labels) - max(fits))


def test_generators_and_tuples_are_lists_and_a_string_is_one_label():
    assert prompt(l for l in ('A', 'B')) == prompt(('A', 'B'))
    for f in (join_labels, prompt, class_prompts, label_hash, protocol):
        assert f('Male speech, man speaking') == f(['Male speech, man speaking'])
        with pytest.raises(TypeError, match='a list of names'):
            f(None)
        with pytest.raises(ValueError, match='no labels'):
            f([])
    with pytest.raises(TypeError, match='a string is accepted'):
        prompt(['A', 7])


def test_hash_is_fixed_for_all_time():
    "Results that were written in the past are recognised by it."
    assert label_hash(['dog_bark', 'Male speech, man speaking', 'éclair']) == '7e7b1e48477e'
