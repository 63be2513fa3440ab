"""What people really type and hand over, on the command line: each row of issue 23 about lists, tables, model folders
and runs is answered, or refused with a sentence, before any work."""

import codecs
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
from collat.tables import load_csv


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


@pytest.mark.parametrize('code', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-le with a mark'])
def test_a_list_is_read_as_people_write_it(collat, code):
    text = '# of Tuesday\r\na.wav  \r\n\r\n"b c.wav"\r\n'
    data = codecs.BOM_UTF16_LE + text.encode('utf-16-le') if 'mark' in code else text.encode(code)
    done, lines, err = collat('classify', '-', *ASK, stdin=data)
    assert done == 0 and files(lines) == ['a.wav', 'b c.wav'], err
    assert {x['label'] for l in lines for x in json.loads(l)['labels']} <= {'Music, violin', 'bell'}


@pytest.mark.parametrize(
    'text, names',
    [
        (b"'a.wav'\n  b c.wav", ['a.wav', 'b c.wav']),
        (b'a.wav\r\ra.wav\r', ['a.wav']),
        (b'\n\n#\n  # x\na.wav', ['a.wav']),
        ('a.wav\nb c.wav'.encode('utf-16')[:-1], ['a.wav']),
    ],
)
def test_lists_of_more_kinds(collat, text, names):
    done, lines, err = collat('classify', '-', *ASK, stdin=text)
    assert done in (0, 3) and files(lines) == names and 'Traceback' not in err, err


@pytest.mark.parametrize('text', [b'', b'\n', b'# nothing', b'fLaC\0\0', b'\0' * 9, b'\xff\xfe'])
def test_what_is_no_list_is_refused(collat, text):
    done, lines, err = collat('classify', '-', *ASK, stdin=text)
    assert done == 2 and not lines and 'standard input' in err


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
        (('words', ' '), 'words: an empty argument'),
        (('search', '', 'a.wav'), 'search: an empty argument'),
        (('imagine', 'a.wav', '--out='), '--out: an empty argument'),
        (('classify', 'a.wav', '--labels', 'a,,b'), 'an empty name'),
        (('classify', 'a.wav', '--labels', ' '), '--labels: an empty argument'),
        (('classify', 'a.wav', '--labels', 'dog, Dog', '--model', 'model'), 'labels 1 and 2'),
        (('classify', 'a.wav', '--labels', 'dog\udcff', '--model', 'model'), 'letter 4 is no Unicode'),
        (('classify', 'a.wav', '--labels', '\u200b,dog', '--model', 'model'), 'label 1 of 2 is blank'),
        (('search', 'rain \udcff', 'a.wav', '--model', 'model'), 'no Unicode'),
        (('search', '{audio}', 'a.wav', '--model', 'model'), '1 {audio} and 0 sounds'),
        (('classify', 'gone', '--model', 'model'), 'gone: no such file or folder'),
        (('classify', 'a.wav', '--model', 'mix'), 'mix: no trained model there'),
        (('classify', 'a.wav', '--model', 'a.wav'), 'a.wav: no trained model there'),
        (('classify', 'a.wav', '-k', '1e3'), 'a whole number from 1'),
        (('ground', 'a.wav', '--method', 'nope', '--model', 'model'), "method 'nope' is not one of"),
        (('run', '--stages', 'scenes,,train'), 'an empty name'),
        (('run', '--plan', '--profile', 'smoke', 'lr'), 'lr'),
        (('run', '--plan', '--profile', 'mix'), "profile 'mix' is neither a file"),
        (('run', '--plan', '--profile', 'gone.json'), "profile 'gone.json' is neither a file"),
        (('profile', 'smoke', 'seed=inf'), "seed='inf': a value of type int"),
        (('data', 'get', 'esc5'), "Did you mean 'esc50'"),
        (('data', 'shard', 'gone.csv', '--out', 'shards'), 'gone.csv: no such file'),
        (('data', 'shard', 'my.csv', '--out', 'shards', '--part', '3/2'), "part='3/2'"),
        (('eval', '--data', 'gone.csv', '--checkpoint', 'model'), 'gone.csv: no such file'),
        (('eval', '--data', 'nope', '--checkpoint', 'model'), "data set 'nope'"),
        (('eval', '--data', 'my.csv', '--checkpoint', 'gone'), 'gone: no such folder'),
        (('eval', '--data', 'my.csv', '--out', 'a.wav/deep/x.json'), 'cannot be written'),
        (('imagine', 'a.wav', '--out', 'a.wav/x'), 'a.wav/x cannot be written'),
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
    'steps=inf': 'a value of type int',
    'n_tokens=1e9': 'a number from 1 to 4,096',
    'depth_audio=1e30': 'a number from 1 to 128',
    'sample_rate=1': 'a number from 1,000 to 1,000,000',
    'shipped_ears=maybe': 'a value of type bool',
    'noise_test=x': 'positive numbers separated by commas',
    'template=nope': "template 'nope' is unknown",
    'text_encoder=nope': "no text encoder 'nope'",
    'data=gone.csv': 'gone.csv: no such file',
    'heads_interaction=5': 'does not divide',
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
    'float8': (lambda f, c: changed(f, lambda w: w.update(logit_scale=w['logit_scale'].bool())), 'torch.bool'),
    'whole numbers': (lambda f, c: changed(f, lambda w: w.update(logit_scale=w['logit_scale'].int())), 'torch.int32'),
    'too large': (
        lambda f, c: changed(f, lambda w: w.update(logit_scale=w['logit_scale'].double() * 1e300)),
        'holds NaN',
    ),
    'one more': (lambda f, c: changed(f, lambda w: w.update(x=w['logit_scale'].clone())), 'x is not known'),
    'text': (lambda f, c: f.write_text('<html>not found</html>'), 'model.safetensors: cut off'),
    'weights are a folder': (lambda f, c: (f.unlink(), f.mkdir()), 'no trained model there|no model.safetensors'),
    'no config': (lambda f, c: c.unlink(), 'no config.json'),
    'config is a folder': (lambda f, c: (c.unlink(), c.mkdir()), 'no config.json'),
    'deep': (lambda f, c: c.write_text('[' * 99_999), 'config.json: cut off, or not a JSON file'),
    'absurd': (lambda f, c: c.write_text('{"n_mels": 1e9}'), 'config.json: n_mels=1e+09: a number from 1 to 1,024'),
    'of a baseline': (
        lambda f, c: c.write_text('{"profile": 3, "baseline": 3}'),
        "config.json: 'profile' is not a field",
    ),
    'latin': (lambda f, c: c.write_bytes(b'{"name": "caf\xe9"}'), 'config.json: cut off, or not a JSON file'),
}


