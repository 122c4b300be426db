"""Artifacts: bit-equal round trips, and one clear refusal for each way to be wrong."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cartridges import artifact
from cartridges.artifact import MANIFEST, TENSORS, CorpusRecord
from cartridges.cartridge import Cartridge
from cartridges.errors import UserError
from cartridges.files import file_digest
from cartridges.models import ModelIdentity

IDENTITY = ModelIdentity(
    name="tiny", revision="r1", weights_digest="w" * 64, tokenizer_hash="t" * 64, template_hash="c" * 64,
    rope={"rope_type": "default", "rope_theta": 10000.0}, num_layers=2, num_key_value_heads=2,
    head_dim=4, vocab_size=64, max_position_embeddings=128)
CORPUS = CorpusRecord(id="sample", fingerprint="f" * 32, tokens=1000)


def make_cartridge(seed=0, num_tokens=6):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 2, num_tokens, 4, generator=generator)
    return Cartridge(keys, values, num_frozen_tokens=1)


def save(directory, cartridge=None, **fields):
    fields = {"model": IDENTITY, "corpus": CORPUS, "settings": {"steps": 3, "betas": (0.9, 0.99)}} | fields
    return artifact.save(directory, cartridge or make_cartridge(), **fields)


def edit_manifest(directory, **fields):
    path = directory / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(directory):
    with pytest.raises(UserError) as caught:
        artifact.load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    cartridge = make_cartridge()
    manifest = save(tmp_path, cartridge, dtype=dtype)
    loaded = artifact.load(tmp_path)
    for mine, theirs in zip(cartridge.keys_values(), loaded.cartridge.keys_values(), strict=True):
        assert torch.equal(mine.to(getattr(torch, dtype)).float(), theirs)
    assert loaded.cartridge.num_frozen_tokens == 1
    assert loaded.digest == manifest.digest == file_digest(tmp_path / TENSORS)
    again = artifact.save(tmp_path / "again", loaded.cartridge, model=IDENTITY, corpus=CORPUS,
                          settings={}, dtype=dtype)
    assert again.digest == manifest.digest


def test_version_is_of_the_content(tmp_path):
    manifest = save(tmp_path / "a")
    assert len(manifest.version) == 16
    assert artifact.read_manifest(tmp_path / "a").version == manifest.version
    with_card = artifact.set_report_card(tmp_path / "a", {"arms": {"cartridge": {"metrics": {}}}})
    assert with_card.version == manifest.version
    assert artifact.load(tmp_path / "a").manifest.report_card == with_card.report_card
    assert save(tmp_path / "b").version == manifest.version
    assert save(tmp_path / "c", make_cartridge(seed=1)).version != manifest.version
    assert save(tmp_path / "d", seed=7).version != manifest.version


def test_only_the_two_files_are_left(tmp_path):
    save(tmp_path)
    save(tmp_path, make_cartridge(seed=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [TENSORS, MANIFEST]


def test_killed_before_the_manifest(tmp_path):
    save(tmp_path)
    (tmp_path / MANIFEST).unlink()
    assert "manifest.json is missing" in refused(tmp_path)
    assert "not a directory" in refused(tmp_path / "nowhere")


def test_damaged_tensors(tmp_path):
    save(tmp_path)
    path = tmp_path / TENSORS
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert "digest" in refused(tmp_path)
    path.write_bytes(data[:-10])
    assert f"it has {len(data) - 10} bytes" in refused(tmp_path)
    path.unlink()
    assert "cartridge.safetensors is missing" in refused(tmp_path)


def forge(directory, tensors):
    """Other tensors under a manifest that vouches for them."""
    path = directory / TENSORS
    if isinstance(tensors, bytes):
        path.write_bytes(tensors)
    else:
        save_file(tensors, path)
    edit_manifest(directory, digest=file_digest(path), file_bytes=path.stat().st_size)


def test_forged_tensors(tmp_path):
    save(tmp_path, dtype="float32")
    good = {"keys": torch.zeros(2, 2, 6, 4), "values": torch.zeros(2, 2, 6, 4)}
    for tensors, message in [
        (b"not safetensors at all", "not a safetensors file"),
        ({"keys": good["keys"]}, "holds ['keys']"),
        (good | {"keys": torch.zeros(2, 2, 5, 4)}, "keys are [2, 2, 5, 4]"),
        (good | {"values": good["values"].bfloat16()}, "torch.bfloat16"),
        (good | {"values": torch.full_like(good["values"], torch.nan)}, "non-finite"),
    ]:
        forge(tmp_path, tensors)
        assert message in refused(tmp_path)
    forge(tmp_path, good)
    artifact.load(tmp_path)


def test_bad_manifests(tmp_path):
    save(tmp_path)
    whole = (tmp_path / MANIFEST).read_text()
    for fields, message in [
        ({"format_version": 99}, "newer"),
        ({"format_version": "1"}, "no format_version"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"num_frozen_tokens": 7}, "num_frozen_tokens"),
        ({"surprise": 1}, "surprise"),
        ({"digest": "abc"}, "digest"),
        ({"dtype": "float8"}, "dtype"),
    ]:
        edit_manifest(tmp_path, **fields)
        assert message in refused(tmp_path)
        (tmp_path / MANIFEST).write_text(whole)
    (tmp_path / MANIFEST).write_text(whole[: len(whole) // 2])
    assert "not JSON" in refused(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert "not JSON" in refused(tmp_path)


@pytest.mark.parametrize("field, value, message", [
    ("num_layers", 3, "shape"),
    ("num_key_value_heads", 1, "shape"),
    ("head_dim", 8, "shape"),
    ("vocab_size", 65, "vocabulary"),
    ("rope", {"rope_type": "default", "rope_theta": 500000.0}, "RoPE"),
    ("weights_digest", "x" * 64, "model weights"),
    ("tokenizer_hash", "x" * 64, "tokenizer"),
    ("template_hash", "x" * 64, "chat template"),
])
def test_another_base_model_is_refused_by_name(tmp_path, field, value, message):
    manifest = save(tmp_path)
    artifact.check_compatible(manifest, IDENTITY)
    artifact.check_compatible(artifact.read_manifest(tmp_path), replace(IDENTITY, name="a copy of tiny"))
    with pytest.raises(UserError, match=message) as caught:
        artifact.check_compatible(manifest, replace(IDENTITY, **{field: value}))
    assert "tiny" in str(caught.value) and "\n" not in str(caught.value)


def test_window_too_small(tmp_path):
    manifest = save(tmp_path)
    with pytest.raises(UserError, match="window"):
        artifact.check_compatible(manifest, replace(IDENTITY, max_position_embeddings=6))


def test_unfit_cartridges_are_not_saved(tmp_path):
    broken = make_cartridge()
    broken.trainable_keys.data[0, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="non-finite"):
        save(tmp_path, broken)
    with pytest.raises(UserError, match="needs"):
        save(tmp_path, model=replace(IDENTITY, num_layers=3))
    assert not list(tmp_path.iterdir())
