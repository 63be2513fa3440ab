"""A seeded storm: thousands of inputs, each valid but for at most one fault, through the doors of the package.

Each ends in a finite answer, or in a refusal that the package raises itself; where the right answer is known, it is
compared. COLLAT_FUZZ=200000 sets the number of cases, COLLAT_FUZZ_SEED the storm, and COLLAT_FUZZ_CASE=sounds/17 runs
one case alone, with its traceback.
"""

import copy
import csv
import dataclasses
import dis
import io
import json
import os
import random
import traceback
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors.torch import load_file, save_file

from collat.audio import LOUDEST, load_audio, load_sounds
from collat.captioning import build_vocabulary, load_captioner, save_captioner, seeded_captioner
from collat.cli import names_in_a_row
from collat.clips import read_clips
from collat.config import LIMITS, Profile, load_profile
from collat.datasets import load_dataset
from collat.files import list_lines, list_name
from collat.model import CoLLAT
from collat.prompts import class_prompts
from collat.reading import compose, read_words
from collat.streaming import INDEX, Plan, Shards
from collat.tables import load_csv
from collat.weights import fill, read_pickled, read_tensors, saved_config, saved_profile

CASES = int(os.environ.get('COLLAT_FUZZ', 10_000))
SEED = int(os.environ.get('COLLAT_FUZZ_SEED', 0))
ALONE = os.environ.get('COLLAT_FUZZ_CASE', '')
SHARES = dict(arrays=0.36, sounds=0.31, tables=0.1, lists=0.02, labels=0.08, profiles=0.09, folders=0.037, model=0.003)
RATE = 16_000


class Wrong(AssertionError):
    "An answer that is not the right one."


def on_purpose(e: Exception) -> bool:
    "Whether a `raise` of the package raised it, with words."
    tb = e.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    ours = tb.tb_frame.f_globals.get('__name__', '').startswith('collat.')
    by_raise = tb.tb_frame.f_code.co_code[tb.tb_lasti] == dis.opmap['RAISE_VARARGS']
    return ours and by_raise and isinstance(e, (ValueError, TypeError, OSError)) and len(str(e)) > 10


def refusal(call, names: str = '') -> str | None:  # None: it answered
    "What is said against an input; what else is raised goes on."
    try:
        call()
    except Exception as e:
        if not on_purpose(e):
            raise
        if names not in str(e):
            raise Wrong(f'the refusal names no {names}: {e}') from e
        return str(e)


def expect(true, what):
    if not true:
        raise Wrong(what)


# ---- arrays


def some_sound(rng, g) -> np.ndarray:  # (s,) float32
    s = rng.randrange(900, 3_000)
    return (0.3 * 10 ** rng.uniform(-2, 1.4) * g.uniform(-1, 1, s)).astype(np.float32)


TYPES = {  # how samples may be written, and how exactly they come back, as a share of the peak
    'float32': (lambda x: x, 0),
    'float64': (lambda x: x.astype(float), 0),
    'longdouble': (lambda x: x.astype(np.longdouble), 0),
    'big-endian': (lambda x: x.astype('>f4'), 0),
    'tensor': (torch.from_numpy, 0),
    'tensor, negated': (lambda x: torch.complex(x0 := torch.from_numpy(x), -x0).conj().imag, 0),
    'with gradient': (lambda x: torch.from_numpy(x).requires_grad_(), 0),
    'bfloat16': (lambda x: torch.from_numpy(x).bfloat16(), 0.01),
    'float16': (lambda x: x.astype(np.float16), 0.001),
    'list': (lambda x: x.tolist(), 0),
    'tuple': (lambda x: tuple(x.tolist()), 0),
    'int16': (lambda x: (x.clip(-1, 1) * 32767).round().astype(np.int16), None),
    'int32': (lambda x: (x.clip(-1, 1) * (2**31 - 129.0)).astype(np.int32), None),
    'int8': (lambda x: (x.clip(-1, 1) * 127).round().astype(np.int8), None),
    'uint8': (lambda x: (x.clip(-1, 1) * 127 + 128).round().astype(np.uint8), None),
}
SHAPES = {
    '(s,)': lambda x: x,
    '(1, s)': lambda x: x[None],
    '(s, 1)': lambda x: x[:, None],
    '[(2, s)]': lambda x: [np.stack([x, x])],
    '(s, 3)': lambda x: np.stack([x, x, x], 1),
    'broadcast': lambda x: np.broadcast_to(x[:, None], (len(x), 4)),
    'Fortran': lambda x: np.asfortranarray(np.stack([x, x], 1)),
    'backwards': lambda x: x[::-1].copy()[::-1],
    'every third': lambda x: np.repeat(x, 3)[::3],
    'read-only': lambda x: np.frombuffer(x.tobytes(), x.dtype),
}
WRAPS = {
    'plain': lambda x, r: x,
    'list': lambda x, r: x if isinstance(x, list) else [x],
    'generator': lambda x, r: (y for y in (x if isinstance(x, list) else [x])),
    'pair': lambda x, r: (only(x), r),
    'pair, turned': lambda x, r: (r, only(x)),
    'dict': lambda x, r: dict(array=only(x), sampling_rate=r, path=None),
    'raw': lambda x, r: [dict(raw=only(x), sampling_rate=np.float32(r))],
}


