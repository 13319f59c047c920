"""Everything that has to be proven on an NVIDIA GPU, in one command that needs nothing else.

    python -m edgead.benchmarks.gpu_acceptance --out results.json [--bundle X.edgead] [--images DIR]
        [--backends a,b] [--only section,...] [--resume] [--quick]

Without --bundle it makes its own, EfficientAD-S in FP16 with seeded random weights: speed does not
depend on them. Every GPU back end that opens here is measured, one after the other. The JSON file is
rewritten after each section, so that a kill loses no more than the section that runs. A section that
fails is recorded with its error, the rest goes on. results.md beside it has the same as tables.

On a fast card all sections but "memory" are laid out for 5 to 6 minutes per back end, most of it waiting
in "idle_gap" and "throughput"; "memory" takes 5 minutes more. Where a call may not last that long:

    ... --out results.json --only doctor,matmul,opened,contract,parity,latency,overhead,naive
    ... --out results.json --resume --only throughput,idle_gap,energy
    ... --out results.json --resume --only memory --backends torch-cuda

--resume skips what the file already has, except for errors, and refuses a file of another graph, GPU,
driver or version of edgead. --quick measures next to nothing: it shows that the run works here.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgead.benchmarks import gpu_compare, gpu_contract, gpu_measure, gpu_report, gpu_sections
from edgead.benchmarks.gpu_bench import QUICK, Bench, Effort, NotMeasured, check_names, read_images
from edgead.benchmarks.gpu_record import Record, Refused, known_state, provenance, utc
from edgead.bundle import Bundle
from edgead.doctor import check
from edgead.engines.cache import default_folder
from edgead.errors import EdgeADError
from edgead.files import write_text
from edgead.runtime import BACKENDS, GPU_BACKENDS, explain_auto

if TYPE_CHECKING:
    from edgead.models.efficientad import EfficientAD

BACKEND_SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "opened": gpu_sections.opened,
    "contract": gpu_contract.contract,
    "parity": gpu_compare.parity,
    "latency": gpu_sections.latency,
    "throughput": gpu_sections.throughput,
    "idle_gap": gpu_sections.idle_gap,
    "overhead": gpu_sections.overhead,
    "energy": gpu_sections.energy,
    "naive": gpu_compare.naive,
    "memory": gpu_sections.memory,
}
SECTIONS = ("doctor", "matmul", *BACKEND_SECTIONS)


def doctor() -> list[dict[str, Any]]:
    """What `edgead doctor` says of this box."""
    return [asdict(finding) for finding in check()]


def matmul(bundle: Bundle, effort: Effort) -> dict[str, Any]:
    """The card's FP16 matrix product and the operations of one image: together the limit."""
    graph: dict[str, Any]
    try:
        graph = gpu_measure.count_flop(bundle.model_bytes())
    except ImportError:
        graph = {"flop_per_image": None, "why": "onnx is not installed"}
    return {"graph": graph, "card": _card(effort)}


def _card(effort: Effort) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"tflops": None, "why": "torch is not installed"}
    if not torch.cuda.is_available():
        return {"tflops": None, "why": "torch finds no CUDA device"}
    side, repeats, groups = effort.matmul
    return gpu_measure.matmul_rate("cuda", side=side, repeats=repeats, groups=groups)


def guarded(measure: Callable[[], Any]) -> dict[str, Any]:
    """Runs a section. Whatever goes wrong in it becomes part of the record."""
    leaf: dict[str, Any] = {"utc": utc(), "gpu_state_before": known_state()}
    start = time.perf_counter()
    try:
        leaf["result"] = measure()
    except NotMeasured as reason:
        leaf["not_measured"] = str(reason)
    except Exception as error:
        leaf["error"] = f"{type(error).__name__}: {error}"
        trace = traceback.extract_tb(error.__traceback__)[-6:]
        leaf["where"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in trace]
    leaf["seconds"] = round(time.perf_counter() - start, 2)
    leaf["gpu_state_after"] = known_state()
    return leaf


def choose_backends(named: list[str] | None) -> tuple[list[str], list[str]]:
    """The back ends to measure, and why the others are not among them.

    Raises:
        Refused: There is none.
    """
    check_names(named or [], BACKENDS, "--backends")
    wanted = named or list(GPU_BACKENDS)
    reasons = {name: why for name, is_tried, why in explain_auto() if not is_tried}
    left_out = [f"{name}: {reasons[name]}" for name in wanted if name in reasons]
    chosen = [name for name in wanted if name not in reasons]
    if not chosen:
        raise Refused(
            f"nothing to measure here ({'; '.join(left_out)}); see edgead doctor. To try this command "
            "out on a CPU: --backends onnxruntime --quick"
        )
    return chosen, left_out


