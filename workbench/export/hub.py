"""Push steering vectors to the Hugging Face Hub with a model card, and pull them from there.

Only files that ``save_vector`` wrote are pulled: safetensors, checked as they are read. What a
repository says is not trusted: its number of files and their sizes are limited.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.export.card import check_one_model, model_card
from workbench.export.from_run import RunNumbers, Strength
from workbench.files.hints import one_line
from workbench.files.store import name_for_file
from workbench.steering.vectors import SteeringVector, load_vector, save_vector

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


MOST_FILES = 256
"""Vectors that are pulled from one repository, at most."""

MOST_BYTES = 64 * 2**20
"""Size of a vector file that is pulled, at most: a million numbers are 4 MB."""


def push_vectors(
    repo_id: str,
    strengths: Sequence[Strength],
    *,
    numbers: RunNumbers | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Push vectors and a model card to a repository, in one commit.

    Args:
        repo_id: Repository of the hub, "user/name"; it is made where it is not there.
        strengths: Vectors with their multipliers, of one model (``run_strengths``).
        numbers: What the run measured with them, for the card (``run_numbers``).
        private: Whether a new repository is private; None is the hub's own default.
        revision: Branch; "main" by default.
        token: Access token; that of ``hf auth login`` by default.
        endpoint: Address of the hub; HF_ENDPOINT or the public one by default.

    Returns:
        Address of the commit.

    Raises:
        ValueError: If there are no vectors, they are of several models, or the hub cannot be
            reached or refuses, in one line.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_one_model(strengths)
    files = {_file_name(strength.vector): strength for strength in strengths}
    if len(files) < len(strengths):
        raise ValueError("two vectors have one site, category and method; push one of them.")
    card = model_card(files, repo_id, numbers)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo="README.md", path_or_fileobj=card.encode("utf-8"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        for name, strength in files.items():
            path = Path(folder) / name
            save_vector(path, strength.vector)
            operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path))
        with _in_one_line(repo_id):
            api = HfApi(endpoint=endpoint, token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                operations,
                commit_message=f"{len(files)} steering vectors",
                revision=revision,
            )
    return str(commit.commit_url)


def pull_vectors(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> dict[str, SteeringVector]:
    """Download the steering vectors of a repository.

    Args:
        repo_id: Repository of the hub, "user/name".
        revision: Branch, tag or commit; give a commit to get the same vectors always.
        token: Access token; that of ``hf auth login`` by default.
        endpoint: Address of the hub; HF_ENDPOINT or the public one by default.

    Returns:
        Name of the file, without its ending, to the vector.

    Raises:
        ValueError: If the hub cannot be reached or has no such repository, or it holds no vectors,
            too many, too large ones, or a damaged one.
    """
    from huggingface_hub import HfApi

    with _in_one_line(repo_id):
        api = HfApi(endpoint=endpoint, token=token)
        info = api.model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size
            for file in info.siblings or ()
            if file.rfilename.endswith(".safetensors")
        }
    if not sizes:
        raise ValueError(
            f"{repo_id!r} holds no .safetensors: no vectors of save_vector. Files of other "
            "libraries are read by wb.import_vectors once they are on this machine."
        )
    if len(sizes) > MOST_FILES:
        raise ValueError(f"{repo_id!r} has {len(sizes)} files; up to {MOST_FILES} are pulled.")
    for name, size in sizes.items():
        if size is None or size > MOST_BYTES:
            raise ValueError(
                f"{name!r} of {repo_id!r} has {size} bytes; a vector has {MOST_BYTES} at most: is "
                "it a model?"
            )
    vectors = {}
    for name in sorted(sizes):
        with _in_one_line(repo_id):
            path = api.hf_hub_download(repo_id, name, revision=info.sha or revision)
        vectors[name.removesuffix(".safetensors")] = load_vector(path)
    return vectors


def _file_name(vector: SteeringVector) -> str:
    """Name a vector's file after what it is."""
    parts = (name_for_file(vector.method), str(vector.site), name_for_file(vector.category))
    return ".".join(parts) + ".safetensors"


@contextmanager
def _in_one_line(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises inside the block into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ValueError(
            f"the hub is not asked for {repo_id!r}: HF_HUB_OFFLINE is set; unset it, or exchange "
            "files of wb.save_vector."
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"no repository can be called {repo_id!r}: {one_line(error)}.") from error
    except errors.LocalTokenNotFoundError as error:
        raise ValueError("the hub wants a token: run 'hf auth login', or pass token=.") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{repo_id!r} has no such revision; leave out revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"no repository {repo_id!r} on the hub, or no right to it: check name and token."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        refused = status in (401, 403)
        what = "check the token and its rights" if refused else one_line(error)
        raise ValueError(f"the hub refused {repo_id!r} (status {status}): {what}.") from error
    except (ConnectionError, OSError) as error:
        raise _unreachable(repo_id, error) from error
    except Exception as error:  # the client below has its own family of connection errors
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise _unreachable(repo_id, error) from error


def _unreachable(repo_id: str, error: Exception) -> ValueError:
    return ValueError(
        f"the hub cannot be reached for {repo_id!r} ({type(error).__name__}); try again where "
        "there is a network, or exchange files of wb.save_vector."
    )
