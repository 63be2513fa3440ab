"""What people really type and hand over, on the command line: each row of issue 23 about lists, tables, model folders
and runs is answered, or refused with a sentence, before any work."""

import io
import json
import sys

import numpy as np
import pytest
import soundfile as sf
from safetensors.torch import load_file, save_file

from collat.cli import is_refusal, main, say
from collat.config import load_profile
from collat.model import CoLLAT


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Two sounds, two films that are none, an empty folder, and a model of smoke size."
    d = tmp_path_factory.mktemp('inputs')
    (d / 'mix').mkdir()
    for name in ('a.wav', 'b c.wav', 'mix/a.wav', 'mix/b.w64'):
        sf.write(d / name, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    for name in ('mix/c.m4a', 'mix/d.mp4'):
        (d / name).write_bytes(b'no sound')
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'model')
    return d


@pytest.fixture
def collat(here, monkeypatch, capsys):
    "The command in this process: exit code, lines on standard output, standard error."

    def call(*argv, stdin=b''):
        monkeypatch.chdir(here)
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as e:
            main(list(map(str, argv)))
        said = capsys.readouterr()
        assert 'Traceback' not in said.err
        return e.value.code, said.out.splitlines(), said.err

    return call


ASK = '--model', 'model', '--quiet', '--json', '--labels', '"Music, violin",bell', '-k', '1'


def files(lines):
    return [json.loads(l)['file'] for l in lines]


