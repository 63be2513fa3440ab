"""More of each kind of issue 23 that had few cases: pipes that close, finished runs under bad overrides, requests to
stop, pictures of one name, tables of captions, and downloads without a checksum."""

import http.server
import io
import json
import os
import signal
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import soundfile as sf
import torch
from PIL import Image
from torch import nn

from collat import pipeline
from collat.batches import StepLoader
from collat.checkpoints import read_checkpoint, read_log
from collat.cli import main, say
from collat.config import Preempted, load_profile
from collat.downloads import DownloadError, fetch
from collat.listen import open_model
from collat.model import CoLLAT
from collat.painter import imagine_files
from collat.pipeline import StageError, open_run, plan, run_pipeline
from collat.sources import Remote
from collat.stages import Stage
from collat.streaming import Shards, clips_to_shard, shard
from collat.training import run_steps


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Sounds, one file that is none, two of one name, and a model of smoke size."
    d = tmp_path_factory.mktemp('hard')
    rng = np.random.default_rng(0)
    for name in ('0.wav', '1.wav', '2.wav', 'a/x.wav', 'b/x.wav', 'c/x.wav', 'a/X.wav'):
        (d / name).parent.mkdir(exist_ok=True)
        sf.write(d / name, 0.1 * rng.standard_normal(8_000), 16_000)
    (d / 'none.wav').write_bytes(b'no sound')
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'model')
    return d


# ---- readers that have gone


@contextmanager
def unread():
    "A text file into a pipe that nobody reads any more."
    read, write = os.pipe()
    os.close(read)
    f = open(write, 'w', buffering=1)
    try:
        yield f
    finally:
        os.dup2(os.open(os.devnull, os.O_WRONLY), f.fileno())
        f.close()


def ended(argv) -> int:
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    return e.value.code


ASK = '--model', 'model', '--labels', 'dog,bell'
ASKED = {
    'classify': ('classify', '0.wav', '1.wav', *ASK),
    'classify, in JSON without a bar': ('classify', '0.wav', '1.wav', *ASK, '--json', '--quiet'),
    'words': ('words', '0.wav', *ASK, '--json'),
    'caption': ('caption', '0.wav', *ASK),
    'ground': ('ground', '0.wav', *ASK),
    'search': ('search', 'a dog', '0.wav', '1.wav', '--model', 'model'),
    'imagine': ('imagine', '0.wav', '--out', 'pictures', '--model', 'model', '--json'),
    'profile': ('profile', 'smoke'),
    'run --plan': ('run', '--plan', '--profile', 'smoke', '--run-dir', 'runs', '--stages', 'scenes'),
    'eval': ('eval', '--data', 'my.csv', '--checkpoint', 'model'),
}


@pytest.fixture
def stay(here, monkeypatch):
    monkeypatch.chdir(here)
    (here / 'my.csv').write_text('path,labels\n0.wav,dog\n1.wav,bell\n')
    monkeypatch.setattr('collat.painter.found_painter', lambda *_: None)
    monkeypatch.setattr('collat.painter.with_painter', lambda *_: lambda states: Image.new('RGB', (8, 8)))
    return here


@pytest.mark.parametrize('asked', ASKED)
def test_an_answer_that_nobody_reads_ends_without_a_word(stay, capsys, monkeypatch, asked):
    "As `collat … | head -1`: the code that a shell gives to SIGPIPE, and nothing on standard error but the bar."
    with unread() as out:
        monkeypatch.setattr(sys, 'stdout', out)
        code = ended(ASKED[asked])
    said = capsys.readouterr().err
    assert code in (0, 141) and 'Traceback' not in said and 'collat:' not in said, said


def test_the_first_answer_is_read_and_the_work_ends(stay, monkeypatch):
    "After `head -1` has what it wants, no further file is heard."
    heard = []
    hear = CoLLAT.encode_audio
    monkeypatch.setattr(CoLLAT, 'encode_audio', lambda self, w, *a, **k: heard.extend(w) or hear(self, w, *a, **k))
    monkeypatch.setattr('collat.listen.in_groups', lambda sounds, rate: ([s] for s in sounds))
    with unread() as out:
        monkeypatch.setattr(sys, 'stdout', out)
        assert ended(('classify', '0.wav', '1.wav', '2.wav', *ASK, '--quiet')) == 141
    assert len(heard) <= 2


@pytest.mark.parametrize('bar', [(), ('--quiet',)])
def test_answers_are_given_though_nobody_reads_standard_error(stay, capfd, monkeypatch, bar):
    "As `collat classify folder --json 2> >(head -1) > answers`: bar and remarks may go, answers and exit code stay."
    with unread() as err:
        monkeypatch.setattr(sys, 'stderr', err)
        code = ended(('classify', '0.wav', 'none.wav', '1.wav', *ASK, '--json', *bar))
    files = [json.loads(line)['file'] for line in capfd.readouterr().out.splitlines()]
    assert (files, code) == (['0.wav', '1.wav'], 3)


