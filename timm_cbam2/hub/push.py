"""Model folders to the Hugging Face Hub and back, and Spaces that show them: `timm-cbam2 push` and `pull`."""

from __future__ import annotations

import hashlib
import math
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Iterator, NamedTuple

import typer
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..errors import UserError, one_line
from ..models.configuration_cbam2 import architectures
from ..models.reach_cbam2 import unreachable
from ..terminal import say
from .card import card, is_generated
from .folder import check_folder, expected_shapes, model_code, read_config, whole, with_auto_map

__all__ = ["check_push", "explained", "pull", "push"]

MODEL_FILES = ("config.json", "model.safetensors", "README.md")  # besides the code, nothing else ever goes up
MAX_SMALL_FILE = 10_000_000  # bytes


def push(
    folder: Annotated[Path | None, typer.Argument(help="A model folder, or a run (its best model goes up).")] = None,
    repo_id: Annotated[str | None, typer.Argument(metavar="USER/NAME", help="Where to on the Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; it is made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    with_code: Annotated[
        bool, typer.Option("--with-code/--no-code", help="Let people load it with trust_remote_code=True.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go up, and send nothing.")] = False,
    space: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Make a Space of the page of `app`; FOLDER, if given, is its model."),
    ] = None,
) -> None:
    """Upload a model folder to the Hugging Face Hub in one commit; with --space, a web page that shows it."""
    if space is None and (folder is None or repo_id is None):
        raise UserError("say what to push and where to: timm-cbam2 push FOLDER USER/NAME, or --space USER/NAME")
    for name in (repo_id, space):
        if name is not None:
            _check_repo_id(name)
    target = _Target(private, revision, create_pr)
    parts: list[tuple[str, str, list[CommitOperationAdd]]] = []
    if folder is not None:
        folder = _model_folder(folder)
        model = _operations(folder, repo_id or space, with_code)  # which also checks what a Space shows
        if repo_id is not None:
            parts.append(("model", repo_id, model))
    if space is not None:
        from .space import space_operations

        parts.append(("space", space, space_operations(space, folder, repo_id)))
    for kind, name, operations in parts:
        say(f"{kind} {name}{f' ({revision})' if revision else ''}{', private' if private else ''}:")
        for operation in operations:
            say(f"  {operation.upload_info.size:>12,} bytes  {operation.path_in_repo}")
    if dry_run:
        say("dry run: nothing was sent")
        return
    _check_token()
    for kind, name, operations in parts:
        _send(kind, name, operations, target)


def check_push(repo_id: str) -> None:
    """Check, before a long training, what the upload at its end needs: a name, a token, leave to use the network.

    Raises:
        UserError: something is missing.
    """
    _check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push-to {repo_id}: HF_HUB_OFFLINE is set: unset it, or push when the run is complete")
    _check_token()
    host = unreachable()
    if host is not None:
        raise UserError(f"--push-to {repo_id}: {host} cannot be reached: go online, or push when the run is complete")


def _check_token() -> None:
    if get_token() is None:
        raise UserError("no Hub token: run `hf auth login`, or set HF_TOKEN to one with write access")


class _Target(NamedTuple):
    private: bool
    revision: str | None
    create_pr: bool


def _send(kind: str, name: str, operations: list[CommitOperationAdd], target: _Target) -> None:
    """Make the repository if need be, and commit."""
    api = HfApi(library_name="timm_cbam2")
    sdk = "gradio" if kind == "space" else None
    with explained(name, "nothing was committed"):
        api.create_repo(name, private=target.private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        if target.revision and not target.create_pr:
            api.create_branch(name, branch=target.revision, exist_ok=True, repo_type=kind)
        done = api.create_commit(
            name,
            operations,
            commit_message=f"Upload a {kind} with timm_cbam2",
            revision=target.revision,
            create_pr=target.create_pr,
            repo_type=kind,
        )
    say(f"done: {done.pr_url or done.commit_url}")
    if kind == "model" and not target.create_pr:
        at = f"@{target.revision}" if target.revision else ""
        say("next:", f'  timm.create_model("hf-hub:{name}{at}", pretrained=True)')


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="A model on the Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; new, or empty.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
) -> None:
    """Download a model folder from the Hub, whole and checked, or not at all; no code of it is run."""
    _check_repo_id(repo_id)
    folder = folder.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already: give a new folder")
    with explained(repo_id, f"{folder} was not written"):
        info = HfApi(library_name="timm_cbam2").model_info(repo_id, revision=revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling for sibling in info.siblings or []}
        for name in MODEL_FILES[:2]:
            if name not in sizes:
                raise UserError(_missing(repo_id, name, sizes))
        wanted = [name for name in (*MODEL_FILES, *model_code()) if name in sizes]
        for name in wanted:
            if name != "model.safetensors" and (sizes[name].size or 0) > MAX_SMALL_FILE:
                raise UserError(f"{repo_id}: {name} has {sizes[name].size:,} bytes, too many for what it should be")
        with whole(folder) as temporary:
            for name in wanted:
                if name == "model.safetensors":
                    _check_size(repo_id, temporary, sizes[name].size or 0)
                sha256 = sizes[name].lfs.sha256 if sizes[name].lfs else None
                shutil.copyfile(_download(repo_id, name, info.sha, sha256), temporary / name)
            try:
                check_folder(temporary)
            except ValueError as error:
                raise UserError(f"{repo_id}: {one_line(error).replace(str(temporary) + '/', '')}") from error
    say(f"{folder}: {', '.join(wanted)}", "next:", f'  timm.create_model("local-dir:{folder}", pretrained=True)')


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name on the Hub, write user/name: {one_line(error, 200)}") from error
    if repo_id.count("/") != 1:
        raise UserError(f"{repo_id!r} is no name on the Hub: write user/name")


