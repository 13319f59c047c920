"""The methods that `edgead train --method` knows, and what a method's module has to hold.

A method is one module with a class `Trainer`:

    Config      frozen dataclass of its settings: `method` (its name), `seed`, `false_reject`; those of
                `steps`, `minutes` and `checkpoint_s` that mean something to it; and its own. Options of
                the command line with the name of a setting are passed on
    FILES       which options that name files it takes, of "teacher", "penalty" and "backbone"
    Trainer(config, files, run)     loads the files ({option: path}); may write to the folder `run`
      .config                       the settings, with what had been left open
      .model                        an `edgead.models.base.AnomalyModel`
      .record                       entries for run.json: "weights" {what: WeightsInfo.record()}, others
      .settings                     what, beside config and data, a checkpoint must have been made with
      .fit(session)                 trains the model; see `edgead.training.session.Session`
    build(**architecture)           the model of `AnomalyModel.architecture()`, to be filled with weights

This module itself needs neither torch nor any of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgead.errors import TrainingError


@dataclass(frozen=True)
class Method:
    """The module of a method, and the settings that its name stands for."""

    module: str
    preset: Mapping[str, Any] = field(default_factory=dict)


METHODS: dict[str, Method] = {
    "efficientad-s": Method("edgead.training.efficientad", {"size": "s"}),
    "efficientad-m": Method("edgead.training.efficientad", {"size": "m"}),
    "stpm": Method("edgead.models.stpm"),
    "fbft": Method("edgead.models.fbft"),
    "protoad": Method("edgead.models.protoad"),
}


def trainer_of(name: str) -> Any:
    """The class `Trainer` of a method; imports torch.

    Raises:
        TrainingError: there is no such method.
    """
    return importlib.import_module(_method(name).module).Trainer


def configure(name: str, **settings: Any) -> Any:
    """The `Config` of a method.

    Raises:
        TrainingError: there is no such method, it has no such setting, or a value is out of range.
    """
    config = trainer_of(name).Config
    known = config.__dataclass_fields__
    if unknown := [option for option in settings if option not in known]:
        raise TrainingError(
            f"{', '.join(map(_option, unknown))}: not an option of --method {name}, which has"
            f" {', '.join(_option(option) for option in known if option not in _method(name).preset)}"
        )
    return config(**_method(name).preset, **settings)


def _method(name: str) -> Method:
    if name not in METHODS:
        raise TrainingError(f"method {name!r} is unknown; known are {', '.join(METHODS)}")
    return METHODS[name]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
