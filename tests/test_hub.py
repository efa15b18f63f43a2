"""Sets that travel by the Hugging Face Hub: a stub of it, on this machine, takes and gives what it is asked."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Finished

import stillroom
from stillroom import cli, hub
from stillroom.claims import claims_of
from stillroom.distilled import find_set, load_distilled, verify_distilled
from stillroom.errors import StillroomError
from stillroom.files import read_json
from stillroom.manifest import encode_manifest, read_manifest
from stillroom.pipeline import make_recipe_set
from stillroom.recipes import Recipe
from stillroom.run import Run

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the Hub's library is not installed")


@dataclass
class StubHub:
    """Data sets by "owner/name", each a list of commits, each of these its files by name; what was asked of it."""

    address: str = ""
    repos: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def commit_id(self, repo: str, number: int) -> str:
        names = {name: hashlib.sha256(content).hexdigest() for name, content in self.repos[repo][number].items()}
        return hashlib.sha1(json.dumps([repo, number, sorted(names.items())]).encode()).hexdigest()

    def find(self, repo: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repos.get(repo, [])
        for number in reversed(range(len(commits))):
            if revision in (None, "main", self.commit_id(repo, number)):
                return self.commit_id(repo, number), commits[number]
        return None

    def written(self) -> list[str]:
        return [path for method, path in self.asked if method not in ("GET", "HEAD")]

    def fetched(self) -> set[str]:
        return {path.rpartition("/")[2] for method, path in self.asked if method == "GET" and "/resolve/" in path}


class Handler(BaseHTTPRequestHandler):
    stub: StubHub

    def log_message(self, *words: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length)

    def carry_out(self) -> None:
        stub, path, sent = self.stub, self.path.partition("?")[0], self.body()
        stub.asked.append((self.command, path))
        user = {"Bearer hf_good": "owner", "Bearer hf_other": "other"}.get(self.headers.get("Authorization", ""))
        if self.command not in ("GET", "HEAD") and not path.startswith("/large/") and user is None:
            return self.answer(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(sent)
            if asked["organization"] != user:
                return self.answer(403, {"error": "You don't have the rights"})
            repo = f"{asked['organization']}/{asked['name']}"
            assert asked["type"] == "dataset"
            stub.repos[repo] = [{".gitattributes": b"*.parquet filter=lfs\n"}]
            stub.private |= {repo} if asked.get("visibility") == "private" or asked.get("private") else set()
            return self.answer(200, {"url": f"{stub.address}/datasets/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            here = stub.find(found[1], found[2])
            if here is None or (found[1] in stub.private and user != "owner"):
                code = "RevisionNotFound" if found[1] in stub.repos else "RepoNotFound"
                return self.answer(404, {"error": "not found"}, X_Error_Code=code)
            siblings = [{"rfilename": name, "size": len(content)} for name, content in here[1].items()]
            facts = {"id": found[1], "sha": here[0], "private": found[1] in stub.private, "siblings": siblings}
            return self.answer(200, facts)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith((".parquet", ".safetensors")) else
                 "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(sent)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{stub.address}/large/{o['oid']}", "header": {}}}}
                for o in json.loads(sent)["objects"]
            ]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if self.command == "PUT" and path.startswith("/large/"):
            assert hashlib.sha256(sent).hexdigest() == path.rpartition("/")[2]
            stub.large[path.rpartition("/")[2]] = sent
            return self.answer(200)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/commit/main", path):
            files = dict(stub.repos[found[1]][-1])
            for line in sent.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "header" and "parentCommit" in value:
                    assert value["parentCommit"] == stub.find(found[1], None)[0]  # type: ignore[index]
                elif entry["key"] == "file":
                    assert value["encoding"] == "base64"
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = stub.large[value["oid"]]
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            stub.repos[found[1]].append(files)
            oid = stub.commit_id(found[1], len(stub.repos[found[1]]) - 1)
            address = f"{stub.address}/datasets/{found[1]}/commit/{oid}"
            return self.answer(200, {"commitUrl": address, "commitOid": oid, "success": True})
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            here = stub.find(found[1], found[2])
            if here is None or found[3] not in here[1]:
                return self.answer(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
            content = here[1][found[3]]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.answer(200, content, ETag=etag, X_Repo_Commit=here[0])
        return self.answer(404, {"error": f"the stub does not know {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = carry_out  # noqa: N815


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StubHub]:
    """An empty Hub, at which the Hub's own library is pointed, and the login of its user "owner"."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _cache_assets

    stub = StubHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    stub.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", stub.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield stub
    server.shutdown()
    server.server_close()
    thread.join()


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def publish(finished: Finished, repo: str = "owner/toy", private: bool = False) -> str:
    return hub.send(hub.prepare(finished.directory, repo, private))


