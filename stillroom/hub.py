"""The Hugging Face Hub: a distilled set sent there with its card, and read back with checks.

    distilled = load("owner/name")                      # or "owner/name@revision", or a folder
    publication = prepare("runs/mine", "owner/name")    # what everybody would see; nothing is sent
    send(publication)

Reading never writes there. Of what lies there only the files that the manifest names are fetched, if they have the
size that it says, and nothing is read before its SHA-256 agrees. The card is not fetched: people edit cards.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stillroom.artifact import OWN_DATA_FILE, check_part, strip_metadata
from stillroom.card import build_card
from stillroom.claims import Claim, claims_of
from stillroom.data import hub_id
from stillroom.distilled import DistilledSet, find_set, load_distilled
from stillroom.errors import StillroomError
from stillroom.files import read_json, sha256_bytes
from stillroom.manifest import CARD_ROLES, MANIFEST_NAME, FileFacts, Manifest, encode_manifest, file_name, read_manifest

LARGEST_MANIFEST = 2**26  # bytes; of the one file that is fetched before anything says how large it should be
OWN_FILES = (".gitattributes", MANIFEST_NAME, "README.md", "contact_sheet.png")  # beside those named by their hash
LOCAL_PATH = re.compile(r"(?:file:|/|~|\.{1,2}/|[A-Za-z]:[\\/]|\\\\).+")
PATH_WITHIN = re.compile(r"(?<![^\s='\"(\[,;])(?:file:/|/|~/|\.{1,2}/|[A-Za-z]:[\\/]|\\\\)[^\s'\",;)\]]+")  # a text
RELATIVE_WITHIN = re.compile(r"[^\s'\",;()\[\]]+[\\/][^\s'\",;()\[\]]+")  # a note of an import
ADDRESS = re.compile(r"(?!file:)\w+://\S+")
PLACES = ("class_order", "soft_labels", "naturals")  # settings that hold paths, which may have spaces
FROM_HUB = "from the Hub, as it is at "  # begins what an import notes of a set that it fetched there
SHOWN_NAMES = 10


@dataclass(frozen=True)
class Publication:
    """What `send` would send to the data set `repo` ("owner/name"): `files` by name, each bytes or where it lies."""

    repo: str
    private: bool
    manifest: Manifest
    files: dict[str, bytes | Path]
    notes: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What would be seen, and by whom, a line each."""
        names, facts = self.manifest.class_names, self.manifest.dataset
        more = f", ... ({len(names)})" if len(names) > SHOWN_NAMES else ""
        size = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in self.files.items()}
        return [
            f"{self.repo}, seen by {'its owner alone' if self.private else 'everybody'}:",
            *(f"- {name}: {count:,} bytes" for name, count in size.items()),
            f"- class names: {', '.join(map(repr, names[:SHOWN_NAMES]))}{more}",
            f"- made of: {facts.name}, whose licence is {facts.licence}",
            *(f"- {note}" for note in self.notes),
        ]


def load(source: Path | str) -> DistilledSet:
    """Read a distilled set: a folder, a run's directory, or "owner/name" on the Hub, there also "owner/name@revision".

    A path that exists wins; "hf://owner/name" is the Hub's. What was fetched is kept where the Hub's library keeps
    assets (HF_ASSETS_CACHE), by commit. Raises StillroomError for an address that is none, a Hub that is not reached,
    and a set that is not whole: of another size than its manifest says, or another SHA-256.
    """
    path = Path(source)
    if path.exists():
        return load_distilled(find_set(path))
    repo, revision = _parse_address(str(source))
    folder = _fetch(repo, revision)
    with _whole_or_gone(folder, repo):
        return load_distilled(folder, ignore_card=True)


def prepare(path: Path | str, repo: str, private: bool = False) -> Publication:
    """Return what `send` would send of the set in the folder, or run's directory, `path`, which is verified whole.

    The card is written anew, with what the set's run found beside its controls, where its results are there; one that
    was edited is sent as it is. Paths of this machine that settings hold are cut to their last part, and where an
    imported set was read from is left out unless that is the Hub. Raises StillroomError for a set that is not whole,
    for image files with metadata, and for a name that the Hub does not take.
    """
    _require_name(repo)
    folder = find_set(Path(path))
    distilled = load_distilled(folder, ignore_card=True)
    manifest = distilled.manifest
    if tells := [row for row, file in enumerate(distilled.image_files or ()) if not _is_bare(file)]:
        raise StillroomError(
            f"push {repo}: images {str(tells[:3])[1:-1]}{', ...' if len(tells) > 3 else ''} of {folder} are JPEG files "
            "with metadata, which may say where and by whom they were made; import the set again, which leaves it out"
        )
    check_part(folder, "contact_sheet", manifest.files["contact_sheet"])
    notes: list[str] = []
    bare = replace(
        manifest,
        recipe=_without_paths(manifest.recipe, "recipe", notes),
        extra=_without_paths(_without_source(manifest.extra, notes), "extra", notes),
    )
    claims = _find_claims(folder, distilled)
    notes.append(f"results of its run: {len(claims)}, each beside its controls" if claims else "results: none")
    card = _edited_card(folder, manifest)
    if card is None:
        parts = {role: facts for role, facts in manifest.files.items() if role not in CARD_ROLES}
        card = build_card(replace(bare, files=parts), claims, repo)
    else:
        notes.append("README.md is sent as you edited it")
    digest = sha256_bytes(card)
    of_card = FileFacts(file_name("card", digest), len(card), digest, 0, 0)
    sent = replace(bare, files=manifest.files | {"card": of_card})
    files: dict[str, bytes | Path] = {f.name: folder / f.name for role, f in manifest.files.items() if role != "card"}
    files |= {of_card.name: card, MANIFEST_NAME: encode_manifest(sent)}
    return Publication(repo, private, sent, files, tuple(notes))