@pytest.mark.parametrize('code', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_list_is_read_as_people_write_it(collat, code):
    text = '# of Tuesday\r\na.wav  \r\n\r\n"b c.wav"\r\n'
    done, lines, err = collat('classify', '-', *ASK, stdin=text.encode(code))
    assert done == 0 and files(lines) == ['a.wav', 'b c.wav'], err
    assert {x['label'] for l in lines for x in json.loads(l)['labels']} <= {'Music, violin', 'bell'}


def test_what_a_list_names_in_vain_is_skipped(collat):
    done, lines, err = collat('classify', '-', *ASK, stdin=b'gone.wav\na.wav\n')
    assert done == 3 and files(lines) == ['a.wav'] and 'gone.wav: no such file' in err and '1 of 2 files' in err


def test_sound_in_the_place_of_a_list_is_refused(collat, here):
    done, lines, err = collat('classify', '-', *ASK, stdin=(here / 'a.wav').read_bytes())
    assert done == 2 and not lines and 'standard input: sound' in err


def test_a_folder_answers_for_all_that_is_sound_in_it(collat):
    done, lines, err = collat('classify', 'mix', *ASK)
    assert done == 3 and files(lines) == ['mix/a.wav', 'mix/b.w64']
    assert 'mix/c.m4a' in err and 'mix/d.mp4' in err and '2 of 4 files' in err


def test_a_name_in_any_bytes_comes_through_json(monkeypatch):
    name = b'caf\xe9.wav'.decode(errors='surrogateescape')
    out = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', errors='backslashreplace')  # as `main` sets it
    monkeypatch.setattr(sys, 'stdout', out)
    say(dict(file=name, score=0.5), as_json=True)
    assert json.loads(out.buffer.getvalue())['file'] == name


@pytest.mark.parametrize(
    'argv, says',
    [
        (('classify', ''), 'classify: an empty argument'),
        (('classify', 'a.wav', '--model', ''), '--model: an empty argument'),
        (('classify', 'a.wav', '--labels', ','), "--labels ',': an empty name"),
        (('classify', 'a.wav', '--labels', '"a'), 'double quotes'),
        (('run', '--stages', ''), '--stages: an empty argument'),
        (('run', '--stages', ' , '), 'an empty name'),
        (('eval', '--data', 'my.csv', '--out', 'mix'), 'mix is a folder; the name of a file'),
        (('eval', '--data', 'my.csv', '--out', 'a.wav/x.json'), 'a.wav/x.json cannot be written'),
        (('eval', '--data', 'my.csv', '--protocol', 'papr'), "Did you mean 'paper'"),
        (('imagine', 'a.wav', '--out', 'a.wav'), 'a.wav is a file; the name of a folder'),
        (('data', 'shard', 'my.csv', '--out', 'a.wav'), 'a.wav is a file'),
        (('run', '--plan', '--profile', 'smoke', '--run-dir', 'a.wav'), 'a.wav is a file'),
        (('run', '--profile', 'smoke', '--run-dir', 'a.wav'), 'a.wav is a file'),
    ],
)
def test_refused_before_any_work(collat, argv, says):
    done, lines, err = collat(*argv)
    assert done == 2 and not lines and says in err, err


VALUES = {
    'lr=nan': 'a finite number',
    'batch=0': 'more than zero',
    'n_mels=0': 'more than zero',
    'heads_audio=3': 'heads',
    'backbone=nope': "backbone 'nope'",
    'sweeps=nope': "'nope' is not a group",
    'clip_seconds=-1': 'zero or more',
    'data=nope': "data set 'nope'",
}


@pytest.mark.parametrize('value', VALUES)
def test_all_values_are_checked_before_anything_moves(collat, here, value):
    model = here / 'runs/checkpoints/model/model.safetensors'
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_text('an evening of training')
    for more in ((), ('--plan',)):
        done, lines, err = collat('run', '--profile', 'smoke', '--run-dir', 'runs', value, *more)
        assert done == 2 and not lines and VALUES[value] in err, err
    assert [str(f.relative_to(here / 'runs')) for f in (here / 'runs').rglob('*') if f.is_file()] == [
        'checkpoints/model/model.safetensors'
    ]


def test_a_run_folder_may_hold_an_equals_sign(collat, here):
    done, lines, err = collat('run', '--plan', '--run-dir', 'runs/lr=0.1', '--profile', 'smoke', '--stages', 'scenes')
    assert done == 0 and lines[0].startswith('04_scenes'), err


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def changed(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


BROKEN = {
    'half': (lambda f, c: cut(f, f.stat().st_size // 2), 'model.safetensors: cut off'),
    'empty': (lambda f, c: cut(f, 0), 'model.safetensors: cut off'),
    'pointer': (lambda f, c: f.write_text('version https://git-lfs.github.com/spec/v1\n'), 'git lfs pull'),
    'lacks': (lambda f, c: changed(f, lambda w: w.pop('logit_scale')), 'no logit_scale in it'),
    'shape': (lambda f, c: changed(f, lambda w: w.update(logit_scale=w['logit_scale'][None])), 'of shape (1,)'),
    'nan': (lambda f, c: changed(f, lambda w: w['logit_scale'].fill_(float('nan'))), 'holds NaN'),
    'json': (lambda f, c: cut(c, 99), 'config.json: cut off'),
    'list': (lambda f, c: c.write_text('[]'), 'config.json: a list'),
    'fields': (lambda f, c: c.write_text('{"stepz": 3}'), "config.json: 'stepz' is not a field"),
    'latin': (lambda f, c: c.write_bytes(b'{"name": "caf\xe9"}'), 'config.json: cut off, or not a JSON file'),
}


@pytest.mark.parametrize('fault', BROKEN)
def test_a_broken_model_folder_is_named(collat, here, tmp_path, fault):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((here / 'model' / name).read_bytes())
    breaks, says = BROKEN[fault]
    breaks(tmp_path / 'model.safetensors', tmp_path / 'config.json')
    done, lines, err = collat('classify', 'a.wav', '--model', tmp_path, '--quiet')
    assert done == 2 and not lines and says in err and str(tmp_path) in err, err


def test_a_table_says_what_was_left_out(collat, here):
    (here / 'my.csv').write_text('path,labels\na.wav,dog\nb c.wav,bell\ngone.wav,bell\nmix/a.wav,\n')
    done, lines, err = collat('eval', '--checkpoint', 'model', '--data', 'my.csv')
    body = json.loads('\n'.join(lines))
    assert (
        done == 0
        and body['n'] == 2
        and body['left_out'] == dict(missing=1, empty=0, corrupt=0, unreadable=0, unlabelled=1)
    )
    assert 'left out, missing: gone.wav' in err and 'left out, unlabelled' in err


def test_one_class_is_said_in_the_tables_words(collat, here):
    (here / 'one.csv').write_text('path,labels\na.wav,dog\ngone.wav,bell\n')
    done, _, err = collat('eval', '--checkpoint', 'model', '--data', 'one.csv')
    assert done == 2 and "one.csv: only the class 'dog' in what can be used (missing: gone.wav)" in err


def test_a_full_disk_is_told_and_a_defect_is_not():
    def caught(e):
        try:
            raise e
        except Exception as e:
            return e

    for e in (OSError(28, 'No space left on device'), PermissionError(13, 'Permission denied', 'x.json')):
        assert is_refusal(caught(e))
    assert not is_refusal(caught(KeyError('x'))) and not is_refusal(caught(OSError('some other')))
