"""The registry: atomic, idempotent, by name and version; the same over local and remote roots."""

import io
import tarfile
import threading
import uuid

import pytest
import torch

from cartridges import artifact
from cartridges.artifact import MANIFEST, TENSORS
from cartridges.errors import UserError
from cartridges.registry import Registry
from test_artifact import make_cartridge, save


@pytest.fixture(params=["local", "memory"])
def registry(request, tmp_path):
    root = str(tmp_path / "registry") if request.param == "local" else f"memory://{uuid.uuid4().hex}/registry"
    return Registry(root, cache=tmp_path / "cache")


@pytest.fixture
def local(tmp_path):
    return Registry(tmp_path / "registry")


def publish(registry, tmp_path, name="sample", seed=0, **kwargs):
    directory = tmp_path / f"artifact-{seed}"
    save(directory, make_cartridge(seed))
    return registry.publish(name, directory, **kwargs)


def test_publish_resolve_get(registry, tmp_path):
    assert registry.list() == () and registry.names() == ()
    first = publish(registry, tmp_path, seed=0)
    second = publish(registry, tmp_path, seed=1)
    assert registry.aliases("sample") == {"latest": second}
    assert registry.resolve("sample").version == second
    assert registry.resolve(f"sample@{first}").aliases == ()
    assert registry.resolve(f"sample@{first[:6]}").version == first
    assert registry.resolve("sample@latest").aliases == ("latest",)
    assert {entry.version for entry in registry.versions("sample")} == {first, second}
    assert [entry.name for entry in registry.list()] == ["sample"]
    loaded = artifact.load(registry.get(f"sample@{first}"))
    assert loaded.manifest == registry.resolve(f"sample@{first}").manifest
    expected = make_cartridge(0).keys_values()[0].bfloat16().float()
    assert torch.equal(loaded.cartridge.keys_values()[0], expected)


def test_publishing_twice_is_once(registry, tmp_path):
    version = publish(registry, tmp_path)
    assert publish(registry, tmp_path) == version
    assert len(registry.versions("sample")) == 1


def test_prod_before_latest(registry, tmp_path):
    first, second = publish(registry, tmp_path, seed=0), publish(registry, tmp_path, seed=1)
    entry = registry.promote("sample", first[:8])
    assert entry.version == first and entry.aliases == ("prod",)
    assert registry.resolve("sample").version == first
    assert registry.resolve("sample@latest").version == second
    assert registry.promote("sample", "latest", "prod").version == second


def test_unfinished_publish_is_not_there(registry, tmp_path):
    publish(registry, tmp_path, name="whole")
    version = publish(registry, tmp_path, name="killed")
    registry._store.remove("killed", version, MANIFEST)
    registry._store.remove("killed", "aliases.json")
    assert registry.names() == ("whole",)
    with pytest.raises(UserError, match="no cartridge 'killed'"):
        registry.resolve("killed")
    assert publish(registry, tmp_path, name="killed") == version
    assert registry.names() == ("killed", "whole")


def test_killed_before_the_alias(registry, tmp_path):
    version = publish(registry, tmp_path)
    registry._store.remove("sample", "aliases.json")
    assert registry.resolve("sample").version == version
    assert [entry.version for entry in registry.list()] == [version]


def test_delete(registry, tmp_path):
    first, second = publish(registry, tmp_path, seed=0), publish(registry, tmp_path, seed=1)
    with pytest.raises(UserError, match="latest"):
        registry.delete(f"sample@{second}")
    assert registry.delete(f"sample@{first}") == (first,)
    assert registry.delete("sample@latest", force=True) == (second,)
    with pytest.raises(UserError, match="no cartridge"):
        registry.resolve("sample")
    publish(registry, tmp_path, seed=0)
    publish(registry, tmp_path, seed=1)
    assert set(registry.delete("sample")) == {first, second}
    assert registry.names() == () and registry._store.files() in ([], [".locks/sample.lock"])
    with pytest.raises(UserError, match="no cartridge"):
        registry.delete("sample")