def send(publication: Publication) -> str:
    """Send it in one commit and return that commit's id. It cannot be undone: others may have copied it at once.

    An older version of a set in the same place is replaced. Raises StillroomError where nobody is logged in, where the
    place holds something else or is public though `private` is asked for, and where the Hub refuses or is not reached;
    the place is as before then, but may be new and empty.
    """
    repo, what = publication.repo, f"push {publication.repo}"
    library = _library(what)
    if library.get_token() is None:
        raise StillroomError(f"{what}: nobody is logged in to the Hub; run `hf auth login`, or set HF_TOKEN")
    api = library.HfApi()
    with _explained(what):
        try:
            before = api.dataset_info(repo)
        except library.errors.RepositoryNotFoundError:
            before = None
    present = set() if before is None else {entry.rfilename for entry in before.siblings or []}
    foreign = sorted(name for name in present if name not in OWN_FILES and not OWN_DATA_FILE.fullmatch(name))
    if foreign or (present - {".gitattributes"} and MANIFEST_NAME not in present):
        held = (foreign or sorted(present - {".gitattributes"}))[0]
        raise StillroomError(f"{what}: it holds {held!r} and is not, or not only, a distilled set; give another name")
    if publication.private and before is not None and not before.private:
        raise StillroomError(f"{what}: it is public already, so --private cannot hold; give another name, or leave it")
    stale = [name for name in present if OWN_DATA_FILE.fullmatch(name) and name not in publication.files]
    with _explained(what):
        if before is None:
            api.create_repo(repo, repo_type="dataset", private=publication.private)
        added = [library.CommitOperationAdd(name, content) for name, content in publication.files.items()]
        commit = api.create_commit(
            repo,
            [*added, *map(library.CommitOperationDelete, sorted(stale))],
            repo_type="dataset",
            commit_message=f"{publication.manifest.dataset.name} distilled by {publication.manifest.method}",
            parent_commit=None if before is None else before.sha,
        )
    return str(commit.oid)


def _fetch(repo: str, revision: str | None) -> Path:
    """Return the folder of the set as it lies at `revision`, a branch, tag or commit, None for what is there now."""
    what = f"load {repo}{'' if revision is None else f'@{revision}'}"
    library = _library(what)
    api = library.HfApi()
    with _explained(what):
        found = api.dataset_info(repo, revision=revision, files_metadata=True)
    if re.fullmatch(r"[0-9a-f]{40}", str(found.sha)) is None:
        raise StillroomError(f"{what}: the Hub names no commit but {found.sha!r:.80}; try again, or download the set")
    sizes = {entry.rfilename: entry.size for entry in found.siblings or []}
    folder = Path(
        library.cached_assets_path("stillroom", namespace="sets", subfolder=f"{repo.replace('/', '--')}@{found.sha}")
    )

    def fetch(name: str) -> None:
        with _explained(what):
            api.hf_hub_download(repo, name, repo_type="dataset", revision=found.sha, local_dir=folder)

    if MANIFEST_NAME not in sizes:
        raise StillroomError(f"{what}: it has no {MANIFEST_NAME}, so it is no distilled set of stillroom's; "
                             "load_real and `stillroom import` read other data sets")  # fmt: skip
    if not 0 < (sizes[MANIFEST_NAME] or 0) <= LARGEST_MANIFEST:
        raise StillroomError(f"{what}: its {MANIFEST_NAME} has {sizes[MANIFEST_NAME]} bytes, which no manifest has")
    fetch(MANIFEST_NAME)
    with _whole_or_gone(folder, repo):
        manifest = read_manifest(folder)
    parts = [facts for role, facts in manifest.files.items() if role not in CARD_ROLES]
    for facts in parts:  # all of them before any is fetched
        if sizes.get(facts.name) != facts.bytes:
            there = f"has {sizes[facts.name]} bytes there" if facts.name in sizes else "is not there"
            raise StillroomError(
                f"{what}: {facts.name} {there}, but should have {facts.bytes}; ask who published it to push it again"
            )
    for facts in parts:
        fetch(facts.name)
    return folder


@contextmanager
def _whole_or_gone(folder: Path, repo: str) -> Iterator[None]:
    """Delete what was fetched where it cannot be read, so that the next call fetches it anew."""
    try:
        yield
    except StillroomError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise StillroomError(
            f"load {repo}: what was fetched is not whole and was deleted; load it again, or else ask who "
            f"published it ({error})"
        ) from error


