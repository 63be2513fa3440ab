"Embeddings of a table's clips, shared out over ranks: `eval_ranks.py MODEL TABLE OUT`, under torchrun."

import os
import sys

import torch
import torch.distributed as dist

from collat.batches import rank_and_world
from collat.evaluate import embed_manifest, evaluation_set, load_any

torch.set_num_threads(1)
checkpoint, table, out = sys.argv[1:]
rank, _ = rank_and_world()
e, clips, skipped = embed_manifest(load_any(checkpoint), evaluation_set(table))
torch.save(dict(z=e.z, y=e.y, paths=[str(c.path) for c in clips], skipped=skipped), f'{out}.{rank}')
dist.barrier()
os._exit(0)  # all is written; tearing gloo's threads down sometimes aborts (torch 2.14)
