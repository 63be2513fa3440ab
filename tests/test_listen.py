"The command line on files: answers, refusals, exit codes, and no slower than Python."

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import soundfile as sf
import torch

from collat.audio import load_audio, window_views
from collat.captioning import build_vocabulary, save_captioner, seeded_captioner
from collat.cli import main
from collat.config import load_profile
from collat.ears import front_end
from collat.evaluate import checkpoint_id, prompts_of
from collat.listen import answers, known_labels, open_model, search, sound_files
from collat.model import CoLLAT

N = int(os.environ.get('COLLAT_FILES', 200))  # 1,000 for the number of the issue


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A model of smoke size and N short files."
    d, rng = tmp_path_factory.mktemp('listen'), np.random.default_rng(0)
    CoLLAT(load_profile('smoke')).save_pretrained(d / 'model')
    (d / 'sounds').mkdir()
    for i in range(N):
        sf.write(d / f'sounds/{i:04d}.wav', 0.1 * rng.standard_normal(16000), 16000)
    return d


def collat(*args, input=''):
    "The command in this process: what it printed, and its exit code."
    out, err = io.StringIO(), io.StringIO()
    said = io.TextIOWrapper(io.BytesIO(input.encode()))
    with redirect_stdout(out), redirect_stderr(err), patch('sys.stdin', said):
        with pytest.raises(SystemExit) as end:
            main(list(map(str, args)))
    return subprocess.CompletedProcess(args, end.value.code, out.getvalue(), err.getvalue())


def test_a_process_of_its_own(folder, tmp_path):
    "Answers go to standard output, all else to standard error; a file that is none is exit code 3."
    (tmp_path / 'none.wav').touch()
    names = folder / 'sounds/0000.wav', tmp_path / 'none.wav'
    options = '--model', str(folder / 'model'), '--json', '--labels', 'dog,bell'
    call = [sys.executable, '-c', 'from collat.cli import main; main()', 'classify', '-', *options]
    done = subprocess.run(call, capture_output=True, text=True, input='\n'.join(map(str, names)))
    assert done.returncode == 3, done.stderr
    assert {l['label'] for l in json.loads(done.stdout)['labels']} == {'dog', 'bell'}
    assert '1 of 2 files could not be read' in done.stderr


@pytest.mark.parametrize(
    'question, keys',
    [
        ('classify', {'labels'}),
        ('words', {'concepts', 'tokens'}),
        ('caption', {'caption', 'labels'}),
        ('ground', {'events'}),
    ],
)
def test_one_json_object_per_line(folder, question, keys):
    names = sorted((folder / 'sounds').glob('*.wav'))[:3]
    options = '--model', folder / 'model', '--json', '--labels', 'dog,bell', '-k', 1
    done = collat(question, '-', *options, input='\n'.join(map(str, names)))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(l) for l in done.stdout.splitlines()]
    assert [r['file'] for r in rows] == list(map(str, names)) and all(set(r) == keys | {'file'} for r in rows)
    assert question in done.stderr and '3/3' in done.stderr  # the bar
    plain = collat(question, names[0], '--model', folder / 'model', '--labels', 'dog, bell', '--quiet')
    assert plain.returncode == 0 and plain.stdout.startswith(f'{names[0]}: ') and plain.stderr.strip() == ''


def test_a_captioner_beside_the_model_speaks(folder):
    path = folder / f'captioner-{checkpoint_id(folder / "model")}-states.safetensors'

    def says(*more):
        asked = 'caption', folder / 'sounds/0000.wav', '--model', folder / 'model', '--json', '--quiet'
        return json.loads(collat(*asked, *more).stdout)['caption']

    assert says().startswith('The sound of')
    save_captioner(seeded_captioner(384, build_vocabulary(['rain on a roof'])), path, kind='states')
    try:
        assert set(says().split()) <= {'rain', 'on', 'a', 'roof'} and says('--labels', 'dog') == 'The sound of a dog.'
    finally:
        path.unlink()


def test_search_and_a_composed_query(folder):
    names = sorted((folder / 'sounds').glob('*.wav'))[:4]
    done = collat(
        'search', 'the sound of {audio}', *names, '--sound', names[0], '--model', folder / 'model', '--json', '-k', 2
    )
    assert done.returncode == 0 and [json.loads(l)['rank'] for l in done.stdout.splitlines()] == [1, 2], done.stderr


