"""What follows from the other findings: which back ends this box can use, and what a bundle gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgead.doctor.finding import NOTE, OK, PROBLEM, Finding, from_error
from edgead.doctor.libraries import RTX_CAPABILITIES, Box, torch_facts
from edgead.doctor.probe import ask

FLAVOURS = ("tensorrt", "tensorrt-rtx")
REPLAY_TIMEOUT_S = 300.0


def check_usable(box: Box, findings: Mapping[str, Finding]) -> Finding:
    """Which back ends can run here, best first, judged by the findings on their parts.

    An NVIDIA GPU without a back end for it is a problem; no GPU is none.
    """
    fine = {check for check, finding in findings.items() if finding.state == OK}
    torch = torch_facts()
    gpu_names = []
    flavours = [name for name in FLAVOURS if name in fine and _serves(name, box)]
    if "cuda layer" in fine:
        gpu_names += flavours
    if box.capability is not None and "torch" in fine and torch and torch[1]:
        gpu_names.append("torch-cuda")
    names = gpu_names + [name for name in ("openvino", "onnxruntime") if name in fine]
    found = ", ".join(names)
    if not names:
        return Finding("back ends", PROBLEM, "none can run here", "pip install onnxruntime")
    if gpu_names or not box.has_gpu:
        return Finding("back ends", OK, found)
    if box.capability is None:
        remedy = "first get the driver to work, see above"
    elif any(findings[check].state == PROBLEM for check in ("cuda layer", *FLAVOURS)):
        remedy = "solve the problems above; docs/boxes.md of edgead has the steps for each kind of box"
    elif flavours:
        remedy = findings["cuda layer"].remedy
    else:
        remedy = f"{box.remedy}; docs/boxes.md of edgead has the steps for each kind of box"
    return Finding("back ends", PROBLEM, f"{found}; none uses the GPU", remedy)


def _serves(name: str, box: Box) -> bool:
    return box.capability in RTX_CAPABILITIES if name == "tensorrt-rtx" else box.capability is not None


def check_bundle(path: Path, box: Box) -> list[Finding]:
    """Whether a bundle is whole, and what `backend="auto"` makes of it here.

    Back ends are opened and have to answer the golden samples. Engines are not built: that takes minutes
    on a small board.
    """
    answer = ask("bundle", str(path))
    if answer.error:
        remedy = "copy it again from where it was exported, or export it again"
        return [from_error("bundle", PROBLEM, answer.error, remedy)]
    what = "{name}, {method}, {precision}".format(**answer.facts)
    found = Finding("bundle", OK, f"{path.name}: every byte is as exported ({what})")
    auto = ask("auto")
    if auto.error:
        return [found, from_error("auto", PROBLEM, auto.error, "install edgead again")]
    return [found, _walk(path, auto.facts["candidates"], box)]


def _walk(path: Path, candidates: list[Any], box: Box) -> Finding:
    """Does what auto does, until a back end works."""
    passed_over: list[str] = []
    failed: list[str] = []
    for name, is_tried, reason in candidates:
        if is_tried:
            choice, reason = _try(path, name)
            if choice is not None:
                text = f"takes {name}: {choice.found}"
                if passed_over:
                    text += f" (not {'; not '.join(passed_over)})"
                if failed and choice.state != PROBLEM:
                    remedy = f"edgead verify {path.name} --backend {failed[0]} shows the whole error"
                    return Finding("auto", PROBLEM if box.has_gpu else NOTE, text, remedy)
                return Finding("auto", choice.state, text, choice.remedy)
            failed.append(name)
        passed_over.append(f"{name}: {reason}")
    remedy = f"see above; on this box: {box.remedy}" if box.has_gpu else "pip install onnxruntime"
    return Finding("auto", PROBLEM, f"no back end can run it (not {'; not '.join(passed_over)})", remedy)


def _try(path: Path, name: str) -> tuple[Finding | None, str]:
    """The finding if auto would take this back end, else why not."""
    if name in FLAVOURS:
        engine = ask("engine", str(path), name)
        if engine.error:
            return None, f"it fails ({from_error(name, PROBLEM, engine.error, '').found})"
        if missing := engine.facts["missing"]:
            text = f"{missing}; the first start builds one, which can take minutes"
            return Finding("auto", NOTE, text, f"edgead build {path.name} --backend {name}"), ""
    answer = ask("backend", str(path), name, timeout_s=REPLAY_TIMEOUT_S)
    if answer.error:
        return None, f"it fails ({from_error(name, PROBLEM, answer.error, '').found})"
    facts = answer.facts
    if facts["ok"]:
        text = (
            f"{facts['precision']}, gives the verdicts of the reference on all {facts['images']} samples"
        )
        return Finding("auto", OK, text), ""
    reason = (
        f"{facts['precision']}, does not reproduce the golden samples ({facts['flips']} of "
        f"{facts['images']} verdicts differ)"
    )
    if name != "onnxruntime":  # the last resort is taken without this check
        return None, reason
    return Finding(
        "auto", PROBLEM, reason, f"edgead verify {path.name} shows how far; export it again"
    ), ""