def _model_folder(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    return folder / "best" if not (folder / "config.json").exists() and (folder / "best").is_dir() else folder


def _operations(folder: Path, repo_id: str, with_code: bool) -> list[CommitOperationAdd]:
    """What goes up, after the folder was checked; the weights are read from disk when they are sent."""
    for name in MODEL_FILES:
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a link: push a folder that holds the files themselves")
    try:
        config = check_folder(folder)
        readme = folder / "README.md"
        text = card(folder, repo_id) if is_generated(readme) else readme.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(one_line(error)) from error
    code = model_code() if with_code and config["architecture"] in architectures() else {}
    config.pop("auto_map", None)
    config_text = with_auto_map(config) if code else (folder / "config.json").read_text(encoding="utf-8")
    return [
        CommitOperationAdd("config.json", config_text.encode()),
        CommitOperationAdd("model.safetensors", str(folder / "model.safetensors")),
        CommitOperationAdd("README.md", text.encode()),
        *(CommitOperationAdd(name, str(path)) for name, path in code.items()),
    ]


def _missing(repo_id: str, name: str, names: dict) -> str:
    pickles = sorted(n for n in names if n.endswith((".bin", ".pth", ".pt", ".ckpt")))
    if name == "model.safetensors" and pickles:
        return (
            f"{repo_id} offers only {pickles[0]}, a pickle, which can run code when it is read: "
            "ask for model.safetensors there"
        )
    return f"{repo_id} has no {name}: it is no model of timm or timm_cbam2"


def _check_size(repo_id: str, folder: Path, size: int) -> None:
    """Refuse weights that are far larger than their configuration asks for, before they are downloaded."""
    try:
        shapes = expected_shapes(read_config(folder))
    except ValueError as error:
        raise UserError(f"{repo_id}: {one_line(error)}") from error
    numbers = sum(math.prod(shape) for shape in shapes.values())
    if size > 8 * numbers + MAX_SMALL_FILE:
        raise UserError(
            f"{repo_id}: model.safetensors has {size:,} bytes, but its configuration asks for {numbers:,} numbers: "
            "it was not downloaded"
        )


def _download(repo_id: str, name: str, revision: str | None, sha256: str | None) -> Path:
    """A file in the cache of huggingface_hub, which checks sizes; here its contents are checked as well."""
    path = Path(hf_hub_download(repo_id, name, revision=revision, library_name="timm_cbam2"))
    if sha256 is not None:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != sha256:
            path.resolve().unlink()  # or the cache would hand out the damaged file for ever
            path.unlink(missing_ok=True)
            raise UserError(f"{repo_id}: {name} arrived damaged (its checksum differs): try again")
    return path


@contextmanager
def explained(repo_id: str, outcome: str) -> Iterator[None]:
    """One line for whatever the Hub or the network says."""
    host = unreachable()
    if host is not None:
        raise UserError(f"{host} cannot be reached: check the network and try again; {outcome}")
    try:
        yield
    except (RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError) as error:
        kinds = {RevisionNotFoundError: "revision", RemoteEntryNotFoundError: "file"}
        kind = kinds.get(type(error), "repository")
        status = error.response.status_code
        if status == 401:
            raise UserError(
                f"the Hub does not accept this token (401): run `hf auth login` again; {outcome}"
            ) from error
        raise UserError(f"{repo_id}: no such {kind}, or this token may not see it (404); {outcome}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the Hub does not accept this token (401): run `hf auth login` again",
            403: f"this token may not write to {repo_id} (403): use one with write access, or another name",
            404: f"{repo_id}: the Hub does not find it (404)",
            409: f"{repo_id} is being changed by someone else, or exists as another kind (409): try again",
            429: "the Hub asks to slow down (429): try again in a few minutes",
        }
        reason = reasons.get(status) or f"the Hub answered {status or 'nothing'}: {one_line(error, 200)}"
        if status >= 500:
            reason = f"the Hub has a problem of its own ({status}): try again later"
        raise UserError(f"{reason}; {outcome}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"HF_HUB_OFFLINE is set: unset it and try again; {outcome}") from error
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if "committed" in outcome:
            outcome = "it is one commit, so all of it arrived or nothing"
        reason = " ".join(dict.fromkeys([one_line(error, 100), one_line(error.__cause__ or error, 200)]))
        raise UserError(f"the transfer failed ({reason}): try again; {outcome}") from error