def test_a_refusal_without_standard_error_is_no_answer(stay, capsys, monkeypatch):
    "As `2>&-`: Python has no sys.stderr then. What would go there does not go among the answers."
    monkeypatch.setattr(sys, 'stderr', None)
    assert ended(('classify', 'gone.wav', *ASK, '--json', '--quiet')) == 2
    assert capsys.readouterr().out == ''


def test_standard_output_that_is_closed(stay, capsys, monkeypatch):
    "As `>&-` in a job of cron: one sentence, or silence; no traceback."
    monkeypatch.setattr(sys, 'stdout', None)
    monkeypatch.setattr(sys, 'argv', ['collat', *ASKED['classify'], '--quiet'])
    monkeypatch.setattr('signal.signal', lambda *_: None)
    with pytest.raises(SystemExit):
        main()
    assert 'Traceback' not in capsys.readouterr().err


def test_a_full_disk_in_the_place_of_standard_output(stay, capsys, monkeypatch):
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        assert ended((*ASKED['classify'], '--quiet')) == 2
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert 'No space left' in capsys.readouterr().err


# ---- a finished run under bad overrides


def notebook(path, *cells):
    cells = ["profile = 'smoke'\nrun_dir = '.'\noverrides = {}", *cells]
    kernel = dict(name='python3', language='python', display_name='python3')
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nb.metadata['kernelspec'] = kernel
    nb.cells[0].metadata['tags'] = ['parameters']
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nb, path)


TRAIN = Stage('01_train', (), ('model/weights', 'results/train.json'), work=('work/*',))
SCORE = Stage('02_score', ('model/weights',), ('results/score.json',))


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A sequence of two stages without kernels: (how each is carried out, run folder, what opens the run)."
    (tmp_path / 'toy').mkdir()
    for s in (TRAIN, SCORE):
        notebook(tmp_path / f'nbs/{s.notebook}.ipynb', 'p = load_profile(profile)\np.seed, p.lr')
    run = tmp_path / 'run'
    did = []

    def made(name, text):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(text)

    def execute(r, stage, *_, **__):
        did.append(stage.notebook)
        p = r.profile
        made('work/state', f'half of {p.seed} {p.lr}')
        made(stage.outputs[0], f'{stage.notebook} {p.seed} {p.lr}')  # what a failing stage leaves behind
        if p.seed == 66 and stage is SCORE:
            raise StageError('02_score fails')
        if p.seed >= 100:
            raise StageError(f'a slip: {p.seed}')
        if p.seed == 99:
            raise KeyboardInterrupt
        for name in stage.outputs:
            made(name, f'{stage.notebook} {p.seed} {p.lr}')

    monkeypatch.setattr(pipeline, 'execute', execute)
    where = dict(stages=(TRAIN, SCORE), nbs=tmp_path / 'nbs', package=tmp_path / 'toy')
    opened = lambda **changed: open_run('smoke', dict(dict(seed=3), **changed), run, **where)
    return types.SimpleNamespace(run=run, did=did, opened=opened)


def content(run):
    "The finished files of a run folder, and when they were made."
    names = (*TRAIN.outputs, *SCORE.outputs)
    return {n: ((run / n).read_text(), (run / n).stat().st_mtime_ns) for n in names if (run / n).exists()}


def attempt(run, only=None):
    try:
        run_pipeline(run, only, say=lambda s: None)
    except (StageError, KeyboardInterrupt, ValueError) as e:
        return e


SLIPS = {  # what is changed, one call after the other
    'two values': [dict(seed=100), dict(seed=101)],
    'one value twice': [dict(seed=100), dict(seed=100)],
    'two fields': [dict(seed=100), dict(seed=3, lr=0.5), dict(seed=101, lr=0.5)],
    'one fails, one is interrupted': [dict(seed=100), dict(seed=99)],
    'interrupted twice': [dict(seed=99), dict(seed=99, lr=0.5)],
    'refused, then one fails': [dict(lr='nan'), dict(seed=100)],
    'a good one between': [dict(seed=100), dict(seed=5), dict(seed=101)],
    'the later stage fails': [dict(seed=66), dict(seed=66, lr=0.5)],
    'many': [dict(seed=100 + i) for i in range(6)],
}


@pytest.mark.parametrize('slips', SLIPS)
def test_what_was_finished_comes_back_after_any_row_of_slips(place, slips):
    assert attempt(place.opened()) is None
    was = content(place.run)
    assert len(was) == 3
    for changed in SLIPS[slips]:
        try:
            attempt(place.opened(**changed))
        except ValueError:
            assert changed['lr'] == 'nan' and content(place.run) == was
    place.did.clear()
    planned = plan(place.opened())
    assert attempt(place.opened()) is None
    assert content(place.run) == was and place.did == [], planned


def test_slips_in_one_stage_only(place):
    "`--stages train` twice under bad settings; then the whole sequence under the old ones."
    assert attempt(place.opened()) is None
    was = content(place.run)
    for seed in (100, 101):
        assert 'a slip' in str(attempt(place.opened(seed=seed), ['train']))
        refused = attempt(place.opened(), ['score'])
        assert refused is None or 'needs model/weights' in str(refused)
    place.did.clear()
    assert attempt(place.opened()) is None
    assert {n: t for n, (t, _) in content(place.run).items()} == {n: t for n, (t, _) in was.items()}
    assert '01_train' not in place.did


