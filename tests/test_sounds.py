"Whatever people hand over as sound, labels or texts: one answer, or a refusal that says what is accepted."

import array
import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile as sf
import torch

from collat.audio import AudioError, load_audio, load_sounds, normalise_level
from collat.captioning import build_vocabulary, save_captioner, seeded_captioner
from collat.listen import answers, known_labels, open_model, search, show
from collat.model import prompts_of
from collat.reading import compose, read_words
from collat.scenes import render_phrase, soundfont_path

ROOT = Path(__file__).parent.parent
LABELS = ['violin', 'flute', 'cabasa', 'piano', 'banjo']
RATE = 16_000


@pytest.fixture(scope='module')
def model():
    return open_model(ROOT / 'figures/mini/model')


@pytest.fixture(scope='module')
def violin(model):
    "A rendered phrase of the validation split, (s,) float32."
    return render_phrase('violin', 'valid', 0, model.profile, soundfont_path('timgm'))


@pytest.fixture(scope='module')
def right(model, violin):
    return model.classify(violin, LABELS)


def wav_bytes(x, rate=RATE, kind='WAV', **how):
    f = io.BytesIO()
    sf.write(f, x, rate, format=kind, **how)
    return f.getvalue()


def closed(f):
    f.close()
    return f


def stereo(x):
    return np.stack([x, x], 1)


def silent(x):
    return np.zeros_like(x)


FORMS = {
    'array': lambda x: x,
    'tensor': torch.from_numpy,
    'double': lambda x: x.astype(float),
    'half': lambda x: torch.from_numpy(x).half(),
    'bfloat16': lambda x: torch.from_numpy(x).bfloat16(),
    'int16': lambda x: np.round(x * 32767).astype(np.int16),
    'int32': lambda x: np.round(x.astype(float) * (2**31 - 1)).astype(np.int32),
    'uint8, loud': lambda x: np.round(x / np.abs(x).max() * 127 + 128).astype(np.uint8),
    'int16 tensor': lambda x: torch.from_numpy(np.round(x * 32767).astype(np.int16)),
    'int8, loud': lambda x: np.round(x / np.abs(x).max() * 127).astype(np.int8),
    'big-endian int16': lambda x: np.round(x * 32767).astype('>i2'),
    'int32 tensor': lambda x: torch.from_numpy(np.round(x.astype(float) * (2**31 - 1)).astype(np.int32)),
    'longdouble': lambda x: x.astype(np.longdouble),
    'negated tensor': lambda x: torch.complex(y := torch.from_numpy(x), -y).conj().imag,
    'list of floats': lambda x: x.tolist(),
    'array of the standard library': lambda x: array.array('f', x.tolist()),
    'whole column of a table': lambda x: pd.Series(x),
    'tuple of floats': lambda x: tuple(x.tolist()),
    '(1, s)': lambda x: x[None],
    '(1, s) in a list, as torchaudio': lambda x: [torch.from_numpy(x)[None]],
    '(s, 2), as soundfile': stereo,
    '(s, 2) in a list': lambda x: [stereo(x)],
    '(2, s) in a list': lambda x: [stereo(x).T],
    '(s, 1)': lambda x: x[:, None],
    '(s, 6), as films': lambda x: np.stack([x] * 6, 1),
    '(6, s) in a list': lambda x: [np.stack([x] * 6)],
    'Fortran order': lambda x: np.asfortranarray(stereo(x)),
    'broadcast': lambda x: np.broadcast_to(x[:, None], (len(x), 3)),
    '(b, c, s)': lambda x: stereo(x).T[None],
    'antiphase, and a third channel silent': lambda x: np.stack([x, -x, silent(x)], 1),
    'antiphase': lambda x: np.stack([x, -x], 1),
    'one channel silent': lambda x: np.stack([x, silent(x)], 1),
    '(array, rate)': lambda x: (x, RATE),
    '(rate, array), as scipy': lambda x: (RATE, x),
    'at another rate': lambda x: (load_sounds(x, 44_100, RATE)[0], 44_100),
    'stereo at another rate': lambda x: (stereo(load_sounds(x, 48_000, RATE)[0].numpy()), 48_000),
    'rate as a fraction': lambda x: (x, Fraction(RATE)),
    'rate as a number of numpy': lambda x: (x, np.float32(RATE)),
    'at a rate that is no whole number': lambda x: (load_sounds(x, 44_100, RATE)[0], 44_100.0),
    'dict in a list': lambda x: [dict(array=stereo(x), sampling_rate=RATE)],
    'bytearray': lambda x: bytearray(wav_bytes(x)),
    'flac in memory': lambda x: wav_bytes(x, kind='FLAC'),
    'dict, as datasets': lambda x: dict(array=x, sampling_rate=RATE, path=None),
    'dict, as pipelines': lambda x: dict(raw=x, sampling_rate=RATE),
    'dict of bytes': lambda x: dict(bytes=wav_bytes(x), path=None),
    'bytes': wav_bytes,
    'open file': lambda x: io.BytesIO(wav_bytes(x)),
    'memoryview': lambda x: memoryview(wav_bytes(stereo(x))),
    'generator': lambda x: (y for y in [x]),
    'map': lambda x: map(torch.from_numpy, [x]),
    'negative strides': lambda x: x[::-1].copy()[::-1],
    'read-only': lambda x: np.frombuffer(x.tobytes(), np.float32),
    'with gradient': lambda x: torch.from_numpy(x).requires_grad_(),
    'peaks of 1.8': lambda x: x / np.abs(x).max() * 1.8,
    'peaks of 30': lambda x: x / np.abs(x).max() * 30,
    '-70 dB': lambda x: x.astype(float) * 0.0003,
    '+14 dB': lambda x: x * 5,
    'one channel 40 dB below': lambda x: np.stack([x, x * 0.01], 1),
    'with an offset of 20': lambda x: x * 0.5 + 20,
    '-60 dB': lambda x: x * 0.001,
    '-40 dB': lambda x: x * 0.01,
    '+6 dB': lambda x: x * 2,
    'with an offset': lambda x: x + 0.2,
    'in the middle of silence': lambda x: np.r_[silent(x)[:8000], x, silent(x)[:8000]],
}


