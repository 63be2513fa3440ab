"""A GPU that is none. Inside `pretended_gpu()` torch says that there is one.

Tensors sent to it refuse to meet those of the CPU, have no `.numpy()`, and are computed on the CPU.
It shows that no line forgets where a tensor lies.
It says nothing about kernels, half precision, memory or speed: `test_gpu.py` does, on a true one.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
PLACE = torch.device('meta')  # the only device besides the CPU that autograd accepts on every machine
BY_INDEX = [aten.index.Tensor]  # a GPU's tensor may be indexed from the CPU
BY_INDEX += [aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default]


class OnGPU(torch.Tensor):
    "A tensor `x` of the CPU that lies elsewhere."

    @staticmethod
    def __new__(cls, x: torch.Tensor, requires_grad: bool = False):
        layout = dict(strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype)
        make = torch.Tensor._make_wrapper_subclass
        self = make(cls, x.size(), **layout, device=PLACE, requires_grad=requires_grad)
        self.x = x
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    def __repr__(self):
        return f'OnGPU({self.x!r})'

    def __deepcopy__(self, memo):
        memo[id(self)] = out = OnGPU(self.x.detach().clone(), self.requires_grad)
        return out

    def tolist(self):
        return self.x.detach().tolist()


def compute(func, args, kwargs):
    "One operation, on the CPU. Raises RuntimeError where a GPU would refuse."
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    here = [t for t in tensors if not isinstance(t, OnGPU)]
    there = [t for t in tensors if isinstance(t, OnGPU)]
    indexed = func in BY_INDEX and isinstance(args[0], OnGPU) and all(t.dtype in (torch.long, torch.bool) for t in here)
    if there and any(t.ndim for t in here) and func is not aten.copy_.default and not indexed:
        raise RuntimeError(
            f'Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({func})'
        )
    wanted = kwargs.get('device')
    a, k = tree_map(lambda t: t.x if isinstance(t, OnGPU) else t, (args, kwargs))
    out = func(*a, **k | (dict(device=torch.device('cpu')) if 'device' in k else {}))
    changes = [v.alias_info is not None and v.alias_info.is_write for v in func._schema.arguments]
    if any(changes):
        return kwargs['out'] if 'out' in kwargs else args[changes.index(True)]
    if (wanted.type == 'cpu') if wanted is not None else not there:
        return out
    same = {id(t.x): t for t in there}
    return tree_map(lambda t: same.get(id(t)) or OnGPU(t) if isinstance(t, torch.Tensor) else t, out)


class Computing(TorchDispatchMode):
    "Makes new tensors where they are wanted."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def there(v):
    "`cuda` means this place."
    return PLACE if isinstance(v, (str, torch.device)) and str(v).startswith('cuda') else v


class Named(TorchFunctionMode):
    "Where a device is named."

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args = [there(v) for v in args]
        kwargs = {k: there(v) for k, v in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get('device') == PLACE:
            return func(*args, **kwargs | dict(device='cpu')).to(PLACE)  # a meta tensor would forget its numbers
        return func(*args, **kwargs)


@contextmanager
def same_randomness(*args, **kwargs):
    "`fork_rng` of the CPU's generator, the only one."
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def pretended_gpu():
    "One GPU, until the block ends."
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    autocast = torch.autocast
    generator = torch.Generator

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__('cpu', *args, **kwargs)

    class Generator:
        def __new__(cls, device='cpu'):
            return generator('cpu')

    answers = dict(is_available=True, current_device=0, device_count=1, is_bf16_supported=True)
    answers |= dict(get_device_name='pretended', synchronize=None, manual_seed_all=None, _lazy_init=None)
    optimizer = torch.optim.Optimizer
    with ExitStack() as s:
        for name, answer in answers.items():
            s.enter_context(patch.object(torch.cuda, name, lambda *a, answer=answer: answer))
        s.enter_context(patch.multiple(torch, autocast=Autocast, Generator=Generator))
        s.enter_context(patch.object(torch.random, 'fork_rng', same_randomness))
        s.enter_context(patch.object(optimizer, '_accelerator_graph_capture_health_check', lambda self: None))
        s.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        s.enter_context(Computing())
        s.enter_context(Named())
        yield PLACE
