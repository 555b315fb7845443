"""Saving and loading, shared by the optimizers: check everything first, then load at once."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from adamax_ext import arrays, checkpoint
from adamax_ext._settings import Checked
from adamax_ext.locking import exclusive
from adamax_ext.progress import Progress


class Saveable(Checked, ABC):
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
    def prepare_state_dict(self, state_dict: dict[str, Any]) -> Progress:
        """Check what another `_state_dict` returned; return it as what `adopt` takes."""

    @abstractmethod
    def prepare_variables(self, weights: Iterable[Any]) -> Progress:
        """Check arrays in the order of `variables`; return them as what `adopt` takes."""

    @abstractmethod
    def adopt(self, progress: Progress) -> None:
        """Go on from `progress`: one assignment, so that an interrupt finds all old or all new."""

    def _require_built(self) -> None:
        if not self.built:
            raise ValueError("the optimizer has no state yet: call build() first")

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """Return a copy of everything that training changes.

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

        What the settings of this optimizer are stays as it is, exclusion from weight decay
        included, but for the rate, if it is a number, and the seed: bits follow from it.
        `weight_rounding` may be another one, if the other was not "remainder".

        Raises
        ------
        ValueError
            The optimizer is not built; version, names, arrays, shapes, dtypes or the number of
            accumulation steps differ; `state_bits` differ (see `convert_state`), or remainders of
            weights would be lost; a norm is below zero. Nothing has changed then.

        Notes
        -----
        It loads into new arrays and then exchanges all at once, also where an interrupt
        (KeyboardInterrupt) ends it: read `state` and `variables` again after it.
        """
        self._require_built()
        self.adopt(self.prepare_state_dict(state_dict))

    def save(self, path: checkpoint.PathLike) -> None:
        """Write `state_dict()` to a safetensors file.

        A file that is there is replaced at once when the new one is complete on disk, and keeps
        its mode and owner; an interruption at any moment leaves the old or the new one.

        Parameters
        ----------
        path : str or os.PathLike
            The file.

        Raises
        ------
        OSError
            The file cannot be written, or there is something else than a file.
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
        try:
            self.load_state_dict(checkpoint.read(path))
        except TypeError as error:
            raise ValueError(f"{path} does not fit: {error}") from error

    @exclusive
    def set_weights(self, weights: Iterable[Any]) -> None:
        """Set the state from arrays in the order of `variables`.

        Raises
        ------
        ValueError
            The optimizer is not built; number, shapes or dtypes differ; a norm is below zero.
            Nothing has changed then.

        Notes
        -----
        As with `load_state_dict`, the arrays of `state` and `variables` are new ones after it.
        """
        self._require_built()
        self.adopt(self.prepare_variables(weights))

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
        received = list(store.keys())
        keys = [str(i) for i in range(len(received))]
        if set(received) != set(keys):
            raise ValueError(f"store must have the keys '0', '1', ...; received {received}")
        self.set_weights(store[key] for key in keys)