@pytest.mark.parametrize('fault', BROKEN)
def test_a_broken_model_folder_is_named(collat, here, tmp_path, fault):
    for name in ('config.json', 'model.safetensors'):
        (tmp_path / name).write_bytes((here / 'model' / name).read_bytes())
    breaks, says = BROKEN[fault]
    breaks(tmp_path / 'model.safetensors', tmp_path / 'config.json')
    done, lines, err = collat('classify', 'a.wav', '--model', tmp_path, '--quiet')
    assert done == 2 and not lines and any(s in err for s in says.split('|')) and str(tmp_path) in err, err


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


TABLES = {  # what is in a table, and what is said; {} is a row that is right
    'UTF-32': ('path,labels\na.wav,dog\n'.encode('utf-32'), 'not UTF-8'),
    'another code page': ('path,labels\na.wav,caf\xe9\n'.encode('cp1252'), 'not UTF-8'),
    'a NUL': (b'path,labels\na.wav,d\0g\n', 'not UTF-8'),
    'empty': (b'', 'none'),
    'only columns': (b'path,labels\n', 'no rows below the columns'),
    'bars': (b'path|labels\na.wav|dog\n', "columns ['path|labels']"),
    'tabs': (b'path\tlabels\na.wav\tdog\n', 'separated by tabs'),
    'large letters': (b'Path,Labels\na.wav,dog\n', "rename it to 'path'"),
    'one label': (b'path,label\na.wav,dog\n', "rename it to 'labels'"),
    'twice': (b'path,labels,labels\na.wav,dog,cat\n', "2 columns are called 'labels'"),
    'more cells': (b'path,labels\na.wav,Bird, flute\n', 'row 2 has 3 cells for 2 columns'),
    'open quotes': (b'path,labels\n"a.wav,dog\n', 'stands in double quotes'),
    'a large cell': (b'path,labels\na.wav,' + b'x' * 140_000 + b'\n', 'field larger than'),
    'no path': (b'path,labels\n,dog\n', 'row 2: no path'),
    'before the file': (b'path,labels,start\na.wav,dog,-0.5\n', "start='-0.5'"),
    'never': (b'path,labels,start\na.wav,dog,inf\n', "start='inf'"),
    'beyond all floats': (b'path,labels,start\na.wav,dog,1e305\n', "start='1e305'"),
    'of no length': (b'path,labels,seconds\na.wav,dog,0\n', "seconds='0'"),
    'of a negative length': (b'path,labels,seconds\na.wav,dog,-1\n', "seconds='-1'"),
    'half a fold': (b'path,labels,fold\na.wav,dog,1.5\n', "fold='1.5'"),
    'fold 0': (b'path,labels,fold\na.wav,dog,0\n', "fold='0'"),
    'two splits': (b'path,labels,split\na.wav,dog,x\na.wav,cat,y\n', "split of a.wav is 'x' and 'y'"),
    'two spellings': (b'path,labels\na.wav,dog\nb c.wav,Dog\n', "'Dog' and 'dog' are one name"),
    'all missing': (b'path,labels\ngone.wav,dog\n', 'none of the 1 clips can be used'),
}