def only(x):
    return x[0] if isinstance(x, list) and not isinstance(x[0], float) else x


def with_value(value):
    def put(x, rng):
        x = x.copy()
        x[rng.randrange(len(x))] = value
        return x

    return put


FAULTS = {  # of an array: all of these are refused
    **{f'{v}': with_value(v) for v in (np.nan, np.inf, -np.inf, 1e38, 33, -1e6)},
    'empty': lambda x, rng: x[:0],
    'short': lambda x, rng: x[: rng.randrange(400)],
    'bool': lambda x, rng: x > 0,
    'complex': lambda x, rng: x + 1j,
    'int64': lambda x, rng: (x * 30_000).astype(int),
    'uint16': lambda x, rng: np.abs(x * 999).astype(np.uint16),
    'text': lambda x, rng: [x.astype(str)],
    'bytes of text': lambda x, rng: x.astype('S'),
    'dates': lambda x, rng: np.zeros(len(x), 'M8[s]'),
    'records': lambda x, rng: np.zeros(len(x), [('a', 'f4')]),
    'four axes': lambda x, rng: x[None, None, None],
    'many channels': lambda x, rng: [np.tile(x[:500], (rng.randrange(17, 40), 1))],
    'no channels': lambda x, rng: x[:, None][:, :0],
    'no clips': lambda x, rng: x[None][:0],
    'no axes': lambda x, rng: x[0],
    'objects': lambda x, rng: [np.array([*x[:9], None], object)],
    'ragged': lambda x, rng: [[0.1, [0.2]]],
    'none in a list': lambda x, rng: rng.sample([x, None], 2),
    'one bad of several': lambda x, rng: rng.sample([x, x, with_value(np.nan)(x, rng)], 3),
    'sparse': lambda x, rng: torch.from_numpy(x).to_sparse(),
    'meta': lambda x, rng: torch.zeros(len(x), device='meta'),
    'conjugate': lambda x, rng: torch.from_numpy(x + 1j).conj(),
    'two rows': lambda x, rng: np.stack([x, x]),
    'no rate': lambda x, rng: dict(array=x),
    'no array': lambda x, rng: dict(sampling_rate=RATE, array=None),
    'rate': lambda x, rng: (x, rng.choice([0, -1, 1, 999, 1e6 + 1, 1e300, 10**400, -(10**400), np.nan, np.inf, True])),
    'rate, no number': lambda x, rng: dict(array=x, sampling_rate=rng.choice(['16000', None, [RATE], 1j, b'1'])),
    'a number': lambda x, rng: rng.choice([0, 3.5, True, np.float32(1), 10**400]),
    'nothing': lambda x, rng: rng.choice([None, [], (), {}, '', b'', object(), int, iter([])]),
}


