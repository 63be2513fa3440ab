"Data sets: official names, columns and quirks on miniature trees; broken files; leakage; downloads that break off."

import csv
import hashlib
import http.server
import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from collat.audio import load_audio
from collat.clips import read_clips
from collat.datasets import check_data, clips_without_leaks, data_check, listed, load_dataset, table_1
from collat.downloads import DownloadError, data_get, fetch, git_blob, unpack
from collat.prompts import class_prompts, label_to_words
from collat.sources import SOURCES, DatasetMissing, Remote
from collat.tables import load_csv

TUT = 'TUT-acoustic-scenes-2017'
HEAD = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids={0}, num_segs={0}, num_unique_labels=527, num_positive_labels=52882
# YTID, start_seconds, end_seconds, positive_labels
"""
ESC50_COLUMNS = 'filename,fold,target,category,esc10,src_file,take'.split(',')
US8K_COLUMNS = 'slice_file_name,fsID,start,end,salience,fold,classID,class'.split(',')
US8K_LIST = 'UrbanSound8K/metadata/UrbanSound8K.csv'


def tone(path, hz=440.0, seconds=0.3):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.3 * np.sin(2 * np.pi * hz * np.arange(int(16_000 * seconds)) / 16_000), 16_000)


def text(path, s, **how):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(s, **how)


def rows_csv(path, header, rows):
    f = io.StringIO()
    w = csv.writer(f, lineterminator='\n')
    if header:
        w.writerow(header)
    w.writerows(rows)
    text(path, f.getvalue())


def esc50(root, n=10, classes=('dog', 'sea_waves'), corrupt=()):
    "ESC-50 with `n` clips, as the archive of GitHub unpacks it."
    base = Path(root) / 'ESC-50-master'
    rows = []
    for i in range(n):
        fold = 1 + i % 5
        target = i % len(classes)
        name = f'{fold}-{100 + i}-A-{target}.wav'
        rows.append((name, fold, target, classes[target], 'True', 100 + i, 'A'))
        tone(base / 'audio' / name, 200.0 * (1 + target), 1.0)
        if i in corrupt:
            (base / 'audio' / name).write_bytes(b'RIFF\x24\x00\x00\x00WAVEjunk' + bytes(40))
    rows_csv(base / 'meta/esc50.csv', ESC50_COLUMNS, rows)
    return base


@pytest.mark.parametrize('name', SOURCES)
def test_a_missing_set_says_where_size_licence_and_place(name, tmp_path):
    s = SOURCES[name]
    with pytest.raises(DatasetMissing) as e:
        load_dataset(name, tmp_path)
    message = str(e.value)
    for x in (s.title, s.url, s.size, s.licence, str(tmp_path / s.folders[0]), s.layout):
        assert x in message
    assert (f'`collat data get {name}`' in message) == bool(s.remotes)
    assert ('not distributed' in message) == (not s.audio)
    assert '\n' not in message
    official = {'esc50', 'urbansound8k', 'tut2017', 'fsd50k', 'audioset', 'vggsound', 'audiocaps', 'audiocaps2'}
    assert s.checked and (s.remotes or name not in official)


def test_three_percent_corrupt_clips_are_evaluated_with_n(tmp_path, capsys):
    "Model and metrics are the real ones, the weights are random."
    from collat.config import load_profile
    from collat.evaluate import Embedded, score_split
    from collat.model import CoLLAT
    from collat.validation import multi_hot

    base = esc50(tmp_path, 100, corrupt=(7, 50, 93))
    (base / 'audio/1-195-A-1.wav').unlink()
    m = load_dataset('esc50', tmp_path)
    model = CoLLAT(load_profile('smoke')).eval()
    assert m.report.found == {'all': 99} and m.report.missing == ['audio/1-195-A-1.wav']
    assert m.report.corrupt == []  # `stat` does not look inside
    skipped = []
    kept, wavs = zip(*read_clips(m.clips, 16_000, skipped))
    assert len(skipped) == 3 and all('ESC-50-master/audio' in why for _, why in skipped)
    targets = multi_hot([m.clips[i].labels for i in kept], m.classes)
    embedded = Embedded('esc50', model.encode_audio(list(wavs)).cpu(), targets, m.classes)
    row = score_split(model, embedded, 'paper', n_boot=20)[0]
    print(f'ESC-50 {row["metric"]} {row["value"]:.2f}, N = {row["n"]} of {m.report.listed["all"]}')
    assert 'N = 96 of 100' in capsys.readouterr().out and 0 <= row['value'] <= 1
    deep = load_dataset('esc50', tmp_path, check='header').report
    assert len(deep.corrupt) == 3 and deep.found == {'all': 96}
    deep.save(tmp_path / 'report.json')
    assert json.loads((tmp_path / 'report.json').read_text())['corrupt'] == deep.corrupt


def urbansound8k(root, ids):
    "Dog, siren, dog, ..., each in the next fold; `ids` are freesound ids."
    rows = []
    for k, i in enumerate(ids):
        number, label = ((3, 'dog_bark'), (8, 'siren'))[k % 2]
        fold = 1 + k % 10
        name = f'{i}-{number}-0-0.wav'
        rows.append((name, i, 0.0, 0.3, 1, fold, number, label))
        tone(Path(root) / f'UrbanSound8K/audio/fold{fold}/{name}')
    rows_csv(Path(root) / US8K_LIST, US8K_COLUMNS, rows)


def tut2017(root):  # folders of the two sets, rows of the development set
    dev, ev = (Path(root) / TUT / f'{TUT}-{s}' for s in ('development', 'evaluation'))
    files = [(f'audio/b{i:03d}_0_10.wav', ('beach', 'cafe/restaurant')[i % 2], f'b{i:03d}') for i in range(8)]
    text(dev / 'meta.txt', ''.join('\t'.join(f) + '\r\n' for f in files), newline='')
    for k in range(1, 5):
        held = files[2 * k - 2 : 2 * k]
        fold = dev / f'evaluation_setup/fold{k}'
        text(f'{fold}_train.txt', ''.join('\t'.join(f) + '\n' for f in files if f not in held))
        text(f'{fold}_test.txt', ''.join(f'{a}\n' for a, *_ in held))
        text(f'{fold}_evaluate.txt', ''.join(f'{a}\t{b}\n' for a, b, _ in held))
    text(ev / 'evaluation_setup/evaluate.txt', 'audio/1.wav\tforest_path\n')
    for f, *_ in files:
        tone(dev / f)
    tone(ev / 'audio/1.wav')
    return dev, ev, files


def test_esc50_and_urbansound8k_folds(tmp_path):
    esc50(tmp_path)
    m = load_dataset('ESC-50', tmp_path)
    assert m.folds == [1, 2, 3, 4, 5] and m.words == ['dog', 'sea waves']
    assert {c.id for c in m.clips} == {str(100 + i) for i in range(10)}
    for k in m.folds:
        train, test = m.fold(k)
        assert {c.fold for c in test} == {k}
        assert len(train) + len(test) == 10
        assert not {c.path for c in train} & {c.path for c in test}
    urbansound8k(tmp_path, range(101, 111))
    u = load_dataset('us8k', tmp_path)
    assert u.folds == list(range(1, 11)) and u.words == ['dog bark', 'siren']
    assert len([*read_clips(u.clips, 8_000)]) == 10


def test_tut_2017_has_four_folds_and_two_sets(tmp_path):
    dev, ev, files = tut2017(tmp_path)
    m = load_dataset('tut2017', tmp_path)
    assert m.report.notes == [] and m.report.found == dict(dev=8, eval=1)
    assert m.words == ['beach', 'cafe/restaurant', 'forest path']
    train, test = m.fold(2)
    assert [c.id for c in test] == ['b002', 'b003']
    assert len(train) == 6  # the evaluation set is in no fold
    text(dev / 'evaluation_setup/fold3_train.txt', files[4][0] + '\tbeach\n')
    notes = load_dataset('tut2017', tmp_path, 'dev').report.notes
    assert notes == ['TUT: fold3_train.txt differs from "all the rest" in 7 clips']
    shutil.rmtree(ev)
    assert load_dataset('tut2017', tmp_path).report.notes[-1] == f'TUT: {TUT}-evaluation is not there'


def fsd50k(root, vocabulary, dev, ev=()):
    truth = Path(root) / 'FSD50K/FSD50K.ground_truth'
    mid = {l: f'/m/{i:05d}' for i, l in enumerate(vocabulary)}
    rows_csv(truth / 'vocabulary.csv', None, [(i, l, mid[l]) for i, l in enumerate(vocabulary)])

    def row(f, labels, *split):
        return (f, ','.join(labels), ','.join(mid[l] for l in labels), *split)

    rows_csv(truth / 'dev.csv', ['fname', 'labels', 'mids', 'split'], [row(*clip) for clip in dev])
    rows_csv(truth / 'eval.csv', ['fname', 'labels', 'mids'], [row(*clip) for clip in ev])
    for part, clips in (('dev', dev), ('eval', ev)):
        for f, *_ in clips:
            tone(truth.parent / f'FSD50K.{part}_audio/{f}.wav')


def test_fsd50k_training_leaves_out_shared_freesound_ids(tmp_path):
    esc50(tmp_path)  # ids 100 to 109
    rows_csv(tmp_path / US8K_LIST, US8K_COLUMNS, [('300-3-0-0.wav', 300, 0, 1, 1, 1, 3, 'dog_bark')])
    dev = [
        (100, ['Bark'], 'train'),
        (200, ['Bark', 'Crying_and_sobbing'], 'train'),
        (300, ['Bark'], 'train'),
        (400, ['Bark'], 'train'),
        (105, ['Bark'], 'val'),
    ]
    fsd50k(tmp_path, ['Bark', 'Crying_and_sobbing'], dev, [(400, ['Bark'])])
    m = load_dataset('fsd50k', tmp_path)
    kept, counts = clips_without_leaks(m, tmp_path)
    assert [c.id for c in kept] == ['200']
    by_list = {'fsd50k eval': 1, 'esc50 all': 1, 'urbansound8k all': 1}
    assert counts == dict(listed=4, kept=1, left_out=3, by_list=by_list)
    shutil.rmtree(tmp_path / 'UrbanSound8K')
    with pytest.raises(DatasetMissing, match='UrbanSound8K.*only the list'):
        clips_without_leaks(m, tmp_path)
    assert clips_without_leaks(m, tmp_path, allow_missing=True)[1]['by_list']['urbansound8k all'] is None
    p = tmp_path / 'FSD50K/FSD50K.ground_truth/dev.csv'
    p.write_text(p.read_text().replace('/m/00001', '/m/xxxxx'))
    notes = load_dataset('fsd50k', tmp_path).report.notes
    assert notes == ['FSD50K: 1 clips whose labels and mids do not agree with vocabulary.csv']


def test_audioset_training_leaves_out_test_videos(tmp_path):
    base = tmp_path / 'AudioSet'
    text(
        base / 'class_labels_indices.csv',
        'index,mid,display_name\n0,/m/09x0r,"Speech"\n1,/m/05zppz,"Male speech, man speaking"\n',
    )
    ids = ['--PJHxphWEs', '7fmOlUlwoNg', 'vggtestvid0', 'evalvideo00']
    segments = ''.join(f'{i}, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n' for i in ids)
    text(base / 'balanced_train_segments.csv', HEAD.format(4) + segments)
    text(base / 'eval_segments.csv', HEAD.format(1) + 'evalvideo00, 0.000, 10.000, "/m/09x0r"\n')
    for name in ('--PJHxphWEs.wav', 'Y7fmOlUlwoNg.flac', 'vggtestvid0_30.wav'):
        tone(base / 'audio/balanced' / name)
    text(base / 'audio/balanced/evalvideo00_30.000_40.000.m4a', 'aac')
    m = load_dataset('audioset', tmp_path, 'balanced')
    assert len(m) == 3 and m.clips[0].labels == ('Speech', 'Male speech, man speaking') and m.multilabel
    assert m.report.unreadable == ['audio/balanced/evalvideo00_30.000_40.000.m4a'] and 'ffmpeg' in m.report.notes[0]
    text(
        tmp_path / 'VGGSound/vggsound.csv',
        'vggtestvid0,1,people marching,test\n--PJHxphWEs,30,waterfall burbling,train\n',
    )
    with pytest.raises(DatasetMissing, match='AudioCaps'):
        clips_without_leaks(m, tmp_path)
    version_2 = tmp_path / 'AudioCaps/dataset2.0/test.csv'  # does as well
    text(version_2, 'audiocap_id,youtube_id,start_time,caption\n1,7fmOlUlwoNg,90,a rattle\n')
    kept, counts = clips_without_leaks(m, tmp_path)
    assert [c.id for c in kept] == ['--PJHxphWEs']
    # the eval video is an unreadable file
    assert counts['by_list'] == {'audioset eval': 0, 'audiocaps test': 1, 'vggsound test': 1}


def test_vggsound_has_no_header_and_frames(tmp_path):
    base = tmp_path / 'VGGSound'
    text(base / 'vggsound.csv', '---g-f_I2yQ,1,people marching,test\n--56QUhyDQM,185,"bird chirping, tweeting",train\n')
    tone(base / 'audio/---g-f_I2yQ_000001.wav', seconds=0.5)
    tone(base / 'audio/--56QUhyDQM_000185.wav')
    for n in ('0002', '0001'):
        text(base / f'frames/---g-f_I2yQ_000001/{n}.jpg', '')
    text(base / 'frames/--56QUhyDQM_000185.jpg', '')
    m = load_dataset('vggsound', tmp_path)
    assert m.classes == ['bird chirping, tweeting', 'people marching']
    first, second = m.clips
    assert [Path(f).name for f in first.frames] == ['0001.jpg', '0002.jpg']
    assert [Path(f).name for f in second.frames] == ['--56QUhyDQM_000185.jpg']
    test = load_dataset('vggsound', tmp_path, 'test')
    assert len(test) == 1 and test.classes == m.classes  # candidates do not depend on the split
    tone(tmp_path / 'w/VGGSound/---g-f_I2yQ.wav', seconds=3.0)
    shutil.copy(base / 'vggsound.csv', tmp_path / 'w/VGGSound')
    ((_, wav),) = read_clips(load_dataset('vggsound', tmp_path / 'w', whole=True).clips, 16_000)
    assert len(wav) == 2 * 16_000  # from second 1 to the end of the video


@pytest.mark.data('audiocaps')
def test_the_audiocaps_captions_are_4875_of_975_clips(data, tmp_path):
    (tmp_path / 'AudioCaps').mkdir()
    shutil.copy(data, tmp_path / 'AudioCaps')
    l = listed('audiocaps', tmp_path, 'test')
    assert len(l.clips) == 975
    assert all(len(c.captions) == 5 and c.captions[0].strip() for c in l.clips)
    pin = {r.to: r.checksum for r in SOURCES['audiocaps'].remotes}['dataset/test.csv']
    assert pin == f'git:{git_blob(data)}'  # the pin is of this very file
    with pytest.raises(DatasetMissing, match='none of the 975'):
        load_dataset('audiocaps', tmp_path, 'test')


@pytest.mark.data('class_labels')
def test_class_words_are_those_of_the_published_lists(data, tmp_path):
    published = {f.name.split('_class')[0]: list(json.loads(f.read_text())) for f in data.glob('*.json')}
    under = lambda l: l.replace(' ', '_')
    words_of = lambda name: [label_to_words(c) for c in listed(name, tmp_path).classes]
    l = published['ESC50']
    rows = [(f'{i}.wav', 1, i, under(c), False, i, 'A') for i, c in reversed(list(enumerate(l)))]
    rows_csv(tmp_path / 'ESC-50/meta/esc50.csv', ESC50_COLUMNS, rows)
    assert words_of('esc50') == l and len(l) == 50
    l = published['UrbanSound8K']
    rows = [(f'{i}.wav', i, 0, 1, 1, 1, i, under(c)) for i, c in enumerate(l)]
    rows_csv(tmp_path / US8K_LIST, US8K_COLUMNS, rows)
    assert words_of('us8k') == l and len(l) == 10
    l = published['audioset']
    rows = [(i, f'/m/{i}', c) for i, c in enumerate(l)]
    rows_csv(tmp_path / 'AudioSet/class_labels_indices.csv', ['index', 'mid', 'display_name'], rows)
    text(tmp_path / 'AudioSet/eval_segments.csv', HEAD.format(0))
    assert words_of('audioset') == l and len(l) == 527
    l = published['VGGSound']
    rows_csv(tmp_path / 'VGGSound/vggsound.csv', None, [(f'video{i:06d}', i, c, 'test') for i, c in enumerate(l)])
    assert words_of('vggsound') == sorted(l) and len(l) == 309
    l = published['FSD50k']
    spelt = [under(c.replace(', and ', '_and_').replace(', ', '_and_')) for c in l]
    fsd50k(tmp_path, spelt, [(1, [spelt[0]], 'train')])
    words = words_of('fsd50k')
    assert words == [c.replace(', and ', ' and ').replace(', ', ' and ') for c in l] and 'Keyboard (musical)' in words
    assert len(words) == len(class_prompts(words)) == 200


def test_a_users_table_is_read_as_written(tmp_path):
    for i in range(3):
        tone(tmp_path / f'{i}.wav')
    text(
        tmp_path / 'my.csv',
        '\ufeffpath,labels,note\n0.wav,"dog;Male speech, man speaking",x\n1.wav, cat ,y\n2.wav,dog,\n',
    )
    m = load_csv(tmp_path / 'my.csv')
    assert [Path(c.path).name for c in m.clips] == ['0.wav', '1.wav', '2.wav']
    assert [c.labels for c in m.clips] == [('dog', 'Male speech, man speaking'), ('cat',), ('dog',)]
    assert m.multilabel
    text(tmp_path / 'bad.csv', 'file\nx\n')
    for bad in ('none.csv', 'bad.csv'):
        with pytest.raises(ValueError, match='path and (one of )?labels'):
            load_csv(tmp_path / bad)


def test_captions_of_one_clip_merge_in_order(tmp_path):
    tone(tmp_path / 'a.wav', seconds=2.0)
    tone(tmp_path / 'b.wav')
    table = """path,caption,split,start,seconds