def test_a_note_of_ones_own_stays_where_it_lies(place):
    "What no stage has made is not set aside."
    assert attempt(place.opened()) is None
    (place.run / 'model/notes.txt').write_text('mine')
    for seed in (100, 101):
        attempt(place.opened(seed=seed))
    assert (place.run / 'model/notes.txt').read_text() == 'mine'


def test_unfinished_work_of_a_slip_does_not_serve_another(place):
    "The second bad setting begins without the half-done work of the first."
    assert attempt(place.opened()) is None
    attempt(place.opened(seed=100))
    run = place.opened(seed=101)
    mark = pipeline.begin_stage(run, TRAIN, lambda s: None)
    assert mark and not (place.run / 'work/state').exists() and not (place.run / 'model/weights').exists()


# ---- requests to stop


class Ten:
    "Ten clips of four samples."

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.arange(4.0) - i, []


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 2)
        nn.init.constant_(self.net.weight, 0.5)
        nn.init.zeros_(self.net.bias)

    def forward(self, batch):
        return dict(loss=self.net(batch['wav'].to(self.net.weight.device)).square().mean())


def train(folder, at=(), names=()):
    """A training of ten steps, validated at 4, 8 and 10. `at`: (what, number) at which the signals `names` come;
    what is `load` or `look`."""
    short = dict(steps=10, eval_every=4, checkpoint_every=3, optimizer='adamw', precision='fp32', lr=0.1)
    p = load_profile('smoke', short)
    model = Line()
    loader = StepLoader(Ten(), 5, p.steps, p.eval_every, 0)
    load = loader.load

    def come(what, i):
        if (what, i) == at:
            for name in names:
                signal.raise_signal(name)

    def loading(step):
        come('load', step)
        return load(step)

    def look(m):
        come('look', len(looked))
        looked.append(m.net.weight.norm().item())
        return dict(size=looked[-1])

    looked = []
    loader.load = loading
    return run_steps(model, loader, [(model.parameters(), p.lr)], p, folder, 'toy', look)


@pytest.fixture(scope='module')
def straight(tmp_path_factory):
    "The training that nobody stopped: weights, rows of validation, losses."
    d = tmp_path_factory.mktemp('straight')
    model, rows = train(d)
    return model.net.weight.clone(), rows, read_log(d, 'toy')['loss'].tolist()


TERM, INT = signal.SIGTERM, signal.SIGINT
STOPS = {
    'in the last validation': (('look', 2), [TERM]),
    'twice in the last validation': (('look', 2), [TERM, TERM]),
    'in the first validation': (('look', 0), [TERM]),
    'in the first step': (('load', 0), [TERM]),
    'in the last step': (('load', 9), [TERM]),
    'twice in a step with a checkpoint': (('load', 5), [TERM, TERM]),
    'Ctrl-C in the last validation': (('look', 2), [INT]),
    'Ctrl-C in the first validation': (('look', 0), [INT]),
    'Ctrl-C in the last step': (('load', 9), [INT]),
    'SIGTERM, then Ctrl-C': (('look', 1), [TERM, INT]),
}


@pytest.mark.parametrize('stop', STOPS)
def test_a_training_that_is_stopped_says_so_and_ends_as_one_that_is_not(straight, tmp_path, stop):
    at, names = STOPS[stop]
    before = signal.getsignal(TERM)
    with pytest.raises(KeyboardInterrupt if INT in names else Preempted):
        train(tmp_path, at, names)
    assert signal.getsignal(TERM) is before
    if INT not in names:
        saved = read_checkpoint(tmp_path / 'checkpoints/work/toy.pt')['data']['step']
        assert saved == len(read_log(tmp_path, 'toy'))  # not a step is lost
    model, rows = train(tmp_path)
    weights, expected, losses = straight
    assert torch.equal(model.net.weight, weights) and rows == expected
    assert read_log(tmp_path, 'toy')['loss'].tolist() == losses


LONG = Stage('01_long', (), ('done.json',))
COUNT = """import time
from pathlib import Path
Path(run_dir, 'begun').touch()
for _ in range(40):
    time.sleep(0.1)
Path(run_dir, 'done.json').write_text('{}')"""


@pytest.fixture
def long_run(tmp_path):
    "A stage of four seconds, with a real kernel."
    (tmp_path / 'toy').mkdir()
    notebook(tmp_path / 'nbs/01_long.ipynb', COUNT)
    where = dict(stages=(LONG,), nbs=tmp_path / 'nbs', package=tmp_path / 'toy')
    return open_run('smoke', {}, tmp_path / 'run', **where)