def arrays(rng, g, here):
    x = some_sound(rng, g)
    levelled = rng.random() < 0.3
    if rng.random() < 0.4:
        fault = rng.choice(list(FAULTS))
        given = FAULTS[fault](x, rng)
        expect(refusal(lambda: load_sounds(given, levelled=levelled)), f'{fault}: answered')
        return
    kind, shape, wrap = (rng.choice(list(d)) for d in (TYPES, SHAPES, WRAPS))
    if kind not in ('float32', 'float64', 'longdouble', 'float16', 'int16', 'int32', 'int8', 'uint8'):
        shape = '(s,)'
    rate = rng.choice([RATE, RATE, RATE, 8_000, 22_050, 11_025.5])
    write, close = TYPES[kind]
    given = WRAPS[wrap](SHAPES[shape](write(x)), rate)
    more = dict(sampling_rate=rate) if wrap in ('plain', 'list', 'generator') else {}
    (found,) = load_sounds(given, levelled=levelled, **more)
    (right,) = load_sounds(x if close is not None else x.clip(-1, 1), sampling_rate=rate, levelled=levelled)
    bits = dict(int8=0.02, uint8=0.02, int16=1e-4, int32=1e-4)
    atol = bits[kind] if close is None else (close + 1e-5) * float(right.abs().max())
    if close is None and levelled:
        atol = atol / max(1e-3, np.abs(x).max()) + 1e-3
    expect(found.shape == right.shape and found.isfinite().all(), f'{kind}, {shape}, {wrap}: {found.shape}')
    expect(
        torch.allclose(found, right, atol=max(atol, 1e-7), rtol=0.01), f'{kind}, {shape}, {wrap}, {rate}: another sound'
    )


# ---- sound files

FORMATS = [('WAV', s) for s in ('PCM_16', 'PCM_24', 'FLOAT', 'PCM_U8', 'MS_ADPCM', 'ULAW')]
FORMATS += [('FLAC', 'PCM_16'), ('OGG', 'VORBIS'), ('OGG', 'OPUS'), ('MP3', 'MPEG_LAYER_III'), ('W64', 'PCM_16')]
FORMATS += [('AIFF', 'PCM_16'), ('CAF', 'PCM_16'), ('AU', 'PCM_16'), ('RF64', 'PCM_16')]
EXACT = 'PCM_16', 'PCM_24', 'FLOAT', 'PCM_U8'


def written() -> list:  # (format, subtype, bytes, what is read from them) each
    x = np.random.default_rng(1).uniform(-0.5, 0.5, (1_200, 1)).astype(np.float32)
    out = []
    for kind, subtype in FORMATS:
        f = io.BytesIO()
        sf.write(f, x, RATE, subtype, format=kind)
        out.append((kind, subtype, f.getvalue(), load_sounds(f.getvalue())[0]))
    return out


FILES = written()