a.wav,one,test,0,1
b.wav,"x; y",train,,
a.wav,two,test,0,1
a.wav,later,test,1,0.5
"""
    text(tmp_path / 'my.csv', table)
    m = load_dataset(tmp_path / 'my.csv')
    assert [(c.captions, c.split, c.start) for c in m.clips] == [
        (('one', 'two'), 'test', 0.0),
        (('x; y',), 'train', 0.0),
        (('later',), 'test', 1.0),
    ]
    assert [len(w) for _, w in read_clips(m.clips, 16_000)] == [16_000, 4_800, 8_000]
    assert m.classes == [] and m.stamp()['captions'] == 4
    assert np.array_equal(dict(read_clips(m.clips, 16_000))[2], load_audio(tmp_path / 'a.wav')[16_000:24_000])


def test_lists_that_are_not_the_official_ones_are_refused(tmp_path):
    cut_off = ','.join(US8K_COLUMNS) + '\na.wav,1,0\n'
    for path, s, name, why in (
        ('ESC-50/meta/esc50.csv', 'filename,fold\na,1\n', 'esc50', 'target, category, src_file are needed'),
        ('VGGSound/vggsound.csv', 'a,1,dog\n', 'vggsound', 'YouTube id, start second'),
        (US8K_LIST, cut_off, 'urbansound8k', 'row 2 is cut off'),
    ):
        text(tmp_path / path, s)
        with pytest.raises(ValueError, match=why) as e:
            load_dataset(name, tmp_path)
        assert Path(path).name in str(e.value)
    states = {r['name']: r['state'] for r in check_data(tmp_path)}
    for name in ('esc50', 'urbansound8k', 'vggsound'):
        assert states.pop(name) == 'not readable'
    assert set(states.values()) == {'absent'}
    text(tmp_path / 'AudioSet/eval_segments.csv', HEAD.format(0))
    with pytest.raises(DatasetMissing, match='class_labels_indices.csv is not there'):
        load_dataset('audioset', tmp_path)


def test_data_check_and_table_1(tmp_path):
    esc50(tmp_path)
    said = data_check(tmp_path)
    assert len(said.split('\n\n')[0].splitlines()) == len(SOURCES)
    assert 'partly              10 of     2,000' in said and 'collat data get fsd50k' in said
    rows = {r['data']: r for r in table_1(tmp_path)}
    esc = rows['ESC-50']
    assert (esc['found'], esc['official'], esc['found_classes'], esc['reason']) == (10, 2000, 2, '')
    fsd = rows['FSD50K']
    assert fsd['found'] == 0 and 'https://zenodo.org/records/4060432' in fsd['reason']
    assert (fsd['paper_classes'], fsd['official_classes']) == (50, 200)
    json.dumps(list(rows.values()), allow_nan=False)


def test_import_reaches_for_no_network_library():
    heavy = '{"pooch", "requests", "pandas"}'
    code = f'import sys, collat.datasets, collat.downloads; print(*sorted({heavy} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == ''


class Shaky(http.server.BaseHTTPRequestHandler):
    "Serves `server.files`; `server.plan` lists bytes after which to hang up, or (negative) status codes."

    def do_GET(self):
        s = self.server
        body = s.files.get(self.path)
        asked = self.headers.get('Range')
        limit = s.plan.pop(0) if s.plan else None
        s.log.append(asked)
        if body is None or limit is not None and limit < 0:
            return self.send_error(404 if body is None else -limit)
        at = 0
        size = len(body)
        if asked and s.ranges:
            at = int(asked.removeprefix('bytes=').removesuffix('-'))
            self.send_response(206 if at < size else 416)
            self.send_header('Content-Range', f'bytes {at}-{size - 1}/{size}' if at < size else f'bytes */{size}')
        else:
            self.send_response(200)
        self.send_header('Content-Length', max(0, size - at))
        self.send_header('Content-Type', 'text/html; charset=utf-8' if body[:1] == b'<' else 'application/zip')
        self.end_headers()
        self.wfile.write(body[at:][:limit])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Shaky)
    s.files = {}
    s.plan = []
    s.log = []
    s.ranges = True
    threading.Thread(target=s.serve_forever, daemon=True).start()
    s.url = f'http://127.0.0.1:{s.server_port}'
    yield s
    s.shutdown()
    s.server_close()


BODY = np.random.default_rng(0).bytes(200_000)
QUIET = dict(wait=0.01, progress=False)
BLOCK = 1 << 14


def remote(server, name='/a.bin', body=BODY):
    server.files[name] = body
    return Remote(server.url + name, 'md5:' + hashlib.md5(body).hexdigest())


def test_a_download_that_breaks_off_goes_on(server, tmp_path):
    r = remote(server)
    server.plan[:] = [3 * BLOCK, BLOCK, 100, -503, 2 * BLOCK]
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY
    assert server.log == [None, *(f'bytes={n * BLOCK}-' for n in (3, 4, 4, 4, 6))]
    assert [p.name for p in tmp_path.iterdir()] == ['a.bin'] and fetch(r, tmp_path, **QUIET) and len(server.log) == 6


def test_tries_that_bring_nothing_end_it_and_the_rest_is_kept(server, tmp_path):
    r = remote(server)
    server.plan[:] = [5 * BLOCK, 0, 0]
    kept = f'{5 * BLOCK:,} bytes are kept and the same command goes on.*By hand: put the file at'
    with pytest.raises(DownloadError, match=kept):
        fetch(r, tmp_path, tries=2, **QUIET)
    assert not (tmp_path / 'a.bin').exists() and (tmp_path / 'a.bin.part').stat().st_size == 5 * BLOCK
    server.plan.clear()
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY and server.log[-1] == f'bytes={5 * BLOCK}-'


def test_a_killed_process_leaves_what_the_next_one_needs(server, tmp_path):
    r = remote(server)
    server.plan[:] = [4 * BLOCK]
    code = f"""