@pytest.mark.parametrize('when', ['before its kernel starts', 'while its kernel starts', 'in its first cell'])
def test_a_stage_is_stopped_at_whatever_moment_the_signal_comes(long_run, when):
    "One request holds for the whole command: the stage does not run to its end because it had only just begun."
    done = long_run.run_dir / 'done.json'
    begun = long_run.run_dir / 'begun'
    mine = set(psutil.Process().children())
    over = threading.Event()

    def send():
        seen = begun.exists if 'cell' in when else lambda: set(psutil.Process().children()) - mine
        while not seen() and not over.is_set():
            time.sleep(0.01)
        if not over.is_set():
            os.kill(os.getpid(), TERM)

    def say(line):
        if 'before' in when and ': runs, because' in line:
            os.kill(os.getpid(), TERM)

    sender = threading.Thread(target=send)
    if 'before' not in when:
        sender.start()
    try:
        with pytest.raises(Preempted, match='stopped by SIGTERM'):
            run_pipeline(long_run, say=say)
    finally:
        over.set()
    assert not done.exists() and set(psutil.Process().children()) <= mine


def test_a_request_between_two_stages_begins_no_other(place):
    "The first is finished and kept, the second is not begun."

    def say(line):
        if '01_train: done' in line:
            signal.raise_signal(TERM)

    with pytest.raises(Preempted, match='stopped by SIGTERM'):
        run_pipeline(place.opened(), say=say)
    assert place.did == ['01_train'] and (place.run / 'model/weights').exists()
    assert attempt(place.opened()) is None and place.did == ['01_train', '02_score']


@pytest.mark.parametrize('name', [TERM, INT])
def test_a_search_that_is_stopped_keeps_what_it_has_heard(stay, capsys, monkeypatch, tmp_path, name):
    index = tmp_path / 'index.npz'
    monkeypatch.setattr('collat.listen.in_groups', lambda sounds, rate: ([s] for s in sounds))
    hear = CoLLAT.hear_windows
    heard = []

    def hearing(self, wav):
        heard.extend(wav)
        if len(heard) == 3:
            signal.raise_signal(name)
        return hear(self, wav)

    monkeypatch.setattr(CoLLAT, 'hear_windows', hearing)
    was = signal.getsignal(TERM), sys.argv
    asked = 'search', 'a dog', '0.wav', '1.wav', '2.wav', '--model', 'model', '--index', str(index), '--quiet'
    signal.signal(TERM, signal.default_int_handler)  # as `main` of the command line sets it
    try:
        assert ended(asked) == 130
        assert 'interrupted' in capsys.readouterr().err
        heard[:] = [None] * 3
        assert ended(asked) == 0 and len(heard) == 4
    finally:
        signal.signal(TERM, was[0])


# ---- pictures of one name


def painted(model, files, out, colour=0):
    "Names of the pictures, in order; `colour` of all of them."
    made = list(imagine_files(model, files, out, lambda states: Image.new('L', (8, 8), colour), skipped := [], False))
    assert not skipped
    return [Path(m['image']).name for m in made]


@pytest.fixture(scope='module')
def model(here):
    return CoLLAT.from_pretrained(here / 'model')


def shade(path):
    with Image.open(path) as picture:
        return picture.getpixel((0, 0))


def test_three_of_one_name_keep_their_places_in_any_order_of_calls(model, here, tmp_path):
    a, b, c = (here / f'{f}/x.wav' for f in 'abc')
    assert painted(model, [a, b, c], tmp_path) == ['x.png', 'x-2.png', 'x-3.png']
    assert painted(model, [c, a], tmp_path, 9) == ['x-3.png', 'x.png']
    assert [shade(tmp_path / n) for n in ('x.png', 'x-2.png', 'x-3.png')] == [9, 0, 9]
    (tmp_path / 'x-2.png').unlink()  # a gap is no reason for a second picture of the third
    assert painted(model, [b], tmp_path) == ['x-2.png']
    assert len(list(tmp_path.iterdir())) == 3


def test_a_gap_gives_no_sound_a_second_picture(model, here, tmp_path):
    a, b, c = (here / f'{f}/x.wav' for f in 'abc')
    painted(model, [a, b, c], tmp_path)
    (tmp_path / 'x-2.png').unlink()
    assert painted(model, [c], tmp_path) == ['x-3.png']


FOREIGN = {
    'a picture': lambda f: Image.new('RGB', (3, 3), 'red').save(f),
    'a picture with words in it': lambda f: Image.new('L', (3, 3)).save(f, pnginfo=None, comment='Source'),
    'a text': lambda f: f.write_text('my notes'),
    'nothing': lambda f: f.write_bytes(b''),
    'a folder': lambda f: f.mkdir(),
    'half a picture': lambda f: (Image.new('RGB', (99, 99)).save(f), f.write_bytes(f.read_bytes()[:60])),
    'a link to a picture elsewhere': lambda f: (
        Image.new('RGB', (3, 3)).save(f.parent.parent / 'far.png'),
        f.symlink_to(f.parent.parent / 'far.png'),
    ),
    'a link to nowhere': lambda f: f.symlink_to('nowhere.png'),
    'a huge picture': lambda f: Image.new('1', (20_000, 20_000)).save(f),
}