def _parse_address(source: str) -> tuple[str, str | None]:
    address, at, revision = source.partition("@")
    repo = hub_id(address)
    if repo is None or (at and not revision):
        raise StillroomError(
            f"load: {source!r} is neither a folder that exists nor an address on the Hub; give a folder, 'owner/name' "
            "or 'owner/name@revision'"
        )
    return repo, revision or None


def _require_name(repo: str) -> None:
    """Raise StillroomError for what is no "owner/name" by the Hub's rules."""
    part = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
    good = re.fullmatch(rf"{part}/{part}", repo, re.ASCII) is not None and len(repo) <= 96
    if not good or "--" in repo or ".." in repo or repo.endswith(".git"):
        raise StillroomError(
            f"push: the name {repo!r:.120} is none that the Hub takes; give 'owner/name' of letters, digits, '-', '_' "
            "and '.', at most 96 in all, without '--' or '..'"
        )


def _without_paths(value: Any, where: str, notes: list[str]) -> Any:
    """Return JSON with every path of this machine cut to its last part, which is noted."""
    if isinstance(value, dict):
        return {key: _without_paths(item, f"{where}.{key}", notes) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item, f"{where}[{index}]", notes) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([\w.-]+=)?(.*)", value, re.DOTALL)  # network=path of a checkpoint
    assert found is not None
    name, text = found[1] or "", found[2]
    relative = re.search(r"[\\/]", text) and not ADDRESS.fullmatch(text)
    one_word = not re.search(r"\s", text) or where.rpartition(".")[2] in PLACES
    is_path = LOCAL_PATH.fullmatch(text) or (relative and one_word)
    last = name + (_last_part(text) if is_path else PATH_WITHIN.sub(lambda path: _last_part(path[0]), text))
    if last != value:
        what = "is" if is_path else "holds"
        notes.append(f"{where} in {MANIFEST_NAME} {what} a path of this machine, {value!r}; it is sent as {last!r}")
    return last


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _without_source(extra: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return `extra` without where an imported set was read from, which is noted, unless it is the Hub.

    Only what the import noted tells: "clinic/ada" may be a folder of its machine as well as an address on the Hub.
    """
    facts = extra.get("import", {})
    source, said = facts.get("source"), facts.get("notes", [])
    if source is None:
        return extra
    if any(note.startswith(FROM_HUB) for note in said):
        return extra | {"import": facts | {"source": f"hf://{source.removeprefix('hf://')}"}}  # as no folder is written
    notes.append(f"extra.import.source in {MANIFEST_NAME}, {source!r}, is where the set was read from; it is not sent")
    kept = {key: value for key, value in facts.items() if key != "source"}
    if re.search(r"[\\/]", source):  # "." is in every sentence
        said = [note.replace(source, "the published set") for note in said]
    said = [RELATIVE_WITHIN.sub(lambda path: _last_part(path[0]), note) for note in said]
    return extra | {"import": kept | {"notes": said}}


def _is_bare(file: bytes) -> bool:
    """Whether an image file is no JPEG with metadata."""
    try:
        return not file.startswith(b"\xff\xd8") or strip_metadata(file) == file
    except (ValueError, IndexError):  # cut short: what may be in it cannot be told
        return False


def _find_claims(folder: Path, distilled: DistilledSet) -> list[Claim]:
    """Return what the set's run found, none where its results are not beside it or are of another set.

    Results say of which set they are by its fingerprint and its labels' SHA-256; those of older versions do not, and so
    are nobody's.
    """
    path = folder.resolve().parent / "results.json"
    if folder.resolve().name != "distilled" or not path.is_file():
        return []
    results = read_json(path)
    try:
        claims = claims_of(results)
    except (KeyError, TypeError, ValueError) as error:
        raise StillroomError(
            f"{path} does not hold a run's results ({error!r}); restore it, or move it away to publish without"
        ) from error
    labels = distilled.manifest.files.get("labels")
    of_it = (distilled.fingerprint, labels.sha256 if labels else None)
    return claims if (results.get("fingerprint"), results.get("labels_sha256")) == of_it else []


def _edited_card(folder: Path, manifest: Manifest) -> bytes | None:
    """Return README.md where it is there and not the one that the set was saved with."""
    facts, path = manifest.files["card"], folder / "README.md"
    content = path.read_bytes() if path.is_file() else None
    return None if content is None or sha256_bytes(content) == facts.sha256 else content


def _library(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise StillroomError(f"{what}: the Hub's library is not installed; pip install 'stillroom[hub]'") from error
    return huggingface_hub


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever the Hub's library, or one below it, raises into a StillroomError that says what to do."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        said = " ".join(str(error).split())[:200]
        fixes = {
            401: "the login is not known, or there is no such data set; check the name, and log in by `hf auth login` "
            "or HF_TOKEN",
            403: "this login may not do that; check the owner's name, and that the token may write",
            404: "there is no such data set, file or revision; check the spelling, and log in if it is private",
        }
        fix = fixes.get(status or 0, "the Hub was not reached, or refused; check the network and try again")
        raise StillroomError(f"{what}: {fix} ({said})") from error
