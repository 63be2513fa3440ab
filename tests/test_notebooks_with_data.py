"Notebooks that show more where public data lies than on a bare clone: their cells and assertions on it."

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    'notebook',
    [
        pytest.param('02_prompts', marks=pytest.mark.data('class_labels')),
        pytest.param('03_metrics', marks=pytest.mark.data('audiocaps')),
        pytest.param('25_text_retention', marks=pytest.mark.data('audiocaps')),
    ],
)
def test_notebook_on_real_data(notebook):
    program = Path(sys.executable).with_name('nbdev_test')
    done = subprocess.run(
        [program, '--path', f'nbs/{notebook}.ipynb', '--n_workers', '0'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