@pytest.mark.parametrize('foreign', FOREIGN)
def test_what_another_program_has_made_is_left_alone(model, here, tmp_path, foreign):
    out = tmp_path / 'out'
    out.mkdir()
    place = out / 'x.png'
    FOREIGN[foreign](place)
    state = lambda: (place.is_symlink(), place.is_dir() or place.exists() and place.read_bytes())
    was = state()
    for _ in range(2):
        assert painted(model, [here / 'a/x.wav'], out) == ['x-2.png']
    assert state() == was and len(list(out.iterdir())) == 2


def test_a_sound_whose_name_is_that_of_a_second_picture(model, here, tmp_path):
    sf.write(tmp_path / 'x-2.wav', 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    files = [here / 'a/x.wav', here / 'b/x.wav', tmp_path / 'x-2.wav']
    out = tmp_path / 'out'
    names = painted(model, files, out)
    assert len(set(names)) == 3 and painted(model, files[::-1], out) == names[::-1] and len(list(out.iterdir())) == 3


def test_names_that_differ_in_case_or_ending_are_kept_apart(model, here, tmp_path):
    sf.write(tmp_path / 'x.flac', 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)
    names = painted(model, [here / 'a/x.wav', here / 'a/X.wav', tmp_path / 'x.flac'], tmp_path / 'out')
    assert len(set(names)) == 3 == len(list((tmp_path / 'out').iterdir()))


def test_one_file_in_other_words_is_painted_in_one_place(model, here, tmp_path, monkeypatch):
    "`x.wav`, `./x.wav`, `../a/x.wav` and the whole path are one sound: four calls, one picture."
    monkeypatch.chdir(here / 'a')
    names = [painted(model, [f], tmp_path)[0] for f in ('x.wav', './x.wav', '../a/x.wav', here / 'a/x.wav')]
    assert names == ['x.png'] * 4


def test_a_name_too_long_for_a_picture_costs_no_other_file_its_picture(stay, capsys):
    "A name of 255 bytes is allowed for a sound; what is written beside it has to fit, or it is skipped and named."
    long = 'n' * 251 + '.wav'
    (stay / long).write_bytes((stay / '0.wav').read_bytes())
    code = ended(('imagine', long, '1.wav', '--out', 'long', '--model', 'model', '--quiet', '--json'))
    files = [json.loads(line)['file'] for line in capsys.readouterr().out.splitlines()]
    assert '1.wav' in files and (code, files[0]) in ((0, long), (3, '1.wav'))


# ---- tables of captions for a training


CAPTIONS = {
    'caption': 'path,caption\n0.wav,a dog barks\n1.wav,a bell rings\n',
    'captions': 'path,captions\n0.wav,a dog|it barks\n1.wav,a bell\n',
    'several columns': 'path,caption_1,caption_2,split\n0.wav,a dog,it barks,train\n1.wav,a bell,,valid\n',
    'labels that are all empty': 'path,labels,caption\n0.wav,,a dog barks\n1.wav, ; ,a bell rings\n',
}


@pytest.mark.parametrize('table', CAPTIONS)
@pytest.mark.parametrize('more', [('--plan',), ()])
def test_a_table_without_labels_is_no_training_data_and_that_is_said_at_once(
    stay, tmp_path, capsys, monkeypatch, table, more
):
    "Training takes its prompts from labels: refused by `--plan` too, before hours of packing."

    def execute(*_, **__):
        raise StageError('the packing has begun')

    monkeypatch.setattr(pipeline, 'execute', execute)
    (stay / 'captions.csv').write_text(CAPTIONS[table])
    run = tmp_path / 'run'
    asked = 'run', '--profile', 'smoke', '--run-dir', run, '--stages', 'streaming', 'data=captions.csv', *more
    code = ended(asked)
    said = capsys.readouterr()
    assert code == 2 and 'captions.csv' in said.err and 'labels' in said.err and not said.out, said
    assert not run.exists()


def test_rows_with_captions_only_are_left_out_of_a_training_and_counted(here, tmp_path):
    "A table in which some rows have labels: the others are counted, and no step meets a clip without a prompt."
    (here / 'mixed.csv').write_text('path,labels,caption\n0.wav,dog,a dog\n1.wav,,a bell\n2.wav,bell,\n')
    _, clips, listing = clips_to_shard(str(here / 'mixed.csv'), '')
    shard(str(here / 'mixed.csv'), tmp_path / 'shards', workers=1)
    shards = Shards(tmp_path / 'shards', 0.5)
    unlabelled = [i for i in range(len(shards)) if not shards[i][1]]
    assert not unlabelled and len(clips) == 2 and '1.wav' in json.dumps(listing)


@pytest.mark.parametrize('table', CAPTIONS)
def test_captions_are_read_where_captions_are_asked_for(stay, table):
    from collat.datasets import load_csv

    (stay / 'captions.csv').write_text(CAPTIONS[table])
    m = load_csv(stay / 'captions.csv')
    assert m.classes == [] and all(c.captions for c in m.clips) and len(m.clips[0].captions) in (1, 2)


# ---- downloads without a checksum


class Told(http.server.BaseHTTPRequestHandler):
    "Each path is answered by a function of `server.paths`; without Keep-Alive."

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get('Range')))
        self.server.paths[self.path](self)
        self.close_connection = True

    def log_message(self, *args):
        pass


