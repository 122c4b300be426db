"""The inputs and outputs of a submitted build: what is uploaded, and what the cluster must be able to reach."""

import argparse
import os
import shutil
import sys
from pathlib import Path

from cartridges.errors import UserError

PACKAGES = ("cartridges", "workflows")
UPLOAD_LIMIT_BYTES = 64 * 2**20
"""Ray keeps an upload in the head's memory and refuses more than 100 MiB; code takes some of it."""
INPUTS = ("corpus", "questions", "config")
OUTPUTS = ("registry", "workdir")


def stage_inputs(build: argparse.Namespace, staging: Path, shared: tuple[str, ...] = ()) -> argparse.Namespace:
    """Copy the input files of `build` (the arguments of `cartridges build`) into `staging`; the job's arguments.

    Inputs below a directory in `shared` (default: `CARTRIDGES_SHARED`, separated by `:`) are not copied. Raises
    `UserError`, one line, for an input that is missing or too large to upload, and for an output that would be
    lost with the job.
    """
    shared = shared or tuple(filter(None, os.environ.get("CARTRIDGES_SHARED", "").split(":")))
    job = argparse.Namespace(**vars(build))
    if not job.registry:
        raise UserError("a job needs --registry: a URL (s3://bucket/registry) or an absolute path "
                        "that the cluster shares; what a job writes elsewhere is lost with it")
    for name in INPUTS:
        if (value := getattr(build, name)) is not None:
            setattr(job, name, _staged(value, staging, f"inputs/{name}", shared))
    for name in OUTPUTS:
        if (value := getattr(build, name)) is not None:
            _check_output(f"--{name}", value)
    if job.workdir is None:
        print("no --workdir: this works on a cluster of one machine, and cannot be resumed; give an absolute "
              "path that the cluster shares", file=sys.stderr)
    if job.model is not None:
        _check_model(job.model)
    return job


def _staged(value: str, staging: Path, folder: str, shared: tuple[str, ...]) -> str:
    """`value` as the job must read it: below the upload, or unchanged where the cluster has it."""
    path = Path(value)
    if "://" in value or any(path.is_relative_to(root) for root in shared):
        return value
    if not path.exists():
        if path.is_absolute():
            print(f"{value} is not on this machine; the cluster must have it", file=sys.stderr)
            return value
        raise UserError(f"{value} does not exist; give a file here, or its absolute path on the cluster")
    size = _size(path)
    if size > UPLOAD_LIMIT_BYTES:
        raise UserError(
            f"{value} has {size / 2**20:.0f} MiB, more than the {UPLOAD_LIMIT_BYTES / 2**20:.0f} that can "
            "be uploaded: put it on a file system that the cluster shares and name it in CARTRIDGES_SHARED")
    target = staging / folder / path.resolve().name
    target.parent.mkdir(parents=True)
    if path.is_dir():
        shutil.copytree(path, target, ignore_dangling_symlinks=True)
    else:
        shutil.copy2(path, target)
    return target.relative_to(staging).as_posix()


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _check_output(option: str, value: str) -> None:
    if "://" not in value and not Path(value).is_absolute():
        raise UserError(f"{option} {value} would be lost with the job: give a URL (s3://bucket/path) or an "
                        "absolute path that the cluster shares")


def _check_model(value: str) -> None:
    if not Path(value).is_absolute() and Path(value).is_dir():
        raise UserError(f"--model {value} is a directory on this machine: give a hub id, or the absolute "
                        "path that it has on the cluster")


def archive(staging: Path) -> str:
    """The path of a zip of `staging` and our packages.

    Ray would pack a directory itself, but leaves out what any `.gitignore` in a corpus names.
    """
    root = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        shutil.copytree(root / package, staging / package, ignore=shutil.ignore_patterns("__pycache__"))
    return shutil.make_archive(str(staging.parent / "upload"), "zip", staging)
