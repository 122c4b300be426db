"""Cartridges on disk for vLLM's workers: content decides the name; nothing vouches for damaged bytes."""

import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cartridges.cartridge import Cartridge
from cartridges.engines.base import CartridgePrefix
from cartridges.engines.spool import Spool, SpoolError, check_spooled, spool_file


def make(seed: int, num_tokens: int = 5) -> Cartridge:
    generator = torch.Generator().manual_seed(seed)
    return Cartridge(*torch.randn(2, 2, 2, num_tokens, 4, generator=generator))


@pytest.fixture
def spool(tmp_path):
    return Spool(str(tmp_path))


def test_file_is_named_by_its_bytes_and_holds_the_tensors(spool):
    from safetensors.torch import load_file

    cartridge = make(0)
    with spool.hold(CartridgePrefix(cartridge, "a")) as content:
        path = check_spooled(spool.root, content)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == content
        keys, values = cartridge.keys_values()
        loaded = load_file(path)
        assert torch.equal(loaded["keys"], keys) and torch.equal(loaded["values"], values)


def test_same_bytes_share_a_file_and_other_bytes_never_do(spool):
    first = spool.put(CartridgePrefix(make(0), "a"))
    assert spool.put(CartridgePrefix(make(0), "b")) == first
    assert spool.put(CartridgePrefix(make(1), "a")) != first, "a digest used twice must not mix cartridges"


def test_a_spool_is_private_and_what_a_killed_process_left_is_swept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from cartridges.engines.spool import Spool; import os; spool = Spool(); print(spool.root); os._exit(9)"
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False,
                            env=os.environ | {"TMPDIR": str(tmp_path)})
    left = Path(killed.stdout.strip())
    assert left.parent == tmp_path and left.is_dir()
    alive = Spool()
    assert not left.exists()
    path = spool_file(alive.root, alive.put(CartridgePrefix(make(0), "a")))
    assert Spool().root != alive.root and path.is_file(), "a spool that is in use was swept"
    assert [stat.S_IMODE(one.stat().st_mode) for one in (alive.root, path)] == [0o700, 0o600]
    alive.close()
    assert not alive.root.exists()


def test_training_on_is_noticed_under_the_same_digest(spool):
    cartridge = make(0)
    prefix = CartridgePrefix(cartridge, "a")
    first = spool.put(prefix)
    with torch.no_grad():
        cartridge.trainable_keys.add_(1)
    assert spool.put(prefix) != first


def test_forgotten_file_stays_while_in_use(spool):
    prefix = CartridgePrefix(make(0), "a")
    with spool.hold(prefix) as content:
        spool.forget("a")
        assert spool_file(spool.root, content).is_file()
    assert not spool_file(spool.root, content).exists()
    with spool.hold(prefix):
        assert check_spooled(spool.root, content)


def test_least_recently_used_goes_first(tmp_path):
    cartridges = [CartridgePrefix(make(seed), str(seed)) for seed in range(3)]
    sizing = Spool()
    one_file = spool_file(sizing.root, sizing.put(cartridges[0])).stat().st_size
    sizing.close()
    spool = Spool(str(tmp_path), max_bytes=2 * one_file)
    contents = []
    for prefix in [cartridges[0], cartridges[1], cartridges[0], cartridges[2]]:
        with spool.hold(prefix) as content:
            contents.append(content)
    there = [spool_file(spool.root, content).is_file() for content in contents]
    assert there == [True, False, True, True]


def test_distrusted_file_is_written_again(spool):
    prefix = CartridgePrefix(make(0), "a")
    content = spool.put(prefix)
    path = spool_file(spool.root, content)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SpoolError, match="damaged"):
        check_spooled(spool.root, content)
    spool.distrust(content)
    assert spool.put(prefix) == content
    check_spooled(spool.root, content)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "/..", ""])
def test_only_a_hash_names_a_file(tmp_path, name):
    with pytest.raises(SpoolError, match="not a cartridge's hash"):
        spool_file(tmp_path, name)


def test_temporary_directory_goes_with_the_spool():
    spool = Spool()
    spool.put(CartridgePrefix(make(0), "a"))
    spool.close()
    assert not spool.root.exists()
