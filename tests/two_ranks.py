"""Gradients of CoLLATLoss under DistributedDataParallel against one process with the whole batch, in float64 on gloo.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/two_ranks.py OUT.json

OUT.json: for each case the largest relative error of a parameter's gradient, and of the loss.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from collat.losses import LOSS_TERMS, CoLLATLoss
from collat.text_encoder import LABEL, PAD, TEMPLATE

B, N, D = 8, 6, 5
lambdas = lambda *l: dict(zip(LOSS_TERMS, l))
CASES = dict(
    default=dict(),
    padding_masked=dict(counts='words'),
    hungarian_sum=dict(matcher='hungarian', norm='sum', closeness='l2', weights=lambdas(0.1, 1.0, 0.1)),
    diagonal=dict(targets='diagonal', stop_grad=True, weights=lambdas(1.0, 1.0, 1.0)),
    contrastive_only=dict(weights=lambdas(0.0, 1.0, 0.0)),
    filler=dict(),
)


class Model(nn.Module):
    "As few layers as give every term of the loss and logit_scale a gradient."

    def __init__(self):
        super().__init__()
        self.tokens = nn.Linear(7, N * D)
        self.audio = nn.Linear(D, 4)
        self.text = nn.Linear(D, 4)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, noise, h_t):
        h_at, noisy = (self.tokens(v).tanh().unflatten(1, (N, D)) for v in (x, x + noise))
        z_a = self.audio(h_at).tanh().mean(1)
        z_t = self.text(h_t).tanh().mean(1)
        return dict(h_at=h_at, h_t=h_t, z_a=z_a, z_t=z_t, logit_scale=self.logit_scale.exp(), h_at_noisy=noisy)


def batch():  # what the model reads, what the loss reads besides
    "Whole batch: texts of unequal length, equal texts within and across the halves."
    g = torch.Generator().manual_seed(1)
    rand = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    ids = torch.tensor([4, 9, 4, 2, 9, 4, 7, 1])
    length = 2 + ids % 5
    table = rand(10, N, D)
    table[:, :2] = table[0, :2]  # template words, the same everywhere
    slot = torch.arange(N)[None]
    kind = torch.where(slot < 2, TEMPLATE, torch.where(slot < length[:, None], LABEL, PAD))
    views = dict(x=rand(B, 7), noise=0.1 * rand(B, 7), h_t=table[ids].masked_fill((kind == PAD)[..., None], 0.0))
    return views, dict(kind=kind, text_ids=ids)


def gradients(model, loss_fn, views, rest):
    model.zero_grad()
    out = loss_fn(**model(**views), **rest)
    out['loss'].backward()
    learnt = [(k, p) for k, p in model.named_parameters() if p.grad is not None]
    return out, {k.removeprefix('module.'): p.grad.clone() for k, p in learnt}


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


def write(path, result):
    tmp = Path(path).with_suffix('.tmp')
    tmp.write_text(json.dumps(result, indent=1))
    os.replace(tmp, path)


def main(path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Model().double()
    views, rest = batch()
    weights = {'filler': torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.float64)}
    fns = {k: CoLLATLoss(embed_scale=0.8, **v) for k, v in CASES.items()}
    whole = {k: gradients(model, f, views, rest | dict(weight=weights.get(k))) for k, f in fns.items()}

    dist.init_process_group('gloo')
    r = dist.get_rank()
    R = dist.get_world_size()
    mine = lambda d: {k: None if v is None else v.chunk(R)[r] for k, v in d.items()}
    result = {}
    for k, f in fns.items():
        ddp = DistributedDataParallel(Model().double())
        ddp.module.load_state_dict(model.state_dict())
        out, grads = gradients(ddp, f, mine(views), mine(rest | dict(weight=weights.get(k))))
        ref, ref_grads = whole[k]
        assert grads.keys() == ref_grads.keys() == dict(model.named_parameters()).keys()
        loss = out['loss'].detach().clone()
        dist.all_reduce(loss)
        result[k] = dict(
            gradient={p: apart(grads[p], ref_grads[p]) for p in grads},
            loss=apart(loss / R, ref['loss'].detach()),
            n_duplicates=out['duplicates'].item() * B / R,
        )
    unequal = lambda d: {k: v[: 3 + r] for k, v in d.items()}
    try:
        fns['default'](**model(**unequal(views)), **unequal(rest))
    except ValueError as e:
        result['unequal'] = str(e)
    if r == 0:
        write(path, result)
    dist.barrier()
    os._exit(0)  # all is written; tearing gloo's threads down sometimes aborts (torch 2.14)


if __name__ == '__main__':
    main(sys.argv[1])
