"Blockwise retrieval, its protocols, image towers and the text axis, on tiny made-up models."

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from collat.metrics import average_precision_at_k, mrr, recall_at_k, relevance
from collat.retrieval import (
    PICTURED,
    by_heart,
    draw_picture,
    duplicate_share,
    embed_captions,
    embed_frames,
    evaluate_retrieval,
    fixed_subset,
    glyphs,
    guess_ceiling,
    image_rows,
    interval,
    load_image_tower,
    rank_values,
    retrieve,
    same_space,
    scene_glyphs,
)
from collat.text_retention import audiocaps_captions, caption_rows
from collat.zero_shot import embed_sounds


class Words:
    "Embeds a text by its words; a sound is the number of a word."

    words = ['dog', 'rain', 'bell', 'car']

    def embed(self, text):
        return torch.tensor([float(w in text) for w in self.words] + [0.1])

    def encode_text(self, texts):
        return F.normalize(torch.stack([self.embed(t) for t in texts]), dim=1)

    def encode_audio(self, wavs):
        return F.normalize(torch.stack([F.one_hot(w.long().sum(), 5).float() for w in wavs]) + 0.05, dim=1)


def loop(sim, rel):
    "R@1/5/10, AP@10, MRR of one query whose gallery is sorted as badly as its scores allow."
    order = sorted(range(len(sim)), key=lambda j: (-sim[j], rel[j]))
    places = [i for i, j in enumerate(order, 1) if rel[j]]
    recalls = [float(places[0] <= k) for k in (1, 5, 10)]
    precision = sum(h / p for h, p in enumerate(places, 1) if p <= 10) / len(places)
    return [*recalls, precision, 1 / places[0]]


@pytest.mark.parametrize('kind', ['random', 'ties', 'constant'])
def test_blocks_equal_the_loop_and_the_full_matrix(kind):
    rng = np.random.default_rng(3)
    for _ in range(25):
        gids = np.repeat(np.arange(5), rng.integers(1, 8, 5))
        rng.shuffle(gids)
        qids = rng.integers(0, 5, int(rng.integers(1, 9)))
        shape = len(qids), len(gids)
        cases = dict(random=rng.normal(size=shape), ties=rng.integers(0, 3, shape) / 2, constant=np.ones(shape))
        sim = cases[kind].astype(np.float32)
        rel = relevance(qids, gids)
        v = rank_values(retrieve(sim, np.eye(len(gids)), qids, gids, block=(2, 3)))
        np.testing.assert_allclose(np.stack(list(v.values()), 1), [loop(s, r) for s, r in zip(sim, rel)], atol=1e-12)
        np.testing.assert_allclose(
            [v['R@5'].mean(), v['AP@10'].mean(), v['MRR'].mean()],
            [recall_at_k(sim, rel, 5), average_precision_at_k(sim, rel), mrr(sim, rel)],
            atol=1e-12,
        )


def test_unit_vectors_in_blocks_equal_the_full_matrix():
    g = torch.Generator().manual_seed(0)
    clip = np.arange(700) % 140
    a, t = (F.normalize(torch.randn(n, 24, generator=g), dim=1) for n in (140, 700))
    for x, y, q, k in ((a, t, np.arange(140), clip), (t, a, clip, np.arange(140))):
        v = rank_values(retrieve(x, y, q, k, block=(50, 90)))
        rel = relevance(q, k)
        sim = (x @ y.T).numpy() - 1e-6 * rel  # nearer than that is a tie in `retrieve`, and counts against
        np.testing.assert_allclose(
            [v['R@10'].mean(), v['AP@10'].mean(), v['MRR'].mean()],
            [recall_at_k(sim, rel), average_precision_at_k(sim, rel), mrr(sim, rel)],
            atol=1e-12,
        )


def test_a_constant_encoder_is_last():
    one = torch.ones(60, 7) / 7**0.5
    assert retrieve(one, one[:12], np.repeat(np.arange(12), 5), np.arange(12))[:, 0].tolist() == [12.0] * 60
    v = rank_values(retrieve(one[:12] + 1e-7 * torch.randn(12, 7), one, np.arange(12), np.repeat(np.arange(12), 5)))
    assert v['R@10'].sum() == v['AP@10'].sum() == 0 and v['MRR'].max() == 1 / 56


def test_refused():
    e = np.eye(2)
    for args, word in (
        ((e, e, [0, 1], [0, 2]), '1 of 2'),
        ((e, np.eye(3), [0, 1], [0, 1, 2]), 'one d'),
        ((e, e, [0, 1], [0, 1, 1]), 'one id'),
        ((e * np.nan, e, [0, 1], [0, 1]), 'not finite'),
    ):
        with pytest.raises(ValueError, match=word):
            retrieve(*args)
    with pytest.raises(ValueError, match='no encode_text'):
        embed_captions(SimpleNamespace(), ['a'])
    with pytest.raises(ValueError, match='2 clips and 1'):
        evaluate_retrieval(Words(), torch.ones(2, 5), [['a']])
    with pytest.raises(ValueError, match='no clips'):
        embed_sounds(Words(), [])


