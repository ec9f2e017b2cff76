"""The environment of somebody who has diffusers and torch and has never heard of this project.

A virtual environment whose packages are links to those of the running one: exactly what the named distributions require,
so nothing is downloaded, it is made in a second, and what is not required (this project, transformers, accelerate) is absent.
"""

import subprocess
import venv
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ENOUGH_TO_LOAD = ("diffusers", "torch", "safetensors")


def required(names: tuple[str, ...]) -> dict[str, metadata.Distribution]:
    """The distributions of these names and all that they require here; extras only where a requirement names them."""
    found, seen, waiting = {}, set(), [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        distribution = found[wanted.name] = metadata.distribution(wanted.name)
        for extra in {"", *wanted.extras} - {extra for name, extra in seen if name == wanted.name}:
            seen.add((wanted.name, extra))
            requirements = map(Requirement, distribution.requires or [])
            waiting += [each for each in requirements if not each.marker or each.marker.evaluate({"extra": extra})]
    return found


def make_stranger(folder: Path, *more: str) -> Path:
    """Make the environment in `folder`, with the distributions `more` besides; returns its Python."""
    venv.EnvBuilder(symlinks=True).create(folder)
    python = folder / "bin" / "python"
    packages = next(folder.glob("lib/python*/site-packages"))
    for distribution in required((*ENOUGH_TO_LOAD, *more)).values():
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}  # ..: scripts and manuals
        for top in tops:
            link, target = packages / top, Path(distribution.locate_file(top)).resolve()
            if target.exists() and not link.exists():  # a namespace is shared by several distributions
                link.symlink_to(target)
    return python


def run(python: Path, code: str, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 300) -> str:
    """What `code` prints. It runs outside of the repository and sees nothing of PYTHONPATH or the user's packages."""
    command = [str(python), "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=python.parent, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
