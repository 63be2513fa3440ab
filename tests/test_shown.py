"Stored outputs of the notebooks that show a published run come from the results files in the repository."

import json
import re
from pathlib import Path

import pytest

from collat.shown import short_digest, showing

ROOT = Path(__file__).parent.parent
SHOWN = re.compile(r'figures/(\w+): ([\w-]+\.json) ([0-9a-f]{8}),')


def printed(path) -> str:
    "What the cells of a notebook print."
    cells = json.loads(path.read_text())['cells']
    outputs = [o for c in cells for o in c.get('outputs', [])]
    return ''.join(''.join(o.get('text', '')) for o in outputs)


NOTEBOOKS = showing(ROOT / 'nbs')
OTHERS = [p for p in sorted((ROOT / 'nbs').glob('*.ipynb')) if p not in NOTEBOOKS and SHOWN.search(printed(p))]


def test_the_evaluations_show_what_is_published():
    assert {'20_zero_shot', '31_architecture'} <= {path.stem for path in NOTEBOOKS}
    assert '35_own_ears' in {path.stem for path in OTHERS}


@pytest.mark.parametrize('path', NOTEBOOKS + OTHERS, ids=lambda p: p.stem)
def test_stored_outputs_are_those_of_the_published_results(path):
    said = printed(path)
    found = SHOWN.findall(said)
    assert found, f'{path.name}: no output names a results file; run `python -m collat.shown --names {path.stem}`'
    for profile, name, stored in found:
        now = short_digest(ROOT / f'figures/{profile}/{name}')
        assert stored == now, f'{path.name} shows another {name}; run `python -m collat.shown --names {path.stem}`'
    assert 'this run:' not in said
