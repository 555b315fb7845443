"""Saving and loading, shared by the optimizers: check everything first, then load at once."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from adamax_ext import arrays, checkpoint
from adamax_ext.locking import Exclusive, exclusive


class Saveable(Exclusive, ABC):
    """An optimizer with state; subclasses say what it is and how it is checked."""

    @property
    @abstractmethod
    def built(self) -> bool:
        """Whether there is state."""

    @property
    @abstractmethod
    def variables(self) -> list[arrays.Array]:
        """State in Keras' order."""

    @abstractmethod
    def _state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that training changes."""

    @abstractmethod
    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Callable[[], None]:
        """Check what another `_state_dict` returned; the result loads it, without failing."""

    @abstractmethod
    def prepare_variables(self, weights: list[arrays.HostArray]) -> Callable[[], None]:
        """Check arrays in the order of `variables`; the result loads them, without failing."""

    def _require_built(self) -> None:
        if not self.built:
            raise ValueError("the optimizer has no state yet: call build() first")

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that training changes, and what has no weight decay.

        Arrays are NumPy's, wherever the state lies: it can continue on the CPU or on a GPU.

        Raises
        ------
        ValueError
            The optimizer is not built.
        """
        self._require_built()
        return self._state_dict()

    @exclusive
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()` of an optimizer with the same settings and variables.

        Raises
        ------
        ValueError
            The optimizer is not built, or version, names, arrays, shapes or dtypes differ. Nothing
            has changed then.
        """
        self._require_built()
        self.prepare_state_dict(state_dict)()

    def save(self, path: checkpoint.PathLike) -> None:
        """Write `state_dict()` to a safetensors file.

        A file that is there is replaced at once when the new one is complete on disk; an
        interruption at any moment leaves the old or the new one.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Raises
        ------
        OSError
            The file cannot be written.
        """
        checkpoint.write(path, self.state_dict())

    def load(self, path: checkpoint.PathLike) -> None:
        """Continue from a file that `save` wrote; see `load_state_dict`.

        Raises
        ------
        OSError
            The file cannot be read.
        ValueError
            It is torn, or does not fit. Nothing has changed then.
        """
        self.load_state_dict(checkpoint.read(path))

    @exclusive
    def set_weights(self, weights: Iterable[Any]) -> None:
        """Set the state from arrays in the order of `variables`.

        Raises
        ------
        ValueError
            The optimizer is not built, or number, shapes or dtypes differ. Nothing has changed
            then.
        """
        self._require_built()
        self.prepare_variables([arrays.to_host(weight) for weight in weights])()

    @exclusive
    def save_own_variables(self, store: MutableMapping[str, Any]) -> None:
        """Write `variables` into `store` as "0", "1", ..., the layout of Keras."""
        for i, array in enumerate(self.variables):
            store[str(i)] = arrays.to_host(array)

    def load_own_variables(self, store: Mapping[str, Any]) -> None:
        """Read what `save_own_variables` of this class, or of its Keras counterpart, wrote.

        Raises
        ------
        ValueError
            As `set_weights`.
        """
        keys = [str(i) for i in range(len(store))]
        if set(store) != set(keys):
            raise ValueError(f"store must have the keys '0', '1', ...; received {list(store)}")
        self.set_weights(store[key] for key in keys)
