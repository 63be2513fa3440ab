"""Section 7 of the paper: nothing behind the encoder knows about sound.
Pictures in front of the same interaction module, losses and locked encoder."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from collat.interaction import TokenInteraction
from collat.losses import CoLLATLoss
from collat.model import text_id
from collat.pictures import draw_picture, glyphs
from collat.text_families import load_text_encoder

NAMES = ['violin', 'trumpet', 'bird', 'helicopter', 'telephone', 'banjo']
NAMES += ['accordion', 'water wave', 'bell', 'harp', 'bear face', 'rocket']


class Picture(nn.Module):
    "Patches of a picture as tokens: an encoder that has never heard of audio."

    def __init__(self, d=48):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, d, 5, 2, 2), nn.GELU(), nn.Conv2d(d, d, 5, 4, 2), nn.GELU())

    def forward(self, x):
        return self.net(x).flatten(2).mT  # (b c h w) -> (b m d)


def drawings(n, seed):
    rng = np.random.default_rng(seed)
    x = np.stack([np.array(draw_picture(glyphs()[name], rng)) for name in n * NAMES])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_pictures_speak_to_the_same_locked_encoder():
    torch.manual_seed(0)
    text = load_text_encoder('minilm')
    before = text.fingerprint()
    encoder = Picture()
    module = TokenInteraction(10, text.d, 48, depth=2, heads=4, width=64, start_scale=text.embed_scale)
    prompts = [f'This is a picture of {n}' for n in NAMES]
    h_t, kind, _ = text.targets(prompts, 10, 'slots', [[n] for n in NAMES])
    z_t = text.encode_text(prompts)
    ids = torch.tensor([text_id(t) for t in prompts])
    loss_of = CoLLATLoss({'cross_token': 1.0, 'global': 1.0, 'uni_token': 0.01}, embed_scale=text.embed_scale)
    opt = torch.optim.AdamW([*encoder.parameters(), *module.parameters()], 3e-3)
    losses = []
    for step in range(150):
        x = drawings(1, step)
        h = module(encoder(torch.cat([x, x + 0.1 * torch.randn_like(x)])))
        h, noisy = h.chunk(2)
        z_a, _ = text.encode_audio_tokens(h, 'slots')
        out = loss_of(h, h_t, z_a, z_t, torch.tensor(14.0), noisy, kind, ids)
        opt.zero_grad()
        out['loss'].backward()
        opt.step()
        losses.append(out['loss'].item())
    assert np.mean(losses[-5:]) < 0.6 * losses[0], losses[::10]
    with torch.no_grad():
        z_a, _ = text.encode_audio_tokens(module(encoder(drawings(4, 1_000))), 'slots')
    said = (F.normalize(z_a, dim=-1) @ F.normalize(z_t, dim=-1).T).argmax(1)
    right = (said == torch.arange(len(NAMES)).repeat(4)).float().mean().item()
    assert right > 0.5, right  # of new drawings; chance is 1/12
    assert text.fingerprint() == before
