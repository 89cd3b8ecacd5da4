"""Weights from the Hugging Face Hub: resumable, hash-checked, atomic; a file in the cache needs no network."""

from __future__ import annotations

from pathlib import Path

from zoo.errors import WeightsError

PREFIX = "hf-hub:"
FILES = ("weights.json", "weights.safetensors")


def fetch_from_hub(name: str) -> Path:
    """Bring `hf-hub:owner/name[@revision]` into the Hub's cache.

    Args:
        name: Repository that holds weights.safetensors and weights.json.

    Returns:
        Path of the weights; the card lies beside it.

    Raises:
        WeightsError: No such repository or file, no network, or an interrupted download; nothing partial is used.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1:
        raise WeightsError(
            f"{name!r} is no Hub name; write {PREFIX}owner/name or {PREFIX}owner/name@revision"
        )
    paths = []
    for file in FILES:
        try:
            paths.append(Path(hf_hub_download(repository, file, revision=revision or None)))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled):
            raise WeightsError(
                f"{name}: {file} is not in the cache and the Hub cannot be reached; connect once, or copy the two files "
                f"of the run folder and give their path"
            ) from None
        except RepositoryNotFoundError:
            raise WeightsError(f"{name}: no such repository on the Hub, or no right to read it") from None
        except EntryNotFoundError:
            raise WeightsError(
                f"{name}: the repository has no {file}; weights of this zoo are {' and '.join(FILES)}"
            ) from None
        except Exception as error:  # whatever the client's transport raises
            raise WeightsError(
                f"{name}: download of {file} failed ({type(error).__name__}: {error}); run again to go on where it stopped"
            ) from None
    return paths[-1]
