"""Adamax for JAX: the fused step where optax's transformations stand."""

try:
    import jax
except ImportError as error:
    raise ImportError(
        "adamax_ext.jax needs jax 0.6 or newer, which cannot be imported: pip install jax"
    ) from error
if jax.__version_info__ < (0, 6):  # jax.typeof is new there
    raise ImportError(f"adamax_ext.jax needs jax 0.6 or newer; received jax {jax.__version__}")

from adamax_ext.jax.transformation import Adamax, AdamaxState, adamax

__all__ = ["Adamax", "AdamaxState", "adamax"]
