"""How each library does a training step: a class a contestant, by name."""

from contestants.base import Contestant
from contestants.jax_peers import KerasJax, KerasTensorflow, KerasTorch, Optax
from contestants.numpy_formula import NumPy
from contestants.ours import (
    AdamaxExt,
    AdamaxExtClass,
    AdamaxExtFlat,
    AdamaxExtJax,
    AdamaxExtKerasJax,
    AdamaxExtKerasTorch,
    AdamaxExtTorch,
)
from contestants.torch_peers import DeepSpeed, TorchAdamW, TorchCompiled, TorchForeach, TorchLoop

CONTESTANTS: dict[str, type[Contestant]] = {
    "adamax_ext": AdamaxExt,
    "adamax_ext, torch tensors": AdamaxExtTorch,
    "adamax_ext, one flat array": AdamaxExtFlat,
    "adamax_ext.torch.Adamax": AdamaxExtClass,
    "adamax_ext.jax.adamax, jit": AdamaxExtJax,
    "adamax_ext.keras.Adamax, JAX": AdamaxExtKerasJax,
    "adamax_ext.keras.Adamax, torch": AdamaxExtKerasTorch,
    "torch Adamax, for-loop": TorchLoop,
    "torch Adamax, foreach": TorchForeach,
    "torch Adamax, compiled": TorchCompiled,
    "torch AdamW, fused": TorchAdamW,
    "DeepSpeed CPU Adam": DeepSpeed,
    "optax adamax, jit": Optax,
    "Keras Adamax, JAX": KerasJax,
    "Keras Adamax, torch": KerasTorch,
    "Keras Adamax, TensorFlow": KerasTensorflow,
    "NumPy": NumPy,
}