def test_a_set_that_was_pushed_is_read_back_bit_for_bit(stub: StubHub, finished: Finished) -> None:
    publish(finished)
    stub.asked.clear()
    here, back = load_distilled(find_set(finished.directory)), stillroom.load("owner/toy")
    assert torch.equal(here.images, back.images)
    assert torch.equal(here.compensators.codes, back.compensators.codes)
    assert torch.equal(here.soft_labels, back.soft_labels)
    assert here.fingerprint == back.fingerprint
    # Nothing was written there, and nothing fetched but the manifest and the parts that it names.
    assert stub.written() == []
    parts = {back.manifest.files[role].name for role in ("images", "compensators", "labels")}
    assert stub.fetched() == {"manifest.json", *parts}
    stub.asked.clear()
    stillroom.load("owner/toy")
    assert stub.fetched() == set()  # it lies here by now


def test_what_was_pushed_is_a_whole_set_with_a_card_of_its_own(
    stub: StubHub, finished: Finished, tmp_path: Path
) -> None:
    publish(finished)
    files = stub.repos["owner/toy"][-1]
    for name, content in files.items():
        if name != ".gitattributes":
            (tmp_path / name).write_bytes(content)
    assert verify_distilled(tmp_path) == []
    card = files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "unknown"
    assert 'load("owner/toy")' in card
    claims = claims_of(read_json(finished.directory / "results.json"))
    assert len(claims) == 2
    for claim in claims:  # every number of the run stands there beside its controls
        assert claim.sentence in card
        assert all(control.control in card and control.said in card for control in claim.against)
    for said in ("**Licence of toy**: not stated.", "## Bytes", "**Not meant for**", "by infer at 4 images per class"):
        assert said in card


def test_a_revision_is_read_as_it_was_and_an_older_version_leaves_no_files(
    stub: StubHub, finished: Finished, tmp_path: Path
) -> None:
    first = publish(finished)
    distilled = load_distilled(find_set(finished.directory))
    hard = distilled.with_labels(None)
    hard.save(tmp_path / "hard")
    hub.send(hub.prepare(tmp_path / "hard", "owner/toy"))
    names = set(stub.repos["owner/toy"][-1])
    assert not any(name.startswith("labels-") for name in names)
    assert stillroom.load("owner/toy").manifest.label_kind == "hard"
    assert stillroom.load(f"owner/toy@{first}").manifest.label_kind == distilled.manifest.label_kind
    card = stub.repos["owner/toy"][-1]["README.md"].decode()
    assert "No results came with this set" in card  # those of the run are not beside it


def test_the_command_sends_nothing_until_it_is_told_to(
    stub: StubHub, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(finished.directory), "owner/toy"]
    for more in ([], ["--dry-run"], ["--dry-run", "--yes"]):
        assert cli.main([*words, *more]) == 0
        shown = capsys.readouterr().out
        assert "owner/toy, seen by everybody" in shown
        assert "'red', 'green', 'blue sky'" in shown
        assert "nothing was sent" in shown
        assert stub.asked == []
    assert cli.main([*words, "--private", "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "seen by its owner alone" in shown
    commit = stub.find("owner/toy", None)[0]  # type: ignore[index]
    assert f'stillroom.load("owner/toy@{commit}")' in shown
    assert stub.private == {"owner/toy"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files, name: files.update({name: files[name][:-1] + b"?"}), "was changed after it was written"),
        (lambda files, name: files.update({name: files[name] + b"more"}), "should have"),
        (lambda files, name: files.pop(name), "is not there"),
        (lambda files, name: files.pop("manifest.json"), "no manifest.json"),
        (lambda files, name: files.update({"manifest.json": b"{}"}), "schema_version"),
        (lambda files, name: files.update({"manifest.json": b""}), "has 0 bytes"),
    ],
)
def test_a_set_that_is_not_whole_there_is_refused_and_not_kept(
    stub: StubHub, finished: Finished, tmp_path: Path, change: Any, said: str
) -> None:
    publish(finished)
    whole = dict(stub.repos["owner/toy"][-1])
    name = next(name for name in whole if name.startswith("images-"))
    change(stub.repos["owner/toy"][-1], name)
    for _ in range(2):
        with pytest.raises(StillroomError, match=said):
            stillroom.load("owner/toy")
    stub.repos["owner/toy"].append(whole)
    stillroom.load("owner/toy")


