"Scenes of recordings under published ears: CoLLAT and its rivals learn from the same kept tokens."

import pytest
import torch

from collat import baselines as B
from collat.batches import StepLoader
from collat.cached_tokens import CachedTokens
from collat.config import load_profile
from collat.ears import front_end, load_published
from collat.launch import launch
from collat.model import CoLLAT
from collat.scenes import Scenes, split_classes

OURS = dict(
    data='esc50',
    backbone='yamnet',
    audio_weights='yamnet',
    norm_mean=0.0,
    norm_std=0.5,
    pretrain_steps=0,
    precision='fp32',
    clip_seconds=2.0,
    n_classes=3,
    n_train=20,
    cache_clips=12,
    cache_views=1,
    n_valid=4,
    steps=2,
    batch=6,
    eval_every=2,
)

pytestmark = [pytest.mark.data('yamnet'), pytest.mark.data('esc50')]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    run, p = tmp_path_factory.mktemp('recorded'), load_profile('smoke', OURS)
    return run, p, CoLLAT.from_pretrained(launch(p, run))


def test_collat_learns_from_recordings_and_leaves_its_ears_alone(trained):
    run, p, model = trained
    fresh = load_published(CoLLAT(p).audio, p).state_dict()
    assert all(torch.equal(w, fresh[n].to(w)) for n, w in model.audio.state_dict().items())
    assert any(
        not torch.equal(w, v.to(w))
        for w, v in zip(model.interaction.state_dict().values(), CoLLAT(p).interaction.state_dict().values())
    )
    held_out = {*split_classes('unseen', p), *split_classes('valid_unseen', p)}
    train = Scenes(run / 'data', 'train', p)
    assert not held_out & {l for i in range(len(train)) for l in train.labels(i)}
    assert len(list((run / 'tokens').glob('*.npy'))) == 1


def test_rivals_read_the_tokens_of_collat_and_hear_what_its_ears_hear(trained):
    run, p, model = trained
    q = B.baseline_profile(p, B.BASELINES['clap'])
    assert q.ears == 'frozen'
    clips = B.training_clips(q, run / 'data')
    assert isinstance(clips, CachedTokens) and len(list((run / 'tokens').glob('*.npy'))) == 1  # made once, by CoLLAT
    folders = [B.train_baseline(n, p, run) for n in ('yamnet', 'wav2clip')]
    order = B.data_order(StepLoader(clips, p.batch, p.steps, p.eval_every, p.seed))
    rows = [B.budget_row(f) for f in folders]
    assert {(r['backbone'], r['act1_steps'], r['act2_data_order']) for r in rows} == {('yamnet', 0, order)}
    for folder in folders:
        rival = B.load_baseline(folder).train()
        assert not rival.audio.training and not any(w.requires_grad for w in rival.audio.parameters())
        assert all(torch.equal(w, model.audio.state_dict()[n]) for n, w in rival.audio.state_dict().items())
        batch, _ = StepLoader(clips, 6, 2, 2, 0).load(1)
        scenes, loader = Scenes(run / 'data', 'train', p), StepLoader(clips, 6, 2, 2, 0)
        wav = torch.stack([scenes[clips.rows[i]][0] for _, i in loader.sample_ids(1)])
        with torch.no_grad():
            kept, anew = rival.listen(batch), rival.listen(dict(wav=wav, seeds=batch['seeds']))
        assert kept.shape == anew.shape and kept.shape[1] < rival.audio(front_end(wav, p)).shape[1]  # some are dropped
        assert (kept - anew).abs().max() < 5e-3 * anew.abs().max()  # half precision
