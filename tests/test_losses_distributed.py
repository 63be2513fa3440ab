"""Two ranks on gloo give the gradients of one process with the whole batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name('two_ranks.py')
CASES = 'default', 'padding_masked', 'hungarian_sum', 'diagonal', 'contrastive_only', 'filler'


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks') / 'out.json'
    cmd = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(SCRIPT), str(out)]
    p = subprocess.run(cmd, capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize('case', CASES)
def test_gradients(result, case):
    grads = result[case]['gradient']
    assert 'logit_scale' in grads and len(grads) == 7
    assert max(grads.values()) <= 1e-8, grads
    assert result[case]['loss'] <= 1e-8


def test_duplicates_are_counted_over_ranks(result):
    assert result['default']['n_duplicates'] == 3  # 4, 9, 4; the only other 9 is on rank 1


def test_unequal_batches_are_refused(result):
    assert '[3, 4]' in result['unequal']