def test_any_model_any_number_of_captions():
    wavs = [torch.eye(5)[i] * i for i in range(4)]
    z = embed_sounds(Words(), iter(wavs), group=3)
    captions = [['a dog'], ['rain', 'the rain falls'], ['a bell'], ['a car', 'one car', 'cars']]
    r = evaluate_retrieval(Words(), z, captions, kinds=['x', 'y', 'y', 'z'], n_boot=20, split='made up')
    rows = {(x['protocol'], x['direction'], x['metric']): x for x in r['rows']}
    assert rows['instance', 'T→A', 'R@1']['value'] == rows['instance', 'A→T', 'R@1']['value'] == 1.0
    assert rows['instance', 'T→A', 'R@1']['n'] == 7
    assert rows['instance', 'A→T', 'AP@10']['value'] == 1.0
    assert rows['label set', 'T→A', 'MRR']['gallery'] == 4
    assert r['duplicates'] == 0
    assert all(x['split'] == 'made up' for x in r['rows'])


def test_duplicates_and_what_bounds_them():
    texts = ['a', 'b', 'a', 'c']
    clips = [0, 0, 1, 1]
    assert duplicate_share(texts, clips) == 0.5 and by_heart(texts, clips)['T→A']['R@1'] == 0.5
    assert guess_ceiling(['a', 'a']) == 0.75
    assert (fixed_subset(list('abcdef'), 3) == fixed_subset(list('abcdef'), 3)).all()
    assert len(fixed_subset(range(9), 4)) == 4


def test_interval_draws_clips():
    v = np.random.default_rng(0).random(40).repeat(5)
    lo, hi = interval(v, np.arange(40).repeat(5), 300)
    narrow = interval(v, np.arange(200), 300)
    assert hi - lo > narrow[1] - narrow[0] and lo < v.mean() < hi


def test_image_rows():
    z = F.normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = image_rows(z, z, list(range(30)), [i // 3 for i in range(30)], n_boot=20, subset=10)
    got = {(r['protocol'], r['direction'], r['metric']): r for r in rows}
    assert got['instance', 'A→I', 'MRR']['value'] == 1
    assert abs(got['instance', 'A→I', 'MRR']['ceiling'] - 11 / 18) < 1e-9
    assert got['instance, fixed 10', 'I→A', 'MRR']['gallery'] == 10
    with pytest.raises(ValueError, match='29 ids'):
        image_rows(z, z, list(range(29)))


def test_glyphs_and_scenes_with_pictures():
    assert set(PICTURED.values()) <= set(glyphs()) and len(glyphs()) > 700
    a, b, again = (np.asarray(draw_picture(glyphs()['violin'], np.random.default_rng(i))) for i in (0, 1, 0))
    assert a.shape == (32, 32, 3) and (a != b).any() and (a == again).all()

    class Few(list):
        def labels(self, i):
            return self[i]

    scenes = Few([['piano'], ['piano', 'vibraphone'], ['violin', 'piano', 'harpsichord']])
    assert scene_glyphs(scenes) == {0: ['musical keyboard'], 2: ['musical keyboard', 'violin']}


def test_open_clip_image_tower_from_a_file(tmp_path):
    import open_clip
    from PIL import Image

    vision = dict(image_size=16, layers=1, width=64, patch_size=8)
    text = dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (tmp_path / 'collat-test.json').write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / 'collat-test.json')
    torch.manual_seed(0)
    net, _, prepare = open_clip.create_model_and_transforms('collat-test')
    torch.save(net.state_dict(), tmp_path / 'w.pt')
    noise = [np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8) for i in range(3)]
    pictures = [Image.fromarray(x) for x in noise]
    tower = load_image_tower(f'open_clip:collat-test/{tmp_path}/w.pt')
    with torch.no_grad():
        want = net.eval().encode_image(torch.stack([prepare(p) for p in pictures]), normalize=True)
    torch.testing.assert_close(tower.encode_image(pictures, batch_size=2), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(embed_frames(tower, [pictures])[0], F.normalize(want.mean(0), dim=0), atol=1e-6, rtol=0)
    for name, error in (('minilm', ValueError), ('open_clip:collat-test/nowhere.pt', FileNotFoundError)):
        with pytest.raises(error):
            load_image_tower(name)


def test_captions_find_their_sisters(tmp_path):
    r = {x['metric']: x for x in caption_rows(Words(), ['a dog', 'dog', 'rain', 'some rain'], [0, 0, 1, 1], n_boot=10)}
    assert r['R@1']['value'] == 1 and r['R@1']['gallery'] == 3
    f = tmp_path / 'test.csv'
    f.write_text('youtube_id,start_time,caption\na,0,"x, y"\na,0,z\nb,0,alone\n')
    assert audiocaps_captions(f) == (['x, y', 'z'], ['a_0', 'a_0'])
    with pytest.raises(ValueError, match='stand|relevant'):
        caption_rows(Words(), ['a', 'b', 'c'], [0, 0, 1])


def test_same_space_needs_the_locked_text_side():
    text = SimpleNamespace(encode_text=lambda t: 3 * Words().encode_text(t))
    assert same_space(Words(), text) and not same_space(SimpleNamespace(), text)
    assert not same_space(SimpleNamespace(encode_text=lambda t: Words().encode_text(t)[:, :4]), text)