@pytest.mark.parametrize('fault', TABLES)
def test_a_faulty_table_is_named_with_its_row(collat, here, fault):
    text, says = TABLES[fault]
    (here / 'bad.csv').write_bytes(text)
    done, lines, err = collat('eval', '--checkpoint', 'model', '--data', 'bad.csv')
    assert done == 2 and not lines and 'bad.csv' in err and says in err, err


@pytest.mark.parametrize('fold', ['1', '1.0', ' 2 ', '1e0', ''])
def test_whole_floats_are_whole_numbers(here, fold):
    (here / 'fold.csv').write_text(f'path,labels,fold\na.wav,dog,{fold}\n')
    assert load_csv(here / 'fold.csv').clips[0].fold == (int(float(fold)) if fold.strip() else 0)


@pytest.mark.parametrize(
    'given', ['seed=1 steps=2', ['seed=1', 'steps=2'], dict(seed=1, steps='2'), iter(['seed=1', 'steps=2.0'])]
)
def test_overrides_as_papermill_and_people_give_them(given):
    p = load_profile('smoke', given)
    assert (p.seed, p.steps) == (1, 2)


@pytest.mark.parametrize(
    'given', ['seed', ['seed'], [1], 3, 1.5, dict(seed=None), dict(data=['scenes']), dict(name={})]
)
def test_overrides_that_are_none(given):
    with pytest.raises(ValueError, match='key=value|a value of type'):
        load_profile('smoke', given)


@pytest.mark.parametrize('base', ['"p.json"', '["smoke"]', 'null', '3', '"gone.json"'])
def test_a_profile_file_ends_in_a_named_profile(tmp_path, monkeypatch, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'p.json').write_text(f'{{"base": {base}}}')
    with pytest.raises(ValueError, match='leads back to itself|is neither a file|cut off'):
        load_profile('p.json')


def test_a_file_that_is_named_twice_is_answered_once(collat, here):
    done, lines, err = collat('classify', 'a.wav', 'a.wav', 'mix/a.wav', 'mix', *ASK)
    assert done == 3 and files(lines) == ['a.wav', 'mix/a.wav', 'mix/b.w64'], err


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