def test_the_painter_of_the_repository_imagines(folder, tmp_path):
    done = collat('imagine', folder / 'sounds/0000.wav', '--out', tmp_path / 'out', '--model', folder / 'model')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'out/0000.png').exists()


def test_an_unreadable_file_among_many_is_skipped_counted_and_listed(folder, tmp_path):
    for f in sorted((folder / 'sounds').glob('*.wav')):
        (tmp_path / f.name).symlink_to(f)
    (tmp_path / '0001b.wav').write_bytes(b'not a sound')
    (tmp_path / '0002b.wav').touch()
    done = collat('classify', tmp_path, '--model', folder / 'model', '--json', '--quiet')
    assert done.returncode == 3 and len(done.stdout.splitlines()) == N
    for said in ('0001b.wav: not readable as audio', '0002b.wav', f'2 of {N + 2} files could not be read'):
        assert said in done.stderr
    done = collat('classify', tmp_path / '0000.wav', tmp_path / '0001b.wav', '--model', folder / 'model')
    assert done.returncode == 3 and '2/2' in done.stderr  # the bar ends at the number of files


@pytest.mark.parametrize(
    'args, says',
    [
        (('{d}/text.txt', '--model', '{m}'), 'not readable as audio'),
        (('{d}/no.wav', '--model', '{m}'), 'no such file'),
        (('{d}/empty', '--model', '{m}'), 'no sound files'),
        (('{s}', '--model', '{d}'), 'make reproduce'),
        (('-', '--model', '{m}'), 'standard input'),
        (('{s}', '--modell', 'x'), "'--modell' is not an option"),
        (('{s}', '--model', '{m}', '--labels', 'dog,,bell'), 'an empty name'),
        (('{s}', '--model', '{m}', '--labels', 'dog,Dog'), 'labels 1 and 2'),
        (('{s}', '-k', '0'), 'a whole number from 1'),
        (('{s}', '-k', '-1'), 'a whole number from 1'),
    ],
)
def test_refusals(folder, tmp_path, args, says):
    (tmp_path / 'text.txt').write_text('not a sound')
    (tmp_path / 'empty').mkdir()
    places = dict(d=tmp_path, m=folder / 'model', s=folder / 'sounds/0000.wav')
    done = collat('classify', *(a.format(**places) for a in args), input='')
    assert done.returncode == 2 and says in done.stderr and 'Traceback' not in done.stderr, done.stderr


@pytest.mark.clock
def test_many_files_at_the_rate_of_python(folder, capsys):
    "At least half of the in-process rate, loading the model apart; the best of three, on a busy machine."
    files, model = sound_files([str(folder / 'sounds')]), open_model(folder / 'model')
    z_t = prompts_of(model, known_labels(model))

    def python():
        for i in range(0, N, 200):
            (model.encode_audio([load_audio(f) for f in files[i : i + 200]]) @ z_t.T).topk(3)

    def command(*paths):
        with pytest.raises(SystemExit) as e:
            main(['classify', *map(str, paths), '--model', str(folder / 'model'), '--json', '--quiet'])
        assert e.value.code == 0
        return len(capsys.readouterr().out.splitlines())

    def seconds(f, *args):
        t = time.time()
        out = f(*args)
        return time.time() - t, out

    def best(f, *args):
        return min((seconds(f, *args) for _ in range(3)), key=lambda x: x[0])

    python()
    inside, _ = best(python)
    start, one = best(command, files[0])
    whole, n = best(command, folder / 'sounds')
    share = inside / (whole - start)
    assert (one, n) == (1, N) and share >= 0.5, f'{share:.2f} of the in-process rate'


def test_show_is_looked_up_when_asked_for(folder):
    code = 'import sys, collat; assert "torch" not in sys.modules; print(collat.show.__name__)'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == 'show'
    with pytest.raises(AttributeError, match='no attribute'):
        __import__('collat').shows


HEAVY = 'diffusers fastai h5py IPython ipykernel matplotlib nbdev open_clip pandas papermill seaborn webdataset'.split()