import os, time
from collat.sources import Remote
from collat.downloads import fetch
time.sleep = lambda s: os._exit(9)
fetch(Remote({r.url!r}, {r.checksum!r}), {str(tmp_path)!r}, progress=False)
"""
    assert subprocess.run([sys.executable, '-c', code]).returncode == 9
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY and server.log == [None, f'bytes={4 * BLOCK}-']


def test_server_without_ranges_changed_files_and_wrong_sums(server, tmp_path):
    r = remote(server)
    server.plan[:] = [2 * BLOCK]
    server.ranges = False
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY
    server.ranges = True
    (tmp_path / 'a.bin').unlink()
    (tmp_path / 'a.bin.part').write_bytes(BODY)  # all there, only not yet in its place
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY
    (tmp_path / 'a.bin').unlink()
    (tmp_path / 'a.bin.part').write_bytes(BODY + b'more')  # of another file
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY
    (tmp_path / 'a.bin').unlink()
    (tmp_path / 'a.bin.part').write_bytes(b'other' * 100)
    with pytest.raises(DownloadError, match='nothing is kept'):
        fetch(r, tmp_path, **QUIET)
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY  # and the next call begins anew
    with pytest.raises(DownloadError, match='404'):
        fetch(Remote(server.url + '/none'), tmp_path, **QUIET)
    (tmp_path / 'a.bin').write_bytes(b'edited')
    assert fetch(r, tmp_path, **QUIET).read_bytes() == BODY
    g = Remote(r.url, 'git:' + git_blob(tmp_path / 'a.bin'))
    (tmp_path / 'a.bin').write_bytes(b'edited')
    assert fetch(g, tmp_path, **QUIET).read_bytes() == BODY


def test_a_web_page_in_the_place_of_a_file_is_refused(server, tmp_path):
    server.files['/a.zip'] = b'<html>please log in</html>'
    with pytest.raises(DownloadError, match='answers with a web page.*nothing is kept'):
        fetch(Remote(server.url + '/a.zip'), tmp_path, **QUIET)
    assert len(server.log) == 1 and not list(tmp_path.iterdir())


def test_offline_says_where_to_put_the_file_by_hand(tmp_path):
    url = 'http://127.0.0.1:9/x.zip'
    with pytest.raises(DownloadError, match=f'x.zip could not be fetched from {url}.*By hand: put the file at'):
        fetch(Remote(url), tmp_path, tries=1, **QUIET)


def test_data_get_fetches_unpacks_checks_and_does_nothing_twice(server, tmp_path):
    esc50(tmp_path / 'made')
    with zipfile.ZipFile(tmp_path / 'esc.zip', 'w') as z:
        for f in (tmp_path / 'made').rglob('*.*'):
            z.write(f, f.relative_to(tmp_path / 'made'))
    data = tmp_path / 'data'
    r = remote(server, '/esc.zip', (tmp_path / 'esc.zip').read_bytes())
    server.plan[:] = [BLOCK]
    source = replace(SOURCES['esc50'], remotes=(r,))
    said = []
    out = data_get('esc50', data, source=source, say=said.append, **QUIET)
    assert 'all: 10 of 10 listed (2,000 officially)' in out
    assert 'CC BY-NC' in said[0] and '0.6 GB' in said[0]
    assert server.log == [None, f'bytes={BLOCK}-']
    assert len(load_dataset('esc50', data)) == 10 and not list((data / 'downloads').glob('*.zip'))
    data_get('esc50', data, source=source, say=said.append, **QUIET)
    assert len(server.log) == 2
    segments = remote(server, '/e.csv', (HEAD.format(2) + 'a, 0.000, 10.000, "/m/0"\n').encode())
    classes = remote(server, '/c.csv', b'index,mid,display_name\n0,/m/0,"A"\n')
    remotes = (Remote(segments.url, '', 'eval_segments.csv'), Remote(classes.url, '', 'class_labels_indices.csv'))
    lists = replace(SOURCES['audioset'], remotes=remotes)
    out = data_get('audioset', data, source=lists, say=said.append, **QUIET)
    assert 'eval 1 clips are listed' in out and 'not distributed' in out and 'promises 2' in out


@pytest.mark.skipif(not shutil.which('zip'), reason='Info-ZIP is not here')
def test_a_split_zip_is_read_as_one(tmp_path):
    "As FSD50K's audio comes: a.z01, a.z02, …, a.zip."
    rng = np.random.default_rng(0)
    for i in range(9):
        (tmp_path / 'in/FSD50K.dev_audio').mkdir(parents=True, exist_ok=True)
        (tmp_path / f'in/FSD50K.dev_audio/{i}.wav').write_bytes(rng.bytes(30_000 + i))
    subprocess.run(['zip', '-q', '-s', '64k', '-r', '../a.zip', '.'], cwd=tmp_path / 'in', check=True)
    assert len(list(tmp_path.glob('a.z*'))) >= 4
    with pytest.raises(zipfile.BadZipFile), zipfile.ZipFile(tmp_path / 'a.zip') as z:
        z.extractall(tmp_path / 'plain')  # what Python alone makes of it
    assert unpack(tmp_path / 'a.zip', tmp_path / 'out', progress=False) == 9
    for f in (tmp_path / 'in/FSD50K.dev_audio').iterdir():
        assert (tmp_path / 'out/FSD50K.dev_audio' / f.name).read_bytes() == f.read_bytes()
    (tmp_path / 'a.z02').unlink()
    with pytest.raises(ValueError, match='zip -s 0 a.zip'):
        unpack(tmp_path / 'a.zip', tmp_path / 'out2', progress=False)


def test_archives_cannot_write_outside_their_folder(tmp_path):
    with tarfile.open(tmp_path / 'x.tar.gz', 'w:gz') as t:
        t.addfile(tarfile.TarInfo('../evil.txt'), io.BytesIO())
    with pytest.raises(ValueError, match='outside the folder'):
        unpack(tmp_path / 'x.tar.gz', tmp_path / 'out', progress=False)
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as z:
        z.writestr('../evil.txt', 'x')
    with pytest.raises(ValueError, match='outside the folder'):
        unpack(tmp_path / 'x.zip', tmp_path / 'out', progress=False)
    assert not (tmp_path / 'evil.txt').exists() and not (tmp_path / 'out/evil.txt').exists()
