"""How each library does a training step: a class a contestant, by name."""

from contestants.base import Contestant
from contestants.jax_peers import KerasJax, KerasTensorflow, KerasTorch, Optax
from contestants.numpy_formula import NumPy
from contestants.ours import (
    AdamaxExt,
    AdamaxExt8,
    AdamaxExt16,
    AdamaxExtClass,
    AdamaxExtClass8,
    AdamaxExtFlat,
    AdamaxExtJax,
    AdamaxExtKerasJax,
    AdamaxExtKerasTorch,
    AdamaxExtTorch,
)
from contestants.torch_peers import (
    Bitsandbytes8,
    DeepSpeed,
    TorchAdamW,
    Torchao8,
    TorchCompiled,
    TorchForeach,
    TorchLoop,
)

CONTESTANTS: dict[str, type[Contestant]] = {
    "adamax_ext": AdamaxExt,
    "adamax_ext, torch tensors": AdamaxExtTorch,
    "adamax_ext, one flat array": AdamaxExtFlat,
    "adamax_ext.torch.Adamax": AdamaxExtClass,
    "adamax_ext, state in 16 bits": AdamaxExt16,
    "adamax_ext, state in 8 bits": AdamaxExt8,
    "adamax_ext.torch.Adamax, 8 bits": AdamaxExtClass8,
    "adamax_ext.jax.adamax, jit": AdamaxExtJax,
    "adamax_ext.keras.Adamax, JAX": AdamaxExtKerasJax,
    "adamax_ext.keras.Adamax, torch": AdamaxExtKerasTorch,
    "torch Adamax, for-loop": TorchLoop,
    "torch Adamax, foreach": TorchForeach,
    "torch Adamax, compiled": TorchCompiled,
    "torch AdamW, fused": TorchAdamW,
    "DeepSpeed CPU Adam": DeepSpeed,
    "bitsandbytes Adam, 8 bits": Bitsandbytes8,
    "torchao Adam, 8 bits": Torchao8,
    "optax adamax, jit": Optax,
    "Keras Adamax, JAX": KerasJax,
    "Keras Adamax, torch": KerasTorch,
    "Keras Adamax, TensorFlow": KerasTensorflow,
    "NumPy": NumPy,
}
