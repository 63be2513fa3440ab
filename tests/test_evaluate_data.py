"`collat eval` from end to end: every task on a table of sounds with labels, captions and splits, one of them broken."

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from collat import zero_shot
from collat.cli import TASKS, main
from collat.config import Preempted, load_profile
from collat.evaluate import embed_manifest, evaluation_set, load_any
from collat.model import CoLLAT

TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('eval')
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'model')
    rng = np.random.default_rng(0)
    rows = ['path,labels,captions,split']
    for i in range(28):
        label = ('tone', 'noise')[i % 2]
        x = np.sin(np.arange(16_000) * (0.05 + 0.01 * (i % 5))) if label == 'tone' else rng.normal(size=16_000)
        sf.write(d / f'{i}.wav', 0.2 * x, 16_000)
        said = '|'.join(
            t.format(label) for t in ('a {}', 'the sound of a {}', '{} is heard', 'here is {}', 'somewhere a {}')
        )
        split = 'train' if i < 12 else 'valid' if i < 18 else 'test'
        rows.append(f'{i}.wav,{label},{said},{split}')
    (d / '27.wav').write_bytes(b'RIFF, but no sound')
    (d / 'my.csv').write_text('\n'.join(rows) + '\n')
    (d / 'bare.csv').write_text('path\n0.wav\n')
    (d / 'labels.csv').write_text('path,labels\n0.wav,tone\n2.wav,noise\n')
    (d / 'captions.csv').write_text('path,caption\n0.wav,a tone\n')
    return d


@pytest.fixture(scope='module')
def many(folder):
    "A table whose clips are more than two groups, of many lengths, two of them broken."
    rng = np.random.default_rng(1)
    rows = ['path,labels']
    for i in range(75):
        sf.write(folder / f'many{i}.wav', 0.1 * rng.normal(size=6_000 + 400 * (i % 7)), 16_000)
        rows.append(f'many{i}.wav,{("tone", "noise")[i % 2]}')
    for i in (3, 40):
        (folder / f'many{i}.wav').write_bytes(b'RIFF, but no sound')
    (folder / 'many.csv').write_text('\n'.join(rows) + '\n')
    return folder / 'many.csv'


def evaluate(folder, task, data='my.csv', *more):
    files = dict(checkpoint=folder / 'model', data=folder / data, out=folder / f'{task}.json')
    options = [word for k, f in files.items() for word in (f'--{k}', str(f))]
    with pytest.raises(SystemExit) as e:
        main(['eval', '--task', task, *options, *more])
    return e.value.code


@pytest.mark.parametrize(
    'task, metrics, n',
    [
        ('zero_shot', {'top-1'}, 27),
        ('linear_probe', {'top-1'}, 9),
        ('retrieval', {'R@1', 'R@5', 'R@10', 'AP@10', 'MRR'}, 27),
        ('captioning', {'BLEU-1', 'CIDEr', 'METEOR', 'ROUGE-L'}, 9),
    ],
)
def test_every_task_on_a_users_table(folder, task, metrics, n, capsys):
    assert evaluate(folder, task) == 0
    r = json.loads((folder / f'{task}.json').read_text())['results']
    assert json.loads(capsys.readouterr().out)['rows'] == r['rows']
    assert {x['metric'] for x in r['rows'] if x['value'] is not None} >= metrics
    assert n in {x['n'] for x in r['rows']} and r['checkpoint']
    assert len(r['skipped']) == 1 and '27.wav' in str(r['skipped'])


def test_two_ranks_embed_as_one_process_does(folder, many, tmp_path):
    "Embeddings to the last bit, clips and reasons in the order of the table, on both ranks."
    torch.set_num_threads(1)  # as the ranks do
    e, clips, skipped = embed_manifest(load_any(folder / 'model'), evaluation_set(many))
    assert len(clips) == 73 and [Path(s.split(':')[0]).name for s in skipped] == ['many3.wav', 'many40.wav']
    args = [str(Path(__file__).parent / 'eval_ranks.py'), str(folder / 'model'), str(many), str(tmp_path / 'two')]
    subprocess.run([sys.executable, *TORCHRUN, *args], check=True, capture_output=True)
    for rank in (torch.load(tmp_path / f'two.{i}', weights_only=True) for i in (0, 1)):
        assert torch.equal(rank['z'], e.z) and torch.equal(rank['y'], e.y)
        assert rank['paths'] == [str(c.path) for c in clips] and rank['skipped'] == skipped