class Run:
    """One call of this command."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.quick, self.out = bool(arguments.quick), Path(arguments.out)
        self.effort = QUICK if self.quick else Effort()
        self.only = arguments.only or list(SECTIONS)
        check_names(self.only, SECTIONS, "--only")
        if self.out.exists() and not arguments.resume:
            raise Refused(f"{self.out} exists: go on with --resume, or name another file")
        self.backends, self.left_out = choose_backends(arguments.backends)
        path, self.model, weights = _bundle(arguments.bundle, folder)
        self.bundle = Bundle.open(path)
        self.images = read_images(self.bundle, arguments.images, self.effort.images)
        facts = provenance(self.bundle, weights, self.images.source, arguments.commit)
        self.record = (
            Record.go_on(self.out, facts, quick=self.quick)
            if self.out.exists()
            else Record.begin(self.out, facts, self.effort, quick=self.quick)
        )
        self.failed: list[str] = []
        self._page = ""

    def __call__(self) -> None:
        """Measures what is to be measured."""
        self.record.data["left_out"] = self.left_out or self.record.data.get("left_out", [])
        self.record.note_run(self.only, self.backends)
        self._section("doctor", doctor)
        self._section("matmul", lambda: matmul(self.bundle, self.effort))
        for name in self.backends:
            bench = self._bench(name)
            for section, measure in BACKEND_SECTIONS.items():
                went_on = self._section(section, functools.partial(measure, bench), bench)
                if section == "opened" and not went_on:
                    break  # the others would only say the same
        self._write()
        print(f"\n{self._page}")

    def _bench(self, name: str) -> Bench:
        return Bench(
            bundle=self.bundle,
            name=name,
            effort=self.effort,
            images=self.images,
            model=self.model,
            engines=default_folder() / "acceptance",
        )

    def _section(self, section: str, measure: Callable[[], Any], bench: Bench | None = None) -> bool:
        """Measures one section if it is to be, and writes the files; returns False if it failed."""
        name = bench.name if bench else None
        title = f"{section} {name or ''}".rstrip()
        if section not in self.only:
            return True
        if self.record.has(section, name):
            print(f"{title}: already there", flush=True)
            return True
        if bench is not None:
            bench.best = gpu_report.result(self.record.data, "throughput", bench.name).get("best")
        leaf = guarded(measure)
        if bench is not None:
            leaf["engines"] = dict(bench.built)
        self.record.put(leaf, section, name)
        self._write()
        is_bad = isinstance(leaf.get("result"), dict) and leaf["result"].get("ok") is False
        outcome = leaf.get("error") or leaf.get("not_measured") or ("NOT OK" if is_bad else "done")
        print(f"{title}: {outcome} ({leaf['seconds']} s)", flush=True)
        if is_bad or "error" in leaf:
            self.failed.append(title)
        return "error" not in leaf

    def _write(self) -> None:
        """The JSON is what counts: a fault in what is said about it ends no run."""
        data = self.record.data
        try:
            data["limits"] = gpu_report.limits(data)
            data["targets"] = gpu_report.targets(data)
            self._page = gpu_report.markdown(data)
        except Exception:
            self._page = f"{self.out} is whole; this page is not:\n\n{traceback.format_exc()}"
        self.record.save()
        write_text(self.out.with_suffix(".md"), self._page)


def _bundle(given: Path | None, folder: Path) -> tuple[Path, EfficientAD | None, str]:
    """The bundle to measure, the networks in it if it is made here, and where its weights come from."""
    if given is not None:
        return given, None, "of the bundle given"
    try:
        from edgead.benchmarks.cpu import random_bundle
    except ImportError as error:
        raise Refused(f"without --bundle one is made, which needs torch and onnx ({error})") from None
    path = folder / "random.edgead"
    return path, random_bundle(path, precision="fp16"), "random, seed 0"


def _names(text: str) -> list[str]:
    return text.split(",")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing failed, 1 if a section failed or none could run, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; beside it an .md file")
    parser.add_argument("--bundle", type=Path, help="measure this bundle")
    parser.add_argument("--images", type=Path, help="folder of images for the comparison with FP32")
    known = f"of {', '.join(BACKENDS)}; default: all that run on the GPU"
    parser.add_argument("--backends", type=_names, metavar="A,B", help=known)
    parser.add_argument("--only", type=_names, metavar="A,B", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument("--resume", action="store_true", help="go on with the file")
    parser.add_argument("--quick", action="store_true", help="next to nothing is measured: no result")
    parser.add_argument("--commit", help="git commit to record where there is no repository")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = Run(arguments, Path(folder))
        except (Refused, NotMeasured, EdgeADError) as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            return 1
        run()
    if run.failed:
        print(f"failed: {', '.join(run.failed)}", file=sys.stderr)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
