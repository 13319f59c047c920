"""Exceptions of edgead. Each is also the builtin that a caller would naturally catch."""

from __future__ import annotations


class EdgeADError(Exception):
    """Base of every error that edgead raises on purpose."""


class BundleError(EdgeADError, ValueError):
    """A bundle file is damaged, hostile, of an unknown version, or does not say what it must."""


class BackendError(EdgeADError, RuntimeError):
    """A runtime back end is missing, refuses the graph, was closed, or got wrong tensors."""


class DataError(EdgeADError, ValueError):
    """An image, mask, frame or data-set folder cannot be used."""


class WeightsError(EdgeADError, ValueError):
    """A weight file has the wrong layout, shapes or values."""


class TrainingError(EdgeADError, RuntimeError):
    """A training, distillation or calibration run cannot start or go on."""


class ExportError(EdgeADError, RuntimeError):
    """A trained run cannot be exported, or the exported graph does not agree with it."""