def test_an_answer_loads_only_what_it_needs(tmp_path):
    "Of the libraries that training, tables and figures use, none is loaded for the label of one sound, nor for a span."
    sf.write(tmp_path / 'a.wav', np.random.default_rng(0).standard_normal(16_000) / 10, 16_000)
    args = str(tmp_path / 'a.wav'), '--model', str(Path(__file__).parent.parent / 'figures/mini/model'), '--quiet'
    code = f"""import gc, sys
from collat.cli import main
for question in 'classify', 'ground':
    sys.argv = ['collat', question, *{args}, '--json']
    try:
        main()
    except SystemExit as e:
        assert not e.code
assert gc.isenabled() and gc.get_freeze_count() > 100_000  # the collector rested while libraries were imported
print(*sorted(sys.modules))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    *answers, loaded = done.stdout.splitlines()
    assert [set(json.loads(a)) for a in answers] == [{'file', 'labels'}, {'file', 'events'}], done.stderr
    loaded = set(loaded.split())
    assert 'torch' in loaded and loaded & set(HEAVY) == set()


def test_the_index_of_a_search_is_kept_and_updated(folder, tmp_path):
    files = [tmp_path / f'{i}.wav' for i in range(4)]
    rng = np.random.default_rng(1)
    for f in files[:3]:
        sf.write(f, rng.standard_normal(8_000) / 10, 16_000)
    model = open_model(folder / 'model')
    heard = []

    def find(*more, index=tmp_path / 'index.npz'):
        heard.clear()
        with patch.object(CoLLAT, 'hear_windows', lambda self, w: heard.extend(w) or self.infer_tokens(w)):
            return search(model, 'a dog', [*files[:3], *more], [], progress=False, index=index)

    fresh = find(index=None)
    assert len(heard) == 3 and not (tmp_path / 'index.npz').exists()
    assert find() == fresh and len(heard) == 3
    assert find() == fresh and len(heard) == 0
    sf.write(files[3], np.zeros(8_000), 16_000)  # a new one, and one that has changed
    sf.write(files[0], rng.standard_normal(9_000) / 10, 16_000)
    again = find(files[3])
    assert len(heard) == 2 and again == find(files[3], index=None) != fresh
    skipped = []
    assert search(model, 'a dog', files, skipped, progress=False, index=tmp_path / 'index.npz') == again
    assert [Path(f).name for f, _ in skipped] == ['3.wav']
    model.logit_scale.data += 1  # another model: hours of hearing are not thrown away for its sake
    was = (tmp_path / 'index.npz').read_bytes()
    with pytest.raises(ValueError, match='index.npz: an index of 4 files as another model heard them'):
        find()
    assert not heard and (tmp_path / 'index.npz').read_bytes() == was
    with pytest.raises(ValueError, match='no index'):
        find(index=files[0])


@pytest.mark.parametrize('question', ['classify', 'ground'])
def test_work_grows_with_the_sound_and_what_is_held_at_once_does_not(folder, tmp_path, question):
    model = open_model(folder / 'model')
    rng = np.random.default_rng(0)
    work = {}
    for seconds in (30, 120):
        sf.write(tmp_path / 'a.wav', rng.standard_normal(16_000 * seconds) / 10, 16_000)
        sizes = []
        front = lambda wav, p, sizes=sizes: sizes.append(wav.numel()) or front_end(wav, p)
        with patch('collat.model.front_end', front):
            (answer,) = answers(model, question, [tmp_path / 'a.wav'], [], False, labels=['dog', 'bell', 'rain'])
        work[seconds] = len(sizes), sum(sizes), max(sizes)
    calls, samples, largest = (b / a for a, b in zip(work[30], work[120]))
    assert 3.5 <= calls <= 4.5 and 3.5 <= samples <= 4.5 and largest == 1


def test_windows_of_a_long_sound_are_no_copies():
    wav = torch.zeros(16_000 * 60)
    assert {w.untyped_storage().data_ptr() for w in window_views(wav, 3, 1.5)} == {wav.untyped_storage().data_ptr()}


def test_sounds_of_many_lengths_pass_the_locked_encoder_together(folder):
    model = open_model(folder / 'model')
    wavs = [torch.randn(8_000 + 100 * i) for i in range(40)]
    rows = []
    embed = CoLLAT.embed
    with patch.object(CoLLAT, 'embed', lambda self, h: rows.append(len(h)) or embed(self, h)):
        z = model.encode_audio(wavs)
    assert rows == [40]
    assert (z - torch.cat([model.encode_audio(w) for w in wavs])).abs().max() < 1e-5
