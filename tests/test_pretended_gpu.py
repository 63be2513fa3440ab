"Everything that listens, on a GPU that is none: no line may forget where its tensors lie."

import numpy as np
import pytest
import torch
from pretend_gpu import pretended_gpu

from collat import (
    architecture,
    batches,
    captioning,
    evaluate,
    features,
    grounding,
    listen,
    maps,
    painter,
    probes,
    ranking,
    retrieval,
    validation,
)
from collat.baselines import BASELINES, Baseline, load_baseline
from collat.config import load_profile
from collat.model import CoLLAT, best_device
from collat.reading import compose, read_words

P = load_profile('smoke')
LABELS = ['violin', 'church organ', 'helicopter']


class Tones:
    "Six scenes, as the rendered ones are asked for."

    split = 'valid'
    profile = P
    classes = LABELS

    def __len__(self):
        return 6

    def labels(self, i):
        return LABELS[: 1 + i % 2]

    def waveform(self, i):
        return 0.3 * torch.sin(torch.arange(int(P.clip_seconds * P.sample_rate)) * (0.05 + 0.02 * i))

    def __getitem__(self, i):
        return self.waveform(i), self.labels(i)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('model')
    CoLLAT(P).save_pretrained(d)
    return d


@pytest.fixture
def model(folder):
    with pretended_gpu() as place:
        model = CoLLAT.from_pretrained(folder)
        assert {w.device for w in model.parameters()} == {place} == {model.text.device}
        yield model


@pytest.fixture
def wavs():
    return torch.stack([Tones()[i][0] for i in range(6)])


def test_the_pretence_is_as_strict_as_a_gpu(model):
    x = torch.ones(2, device='cuda')
    with pytest.raises(RuntimeError, match='two devices'):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match='two devices'):
        torch.ones(2) * x.sum()
    with pytest.raises(RuntimeError):
        x.numpy()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2]
    assert x[torch.tensor([1])].device == x.device == model.logit_scale.device
    assert type(x.cpu()) is torch.Tensor


def test_a_model_goes_to_the_gpu_by_itself_and_answers_as_on_the_cpu(folder, wavs):
    here = CoLLAT.from_pretrained(folder)
    with pretended_gpu():
        there = CoLLAT.from_pretrained(folder).classify(wavs, LABELS).cpu()
    assert here.logit_scale.device.type == 'cpu'
    assert torch.allclose(there, here.classify(wavs, LABELS), atol=1e-5)


def test_sound_as_words_and_in_prompts(model, wavs):
    assert len(read_words(model, wavs[0], 2, LABELS).tokens) == P.n_tokens
    for kind in ('audio', 'tokens', 'states'):
        assert {x.device.type for x in model.token_features(wavs, kind)} == {'cpu'}
    z = compose(model, 'a {audio} without {audio}', [wavs[0], wavs[1]], slots=P.n_tokens).z
    assert (model.encode_audio(wavs) @ z).shape == (6,)


def test_training_and_what_it_looks_at(model, wavs):
    clips = Tones()
    make = batches.prompt_maker(model)
    batch, _ = batches.StepLoader(clips, 6, 2, 2, 0, make).load(0)
    loss = model.train()(batch)['loss']
    loss.backward()
    assert all(w.grad is not None and w.grad.device == w.device for w in model.interaction.parameters())
    model.eval()
    assert 0 <= validation.zero_shot_scores(model, clips, LABELS, P.template)['top1'] <= 1
    assert validation.block_distances(model, clips, 6).shape[1] == 3
    assert len(architecture.greedy_optimality(model, clips)['optimal']) == 3


@pytest.mark.parametrize('question', listen.QUESTIONS)
def test_answers(model, wavs, question):
    for w in wavs[:2]:
        assert listen.QUESTIONS[question](model, LABELS, k=2)([w])[0]


def test_grounding(model, wavs):
    times = grounding.frame_times(P, 20)
    z_t = evaluate.prompts_of(model, LABELS)
    assert grounding.detection_scores(model, wavs[:2], z_t, times, 'relevance').shape == (2, 3, 20)
    assert grounding.sliding_scores(model, wavs[:2], z_t, times, 0.6).shape == (2, 3, 20)
    assert grounding.loudness(model, wavs[:2], times).shape == (2, 20)
    assert maps.token_maps(model, wavs[:2]).shape[:2] == (2, P.n_tokens)
    assert maps.draw_grounding(model, wavs[0], LABELS[:2], 'rollout', LABELS)


def test_retrieval_and_probes(model, wavs):
    z_a = model.encode_audio(wavs)
    z_t = ranking.embed_captions(model, ['a violin', 'a bell', 'a violin'])
    assert ranking.retrieve(z_a, z_t, np.arange(6) % 3, np.arange(3)).shape[0] == 6
    assert retrieval.same_space(model, model.text)
    assert evaluate.class_scores(model, z_a.cpu(), LABELS, P.template).shape == (6, 3)
    f = features.as_features(model.token_features(wavs, 'tokens'))
    y = torch.eye(3).repeat(2, 1)
    net = probes.train_decoder(f, y, np.arange(6), 3, 0, lambda *a: False, 4)
    assert net.query.device == z_a.device
    assert probes.decoder_scores(net, f, np.arange(6)).shape == (6, 3)


def test_captions_and_pictures(model, wavs):
    captions = [['a violin sounds', 'we hear a bell']] * 6
    data = captioning.Captioned(list('abcdef'), model.token_features(wavs, 'states'), captions)
    captioner, log = captioning.fit_captioner(data, data, steps=2, look_every=1, batch=4, device=best_device())
    assert len(captioning.write_captions(captioner, data.features)[0]) == 6
    assert all(np.isfinite(r['valid']) for r in log)
    heard = painter.sound_states(model, list(wavs[:2]))
    written = painter.written_states(model.text, ['a violin', ''], P.n_tokens, P.form)
    drawing = painter.Painter(model.text.d, 32, 1)
    drawing.empty = written[1:]
    assert painter.paint(drawing.eval(), torch.cat([heard, written]), steps=1).shape[0] == 4


def test_a_baseline_too(wavs, tmp_path):
    Baseline(P, BASELINES['clap']).save(tmp_path)
    with pretended_gpu() as place:
        there = load_baseline(tmp_path)
        assert there.device == place
        assert there.classify(wavs, LABELS).cpu().shape == (6, 3)
