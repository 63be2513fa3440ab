"""Gradients of the whole model on a batch of eight, in one process or shared out over ranks:

model_ranks.py PROFILE OUT MICRO_BATCH
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from collat.config import load_profile
from collat.model import CoLLAT

torch.set_num_threads(1)
world = int(os.environ.get('WORLD_SIZE', 1))
if world > 1:
    dist.init_process_group('gloo')
rank = dist.get_rank() if world > 1 else 0
labels = [
    ['flute'],
    ['piano', 'guiro', 'tuba'],
    ['ocarina'],
    ['flute'],
    ['bird chirping', 'gunshot'],
    ['piano', 'guiro', 'tuba'],
    ['tuba'],
    ['flute', 'gunshot'],
]
texts = ['This is a sound of ' + (l[0] if len(l) == 1 else ', '.join(l[:-1]) + ', and ' + l[-1]) for l in labels]
wav = torch.randn(8, 32_000, generator=torch.Generator().manual_seed(0)).double() * 0.1
mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
lambdas = dict(lambda_cross_token=0.7, lambda_global=1.0, lambda_uni_token=0.3)
p = load_profile(sys.argv[1], lambdas | dict(micro_batch=int(sys.argv[3])))
model = CoLLAT(p).double().train()
sound = dict(wav=wav[mine])
if p.ears == 'frozen':  # as they come from a cache
    sound = dict(tokens=torch.randn(8, 2, 50, p.d_audio, generator=torch.Generator().manual_seed(1)).double()[mine])
# noise in float64 too, and no float() in between: the comparison is about ranks, not about rounding
torch.Tensor.float = lambda self: self
net = DistributedDataParallel(model) if world > 1 else model
net(dict(sound, seeds=list(range(8))[mine], texts=texts[mine], labels=labels[mine]))['loss'].backward()
if rank == 0:
    torch.save({k: x.grad for k, x in model.named_parameters() if x.requires_grad}, sys.argv[2])
if world > 1:
    dist.barrier()
    os._exit(0)  # all is written; tearing gloo's threads down sometimes aborts (torch 2.14)