@pytest.mark.skipif(os.cpu_count() < 2, reason='two processes need two cores')
def test_eval_on_two_processes_says_what_one_says(folder, many, capsys):
    said = []
    for more in ([], ['--gpus', '2']):
        assert evaluate(folder, 'zero_shot', many.name, *more) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]['clips'] == 73
    written = json.loads((folder / 'zero_shot.json').read_text())
    assert written['results'] == said[1]


def test_what_is_said_when_a_process_fails(monkeypatch, capsys):
    "Without starting one: the group of processes is played."

    def run(play):
        monkeypatch.setattr(zero_shot, 'run_group', play)
        return zero_shot.in_processes(2, dict(template=''))

    def fails(cmd, failure):
        failure.write_text('rank 1: ValueError: no clip\nTraceback ...\n')
        return 1

    def stopped(cmd, failure):
        raise Preempted('stopped')

    with pytest.raises(RuntimeError, match='the evaluation failed: rank 1: ValueError: no clip$'):
        run(fails)
    assert 'Traceback' in capsys.readouterr().err
    with pytest.raises(RuntimeError, match='one of 2 processes was killed .exit code 9'):
        run(lambda *_: 9)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)


def test_more_processes_than_the_machine_has_and_tasks_that_run_in_one(folder, many, capsys):
    assert evaluate(folder, 'zero_shot', many.name, '--gpus', '999') == 2
    assert 'this machine has' in capsys.readouterr().err
    assert evaluate(folder, 'retrieval', many.name, '--gpus', '2') == 2
    assert 'retrieval runs in one process' in capsys.readouterr().err


@pytest.mark.parametrize(
    'task, data, said',
    [
        ('zero_shot', 'bare.csv', 'labels'),
        ('zero_shot', 'captions.csv', 'column labels'),
        ('linear_probe', 'captions.csv', 'no labels; two classes or more are needed'),
        ('retrieval', 'labels.csv', 'column caption'),
        ('captioning', 'labels.csv', 'train, valid and test'),
    ],
)
def test_a_table_that_lacks_something_is_refused(folder, task, data, said, capsys):
    assert evaluate(folder, task, data) == 2
    assert said in capsys.readouterr().err


def test_all_tasks_are_tried():
    assert set(TASKS) == {'zero_shot', 'linear_probe', 'retrieval', 'captioning'}


def test_probe_of_audioset_learns_from_the_balanced_split(folder, tmp_path):
    "Balanced to learn from, eval to be judged by, both multi-label; what lies in `unbalanced` is not read."
    from collat.linear_probe import linear_probe_on_data

    base = tmp_path / 'AudioSet'
    base.mkdir()
    (base / 'class_labels_indices.csv').write_text(
        'index,mid,display_name\n0,/m/0,"Tone"\n1,/m/1,"Noise"\n2,/m/2,"Sound"\n'
    )
    rng = np.random.default_rng(0)
    for split, file, n in (
        ('balanced', 'balanced_train', 12),
        ('eval', 'eval', 6),
        ('unbalanced', 'unbalanced_train', 2),
    ):
        rows = [(f'{split[:4]}video{i:02d}', i % 2) for i in range(n)]
        lines = ['# made', f'# num_ytids={n}, num_segs={n}, num_unique_labels=3']
        lines += ['# YTID, start_seconds, end_seconds, positive_labels']
        lines += [f'{v}, 0.000, 10.000, "/m/{k},/m/2"' for v, k in rows]
        (base / f'{file}_segments.csv').write_text('\n'.join(lines) + '\n')
        (base / 'audio' / split).mkdir(parents=True)
        for v, k in rows:
            wav = rng.normal(size=16_000) if k else np.sin(np.arange(16_000) * 0.06)
            sf.write(base / f'audio/{split}/{v}.wav', 0.2 * wav, 16_000)
    r = linear_probe_on_data(folder / 'model', 'audioset', root=tmp_path, n_boot=20)
    assert {(x['metric'], x['n']) for x in r['rows'] if x['metric'] == 'mAP'} == {('mAP', 6)}
    assert all(x['split'] == 'eval' for x in r['rows'])