def answer(body=b'', status=200, length=True, kind='application/octet-stream', sent=None, **headers):
    "An answer with a body, of which `sent` bytes come; a length that is true, another number, or none."

    def give(h):
        h.send_response(status)
        if kind:
            h.send_header('Content-Type', kind)
        if length is not None:
            h.send_header('Content-Length', len(body) if length is True else length)
        for k, v in headers.items():
            h.send_header(k.replace('_', '-'), v)
        h.end_headers()
        h.wfile.write(body[:sent])

    return give


def chunked(body, whole=True):
    "An answer in chunks without a length, as GitHub gives archives; the last chunk is missing unless `whole`."

    def give(h):
        h.protocol_version = 'HTTP/1.1'
        h.send_response(200)
        h.send_header('Content-Type', 'application/zip')
        h.send_header('Transfer-Encoding', 'chunked')
        h.end_headers()
        for at in range(0, len(body), 5_000):
            part = body[at : at + 5_000]
            h.wfile.write(b'%x\r\n%s\r\n' % (len(part), part))
        h.wfile.write(b'0\r\n\r\n' if whole else b'')

    return give


def in_turn(*answers):
    "One answer after the other, the last one again and again."
    left = list(answers)
    return lambda h: (left.pop(0) if len(left) > 1 else left[0])(h)


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Told)
    s.paths = {}
    s.asked = []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.shutdown()
    s.server_close()


BODY = np.random.default_rng(0).bytes(40_000)
PAGE = b'<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>Please sign in.</body></html>'
BAD = {
    'a page': (answer(PAGE, kind='text/html'), 'web page'),
    'a page in capitals': (answer(PAGE, kind='Text/HTML; charset=utf-8'), 'web page'),
    'a page of another name': (answer(PAGE, kind='application/xhtml+xml'), 'web page'),
    'a page without a kind': (answer(PAGE, kind=None), 'web page'),
    'a page said to be bytes': (answer(PAGE), 'web page'),
    'a page behind a redirect': (answer(status=302, Location='/login'), 'web page'),
    'nothing': (answer(b''), 'empty|0 bytes|no bytes'),
    'nothing, without a length': (answer(b'', length=None), 'empty|0 bytes|no bytes'),
    'nothing, and that is said': (answer(status=204), 'empty|0 bytes|no bytes|204'),
    'half of it': (answer(BODY, sent=20_000, Accept_Ranges='none'), 'broke.*20,?000'),
    'less than the length says': (answer(BODY, length=10**9), 'broke.*40,?000'),
    'chunks without an end': (chunked(BODY, whole=False), 'a.zip could not be fetched'),
    '404': (answer(PAGE, 404, kind='text/html'), '404'),
    '403': (answer(b'{"message": "rate limit"}', 403, kind='application/json'), '403'),
    '404 behind a redirect': (answer(status=301, Location='/gone'), '404'),
    'a redirect to itself': (answer(status=302, Location='/a.zip'), 'redirect'),
    'a length that is none': (answer(BODY, length='many'), 'a.zip could not be fetched'),
}


@pytest.mark.parametrize('bad', BAD)
def test_what_is_not_the_file_is_refused_and_not_kept_as_the_file(server, tmp_path, bad):
    "There is no checksum to catch it. The next call, with the server well again, has the file."
    give, why = BAD[bad]
    server.paths = {'/a.zip': give, '/login': answer(PAGE, kind='text/html'), '/gone': answer(b'', 404)}
    remote = Remote(f'{server.url}/a.zip')
    with pytest.raises(DownloadError, match=why) as e:
        fetch(remote, tmp_path, tries=2, wait=0.01, progress=False)
    assert 'By hand: put the file at' in str(e.value) and not (tmp_path / 'a.zip').exists()
    server.paths['/a.zip'] = answer(BODY)
    assert fetch(remote, tmp_path, tries=2, wait=0.01, progress=False).read_bytes() == BODY
    assert [f.name for f in tmp_path.iterdir()] == ['a.zip']


GOOD = {
    'without a length, in chunks': chunked(BODY),
    'without a length, until the line is closed': answer(BODY, length=None),
    'behind a redirect': answer(status=302, Location='/b.zip'),
    'after half of it': in_turn(answer(BODY, sent=9_000), answer(BODY)),
    'after chunks without an end': in_turn(chunked(BODY, whole=False), answer(BODY)),
    'after two busy answers': in_turn(answer(status=503), answer(status=429), answer(BODY)),
    'of an unknown kind': answer(BODY, kind=None),
}


