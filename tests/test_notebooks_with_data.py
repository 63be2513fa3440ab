"Notebooks that show more where public data lies than on a bare clone: their cells and assertions on it."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


NEEDS = {'02_prompts': 'class_labels', '03_metrics': 'audiocaps', '25_text_retention': 'audiocaps'}


@pytest.mark.parametrize('notebook', [pytest.param(n, marks=pytest.mark.data(data)) for n, data in NEEDS.items()])
def test_notebook_on_real_data(notebook):
    program = Path(sys.executable).with_name('nbdev_test')
    command = [program, '--path', f'nbs/{notebook}.ipynb', '--n_workers', '0']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
