"""torch tensors that say they are on the emulated GPU; their memory is that of the host."""

import contextlib
import ctypes
from unittest import mock

import pytest
import torch

from support.emulated import CUDA, Exchange, TableArray

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("needs torch 2.10, which has DLPack's exchange table", allow_module_level=True)

GPU = torch.device("cuda", 0)
_NAME = b"dlpack_exchange_api"


class GpuTensor(torch.Tensor):
    """A tensor that is for torch on the CPU, and for everybody who asks it on a GPU."""

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *arguments, **keywords):
        kept = [argument for argument in arguments if argument != GPU]
        if not kept and not keywords:
            return self
        return super().to(*kept, **keywords)

    def __deepcopy__(self, memo):
        return memo.setdefault(id(self), on_gpu(self.detach().as_subclass(torch.Tensor)))


def on_gpu(tensor):
    """Return a copy on the GPU; a leaf that requires grad if `tensor` does."""
    copy = tensor.detach().clone().as_subclass(GpuTensor)
    return copy.requires_grad_(tensor.requires_grad)


def on_host(tensor):
    return tensor.detach().as_subclass(torch.Tensor)


@contextlib.contextmanager
def torch_makes_gpu_tensors():
    """Let torch make tensors on the GPU."""
    plain = torch.tensor

    def tensor(value, *, device=None, **keywords):
        made = plain(value, **keywords)
        return made if device != GPU else on_gpu(made)

    with mock.patch.object(torch, "tensor", tensor):
        yield


def _table_of_torch():
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return Exchange.from_address(pointer(torch.Tensor.__dlpack_c_exchange_api__, _NAME))


@Exchange.AS_TENSOR
def _as_tensor(tensor, out):
    failed = _of_torch.as_tensor(tensor, out)
    if not failed:
        out[0].device = (ctypes.c_int32 * 2)(CUDA, 0)
    return failed


@Exchange.STREAM
def _stream(_type, _device, out):
    ctypes.cast(out, ctypes.POINTER(ctypes.c_size_t))[0] = TableArray.current_stream
    return 0


_of_torch = _table_of_torch()
_TABLE = Exchange((1, 3), None, (None, None, None), _as_tensor, _stream)
GpuTensor.__dlpack_c_exchange_api__ = ctypes.pythonapi.PyCapsule_New(
    ctypes.addressof(_TABLE), _NAME, None
)