def test_unknown_names_versions_and_bad_refs(registry, tmp_path):
    with pytest.raises(UserError, match="is empty"):
        registry.resolve("sample")
    publish(registry, tmp_path, name="harbour-rules")
    with pytest.raises(UserError, match="did you mean harbour-rules"):
        registry.resolve("harbor-rule")
    with pytest.raises(UserError, match="no version or alias 'prod'"):
        registry.resolve("harbour-rules@prod")
    with pytest.raises(UserError, match="no version or alias"):
        registry.resolve("harbour-rules@00000")
    for ref in ["", "Sample", "../sample", "a/b", ".hidden", "x" * 65, "sample\n"]:
        with pytest.raises(UserError, match="not a cartridge name"):
            registry.resolve(ref)
        with pytest.raises(UserError, match="not a cartridge name"):
            registry.publish(ref, tmp_path)
    for alias in ["abcdef", "../x", ""]:
        with pytest.raises(UserError, match="not an alias"):
            registry.promote("harbour-rules", "latest", alias)


def test_ambiguous_prefix(local, tmp_path):
    version = publish(local, tmp_path)
    twin = version[:6] + ("0" * 10 if version[6:] != "0" * 10 else "1" * 10)
    directory = tmp_path / "registry" / "sample"
    (directory / twin).mkdir()
    (directory / twin / MANIFEST).write_bytes((directory / version / MANIFEST).read_bytes())
    with pytest.raises(UserError, match="ambiguous"):
        local.resolve(f"sample@{version[:6]}")
    with pytest.raises(UserError, match="its content is that of version"):
        local.resolve(f"sample@{twin}")


def test_alias_of_a_version_that_is_gone(local, tmp_path):
    version = publish(local, tmp_path)
    (tmp_path / "registry" / "sample" / version / MANIFEST).unlink()
    with pytest.raises(UserError, match="gone"):
        local.resolve("sample")


def test_a_damaged_neighbour_does_not_hide_the_others(local, tmp_path, caplog):
    publish(local, tmp_path, name="good")
    version = publish(local, tmp_path, name="bad")
    (tmp_path / "registry" / "bad" / version / MANIFEST).write_text("{")
    assert [entry.name for entry in local.list()] == ["good"]
    assert "bad is left out" in caplog.text