@pytest.mark.parametrize('form', FORMS)
def test_one_answer_in_every_form(model, violin, right, form):
    found = model.classify(FORMS[form](violin), LABELS)
    assert found.shape == (1, 5) and abs(found[0, 0] - right[0, 0]) <= 0.05 and found.argmax() == 0


def test_files_and_names(model, violin, right, tmp_path):
    names = [tmp_path / f'{i}.wav' for i in range(2)]
    for i, f in enumerate(names):
        sf.write(f, violin * (1, 0.001)[i], RATE, subtype='FLOAT')
    for several in (names, tmp_path.glob('*.wav'), np.array(list(map(str, names))), map(str, names)):
        assert torch.allclose(model.classify(several, LABELS), right.expand(2, -1), atol=1e-3)
    told = list(answers(model, 'classify', iter(names), [], False, labels='violin'))
    assert [a['file'] for a in told] == list(map(str, names)) and len(told[0]['labels']) == 1
    assert len(list(answers(model, 'classify', str(names[0]), [], False, labels=LABELS))) == 1
    assert [a['rank'] for a in search(model, 'a violin', tmp_path.glob('*.wav'), [], progress=False)] == [1, 2]
    with pytest.raises(ValueError, match='no files'):
        list(answers(model, 'classify', tmp_path.glob('*.flac'), []))


def test_a_batch_is_a_batch(model, violin, right):
    flute = violin[::-1].copy()
    many = np.stack([violin, flute, violin])
    found = model.classify(many, LABELS)
    assert found.shape == (3, 5) and torch.allclose(found[[0, 2]], right.expand(2, -1), atol=1e-4)
    pair = model.classify(list(many[:2]), LABELS)
    assert torch.allclose(pair, found[:2], atol=1e-4)


