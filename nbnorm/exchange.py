"""Batch norm states in other systems' files: PyTorch state dicts (safetensors) and Keras weights (.weights.h5).

Numbers are read and written as they are, so evaluation gives the same there and here, if eps is the same.
`nbnorm.conventions.convert` changes them into what training there would have given. Needs the extra ``exchange``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.checks import check_flag, check_installed, check_length, check_number
from nbnorm.containers import CONTAINERS
from nbnorm.conventions import CONVENTIONS, RUNNING, State, initial_weight, numpy_copy, running_of
from nbnorm.errors import StateError
from nbnorm.files import replacing
from nbnorm.running import UNKNOWN, RunningStatistics, check_momentum
from nbnorm.state import CHECKSUM_NAME, VERSION_NAME, digest

PARAMETERS = ("weight", "bias")


def read_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    prefix: str = "",
    *,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
) -> State:
    """The state of one batch norm in a PyTorch state dict.

    Parameters
    ----------
    source : path of a safetensors file, or what ``module.state_dict()`` gives
    prefix : str
        The module's name in the network, such as "features.1".
    eps, momentum : float
        Of the module: a state dict does not have them. The momentum is taken to have been one throughout. A file that
        `write_torch` wrote has what it was written with, and these are ignored.

    Returns
    -------
    State
        Of the convention "torch", for `BatchNorm.from_state` or `BatchNorm.load_state_dict`.

    Raises
    ------
    StateError
        If the file is damaged, the module is not there, or its numbers make no sense. Files that `write_torch` wrote
        have a checksum; in others a flipped bit of a number is another number.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> theirs = {"1.running_mean": np.zeros(2), "1.running_var": np.ones(2), "1.num_batches_tracked": np.array(9)}
    >>> layer = nbnorm.BatchNorm.from_state(nbnorm.exchange.read_torch(theirs, "1"))
    >>> layer.num_batches_tracked, layer.weight
    (9, None)
    """
    start = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    metadata: dict[str, str]
    if isinstance(source, Mapping):
        found, metadata = {name: source[start + name] for name in _torch_names(source, start)}, {}
    else:
        found, metadata = _read_safetensors(source, start)
    found = {name: numpy_copy(array, start + name) for name, array in found.items()}
    said = _parsed(metadata[start]) if start in metadata else _metadata("torch", eps, momentum, found)
    return _checked(State(found, said))


def write_torch(path: str | os.PathLike[str], states: Mapping[str, State]) -> None:
    """Write batch norms as a PyTorch state dict, a safetensors file with what the numbers mean in its metadata.

    ``module.load_state_dict(safetensors.torch.load_file(path), strict=False)`` takes them over. Running statistics are
    float32 there, as in PyTorch, or float64 beside parameters of float64. The file is replaced in one step.

    Parameters
    ----------
    path : path
    states : mapping from the modules' names to State
        The name "" is that of a batch norm that is the whole module.
    """
    arrays, metadata = {}, {}
    for prefix, state in states.items():
        start = f"{prefix}." if prefix else ""
        width = _float_of(state)
        for name, array in state.items():
            arrays[start + name] = _narrowed(array, width, start + name) if name in RUNNING[:2] else np.array(array)
        metadata[start] = json.dumps(_checked(state).metadata)
    metadata[CHECKSUM_NAME] = digest(arrays, metadata)
    with replacing(path) as file:
        file.write(CONTAINERS[".safetensors"].encode(arrays, metadata))


def read_keras(
    path: str | os.PathLike[str],
    layer: str,
    *,
    epsilon: float = 1e-3,
    momentum: float = 0.99,
    scale: bool = True,
    center: bool = True,
    num_batches: int | None = None,
) -> State:
    """The state of one ``BatchNormalization`` in a file of ``keras.Model.save_weights``.

    Parameters
    ----------
    path : path of a ``.weights.h5`` file
    layer : str
        The layer's name, or its place in the file, such as "layers/functional/layers/batch_normalization_1".
    epsilon, momentum, scale, center
        Of the layer: the file does not have them.
    num_batches : int
        How many batches have entered, which Keras does not record. Without it `num_batches_tracked` is 0, and what the
        initial statistics still weigh is unknown.

    Returns
    -------
    State
        Of the convention "keras".

    Raises
    ------
    StateError
        If the file is damaged, the layer is not there, or its numbers make no sense.
    """
    names = _keras_names(check_flag("scale", scale), check_flag("center", center))
    with _hdf5(path, "r") as file:
        variables = _keras_variables(file, layer, names)
        found = {name: np.array(variables[str(place)]) for place, name in enumerate(names)}
    batches = 0 if num_batches is None else check_length("num_batches", num_batches)
    found["num_batches_tracked"] = np.array(batches, np.int64)
    return _checked(State(found, _metadata("keras", epsilon, momentum, found)))


def write_keras(path: str | os.PathLike[str], states: Mapping[str, State]) -> None:
    """Write batch norms into a file of ``keras.Model.save_weights``, for ``load_weights`` of the same model.

    What the file says of other layers stays; it is replaced in one step.

    Parameters
    ----------
    path : path of an existing ``.weights.h5`` file
    states : mapping from names of layers, or their places as for `read_keras`, to State

    Raises
    ------
    StateError
        If the file is damaged, or has no such layer of so many channels; it is as it was then.
    """
    with replacing(path) as partial:
        shutil.copyfile(path, partial.name)  # first: the layers are changed in a copy
        with _hdf5(partial.name, "r+") as file:
            for layer, given in states.items():
                state = _checked(given)
                names = _keras_names("weight" in state, "bias" in state)
                variables = _keras_variables(file, layer, names)
                for place, name in enumerate(names):
                    target, array = variables[str(place)], state[name]
                    if target.shape != array.shape:
                        raise StateError(f"{layer}'s {name} must have shape {target.shape}; got {array.shape}")
                    target[...] = _narrowed(array, target.dtype, f"{layer}'s {name}")


def _metadata(
    convention: str, eps: float, momentum: float | None, arrays: Mapping[str, NDArray[Any]]
) -> dict[str, str]:
    """What a system's own file leaves unsaid. The weight of the initial statistics follows from the count of batches,
    which only PyTorch keeps: with another system 0 is an unknown number."""
    system, batches = CONVENTIONS[convention], int(arrays["num_batches_tracked"].sum())
    new = system.weight_of_new(check_momentum(momentum))
    weight = initial_weight(new, batches) if batches or convention == "torch" else UNKNOWN
    blank = np.zeros(1)
    history = RunningStatistics(blank, blank, system.ddof, batches, weight).history()
    said = {"layer": "BatchNorm", "eps": repr(check_number("eps", eps)), "convention": convention}
    return said | {"momentum": repr(momentum)} | history


def _checked(state: State) -> State:
    """The state, if it is one of a batch norm; else StateError."""
    running = running_of(state)
    for name in PARAMETERS:
        if name in state and (state[name].shape != running.mean.shape or not np.isfinite(state[name]).all()):
            raise StateError(f"{name} must be {running.mean.size} finite numbers; got shape {state[name].shape}")
    return state


def _float_of(state: State) -> Any:
    wide = any(state[name].dtype == np.float64 for name in PARAMETERS if name in state)
    return np.float64 if wide else np.float32


def _narrowed(array: NDArray[Any], dtype: Any, name: str) -> NDArray[Any]:
    """The numbers in the dtype of a file; StateError where one is too large for it."""
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    if not np.isfinite(found).all():
        raise StateError(f"{name} must fit into {np.dtype(dtype)}; got {float(abs(array).max())}")
    return found


def _parsed(text: str) -> dict[str, str]:
    try:
        return {str(name): str(value) for name, value in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise StateError(f"metadata must be a JSON object; got {text[:80]!r}") from error


def _torch_names(keys: Collection[str], start: str) -> list[str]:
    """Which arrays of a batch norm lie under a prefix; StateError where they make none."""
    missing = [start + name for name in RUNNING if start + name not in keys]
    if missing:
        known = sorted(key.removesuffix("running_mean").rstrip(".") for key in keys if key.endswith("running_mean"))
        raise StateError(f"state has no {missing[0]!r}; batch norms lie under the prefixes {known}")
    return [name for name in (*PARAMETERS, *RUNNING) if start + name in keys]


def _read_safetensors(path: str | os.PathLike[str], start: str) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """What lies under a prefix, and the metadata of the file."""
    check_installed("safetensors", "exchange", "this file format needs")
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(path, framework="numpy") as file:
            metadata, names = dict(file.metadata() or {}), _torch_names(file.keys(), start)
            stated = metadata.pop(CHECKSUM_NAME, None)
            read = names if stated is None else [key.removeprefix(start) for key in file.keys()]  # noqa: SIM118  no dict
            found = {start + name: file.get_tensor(start + name) for name in read}
    except SafetensorError as error:
        raise StateError(f"{os.fspath(path)} is no safetensors file: {error}") from error
    if VERSION_NAME in metadata:
        raise StateError(f"{os.fspath(path)} is a state file, which nbnorm.state.read_state reads")
    if stated is not None and stated != digest(found, metadata):
        raise StateError(f"{os.fspath(path)}: contents do not agree with their checksum: the file is damaged")
    return {name: found[start + name] for name in names}, metadata


@contextlib.contextmanager
def _hdf5(path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
    check_installed("h5py", "exchange", "this file format needs")
    import h5py  # noqa: PLC0415

    Path(path).stat()  # FileNotFoundError is not damage
    try:
        with h5py.File(path, mode) as file:
            yield file
    except (OSError, KeyError, RuntimeError) as error:
        raise StateError(f"{os.fspath(path)} cannot be read as HDF5: {error}") from error


def _keras_names(scale: bool, center: bool) -> list[str]:
    """Names of the variables, in Keras's order."""
    return [*(["weight"] if scale else []), *(["bias"] if center else []), *RUNNING[:2]]


def _keras_variables(file: Any, layer: str, names: list[str]) -> Any:
    """The group with the variables of a layer."""
    found: dict[str, str] = {}  # place in the file: name of the layer
    file.visititems(lambda place, item: _note_layer(place, item, found))
    places = [place for place, name in found.items() if layer in (name, place)]
    if len(places) != 1:
        known = {place: name for place, name in found.items() if len(file[place]["vars"]) > 1}
        raise StateError(f"layer must be one of the places or names {known}, and one only; got {layer!r}")
    variables = file[places[0]]["vars"]
    if len(variables) != len(names):
        raise StateError(f"{layer} must have {len(names)} variables ({', '.join(names)}); got {len(variables)}")
    for place in map(str, range(len(names))):
        shape, stored = variables[place].shape, variables[place].id.get_storage_size()
        if len(shape) != 1 or stored != variables[place].nbytes or variables[place].external:
            raise StateError(f"{layer}'s variable {place} must be one axis in this file; got {shape} in {stored} bytes")
    return variables


def _note_layer(place: str, item: Any, found: dict[str, str]) -> None:
    if place.endswith("/vars") and "name" in item.attrs:
        found[place.removesuffix("/vars")] = str(item.attrs["name"])