def test_damaged_tensors_are_not_published_and_are_repaired(local, tmp_path):
    version = publish(local, tmp_path)
    stored = tmp_path / "registry" / "sample" / version / TENSORS
    stored.write_bytes(stored.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        artifact.load(local.get("sample"))
    publish(local, tmp_path)
    artifact.load(local.get("sample"))
    source = tmp_path / "artifact-0" / TENSORS
    source.write_bytes(source.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        local.publish("sample", tmp_path / "artifact-0")


def test_remote_download_is_verified_and_kept(tmp_path):
    registry = Registry(f"memory://{uuid.uuid4().hex}", cache=tmp_path / "cache")
    version = publish(registry, tmp_path)
    whole = registry._store.read("sample", version, TENSORS)
    registry._store.write(whole[:-1] + b"?", "sample", version, TENSORS)
    with pytest.raises(UserError, match="damaged"):
        registry.get("sample")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    registry._store.write(whole, "sample", version, TENSORS)
    directory = registry.get("sample")
    registry._store.remove("sample", version, TENSORS)
    assert registry.get("sample") == directory
    artifact.load(directory)


def test_the_newer_report_card_of_a_version_counts(local, tmp_path):
    publish(local, tmp_path)
    version = local.resolve("sample").version
    artifact.set_report_card(tmp_path / "artifact-0", {"arms": {}})
    assert local.publish("sample", tmp_path / "artifact-0") == version
    assert local.resolve("sample").manifest.report_card == {"arms": {}}
    artifact.set_report_card(tmp_path / "artifact-0", None)
    local.publish("sample", tmp_path / "artifact-0")
    assert local.resolve("sample").manifest.report_card == {"arms": {}}


def test_concurrent_publishes(registry, tmp_path):
    seeds = list(range(6)) * 2
    for seed in range(6):
        save(tmp_path / f"artifact-{seed}", make_cartridge(seed))
    errors = []

    def one(seed):
        try:
            registry.publish("sample", tmp_path / f"artifact-{seed}", aliases=("latest", f"seed-{seed}"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(registry.versions("sample")) == 6
    assert set(registry.aliases("sample")) == {"latest", *(f"seed-{seed}" for seed in range(6))}
    for entry in registry.versions("sample"):
        artifact.load(registry.get(f"sample@{entry.version}"))
    assert not [path for path in registry._store.files() if path.endswith(".tmp")]


def test_export_import(registry, tmp_path):
    version = publish(registry, tmp_path)
    registry.export("sample", tmp_path / "one.tar")
    registry.export(f"sample@{version}", tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    other = Registry(tmp_path / "other")
    assert other.import_(tmp_path / "one.tar").version == version
    assert other.import_(tmp_path / "one.tar", name="renamed").name == "renamed"
    assert other.names() == ("renamed", "sample")
    with pytest.raises(UserError, match="there is no directory"):
        registry.export("sample", tmp_path / "nowhere" / "one.tar")


def members_of(path):
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def info(name, kind=tarfile.REGTYPE, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_hostile_archives_are_refused(local, tmp_path):
    publish(local, tmp_path)
    local.export("sample", tmp_path / "good.tar")
    (manifest_member, manifest), (tensor_member, tensors) = members_of(tmp_path / "good.tar")
    good = [(manifest_member, manifest), (tensor_member, tensors)]
    bad = tmp_path / "bad.tar"
    for members, message in [
        ([*good, (info("../../escape"), b"x")], "holds"),
        ([(info(f"../{MANIFEST}"), manifest), (info(f"../{TENSORS}"), tensors)], "holds"),
        ([(info(f"/{MANIFEST}"), manifest), (info(f"/{TENSORS}"), tensors)], "holds"),
        ([(info(f"a/b/{MANIFEST}"), manifest)], "holds"),
        ([*good, (info("sample/extra"), b"x")], "holds"),
        ([*good, (info(f"sample/{MANIFEST}"), manifest)], "once each"),
        ([(manifest_member, manifest)], "does not hold one cartridge"),
        ([(manifest_member, manifest), (info(f"other/{TENSORS}"), tensors)], "does not hold one"),
        ([(manifest_member, manifest), (info(f"sample/{TENSORS}", tarfile.SYMTYPE, "/etc/passwd"), b"")],
         "not a regular file"),
        ([(info(f"sample/{MANIFEST}", tarfile.LNKTYPE, "x"), b""), (tensor_member, tensors)],
         "not a regular file"),
        ([(manifest_member, b" " * (17 * 2**20)), (tensor_member, tensors)], "more than"),
        ([(manifest_member, manifest), (tensor_member, tensors + b"x")], "its manifest says"),
        ([(manifest_member, manifest), (tensor_member, tensors[:-1] + b"?")], "digest"),
        ([(info(f"Bad Name/{MANIFEST}"), manifest), (info(f"Bad Name/{TENSORS}"), tensors)],
         "not a cartridge name"),
    ]:
        write_tar(bad, members)
        with pytest.raises(UserError, match=message) as caught:
            local.import_(bad)
        assert "\n" not in str(caught.value)
    bad.write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="not a whole tar"):
        local.import_(bad)
    bad.write_bytes((tmp_path / "good.tar").read_bytes()[:1500])
    with pytest.raises(UserError):
        local.import_(bad)
    with pytest.raises(UserError, match="not a file"):
        local.import_(tmp_path / "nowhere.tar")
    assert not (tmp_path.parent / "escape").exists()


def test_unknown_protocol():
    with pytest.raises(UserError, match="cannot open registry"):
        Registry("nosuch://bucket/x")
