"""From a model's name to its folder: a folder on this disk, or a snapshot of the hub."""

from __future__ import annotations

from pathlib import Path

from posttrain.core.errors import ModelError

_NOT_READ = ["*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "onnx/*", "original/*"]


def resolve_folder(name: str) -> Path:
    """The local folder of a model: the folder itself, or a hub snapshot.

    Raises:
        ModelError: no such folder, and no such model on the hub (or no network).
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"no model folder at {name}",
            expected="a folder with config.json and weights, or a hub id like org/name",
            fix="check the path (it is relative to the recipe)",
        )
    # Imported here: the hub client is only needed for models that are not on disk.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, ignore_patterns=_NOT_READ))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"could not get {name} from the hub: {type(error).__name__}",
            expected="a public model and a network, or the model in the local cache",
            fix="check the name and the network, or give a local folder",
        ) from error
