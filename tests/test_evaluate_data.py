"`collat eval` from end to end: every task on a table of sounds with labels, captions and splits, one of them broken."

import json

import numpy as np
import pytest
import soundfile as sf

from collat.cli import TASKS, main
from collat.config import load_profile
from collat.model import CoLLAT


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('eval')
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'model')
    rng = np.random.default_rng(0)
    forms = ['a {}', 'the sound of a {}', '{} is heard', 'here is {}', 'somewhere a {}']
    splits = ['train'] * 12 + ['valid'] * 6 + ['test'] * 10
    rows = ['path,labels,captions,split']
    for i in range(28):
        label = ('tone', 'noise')[i % 2]
        x = np.sin(np.arange(16_000) * (0.05 + 0.01 * (i % 5))) if label == 'tone' else rng.normal(size=16_000)
        sf.write(d / f'{i}.wav', 0.2 * x, 16_000)
        captions = '|'.join(forms).replace('{}', label)
        rows.append(f'{i}.wav,{label},{captions},{splits[i]}')
    (d / '27.wav').write_bytes(b'RIFF, but no sound')
    (d / 'my.csv').write_text('\n'.join(rows) + '\n')
    (d / 'bare.csv').write_text('path\n0.wav\n')
    (d / 'labels.csv').write_text('path,labels\n0.wav,tone\n2.wav,noise\n')
    (d / 'captions.csv').write_text('path,caption\n0.wav,a tone\n')
    return d


def evaluate(folder, task, data='my.csv'):
    files = dict(checkpoint=folder / 'model', data=folder / data, out=folder / f'{task}.json')
    options = ['--task', task]
    for name, path in files.items():
        options += [f'--{name}', str(path)]
    with pytest.raises(SystemExit) as e:
        main(['eval', *options])
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


@pytest.mark.parametrize(
    'task, data, said',
    [
        ('zero_shot', 'bare.csv', 'labels'),
        ('zero_shot', 'captions.csv', 'column labels'),
        ('linear_probe', 'captions.csv', 'a probe needs them'),
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
    from collat.linear_probe import evaluate_data

    base = tmp_path / 'AudioSet'
    base.mkdir()
    labels = ['index,mid,display_name', '0,/m/0,"Tone"', '1,/m/1,"Noise"', '2,/m/2,"Sound"', '']
    (base / 'class_labels_indices.csv').write_text('\n'.join(labels))
    rng = np.random.default_rng(0)
    files = dict(balanced=('balanced_train', 12), eval=('eval', 6), unbalanced=('unbalanced_train', 2))
    for split, (file, n) in files.items():
        (base / 'audio' / split).mkdir(parents=True)
        head = ['# made', f'# num_ytids={n}, num_segs={n}, num_unique_labels=3']
        lines = [*head, '# YTID, start_seconds, end_seconds, positive_labels']
        for i in range(n):
            video = f'{split[:4]}video{i:02d}'
            lines.append(f'{video}, 0.000, 10.000, "/m/{i % 2},/m/2"')
            x = rng.normal(size=16_000) if i % 2 else np.sin(np.arange(16_000) * 0.06)
            sf.write(base / f'audio/{split}/{video}.wav', 0.2 * x, 16_000)
        (base / f'{file}_segments.csv').write_text('\n'.join([*lines, '']))
    r = evaluate_data(folder / 'model', 'audioset', root=tmp_path, n_boot=20)
    assert {x['n'] for x in r['rows'] if x['metric'] == 'mAP'} == {6}
    assert {x['split'] for x in r['rows']} == {'eval'}
