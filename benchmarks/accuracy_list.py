"""The list that `edgead.benchmarks.accuracy` works through: a TOML file, and the jobs that it means.

    [defaults]                      # for every data set; each may name its own
    method = ["efficientad-s", "efficientad-m"]
    steps = 2000                    # or minutes; and whatever else the method's `Config` has
    seeds = [0, 1, 2]
    penalty = "photos"              # folder of natural images
    teacher = "pdn.safetensors"     # default: the one that edgead ships
    precision = "fp32"
    backend = "auto"

    [[data]]
    name = "bottle"
    path = "mvtec_bottle"
    published = "mvtec/bottle"      # optional: see `edgead.benchmarks.accuracy_table.PUBLISHED`

A value that is a list is an axis: the jobs are all combinations. Paths are relative to a root.
"""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgead.benchmarks.accuracy_table import PUBLISHED
from edgead.errors import DataError, TrainingError
from edgead.export.pack import DTYPES
from edgead.methods import METHODS, configure
from edgead.runtime import BACKENDS

DEFAULT_SEED = 42


@dataclass(frozen=True, kw_only=True)
class Job:
    """One detector to train and evaluate.

    Attributes:
        name: Of the data set, in the table.
        data: Folder of the data set; as `penalty`, `teacher` and `backbone` relative to the root of all
            paths.
        config: All fields of the method's `Config`.
        penalty: Folder of natural images; None is what `edgead train` does without.
        teacher: Teacher file; None is the one that ships.
        backbone: Weight file; None is the method's default.
        precision: Of the bundle.
        backend: That the bundle is evaluated with.
        published: Key of the figures to put beside these.
    """

    name: str
    data: str
    config: dict[str, Any]
    method: str = next(iter(METHODS))
    penalty: str | None = None
    teacher: str | None = None
    backbone: str | None = None
    precision: str = "fp32"
    backend: str = "auto"
    published: str | None = None


_OWN = {field.name for field in fields(Job) if field.default is not MISSING} - {"published"}


def read_list(path: Path) -> list[Job]:
    """The jobs of a list, in its order, the seeds of one combination side by side.

    Raises:
        DataError: the file cannot be read or says something unknown.
    """
    content = read_toml(path)
    defaults, data = content.pop("defaults", {}), content.pop("data", [])
    if content or not isinstance(defaults, dict) or not isinstance(data, list) or not data:
        raise DataError(
            f"{path}: expected one table [defaults] and at least one [[data]], nothing else;"
            f" got {', '.join(content) or 'no [[data]]'}"
        )
    jobs = [job for entry in data for job in _jobs(path, defaults, entry)]
    folders: dict[str, str] = {}
    for job in jobs:
        if folders.setdefault(job.name, job.data) != job.data:
            raise DataError(
                f"{path}: {job.name} is the name of {folders[job.name]} and of {job.data}: the table"
                " would take their figures together; give each a name of its own"
            )
    for index, job in enumerate(jobs):
        if job in jobs[:index]:
            raise DataError(f"{path}: {job.name}, seed {job.config['seed']}: the same job twice")
    return jobs


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a list.

    Raises:
        DataError: it cannot be read.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            raise DataError(f"{path}: reading TOML on Python 3.10 needs `pip install tomli`") from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read this list: {error}") from error


def _jobs(path: Path, defaults: dict[str, Any], entry: Any) -> list[Job]:
    if not isinstance(entry, dict) or not {"name", "path"} <= set(entry):
        raise DataError(f"{path}: each [[data]] needs a name and a path; got {entry!r}")
    own = dict(entry)
    name, data, published = own.pop("name"), own.pop("path"), own.pop("published", None)
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise DataError(f"{path}: the name {name!r}: use letters, digits and . _ - only")
    where = f"{path}: {name}"
    if "steps" in own or "minutes" in own:
        defaults = {key: value for key, value in defaults.items() if key not in ("steps", "minutes")}
    settings = {**defaults, **own}
    if "steps" in settings and "minutes" in settings:
        raise DataError(f"{where}: has steps and minutes; choose one")
    if published is not None and published not in PUBLISHED:
        raise DataError(f"{where}: no published figures {published!r}; there are {', '.join(PUBLISHED)}")
    seeds = settings.pop("seeds", DEFAULT_SEED)
    axes = {**settings, "seed": seeds}  # the seed last, so that it varies fastest
    choices = [value if isinstance(value, list) else [value] for value in axes.values()]
    if empty := [key for key, values in zip(axes, choices, strict=True) if not values]:
        raise DataError(f"{where}: {', '.join(empty)}: an empty list leaves no job; name at least one")
    return [
        _job(where, dict(zip(axes, values, strict=True)), name=name, data=data, published=published)
        for values in itertools.product(*choices)
    ]


def _job(where: str, values: dict[str, Any], **fixed: Any) -> Job:
    own = {key: values.pop(key) for key in _OWN & set(values)}
    method, precision = own.get("method", Job.method), own.get("precision", Job.precision)
    if method not in METHODS or precision not in DTYPES:
        raise DataError(
            f"{where}: {method}, {precision}: the methods are {', '.join(METHODS)},"
            f" the precisions {', '.join(DTYPES)}"
        )
    if (backend := own.get("backend", Job.backend)) not in ("auto", *BACKENDS):
        raise DataError(f"{where}: back end {backend}: choose one of auto, {', '.join(BACKENDS)}")
    try:
        config = configure(method, **values)
    except (TrainingError, TypeError) as error:
        raise DataError(f"{where}: {error}") from error
    return Job(config=asdict(config), **own, **fixed)
