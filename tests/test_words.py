"The composition test was built beforehand: the committed cases are what the committed code builds."

import json

import numpy as np

from collat.config import load_profile
from collat.scenes import SPLIT_IDS, split_classes
from collat.words import CASES, FORMS, compose_cases


def test_committed_cases_are_what_the_code_builds():
    p = load_profile('mini')
    kept = json.loads(CASES.read_text())
    classes = split_classes('test', p)

    def label(i):
        rng = np.random.default_rng([p.seed_data, SPLIT_IDS['test'], 1, i])
        return classes[int(rng.choice(len(classes), 1, replace=False)[0])]

    assert kept['cases'] == compose_cases({i: label(i) for i in range(0, p.n_test, 2)}, classes, p.compose_cases)
    assert len(kept['cases']) >= 100 and {c['kind'] for c in kept['cases']} == set(FORMS)