def test_what_was_damaged_here_is_fetched_anew(stub: StubHub, finished: Finished, tmp_path: Path) -> None:
    publish(finished)
    stillroom.load("owner/toy")
    (images,) = (tmp_path / "assets").rglob("images-*.parquet")
    images.write_bytes(images.read_bytes()[:-1] + b"?")
    with pytest.raises(StillroomError, match="was changed after it was written"):
        stillroom.load("owner/toy")
    stillroom.load("owner/toy")


def test_no_larger_file_is_fetched_than_the_manifest_says(stub: StubHub, finished: Finished) -> None:
    publish(finished)
    files = stub.repos["owner/toy"][-1]
    name = next(name for name in files if name.startswith("images-"))
    files[name] += bytes(10**6)
    with pytest.raises(StillroomError, match=f"{name} has .* but should have"):
        stillroom.load("owner/toy")
    assert stub.fetched() == {"manifest.json"}


def test_a_place_that_holds_something_else_stays_as_it_is(stub: StubHub, finished: Finished) -> None:
    for files, held in (({"model.bin": b"x"}, "model.bin"), ({"README.md": b"# mine"}, "README.md")):
        stub.repos["owner/toy"] = [{".gitattributes": b""} | files]
        with pytest.raises(StillroomError, match=f"it holds '{held}'"):
            publish(finished)
        assert stub.written() == []
    stub.repos["owner/toy"] = [{".gitattributes": b""}]
    with pytest.raises(StillroomError, match="public already"):
        publish(finished, private=True)
    publish(finished)


def test_errors_say_what_to_do(
    stub: StubHub, finished: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in (
        "toy",
        "owner/",
        "owner/to/y",
        "owner/-x",
        "owner/a--b",
        "owner/a..b",
        "o/x.git",
        "a b/c",
        "o/" + "x" * 99,
    ):
        with pytest.raises(StillroomError, match="none that the Hub takes"):
            hub.prepare(finished.directory, name)
    for source in ("nowhere", "./owner/toy", "owner/toy@", "a/b/c"):
        with pytest.raises(StillroomError, match="neither a folder that exists nor an address"):
            stillroom.load(source)
    with pytest.raises(StillroomError, match="check the spelling"):
        stillroom.load("owner/none")
    publish(finished)
    with pytest.raises(StillroomError, match=r"load owner/toy@v2: there is no such"):
        stillroom.load("owner/toy@v2")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(StillroomError, match="may not do that"):
        publish(finished, "owner/second")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StillroomError, match="log in"):
        publish(finished, "owner/third")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StillroomError, match="nobody is logged in"):
        publish(finished)


def test_a_hub_that_is_not_reached_is_an_error(
    stub: StubHub, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StillroomError, match="was not reached"):
        stillroom.load("owner/toy")
    with pytest.raises(StillroomError, match="was not reached"):
        publish(finished)