@pytest.mark.parametrize('good', GOOD)
def test_a_file_comes_whole_without_a_checksum(server, tmp_path, good):
    server.paths = {'/a.zip': GOOD[good], '/b.zip': answer(BODY)}
    path = fetch(Remote(f'{server.url}/a.zip'), tmp_path, tries=4, wait=0.01, progress=False)
    assert path.read_bytes() == BODY and [f.name for f in tmp_path.iterdir()] == ['a.zip']


def test_halves_of_two_files_are_not_put_together(server, tmp_path):
    "The file has changed on the server between two requests, which its ETag tells."
    newer = BODY[::-1]

    def rest(h):
        if h.headers.get('If-Range') or not h.headers.get('Range'):
            return answer(newer, ETag='"2"')(h)
        at = int(h.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        answer(newer[at:], 206, Content_Range=f'bytes {at}-{len(newer) - 1}/{len(newer)}', ETag='"2"')(h)

    server.paths = {'/a.zip': in_turn(answer(BODY, sent=16_384, ETag='"1"'), rest)}
    got = fetch(Remote(f'{server.url}/a.zip'), tmp_path, tries=3, wait=0.01, progress=False).read_bytes()
    assert got in (BODY, newer)


def test_a_stretch_that_was_not_asked_for_is_not_taken_for_it(server, tmp_path):
    "Half has come; the server then answers 206 with another stretch than the one that was asked for."
    other = answer(BODY[:20_000], 206, Content_Range=f'bytes 0-19999/{len(BODY)}')
    server.paths = {'/a.zip': in_turn(answer(BODY, sent=20_000), other, answer(BODY))}
    try:
        got = fetch(Remote(f'{server.url}/a.zip'), tmp_path, tries=3, wait=0.01, progress=False).read_bytes()
    except DownloadError:
        return
    assert got == BODY


def test_a_server_that_never_sends_the_rest_is_given_up(server, tmp_path):
    "Each beginning breaks off, each rest is another stretch: coming as far as before does not count as progress."
    half = answer(BODY, sent=20_000)
    other = answer(BODY[:20_000], 206, Content_Range=f'bytes 0-19999/{len(BODY)}')
    server.paths = {'/a.zip': lambda h: (other if h.headers.get('Range') else half)(h)}
    with pytest.raises(DownloadError, match='kept'):
        fetch(Remote(f'{server.url}/a.zip'), tmp_path, tries=3, wait=0.01, progress=False)
    assert len(server.asked) < 6


@pytest.mark.parametrize('version', ['ETag', 'Last_Modified'])
def test_the_rest_of_another_version_is_not_fetched_on_another_day(server, tmp_path, version):
    remote = Remote(f'{server.url}/a.zip')
    busy = answer(status=503)
    server.paths = {'/a.zip': in_turn(answer(BODY, sent=20_000, **{version: '"1"'}), busy)}
    with pytest.raises(DownloadError, match='503'):
        fetch(remote, tmp_path, tries=2, wait=0.01, progress=False)
    newer = BODY[::-1]

    def rest(h):
        "Ignores If-Range, and says which version it is."
        if 'Range' not in h.headers:
            return answer(newer)(h)
        at = int(h.headers['Range'].removeprefix('bytes=').removesuffix('-'))
        said = {'Content_Range': f'bytes {at}-{len(newer) - 1}/{len(newer)}', version: '"2"'}
        answer(newer[at:], 206, **said)(h)

    server.paths = {'/a.zip': rest}
    assert fetch(remote, tmp_path, tries=2, wait=0.01, progress=False).read_bytes() == newer
    assert [f.name for f in tmp_path.iterdir()] == ['a.zip']


# ---- places to write to


@pytest.fixture
def heard(monkeypatch):
    "How many windows are heard."
    count = []
    hear = CoLLAT.hear_windows
    monkeypatch.setattr(CoLLAT, 'hear_windows', lambda self, wav: count.extend(wav) or hear(self, wav))
    return count


SEARCH = 'search', 'a dog', '0.wav', '1.wav', '--model', 'model', '--quiet', '--index'


@pytest.mark.parametrize('asked', [('eval', '--data', 'my.csv', '--checkpoint', 'model', '--out'), SEARCH])
def test_what_is_neither_file_nor_folder_is_not_replaced_by_a_file(stay, tmp_path, heard, asked):
    "As `--out /dev/null` or `--out /dev/stdout`, which root can replace: here a pipe with a name."
    pipe = tmp_path / 'pipe'
    os.mkfifo(pipe)
    was = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(10)  # who opens it waits for ever
    try:
        code = ended((*asked, pipe))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)
    assert pipe.is_fifo() and (code, len(heard)) == (2, 0)


@pytest.mark.parametrize('asked', [('eval', '--data', 'my.csv', '--checkpoint', 'model', '--out'), SEARCH])
def test_a_name_that_is_too_long_is_refused_before_any_work(stay, tmp_path, heard, asked):
    code = ended((*asked, tmp_path / ('n' * 256)))
    assert (code, len(heard)) == (2, 0)
    code = ended((*asked, tmp_path / ('n' * 250)))  # a name that the system allows
    assert code == 0 and (tmp_path / ('n' * 250)).exists() or (code, len(heard)) == (2, 0)