REFUSED = {
    'two rows': (stereo, 'list(x) for two sounds, [x] for one in stereo'),
    'nan': (lambda x: np.r_[x[:RATE], np.nan, x[RATE:]], 'sample of nan at 1.000 s'),
    'inf': (lambda x: [x, np.r_[x[:8000], np.inf]], 'sound 1: sample of inf at 0.500 s'),
    'overflow': (lambda x: x.astype(float) * 1e300, 'sample of'),
    '-inf in one channel': (lambda x: np.stack([x, np.r_[x[:-1], -np.inf]], 1), 'sample of -inf'),
    'nan in a batch': (lambda x: [x, x, np.r_[x[:1600], np.nan]], 'sound 2: sample of nan at 0.100 s'),
    'nan in a pair': (lambda x: (np.r_[x[:800], np.nan], 8000), 'sample of nan at 0.100 s'),
    '33': (lambda x: np.r_[x, np.float32(33)], 'sample of 33'),
    '1e38': (lambda x: x * 1e38, 'at most ±32'),
    'int16 as floats': (lambda x: x * 32767, 'integers are scaled by their type'),
    'uint8 as floats': (lambda x: x / np.abs(x).max() * 127, 'at most ±32'),
    'bool': (lambda x: x > 0, 'bool'),
    'complex': (lambda x: x + 0j, 'complex64'),
    'uint16': (lambda x: np.abs(x * 999).astype(np.uint16), 'uint16'),
    'dates': (lambda x: np.zeros(len(x), 'M8[s]'), 'datetime64'),
    'records': (lambda x: np.zeros(len(x), [('a', 'f4')]), "[('a', '<f4')]"),
    'sparse': (lambda x: torch.from_numpy(x).to_sparse(), 'Sparse'),
    'meta': (lambda x: torch.zeros(len(x), device='meta'), 'meta tensor'),
    'conjugate': (lambda x: torch.from_numpy(x + 1j).conj(), 'complex64'),
    'int64': (lambda x: np.round(x * 32767).astype(int), 'int64'),
    'a list of whole numbers': (lambda x: [0, 1, 2], 'int64'),
    'object': (lambda x: [np.array([x, None], object)], 'object'),
    'four axes': (lambda x: x[None, None, None], 'shape (1, 1, 1'),
    'many channels': (lambda x: [np.zeros((64, 48000))], 'shape (64, 48000)'),
    'no channels': (lambda x: np.zeros((len(x), 0)), ', 0)'),
    'no channels in a list': (lambda x: [np.zeros((48_000, 0))], 'shape (48000, 0)'),
    'no axes': (lambda x: np.array(None), 'shape ()'),
    'a name in an array without axes': (lambda x: np.array('a.wav'), 'shape ()'),
    'none': (lambda x: None, 'NoneType'),
    'a number': (lambda x: 7, 'int'),
    'one of them none': (lambda x: [x, None], 'sound 1'),
    'no sounds': (lambda x: [], 'none were given'),
    'an empty array': (lambda x: x[:0], 'no samples'),
    'one sample': (lambda x: x[:1], 'min_seconds=0.025'),
    '24 ms at another rate': (lambda x: (x[:192], 8_000), '0.0240 s'),
    '24 ms in a file': (lambda x: wav_bytes(x[:384]), '0.0240 s'),
    '24 ms': (lambda x: x[:384], '0.0240 s'),
    'no rate': (lambda x: dict(array=x), 'sampling_rate'),
    'rate is nothing': (lambda x: dict(array=x, sampling_rate=None), 'sampling_rate'),
    'rate is text': (lambda x: dict(array=x, sampling_rate='16000'), "rate '16000'"),
    'rate is a list': (lambda x: dict(array=x, sampling_rate=[RATE]), 'rate [16000]'),
    'rate beyond all floats': (lambda x: (x, 10**400), '1,000 to 1,000,000 Hz'),
    'rate 0': (lambda x: (x, 0), '1,000 to 1,000,000 Hz'),
    'rate 1': (lambda x: (x, 1), '1 samples a second'),
    'rate nan': (lambda x: (x, float('nan')), 'nan samples a second'),
    'no file': (lambda x: 'nowhere.wav', 'nowhere.wav: no such file'),
    'an empty name': (lambda x: '', 'no such file'),
    'a folder': (lambda x: str(ROOT), 'no such file'),
    'bytes of no sound': (lambda x: b'RIFF', 'sound 0: not readable as audio'),
    'a closed file': (lambda x: closed(io.BytesIO(wav_bytes(x))), 'closed file'),
    'cut bytes': (lambda x: wav_bytes(x)[:30], 'sound 0: not readable as audio'),
    'text': (lambda x: io.StringIO('x'), 'not readable as audio'),
    'ragged': (lambda x: [[0.1, [0.2]]], 'sound 0: list'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused_with_what_was_found_and_what_is_accepted(violin, case):
    make, why = REFUSED[case]
    given = make(violin).T if case == 'two rows' else make(violin)
    with pytest.raises(AudioError, match='Accepted') as e:
        load_sounds(given)
    assert why in str(e.value)


def test_rates_that_contradict(violin):
    with pytest.raises(AudioError, match='rate 8000 beside sampling_rate=16000'):
        load_sounds((violin, 8000), sampling_rate=16000)
    assert len(load_sounds(violin, RATE, sampling_rate=8000)[0]) == 2 * len(violin)


@pytest.mark.parametrize('ext', ['m4a', 'mp4', 'aac', 'wma', 'webm', 'amr', 'M4A'])
def test_foreign_formats_name_the_command_that_converts(tmp_path, ext):
    f = tmp_path / f'song.{ext}'
    f.write_bytes(b'\0\0\0 ftypM4A ' + bytes(1000))
    with pytest.raises(AudioError, match=f'ffmpeg -i ".*song.{ext}" sound.wav'):
        load_audio(f)


def test_a_header_of_one_hertz_and_a_file_of_1e25(tmp_path, model, violin):
    slow = bytearray(wav_bytes(violin, subtype='PCM_16'))
    slow[24:28] = (1).to_bytes(4, 'little')
    (tmp_path / 'slow.wav').write_bytes(slow)
    sf.write(tmp_path / 'huge.wav', violin * 1e25, RATE, subtype='FLOAT')
    for i in range(3):
        sf.write(tmp_path / f'{i}.wav', violin[i * 4000 :], RATE)
    sf.write(tmp_path / 'silence.wav', silent(violin), RATE)
    skipped = []
    found = search(model, 'This is a sound of violin', sorted(tmp_path.glob('*.wav')), skipped, progress=False)
    assert len(found) == 3 and sorted(a['score'] for a in found)[::-1] == [a['score'] for a in found]
    why = dict((Path(f).name, why) for f, why in skipped)
    assert (
        'sample of' in why['huge.wav'] and '1 samples a second' in why['slow.wav'] and 'silence' in why['silence.wav']
    )


SILENCE = dict(
    zeros=silent,
    offset=lambda x: silent(x) + 0.3,
    below=lambda x: silent(x) + 1e-40,
    lowest=lambda x: np.full(len(x), -32768, np.int16),
    dither=lambda x: np.random.default_rng(0).integers(-1, 2, len(x)).astype(np.int16),
)


@pytest.mark.parametrize('kind', SILENCE)
def test_silence_is_said(model, violin, tmp_path, kind):
    x = SILENCE[kind](violin)
    with pytest.warns(UserWarning, match='silence in 1 of 2 sounds, the first is 1'):
        scores = model.classify([violin, x], LABELS)
    assert not scores[1].any() and scores[0].argmax() == 0
    sf.write(tmp_path / 'x.wav', x, RATE, subtype='FLOAT' if x.dtype == np.float32 else 'PCM_16')
    sf.write(tmp_path / 'y.wav', violin, RATE)
    for question, key in dict(classify='labels', words='concepts', caption='labels', ground='events').items():
        quiet, loud = answers(model, question, [tmp_path / 'x.wav', tmp_path / 'y.wav'], [], False, labels=LABELS)
        assert quiet['silence'] and quiet[key] == [] and json.dumps(quiet) and 'silence' not in loud
    with pytest.raises(ValueError, match='sound 0 of the prompt is silence'):
        search(model, 'a {audio}', [tmp_path / 'y.wav'], [], sounds=[x], progress=False)
    assert 'silence' in show(x, model, LABELS).data


def test_levels_change_neither_words_nor_prompts(model, violin):
    a, b = (read_words(model, v, 1, LABELS, levelled=True).tokens for v in (violin, violin * 0.003))
    assert [t[0][0] for t in a] == [t[0][0] for t in b]
    z = [compose(model, 'a {audio}', v, levelled=True).z for v in (violin, violin * 0.003)]
    assert z[0] @ z[1] > 0.999


def test_evaluations_hear_sound_as_it_is(model, violin):
    level = torch.from_numpy(violin)
    assert torch.equal(model.encode_audio(violin), model.encode_audio([level]))
    assert not torch.allclose(model.encode_audio(violin * 0.01), model.encode_audio(violin), atol=0.01)
    once = normalise_level(level)
    assert torch.allclose(normalise_level(once), once, atol=1e-5) and normalise_level(1e-3 * level).abs().max() <= 0.98


@pytest.mark.parametrize('ms', [25, 26, 50, 100, 150, 190, 300, 399])
def test_short_clips_by_one_rule(model, violin, tmp_path, ms):
    x = violin[: RATE * ms // 1000]
    sf.write(tmp_path / 'x.wav', x, RATE, subtype='FLOAT')
    scores = model.classify(x, LABELS)
    assert torch.equal(scores, model.classify(tmp_path / 'x.wav', LABELS))
    padded = model.encode_audio(np.r_[x, np.zeros(6400 - len(x), np.float32)])
    assert torch.equal(model.encode_audio(x), padded)
    [told] = answers(model, 'ground', [tmp_path / 'x.wav'], [], False, labels=LABELS)
    for e in told['events']:
        assert 0 <= e['onset'] <= e['peak'] <= e['offset'] <= ms / 1000


def test_labels(model, violin, right):
    assert model.classify(violin, 'violin').shape == (1, 1)
    assert torch.equal(model.classify(violin, (l for l in LABELS)), right)
    assert known_labels(model, 'Music, violin') == ['Music, violin'] and len(known_labels(model)) == 61
    for labels, why in (
        ([], 'no labels'),
        (['violin', 'Violin'], 'labels 1 and 2'),
        (['a', 'a_b', 'a b'], 'labels 2 and 3'),
        (['a', ''], 'label 2 of 2 is blank'),
        ([' '], 'label 1 of 1'),
        (['a', '\u200b'], 'label 2 of 2 is blank'),
        (['a', ' A\t'], 'labels 1 and 2'),
        (['a', 'b\udcff'], 'letter 2 is no Unicode'),
        (iter(()), 'no labels'),
    ):
        for f in (lambda: model.classify(violin, labels), lambda: known_labels(model, labels)):
            with pytest.raises(ValueError, match=why):
                f()
    for labels, why in (
        ([3], 'int; a string'),
        (b'violin', 'int; a string'),
        (None, 'a list of names'),
        (np.array('violin'), 'a list of names'),
    ):
        with pytest.raises(TypeError, match=why):
            model.classify(violin, labels)


def test_templates_of_ones_own_and_ensembles(model, violin, right):
    own = [f'a {l} sound' for l in LABELS]
    assert torch.equal(prompts_of(model, LABELS, 'a {} sound'), model.encode_text(own))
    z = prompts_of(model, LABELS, ['a {} sound', 'laion', 'I hear {}!'])
    assert torch.allclose(z.norm(dim=-1), torch.ones(5), atol=1e-6)
    assert torch.equal(model.classify(violin, LABELS, ['paper']), right)
    several = prompts_of(model, (l for l in LABELS), (t for t in ('paper', 'laion')))
    assert torch.equal(several, prompts_of(model, LABELS, ['paper', 'laion']))
    for bad in ('a sound', ['paper', 'no'], 3, None, [], [None], '{0}', b'{}', '{} \udcff'):
        with pytest.raises(ValueError, match='template|letter 4 is no Unicode'):
            model.classify(violin, LABELS, bad)


@pytest.mark.parametrize(
    'texts, why',
    [
        ([], 'no texts'),
        (3, 'text 1 of 1 is 3, int'),
        (['a', None], 'text 2 of 2 is None'),
        ('word ' * 600, 'some 382 English words'),
        (b'a violin', 'text 1 of 8 is 97, int'),
        ('a \ud800', 'letter 3 is no Unicode'),
        (np.array('a'), 'text 1 of 1 is array'),
        ([['a']], r"text 1 of 1 is \['a'\], list"),
    ],
)
def test_texts_are_refused_in_words(model, texts, why):
    with pytest.raises(ValueError, match=why):
        model.encode_text(texts)


def test_what_is_no_option_is_refused(model, violin, tmp_path):
    for size in (0, -1, 1.5, '8', float('nan')):
        for f in (model.encode_audio, model.token_features):
            with pytest.raises(ValueError, match=f'batch_size={size!r}'):
                f(violin, batch_size=size)
    for f in (
        lambda: model.classify(violin, LABELS, sample_rate=8000),
        lambda: model.encode_audio(violin, sampelrate=8000),
        lambda: list(answers(model, 'classify', [tmp_path / 'x.wav'], [], labls=LABELS)),
    ):
        with pytest.raises(TypeError, match='unexpected keyword'):
            f()


def test_captions_of_levelled_sound(model, violin, tmp_path):
    words = build_vocabulary(['a violin and then a bell'])
    save_captioner(seeded_captioner(model.text.d, words), tmp_path / 'c.safetensors', kind='states')
    said = []
    for i, gain in enumerate((1, 0.01)):
        sf.write(tmp_path / f'{i}.wav', violin * gain, RATE, subtype='FLOAT')
        said += answers(model, 'caption', tmp_path / f'{i}.wav', [], False, trained=tmp_path / 'c.safetensors')
    assert said[0]['caption'] == said[1]['caption']


@pytest.mark.parametrize('kind', [torch.float64, torch.float16, torch.bfloat16])
def test_a_model_in_another_type_answers_the_same(violin, right, kind):
    other = open_model(ROOT / 'figures/mini/model').to(kind)
    assert abs(other.classify(violin, LABELS) - right).max() < 0.02
    assert other.token_features(violin, 'states')[0].dtype == torch.float32


def test_a_click_in_the_last_block_of_silence(model):
    x = np.zeros(RATE, np.float32)
    x[-20:-18] = 0.5, -0.5
    (level,) = load_sounds(x, levelled=True)
    assert level.isfinite().all() and 0 < level.abs().max() <= 0.98
    assert model.classify(x, LABELS).isfinite().all()
    (short,) = load_sounds(np.sin(np.arange(120, dtype=np.float32)), 4_000, levelled=True)
    assert short.isfinite().all() and len(short) == 120


def test_prompts_with_odd_sounds_and_weights(model, violin):
    for weights in ([float('nan')], [float('inf')], [0], [-1], ['a'], '1', [1, 1]):
        with pytest.raises(ValueError, match='one positive number for each'):
            compose(model, 'a {audio}', violin, weights)
    for slots in (0, -1, 2.5, '8', 10**6):
        with pytest.raises(ValueError, match='slots='):
            compose(model, 'a {audio}', violin, slots=slots)
    for text, why in ((3, 'text 1 of 1 is 3'), (None, 'is None'), ('\udcff {audio}', 'no Unicode'), ('', 'nothing')):
        with pytest.raises(ValueError, match=why):
            compose(model, text, violin if '{audio}' in str(text) else [])


def test_counts_methods_and_lists_of_every_kind(model, violin, tmp_path):
    f = tmp_path / 'x.wav'
    sf.write(f, violin, RATE)
    for k in (0, -1, 1.5, '3', None, True, float('nan')):
        for ask in (
            lambda: list(answers(model, 'classify', f, [], False, k=k)),
            lambda: search(model, 'a violin', f, [], k, progress=False),
            lambda: show(violin, model, LABELS, k=k),
        ):
            with pytest.raises(ValueError, match='1 or more answers'):
                ask()
    for ask in (
        lambda: list(answers(model, 'ground', f, [], False, method='nope')),
        lambda: show(violin, model, LABELS, method='nope'),
    ):
        with pytest.raises(ValueError, match="method 'nope' is not one of"):
            ask()
    for sounds in (f, str(f), iter([f]), violin, [violin]):
        assert search(model, '{audio}', [f], [], sounds=sounds, progress=False)[0]['score'] > 0.99
    skipped = []
    assert not list(answers(model, 'classify', [3, None], skipped, False)) and len(skipped) == 2
    for path in (3, b'x', ['x']):
        with pytest.raises(ValueError, match='the folder of a model'):
            open_model(path)


@pytest.mark.parametrize('part, scale', [('interaction', 1e30), ('interaction.head', 1e34)])
def test_a_broken_model_says_so(violin, part, scale):
    broken = open_model(ROOT / 'figures/mini/model')
    with torch.no_grad():
        for w in broken.get_submodule(part).parameters():
            w.mul_(scale)
    for ask in (lambda: broken.classify(violin, LABELS), lambda: compose(broken, 'a {audio}', violin)):
        with pytest.raises(ValueError, match='NaN or infinity; its weights are broken'):
            ask()