def test_paths_of_this_machine_do_not_travel(stub: StubHub, finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(find_set(finished.directory), folder)
    manifest = read_manifest(folder)
    secret = {
        "naturals": "/home/ada/secret/prepared", "note": "a/b is no path, at 16 / 26 %", "list": ["C:\\ada\\x", "~/y/"],
        "file": "file:///home/ada/z", "checkpoint": "resnet18=/home/ada/w.pt", "relative": "ada/secret/v",
        "soft_labels": "my ada/u.npy", "text": "read from /home/ada/t.npz, whole", "address": "https://some.where/t",
    }  # fmt: skip
    (folder / "manifest.json").write_bytes(encode_manifest(replace(manifest, recipe=manifest.recipe | secret)))
    publication = hub.prepare(folder, "owner/toy")
    assert "recipe.naturals in manifest.json is a path of this machine" in "\n".join(publication.lines)
    hub.send(publication)
    files = stub.repos["owner/toy"][-1]
    assert b"ada" not in files["manifest.json"] + files["README.md"]
    recipe = stillroom.load("owner/toy").manifest.recipe
    assert {key: recipe[key] for key in secret} == secret | {
        "naturals": "prepared", "list": ["x", "y"], "file": "z", "checkpoint": "resnet18=w.pt", "relative": "v",
        "soft_labels": "u.npy", "text": "read from t.npz, whole",
    }  # fmt: skip


@pytest.mark.parametrize("source", ["clinic/ada", "hf://owner/published", "owner/published"])
def test_where_an_imported_set_was_read_from_does_not_travel_unless_it_is_the_hub(
    finished: Finished, tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "set"
    shutil.copytree(find_set(finished.directory), folder)
    manifest = read_manifest(folder)
    notes = [
        f"soft labels of {source}",
        f"classes in the order of {'' if 'owner' in source else 'my/'}order.txt",
        *(["from the Hub, as it is at 123"] if "owner" in source else []),
    ]
    extra = {"import": {"source": source, "layout": "folder", "notes": notes}}
    (folder / "manifest.json").write_bytes(encode_manifest(replace(manifest, extra=extra)))
    publication = hub.prepare(folder, "owner/toy")
    sent, said = publication.manifest.extra["import"], "\n".join(publication.lines)
    if "owner" in source:
        assert sent == {"source": "hf://owner/published", "layout": "folder", "notes": notes}
        assert "import.source" not in said
    else:
        assert sent == {
            "layout": "folder",
            "notes": ["soft labels of the published set", "classes in the order of order.txt"],
        }
        assert b"ada" not in publication.files["manifest.json"]
        assert "extra.import.source in manifest.json, 'clinic/ada', is where the set was read from; it is not" in said


def test_results_of_another_set_or_other_labels_are_not_the_sets(finished: Finished, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.directory, run)
    assert "results of its run: 2, each beside its controls" in hub.prepare(run, "owner/toy").notes
    own = load_distilled(run / "distilled")
    own.with_labels(own.soft_labels + 1).save(run / "distilled")  # labelled anew
    assert "results: none" in hub.prepare(run, "owner/toy").notes
    own.save(run / "distilled")
    assert "results: none" not in hub.prepare(run, "owner/toy").notes
    replace(own, images=own.images.flip(3)).save(run / "distilled")  # of the same method and budget
    assert "results: none" in hub.prepare(run, "owner/toy").notes


def test_image_files_with_metadata_are_not_published(finished: Finished, tmp_path: Path) -> None:
    plain = load_distilled(find_set(finished.directory)).with_labels(None).with_image_encoding("jpeg75")
    plain.save(tmp_path / "plain")
    hub.prepare(tmp_path / "plain", "owner/toy")
    assert plain.image_files is not None
    marked = plain.image_files[2][:2] + b"\xff\xfe\x00\x05ada" + plain.image_files[2][2:]  # a comment
    files = (*plain.image_files[:2], marked, *plain.image_files[3:])
    replace(plain, image_files=files).save(tmp_path / "marked")
    with pytest.raises(StillroomError, match=r"images 2 of .* are JPEG files with metadata"):
        hub.prepare(tmp_path / "marked", "owner/toy")


def test_a_card_that_was_edited_is_sent_as_it_is(stub: StubHub, finished: Finished, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(find_set(finished.directory), folder)
    (folder / "README.md").write_text("# My own words\n")
    publication = hub.prepare(folder, "owner/toy")
    assert "README.md is sent as you edited it" in publication.notes
    hub.send(publication)
    assert stub.repos["owner/toy"][-1]["README.md"] == b"# My own words\n"
    (folder / "contact_sheet.png").unlink()
    with pytest.raises(StillroomError, match=r"contact_sheet\.png is missing"):
        hub.prepare(folder, "owner/toy")


def test_a_folder_and_a_run_are_loaded_as_they_lie(finished: Finished) -> None:
    assert stillroom.load(finished.directory).fingerprint == stillroom.load(find_set(finished.directory)).fingerprint


def test_digits_and_imagenet_say_what_binds_them() -> None:
    from stillroom.data import FACTS

    assert FACTS["digits"].licence.startswith("CC BY 4.0")
    assert FACTS["cifar100"].licence == "not stated by its authors"
    assert "non-commercial" in FACTS["imagenet"].licence
    assert "non-commercial" in FACTS["tiny-imagenet"].licence
    assert stillroom.load_real("digits").licence == FACTS["digits"].licence


@pytest.mark.parametrize(("said", "known"), [("cc-by-nc-4.0", "cc-by-nc-4.0"), ("ours, ask us first", "other")])
def test_the_card_states_the_licence_that_the_owner_of_the_images_says(
    toy_recipe: Recipe, tmp_path: Path, said: str, known: str
) -> None:
    recipe = replace(toy_recipe, method="random", data=replace(toy_recipe.data, licence=said))
    with Run(tmp_path / "run") as run:
        make_recipe_set(recipe, run)
    card = (tmp_path / "run/distilled/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == known
    assert said in card
