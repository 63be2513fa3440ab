"The whole sequence, shrunk to seconds, by papermill: with MiniLM, and with a randomly initialised CLIP tower."
import json, subprocess, sys
from pathlib import Path

import pytest

from collat.config import read_results

ROOT = Path(__file__).parent.parent


def collat(*args):
    return subprocess.run([sys.executable, '-m', 'collat.cli', *args], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize('profile', ['smoke', 'smoke_clip'])
def test_every_stage_runs_and_a_second_call_does_nothing(profile, tmp_path):
    run = tmp_path/profile
    first = collat('run', '--profile', profile, '--run-dir', str(run))
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    zs = read_results(run/'results/zero_shot.json')
    assert zs['profile']['name'] == profile and zs['run']['seed'] == 0 and zs['run']['versions']['torch']
    rows = [r for r in zs['results']['rows'] if r['protocol'] == 'paper']
    assert {(r['split'], r['metric'], r['noisy']) for r in rows} >= {(s, m, n) for s in ('test', 'unseen') for m in ('top-1', 'mAP') for n in (False, True)}
    assert all(r['lo'] <= r['value'] <= r['hi'] and r['n'] > 1 for r in rows)
    assert len(read_results(run/'results/training.json')['results']['valid']) == 2
    assert '## Losses (Table 3a)' in (run/'report.md').read_text()
    reads = [json.loads(l) for l in (run/'data/test_reads.jsonl').read_text().splitlines()]
    assert {r['purpose'].split(':')[0] for r in reads} == {'04_scenes', '20_zero_shot'}
    assert not (ROOT/'figures'/profile).exists(), 'only a run in runs/<profile> is published'
    second = collat('run', '--profile', profile, '--run-dir', str(run))
    assert second.returncode == 0 and 'stage 1 of' not in second.stdout
    assert read_results(run/'results/zero_shot.json') == zs
