"""The commands that make detectors: the arguments of demo, distill and train."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from edgead import commands
from edgead.methods import METHODS

BORDERS = ("published", "reflect")


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds them to the command line."""
    sub = command(
        "demo",
        commands.demo,
        "Render a small inspection data set, train on it, export, inspect, and write a report.",
    )
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: demo)")
    sub.add_argument("--minutes", type=float, default=5.0, help="training time (default: 5)")
    sub.add_argument("--seed", type=_seed, default=0)
    sub.add_argument("--only-data", type=Path, metavar="DIR", help="only render the data set into DIR")

    sub = command(
        "distill",
        commands.distill,
        "Distil a PDN teacher from a backbone and a folder of natural images.",
    )
    sub.add_argument(
        "images",
        type=Path,
        metavar="IMAGES",
        help="folder of natural images, searched recursively, or of tar shards that hold them",
    )
    _add_distillation(sub)
    _add_training(sub)

    sub = command("train", commands.train, "Train a detector on the good images of a data set.")
    sub.add_argument(
        "data", type=Path, metavar="DATA", help="MVTec AD, LOCO, VisA, BTAD or good/ + bad/ folder"
    )
    sub.add_argument("--method", choices=METHODS, default=next(iter(METHODS)))
    sub.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    sub.add_argument(
        "--teacher",
        type=Path,
        help="PDN teacher file (default: the one of this size that comes with edgead)",
    )
    sub.add_argument(
        "--penalty", type=Path, metavar="IMAGES", help="folder of natural images for the penalty"
    )
    sub.add_argument(
        "--backbone",
        type=Path,
        metavar="FILE",
        help="weights of the frozen network of stpm, fbft and protoad: MobileNetV2, ResNet, DINOv2"
        " (default: the PDN-S that comes with edgead)",
    )
    length = sub.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        help="training steps (default: 2000 of EfficientAD, of the others as published)",
    )
    length.add_argument("--minutes", type=float, help="train for this long instead")
    sub.add_argument(
        "--optimizer",
        choices=("muon", "adam"),
        help="of EfficientAD: adam, as published, from 20,000 steps on; muon for shorter runs (default)",
    )
    sub.add_argument(
        "--learning-rate",
        type=float,
        help="default: what suits the method and its backbone (docs/methods.md)",
    )
    sub.add_argument(
        "--border",
        choices=BORDERS,
        help="published: the outer 16 of 256 px are not inspected (default); reflect: they are",
    )
    sub.add_argument(
        "--targets",
        type=int,
        metavar="K",
        help="train on K principal directions of the teacher instead of its 384 channels, which makes"
        " steps and graph quicker (default: 128 with the teachers that come with edgead, with another"
        " one all 384, as published)",
    )
    sub.add_argument(
        "--image-px",
        type=int,
        metavar="PX",
        help="side of the input of fbft: a multiple of 14 for a vision transformer (default: 518), of 16"
        " for other networks (default: 256)",
    )
    sub.add_argument(
        "--max-prototypes", type=int, metavar="K", help="most prototypes of protoad (default: 1024)"
    )
    sub.add_argument(
        "--tile",
        type=int,
        metavar="PX",
        help="inspect tiles of PX x PX px of the images beside the images made small, for tiny defects;"
        " at the side of the network's input, such as 256, they keep their resolution",
    )
    sub.add_argument(
        "--overlap",
        type=int,
        metavar="PX",
        help="of neighbouring tiles (default: a quarter of a tile); half a tile leaves least of seams",
    )
    sub.add_argument(
        "--false-reject", type=float, help="target share of good parts rejected (default: 0.01)"
    )
    sub.add_argument("--seed", type=_seed)
    _add_training(sub)


def _add_distillation(sub: argparse.ArgumentParser) -> None:
    """Options of `edgead distill`; their defaults are those of `training.distill.DistillConfig`."""
    sub.add_argument(
        "--backbone",
        type=Path,
        required=True,
        metavar="FILE",
        help="weights (.safetensors, .pth) of MobileNetV2, or of a ResNet as torchvision saves it",
    )
    sub.add_argument(
        "--layers",
        type=_layers,
        metavar="NAME,...",
        help="feature maps to predict, finest first (default: layer2,layer3 of a ResNet,"
        " blocks.5.depthwise.linear,blocks.12.depthwise.linear of MobileNetV2)",
    )
    sub.add_argument("--size", choices=("s", "m"), default="s", help="PDN-S or PDN-M (default: s)")
    sub.add_argument("--out", type=Path, required=True, help="the .safetensors file to write")
    sub.add_argument("--steps", type=int, help="training steps (default: 3000)")
    sub.add_argument("--minutes", type=float, help="stop after this time if the steps take longer")
    sub.add_argument("--batch", type=int, help="images per step, of all processes (default: 8)")
    sub.add_argument(
        "--optimizer", choices=("muon", "adamw"), help="default: muon; the published run used Adam"
    )
    sub.add_argument(
        "--learning-rate", type=float, help="at its highest (default: 0.02 of muon, 0.001 of adamw)"
    )
    sub.add_argument(
        "--crop",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="side of the random crops in short sides of an image (default: 0.55 1.0)",
    )
    sub.add_argument(
        "--side",
        dest="side_px",
        type=int,
        metavar="PX",
        help="input of the PDN; the backbone sees twice as many pixels (default: 256)",
    )
    sub.add_argument(
        "--whiten",
        type=float,
        metavar="0..1",
        help="decorrelate the target channels: 0 not, 1 entirely (default: 0)",
    )
    sub.add_argument("--loss", choices=("mse", "smooth-l1"), help="what is minimised (default: mse)")
    sub.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="of the arithmetic (default: auto, bf16 or fp16 where the hardware has it)",
    )
    sub.add_argument("--seed", type=_seed)


def _add_training(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    sub.add_argument("--resume", action="store_true", help="go on from the last checkpoint")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; give a whole number from 0 to 2^63 - 1")
    return int(text)


def _layers(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))