def spoilt(data: bytes, rng) -> bytes:
    "A file with one fault, most often in its header."
    b = bytearray(data)
    at = rng.randrange(min(len(b) - 8, rng.choice([16, 64, 300, len(b)])))
    kind = rng.randrange(6)
    if kind == 0:
        b[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        b[at : at + 4] = rng.choice([bytes(4), b'\1\0\0\0', b'\0\0\0\1', b'\xff' * 4, b'\xff\xff\xff\x7f', b'RIFF'])
    elif kind == 2:
        b[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    elif kind == 3:
        del b[at : at + rng.randrange(1, 9)]
    elif kind == 4:
        b[at : at + 64] = b[:64]
    else:
        b[at:] = bytes(len(b) - at)
    return bytes(b)


def sounds(rng, g, here):
    kind, subtype, data, right = FILES[rng.randrange(len(FILES))]
    cut = rng.random() < 0.5
    given = data[: rng.randrange(rng.choice([len(data), 100]))] if cut else spoilt(data, rng)
    found = []
    if rng.random() < 0.1:
        path = here / f'x.{kind.lower()}'
        path.write_bytes(given)
        said = refusal(lambda: found.append(load_audio(path)), str(path))
    else:
        said = refusal(lambda: found.extend(load_sounds(given)), 'sound 0')
    if said is None:
        fine = found[0].ndim == 1 and len(found[0]) >= 400 and (found[0].abs() <= 2 * LOUDEST).all()
        expect(fine, f'{kind} {subtype}: {found[0].shape}')
    if said is None and cut and subtype in EXACT and kind != 'FLAC':
        n = min(len(found[0]), len(right))
        expect(
            len(found[0]) <= len(right) and torch.equal(found[0][:n], right[:n]), f'{kind}: no beginning of the file'
        )


# ---- tables

ODD = [
    '',
    ' ',
    '-1',
    '0',
    '1e999',
    'nan',
    'inf',
    '-0.5',
    '1e305',
    '1,5',
    'x',
    '٣',
    '0x1',
    'true',
    '\ud7ff',
    '"',
    "'",
    '\\',
]
ODD += ['../a.wav', '/', '.', 'a.wav\t', 'a' * 300, ';', ';;', '|', '\u200b', 'NULL', '1_0', '-0', '2', '0.01']
COLUMNS = 'path,labels,caption,start,seconds,fold,split,id'.split(',')
ROWS = [
    ['a.wav', 'dog', 'a dog', '', '', '1', 'x', '1'],
    ['b.wav', 'bell;dog', 'a bell', '0.01', '0.05', '2', 'y', '2'],
    ['a.wav', 'rain', '', '0.02', '0.04', '2', '', ''],
]


def as_csv(rows, **how) -> str:
    f = io.StringIO()
    csv.writer(f, **how).writerows(rows)
    return f.getvalue()


SAME = {  # the same table, written otherwise
    'quoted': lambda rows: as_csv(rows, quoting=csv.QUOTE_ALL).encode(),
    'unix': lambda rows: as_csv(rows, lineterminator='\n').encode(),
    'BOM': lambda rows: as_csv(rows).encode('utf-8-sig'),
    'blank lines': lambda rows: as_csv(rows).replace('\r\n', '\r\n\r\n').encode(),
    'blanks': lambda rows: as_csv([[f' {c}' for c in row] for row in rows]).encode(),
    'columns turned': lambda rows: as_csv([row[::-1] for row in rows]).encode(),
    'another column': lambda rows: as_csv([[*row, 'note'] for row in rows]).encode(),
    'whole floats': lambda rows: as_csv(
        [[f'{c}.0' if c in ('1', '2') and i == 5 else c for i, c in enumerate(r)] for r in rows]
    ).encode(),
}


def spoilt_table(rng) -> bytes:
    rows = [list(row) for row in [COLUMNS, *ROWS]]
    kind = rng.randrange(8)
    row = rng.choice(rows)
    if kind < 4:
        row[rng.randrange(len(row))] = rng.choice(ODD)
    elif kind == 4:
        row.insert(rng.randrange(len(row)), rng.choice([*ODD, 'more']))
    elif kind == 5:
        del row[rng.randrange(len(row)) :]
    text = as_csv(rows, delimiter=rng.choice(';\t|') if kind == 6 else ',')
    data = bytearray(text.encode(rng.choice(['utf-16', 'utf-32', 'cp037']) if kind == 7 else 'utf-8'))
    return bytes(spoilt(data, rng)) if rng.random() < 0.3 else bytes(data)


def clips_of(path) -> list:
    return [dataclasses.astuple(c) for c in load_csv(path).clips]


def tables(rng, g, here):
    if rng.random() < 0.2:
        return esc50_table(rng, here)
    path = here / 'my.csv'
    right = [COLUMNS, *ROWS]
    if rng.random() < 0.2:
        way = rng.choice(list(SAME))
        path.write_bytes(as_csv(right).encode())
        clips = clips_of(path)
        path.write_bytes(SAME[way](right))
        return expect(clips_of(path) == clips, f'{way}: other clips')
    path.write_bytes(spoilt_table(rng))
    clips = []
    if refusal(lambda: clips.extend(load_csv(path).clips), str(path)) is None:
        expect(
            clips and all(c.start >= 0 and (c.seconds is None or c.seconds > 0) and c.fold >= 0 for c in clips), clips
        )
        skipped = []
        heard = [w for _, w in read_clips(clips, RATE, skipped)]
        expect(len(heard) + len(skipped) == len(clips) and all(w.isfinite().all() for w in heard), 'clips are lost')


def esc50_table(rng, here):
    "The list of a known data set, with one fault."
    path = here / 'ESC-50/meta/esc50.csv'
    rows = [['filename', 'fold', 'target', 'category', 'esc10', 'src_file', 'take']]
    rows += [[f'{i}-A.wav', str(i), str(i), f'c{i}', 'True', f'{i}', 'A'] for i in (1, 2, 3)]
    rng.choice(rows)[rng.randrange(7)] = rng.choice(ODD)
    data = as_csv(rows).encode()
    path.write_bytes(spoilt(data, rng) if rng.random() < 0.5 else data)
    m = []
    if refusal(lambda: m.append(load_dataset('esc50', here)), 'ESC-50') is None:
        expect(len(m[0]) and m[0].classes, 'no classes')


# ---- names in rows and lists


def some_name(rng) -> str:
    letters = 'abcé,;"\' _-ß🎻字.{}()#'
    return ''.join(rng.choice(letters) for _ in range(rng.randrange(1, 12)))


def lists(rng, g, here):
    names = [some_name(rng).strip() or 'a' for _ in range(rng.randrange(1, 6))]
    row = as_csv([names], lineterminator='')
    found = names_in_a_row('--labels', as_csv([names], lineterminator='', quoting=csv.QUOTE_ALL))
    expect(found == names, f'{row!r}: {found}')
    spoils = row[: rng.randrange(len(row) + 1)] + rng.choice(['"', ',', ',,', '\n', '\0', '\udcff', ' ', 'x'])
    found = []
    if refusal(lambda: found.extend(names_in_a_row('--labels', spoils)), '--labels') is None:
        expect(found and all(n.strip() for n in found), f'{spoils!r}: {found}')
    plain = [n for n in (n.strip('"\'#') for n in names) if n.strip() == n and n]
    text = rng.choice(['\n', '\r\n']).join(rng.choice(['{}', '  {} ', '"{}"']).replace('{}', n) for n in plain)
    data = text.encode(rng.choice(['utf-8', 'utf-8-sig', 'utf-16']))
    expect([list_name(line) for line in list_lines(data)] == plain, f'{data!r}')
    refusal(lambda: list_lines(spoilt(data + bytes(9), rng)), 'standard input')


# ---- labels and templates

TWINS = ['{}', '{} ', ' {}', '{}\t', '{}_', '\n{}']
NO_LABELS = ['', ' ', '\t\n', '_', '\u200b', '\0', None, 3, 1.5, float('nan'), b'a', ['a'], '\udcff', 'a\ud800', {}]
NO_TEMPLATES = ['', 'a sound', '{0}', '{', 3, None, ['paper'], b'{}', '{} \udcff', 'PAPER']
LABEL_FORMS = [
    list,
    tuple,
    iter,
    np.array,
    lambda l: dict.fromkeys(l),
    lambda l: (x for x in l),
    lambda l: np.array(l, object),
]


def labels(rng, g, here):
    names = list(dict.fromkeys(f'{some_name(rng).strip()} {i}' for i in range(rng.randrange(1, 9))))
    template = rng.choice(['paper', 'laion', 'bare', 'a {} sound', '{}, {}', some_name(rng) + '{}'])
    right = class_prompts(names, template)
    expect(len(right) == len(names) and all(isinstance(t, str) and t for t in right), right)
    expect(class_prompts(rng.choice(LABEL_FORMS)(names), template) == right, 'another form of the list')
    at = rng.randrange(len(names))
    if rng.random() < 0.3:
        names.insert(
            rng.randrange(len(names) + 1), rng.choice(TWINS).replace('{}', rng.choice([str.upper, str])(names[at]))
        )
    elif rng.random() < 0.6:
        names[at] = rng.choice(NO_LABELS)
    elif rng.random() < 0.7:
        template = rng.choice(NO_TEMPLATES)
    else:
        names = rng.choice([[], (), None, 3, '', np.array('a'), iter(())])
    expect(refusal(lambda: class_prompts(names, template)), f'{names!r}, {template!r}: answered')


# ---- profiles

FIELDS = dataclasses.fields(Profile)
BAD = [float('nan'), float('inf'), float('-inf'), 'nan', '1e999', '-inf', None, [], [1], {}, {'a': 1}, (1, 2), 1j]
BAD_NUMBERS = [*BAD, '', ' ', 'x', '1,5', '0x10', '1 000', 10**400, -(10**400), '9' * 5_000, b'3']
HUGE = [1e300, 1e18]  # a rate or the weight of a loss may be as large: the training says what comes of it
BAD_WORDS = [None, [], {}, ['scenes'], 1j, (1,)]


def profiles(rng, g, here):
    field = rng.choice(FIELDS)
    kind = type(field.default)
    huge = [] if kind is float and field.name not in LIMITS else HUGE
    wrong = BAD_WORDS if kind is str else BAD_NUMBERS + huge
    if rng.random() < 0.3:
        base = load_profile('smoke')
        value = getattr(base, field.name)
        say = rng.choice([lambda v: {field.name: v}, lambda v: {field.name: str(v)}, lambda v: [f'{field.name}={v}']])
        return expect(load_profile('smoke', say(value)) == base, f'{field.name}={value!r}: another profile')
    value = rng.choice(wrong)
    if rng.random() < 0.3 and not isinstance(value, (bytes, complex)):
        path = here / 'p.json'
        path.write_text(json.dumps({'base': 'smoke', field.name: value}))
        call = lambda: load_profile(path)
    else:
        call = lambda: load_profile('smoke', {field.name: value})
    if field.name == 'name' and kind is str and rng.random() < 0.5:
        call = lambda: load_profile('smoke', {rng.choice(['stepz', '', 3, None, 'Seed', 'self']): 1})
    expect(refusal(call), f'{field.name}={value!r}: accepted')


# ---- folders


def in_json(text: str, rng) -> bytes:
    "A JSON object with one value that is not what it was."
    values = json.loads(text)
    key = rng.choice(list(values))
    odd = [None, 'x', -1, 0, 10**9, 10**30, 1e308, float('nan'), [], {}, True, '../x', '__import__("os")', 'a' * 999]
    if rng.random() < 0.15:
        return rng.choice(
            [b'', b'[' * 99_999, b'{"a":' * 99_999, b'[]', b'3', b'null', b'"x"', b'\xff\xfe', b'{"a": NaN}']
        )
    if rng.random() < 0.1:
        del values[key]
    else:
        values[key] = rng.choice(odd)
    return json.dumps(values).encode()


def in_weights(path: Path, rng):
    "One tensor that is not what it was."
    w = load_file(path)
    k = rng.choice(sorted(w))
    change = rng.randrange(6)
    if change == 0:
        del w[k]
    elif change == 1:
        w[f'{k}.more'] = torch.zeros(1)
    elif change == 2:
        w[k] = w[k][None]
    elif change == 3:
        w[k] = w[k].to(rng.choice([torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64]))
    elif change == 4:
        w[k].view(-1)[0] = rng.choice([np.nan, np.inf])
    else:
        w[k] = w[k].double() * 1e300
    save_file(w, path)


def spoil_file(path: Path, rng):
    "A file with one fault of any kind; what it was is put back by `folders`."
    data = path.read_bytes()
    if path.suffix == '.json' and data[:1] == b'{' and rng.random() < 0.6:
        path.write_bytes(in_json(data.decode(), rng))
    elif path.name == 'model.safetensors' and rng.random() < 0.5:
        in_weights(path, rng)
    elif rng.random() < 0.4:
        path.write_bytes(data[: rng.randrange(rng.choice([len(data), min(200, len(data))]))])
    else:
        path.write_bytes(spoilt(data, rng))


def open_part(place: Path):
    "What lies in a folder of the fuzz, through its door."
    if place.name == 'model':
        saved_profile(place, saved_config(place))
        fill(OPEN['part'], read_tensors(place / 'model.safetensors'), place / 'model.safetensors')
        return OPEN['part'].state_dict().values()
    if place.name == 'shards':
        shards = Shards(place)
        expect(len(shards) <= 3 and all(isinstance(c, str) for c in shards.classes), 'other shards')
        refusal(lambda: shards[len(shards) - 1])
        return []
    if place.name == 'captioner':
        return load_captioner(place / 'c.safetensors')[0].state_dict().values()
    return [w for w in read_pickled(place / 'w.pt').values() if w.is_floating_point()]


OPEN = {}


def folders(rng, g, here):
    place = here / rng.choice(['model', 'shards', 'captioner', 'pickled'])
    path = rng.choice(sorted(f for f in place.iterdir() if f.is_file()))
    data = path.read_bytes()
    try:
        spoil_file(path, rng)
        tensors = []
        if refusal(lambda: tensors.extend(open_part(place)), place.name) is None and place.name != 'pickled':
            expect(all(w.isfinite().all() for w in tensors), f'{path.name}: weights that are not finite')
    finally:
        path.write_bytes(data)


# ---- the whole model


def model(rng, g, here):
    m = OPEN['model']
    x = some_sound(rng, g)
    names = [f'{some_name(rng)} {i}' for i in range(rng.randrange(1, 5))]
    sound = rng.choice([x, x[:450], x * 0, [x, x[::-1]], (x, 22_050), with_value(np.nan)(x, rng), x[:3], x * 1e-20])
    n = 2 if isinstance(sound, list) else 1
    found = []
    text = rng.choice(['a {audio}', '{audio}', 'a {audio} and {audio}', '', 'without {audio}', 'rain without {audio}'])
    weights = rng.choice([None, [1.0], [0.3], [np.nan], [0], [-1], ['a'], [np.inf], 3])
    asked = [
        lambda: found.append((m.classify(sound, names), (n, len(names)))),
        lambda: found.append((m.encode_text([*names, text]), (len(names) + 1, m.text.d_out))),
        lambda: found.append(
            (compose(m, text, sound, weights, rng.choice([None, 8, 40, 0, 2.5, 10**9])).z, (m.text.d_out,))
        ),
        lambda: read_words(m, sound, rng.choice([1, 3, 0, 1.5, 10**9]), names),
        lambda: found.append((m.encode_audio(sound, rng.choice([None, 1, 64, 0, -1, 1.5, '8'])), (n, m.text.d_out))),
    ]
    if refusal(rng.choice(asked)) is None and found:
        z, shape = found[0]
        expect(z.shape == shape and z.isfinite().all() and z.abs().max() < 1.001, f'{z.shape}, {shape}')


# ---- the storm

KINDS = dict(
    arrays=arrays,
    sounds=sounds,
    tables=tables,
    lists=lists,
    labels=labels,
    profiles=profiles,
    folders=folders,
    model=model,
)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Two sounds, and a folder of each kind that is spoilt."
    d = tmp_path_factory.mktemp('fuzz')
    for place in ('ESC-50/meta', 'ESC-50/audio', 'model', 'shards', 'captioner', 'pickled'):
        (d / place).mkdir(parents=True)
    for name in ('a.wav', 'b.wav', *(f'ESC-50/audio/{i}-A.wav' for i in (1, 2, 3))):
        sf.write(d / name, 0.1 * np.random.default_rng(0).standard_normal(2_000), RATE)
    OPEN['model'] = CoLLAT(load_profile('smoke')).eval()
    OPEN['part'] = copy.deepcopy(OPEN['model'].interaction)
    save_file(OPEN['part'].state_dict(), d / 'model/model.safetensors')
    (d / 'model/config.json').write_text(json.dumps(dataclasses.asdict(load_profile('smoke'))))
    save_captioner(seeded_captioner(16, build_vocabulary(['a b'])), d / 'captioner/c.safetensors', kind='states')
    torch.save(dict(a=torch.ones(3), b=torch.zeros(2, 2)), d / 'pickled/w.pt')
    index = np.zeros(3, INDEX)
    index['audio'] = index['meta'] = 1
    index['size'] = 9
    np.save(d / 'shards/index.npy', index)
    (d / 'shards/plan.json').write_text(json.dumps(dataclasses.asdict(Plan('a', 3, 'x'))))
    (d / 'shards/classes.json').write_text('["a", "b"]')
    return d


def run_case(kind: str, i: int, here):
    rng = random.Random(f'{SEED}/{kind}/{i}')
    KINDS[kind](rng, np.random.default_rng(rng.randrange(2**32)), here)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', KINDS)
def test_no_fault_is_fatal_or_silent(kind, here, monkeypatch):
    monkeypatch.chdir(here)
    torch.manual_seed(0)
    if ALONE:
        name, _, i = ALONE.partition('/')
        return run_case(kind, int(i), here) if name == kind else None
    bad = {}
    for i in range(max(1, round(CASES * SHARES[kind]))):
        try:
            run_case(kind, i, here)
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            bad[f'{kind}/{i}'] = f'{type(e).__name__}: {e} ({Path(where.filename).name}:{where.lineno})'[:300]
    told = '\n'.join(f'COLLAT_FUZZ_SEED={SEED} COLLAT_FUZZ_CASE={case}  {why}' for case, why in list(bad.items())[:12])
    assert not bad, f'{len(bad)} cases:\n{told}'