@pytest.mark.parametrize('asked', [('eval', '--data', 'my.csv', '--checkpoint', 'model', '--out'), SEARCH])
def test_a_link_is_written_through(stay, tmp_path, asked):
    "A file that lies on another disk and is linked here stays there."
    (tmp_path / 'far').mkdir()
    link = tmp_path / 'link'
    link.symlink_to('far/file')
    assert ended((*asked, link)) == 0
    assert link.is_symlink() and (tmp_path / 'far/file').exists()


def test_an_index_of_another_model_is_not_lost(stay, tmp_path, heard):
    "Hours of hearing: a search with another model refuses the file, or leaves what the first one heard in it."
    other = CoLLAT.from_pretrained('model')
    other.logit_scale.data += 1
    other.save_pretrained(tmp_path / 'other')
    index = tmp_path / 'index.npz'
    assert ended((*SEARCH, index)) == 0
    ended(('search', 'a dog', '0.wav', '--model', tmp_path / 'other', '--quiet', '--index', index))
    heard.clear()
    assert ended((*SEARCH, index)) == 0 and not heard


@pytest.mark.parametrize('change', [lambda z: z[:, :5], lambda z: z * np.nan, lambda z: z[0], lambda z: z.astype('f8')])
def test_an_index_with_other_numbers_is_no_index(stay, tmp_path, capsys, change):
    index = tmp_path / 'index.npz'
    assert ended((*SEARCH, index)) == 0
    with np.load(index) as f:
        parts = dict(f)
    np.savez(index, **parts | dict(z=change(parts['z'])))
    capsys.readouterr()
    code = ended((*SEARCH, index))
    said = capsys.readouterr()
    assert 'nan' not in said.out and (code == 0 or f'{index}: no index' in said.err), said


def test_a_data_folder_that_is_a_file_is_refused(stay, capsys):
    assert ended(('data', 'get', 'audioset', '--root', '0.wav')) == 2
    assert '0.wav' in capsys.readouterr().err


@pytest.mark.parametrize('name', ['../../outside', '/outside', 'a/../../outside', ''])
def test_the_name_in_a_profile_file_leads_to_no_other_folder(tmp_path, monkeypatch, name):
    "The run folder is runs/NAME: a file from a stranger does not choose another place."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'p.json').write_text(json.dumps(dict(base='smoke', name=name)))
    try:
        run = open_run('p.json')
    except ValueError:
        return
    assert run.run_dir.parent == tmp_path / 'runs'


@pytest.mark.parametrize(
    'name, text',
    [('000000.json', '[]'), ('000000.json', '{"bytes": 1}'), ('000000.json', '{"bytes'), ('listing.json', '{"c')],
)
def test_what_lies_beside_shards_may_be_damaged(stay, tmp_path, name, text):
    "A record is made again, a list is named: no traceback."
    asked = 'data', 'shard', 'my.csv', '--out', tmp_path, '--workers', '1'
    assert ended(asked) == 0
    size = (tmp_path / '000000.tar').stat().st_size
    (tmp_path / name).write_text(text.replace('1', str(size)))
    assert ended(asked) in (0, 2)


def test_no_workers_are_refused(stay, tmp_path):
    assert ended(('data', 'shard', 'my.csv', '--out', tmp_path / 'shards', '--workers', '0')) == 2


# ---- names


def test_a_folder_behind_a_link_is_looked_into_or_named(stay, tmp_path, capsys):
    "A folder of links to folders, as collections are put together."
    (tmp_path / 'sounds').mkdir()
    (tmp_path / 'sounds/a').symlink_to(stay / 'a')
    (tmp_path / 'sounds/round').symlink_to('.')  # and no endless walk
    (tmp_path / 'sounds/own.wav').write_bytes((stay / '0.wav').read_bytes())
    code = ended(('classify', tmp_path / 'sounds', *ASK, '--json', '--quiet'))
    said = capsys.readouterr()
    names = sorted(Path(json.loads(line)['file']).name for line in said.out.splitlines())
    assert names == ['X.wav', 'own.wav', 'x.wav'] or code == 3 and 'sounds/a' in said.err


@pytest.mark.parametrize('code', ['ascii', 'latin-1', 'cp1252', 'utf-8'])
def test_json_is_json_on_every_terminal(monkeypatch, code):
    "With PYTHONIOENCODING or on Windows: letters that standard output does not have are written as JSON escapes them."
    name = 'caf\xe9 \u0436 \U0001f525.wav'
    out = io.TextIOWrapper(io.BytesIO(), encoding=code, errors='backslashreplace')  # as `main` sets it
    monkeypatch.setattr(sys, 'stdout', out)
    say(dict(file=name, score=0.5), as_json=True)
    assert json.loads(out.buffer.getvalue().decode(code))['file'] == name


def test_an_empty_name_of_a_model_is_refused():
    "As `--model ''`: a variable that was not set does not open the default model."
    with pytest.raises((ValueError, FileNotFoundError)):
        open_model('')
