"""The acceptance run, whole, on a CPU back end: its file, its order, what it does with failures.

No figure is judged, except that nothing is claimed that was not measured.
"""

from __future__ import annotations

import functools
import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgead.benchmarks import gpu_acceptance, gpu_compare
from edgead.benchmarks.gpu_acceptance import BACKEND_SECTIONS, SECTIONS, main
from edgead.benchmarks.gpu_bench import (
    QUICK,
    Bench,
    Images,
    NotMeasured,
    bare_launch,
    read_images,
)
from edgead.benchmarks.gpu_contract import contract
from edgead.benchmarks.gpu_measure import count_flop
from edgead.benchmarks.gpu_record import source_sha256
from edgead.bundle import Bundle
from edgead.errors import BackendError
from edgead.image import write_image
from edgead.runtime import explain_auto, open_backend
from edgead.runtime.ort import OrtBackend
from tests import fake_tensorrt

NAME = "onnxruntime"


Runner = Callable[..., int]


@pytest.fixture(scope="module")
def run(tiny: Any, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Function (out, *more arguments) that makes a quick run of the tiny bundle; later arguments win."""
    folder = tmp_path_factory.mktemp("images")
    frames = [*tiny.frames(2, spots=False, seed=3), *tiny.frames(2, spots=True, seed=4)]
    for index, frame in enumerate(frames):
        write_image(folder / f"{index}.png", frame)
    usual = ["--bundle", tiny_bundle, "--images", folder, "--backends", NAME, "--quick"]
    return lambda out, *more: main([str(argument) for argument in ("--out", out, *usual, *more)])


@pytest.fixture(scope="module")
def whole(run: Runner, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a whole quick run. Copy it before you change it."""
    out = tmp_path_factory.mktemp("acceptance") / "new" / "results.json"
    assert run(out) == 0
    return out


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(whole, tmp_path / "results.json"))


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def results(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: data["sections"][name][NAME] for name in BACKEND_SECTIONS}


def test_every_section_is_there_with_its_time(whole: Path) -> None:
    data = read(whole)
    assert set(data["sections"]) == set(SECTIONS)
    leaves = [data["sections"]["doctor"], data["sections"]["matmul"], *results(data).values()]
    assert all(leaf["seconds"] >= 0 and leaf["utc"].endswith("+00:00") for leaf in leaves)
    assert not [leaf["error"] for leaf in leaves if "error" in leaf]
    assert data["quick"] is True and data["effort"]["calls"] == QUICK.calls


@pytest.mark.parametrize("fault", [np.nan, 2.0], ids=["NaN", "twice the score"])
def test_parity_is_about_the_images(
    fault: float,
    copied: Path,
    run: Runner,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The golden sample alone would not find what FP16 does to other images; and the run goes on."""
    real, reference = OrtBackend.infer, gpu_compare._reference

    def broken(self: OrtBackend, inputs: Any) -> dict[str, np.ndarray]:
        found = real(self, inputs)
        return found | {"score": found["score"] * np.float32(fault)}

    def whole_until_now(bench: Bench, frames: np.ndarray) -> Any:
        found = reference(bench, frames)
        monkeypatch.setattr(OrtBackend, "infer", broken)
        return found

    monkeypatch.setattr(gpu_compare, "_reference", whole_until_now)
    data = read(copied)
    del data["sections"]["parity"]
    copied.write_text(json.dumps(data))
    assert run(copied, "--resume", "--only", "parity,overhead") == 1
    assert "NOT OK" in capsys.readouterr().out
    now = read(copied)["sections"]
    assert now["parity"][NAME]["result"]["ok"] is False and now["overhead"][NAME]["result"]


def test_figures_have_the_agreed_form(whole: Path) -> None:
    found = {name: leaf.get("result", {}) for name, leaf in results(read(whole)).items()}
    assert found["contract"]["ok"] and found["parity"]["ok"]
    assert found["latency"]["as_opened"]["calls"] == QUICK.calls
    assert found["latency"]["detector"]["frame"] == [900, 900, 3]
    cells = found["throughput"]["cells"]
    combinations = [(batch, slots) for batch in QUICK.batches for slots in QUICK.slots]
    assert [(cell["batch"], cell["slots"]) for cell in cells] == combinations
    assert found["throughput"]["best"]["images_per_s"] == max(cell["images_per_s"] for cell in cells)
    for mode in ("keep_warm_off", "keep_warm_5_ms"):
        gaps = [(gap["gap_s"], gap["times"]) for gap in found["idle_gap"][mode]["gaps"]]
        assert gaps == [tuple(gap) for gap in QUICK.gaps]
    assert found["idle_gap"]["keep_warm_off"]["heartbeats"] == 0
    assert found["idle_gap"]["keep_warm_5_ms"]["heartbeats"] > 0
    assert found["overhead"]["infer_over_slot"] > 0
    assert len(found["memory"]["host"]["samples_s_kib"]) > 2
    best = found["throughput"]["best"]
    assert (found["energy"]["batch"], found["energy"]["slots"]) == (best["batch"], best["slots"])


def test_what_cannot_be_measured_is_none_and_says_why(whole: Path) -> None:
    data = read(whole)
    found = results(data)
    if not data["provenance"]["gpu"]["name"]:
        assert data["sections"]["matmul"]["result"]["card"]["tflops"] is None
        assert found["energy"]["result"]["mj_per_image"] is None
        assert "counter" in found["energy"]["result"]["why"]
        assert "GPU name" in data["provenance"]["missing"]
    assert "p50_ms" not in found["latency"]["result"]["no_graph"]
    assert found["overhead"]["result"]["infer_over_bare"] is None
    assert "device launch" in found["overhead"]["result"]["bare"]["why"]
    assert found["memory"]["result"]["device"]["slope_kib_per_min"] is None
    assert "tiny-blob" in found["naive"]["not_measured"]
    assert [row["met"] for row in data["targets"]["rows"]] == [None] * 6
    assert "quick run" in data["targets"]["why_not"]


def test_the_page_has_the_figures_of_the_file_and_says_that_it_is_no_result(whole: Path) -> None:
    page, data = whole.with_suffix(".md").read_text(encoding="utf-8"), read(whole)
    assert "no result" in page.splitlines()[2]
    assert f"best {data['sections']['throughput'][NAME]['result']['best']['images_per_s']} at" in page
    assert "| naive | onnxruntime | the naive form of tiny-blob is not known here |" in page
    assert "| batch-1 p50 <= 0.5 ms | not measured | – | – |" in page


def test_provenance(whole: Path, tiny_bundle: Path) -> None:
    facts = read(whole)["provenance"]
    graph = Bundle.open(tiny_bundle).manifest.members["model.onnx"].sha256
    assert facts["bundle"]["graph_sha256"] == graph
    assert facts["bundle"]["input_px"] == [64, 64] and facts["bundle"]["precision"] == "fp32"
    assert len(facts["source_sha256"]) == 64 and facts["machine"]["libraries"]["edgead"]
    assert facts["images"] == "4 of the 4 images of the folder given"
    text = whole.read_text(encoding="utf-8")
    assert str(tiny_bundle.parent) not in text and str(Path.home()) not in text


def test_pictures_are_rendered_where_none_are_given(tiny_bundle: Path) -> None:
    images = read_images(Bundle.open(tiny_bundle), None, 3)
    assert images.frames.shape == (3, 64, 64, 3) and images.large.shape == (3, 900, 900, 3)
    assert "rendered" in images.source and np.ptp(images.frames) > 100


def test_a_file_is_never_overwritten(copied: Path, run: Runner, capsys: Any) -> None:
    before = copied.read_bytes()
    assert run(copied) == 1
    assert "--resume" in capsys.readouterr().err and copied.read_bytes() == before


def test_resume_measures_what_is_missing_or_failed_and_nothing_else(
    copied: Path, run: Runner, capsys: Any
) -> None:
    data = read(copied)
    del data["sections"]["overhead"]
    data["sections"]["parity"][NAME] = {"utc": "2026-01-01T00:00:00+00:00", "error": "boom"}
    kept = data["sections"]["latency"]
    copied.write_text(json.dumps(data))
    assert run(copied, "--resume", "--only", "parity,overhead,latency") == 0
    now = read(copied)
    assert now["sections"]["latency"] == kept
    assert now["sections"]["overhead"][NAME]["result"] and now["sections"]["parity"][NAME]["result"]
    assert [entry["sections"] for entry in now["runs"]][1:] == [["parity", "overhead", "latency"]]
    assert "latency onnxruntime: already there" in capsys.readouterr().out


def test_resume_refuses_the_file_of_something_else(
    copied: Path, run: Runner, tmp_path: Path, capsys: Any, make_tiny_model: Any, tiny: Any
) -> None:
    other = tiny.write(tmp_path / "other.edgead", model=make_tiny_model(batch="M"))
    assert run(copied, "--resume", "--bundle", other) == 1
    assert "graph_sha256" in capsys.readouterr().err
    copied.write_text("[]")
    assert run(copied, "--resume") == 1
    assert "cannot be gone on with" in capsys.readouterr().err and copied.read_text() == "[]"


def test_a_section_that_fails_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "results.json"
    seen: list[list[str]] = []

    def broken(bench: Bench) -> dict[str, Any]:
        seen.append(sorted(read(out)["sections"]))  # the file is written after each section
        raise ValueError("a fault of this section")

    monkeypatch.setitem(BACKEND_SECTIONS, "parity", broken)
    assert run(out, "--only", "opened,parity,overhead") == 1
    sections = read(out)["sections"]
    assert seen == [["opened"]]
    assert sections["parity"][NAME]["error"] == "ValueError: a fault of this section"
    assert sections["parity"][NAME]["where"][-1].endswith("broken")
    assert "result" in sections["overhead"][NAME]
    assert "failed: parity onnxruntime" in capsys.readouterr().err
    assert "a fault of this section" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_back_end_that_does_not_open_is_not_tried_again_and_again(
    tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Bench, *batches: Any, **options: Any) -> Any:
        raise BackendError("this one does not open")

    out = tmp_path / "results.json"
    monkeypatch.setattr(Bench, "open_unmanaged", refuse)
    assert run(out, "--only", "matmul,opened,parity") == 1
    assert list(read(out)["sections"]) == ["matmul", "opened"]
    assert "this one does not open" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_a_kill_loses_no_section(tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(bench: Bench) -> dict[str, Any]:
        raise KeyboardInterrupt

    out = tmp_path / "results.json"
    monkeypatch.setitem(BACKEND_SECTIONS, "parity", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--only", "opened,parity")
    assert list(read(out)["sections"]) == ["opened"]
    assert "## Targets" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "latenci"], "--only: latenci is unknown"),
        (["--backends", "cuda"], "--backends: cuda is unknown"),
        (["--bundle", "absent.edgead"], "absent.edgead"),
        (["--images", "absent"], "absent"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], told: str, tmp_path: Path, run: Runner, capsys: Any
) -> None:
    assert run(tmp_path / "results.json", *arguments) == 1
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "results.json").exists()


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path, tiny_bundle: Path, capsys: Any) -> None:
    if any(tried for name, tried, _ in explain_auto() if name != "openvino" and name != NAME):
        pytest.skip("this machine has an NVIDIA driver")
    for more in ([], ["--backends", "tensorrt-rtx"]):
        out = tmp_path / "results.json"
        assert main(["--out", str(out), "--bundle", str(tiny_bundle), *more]) == 1
        error = capsys.readouterr().err
        assert "nothing to measure here" in error and error.count("\n") == 1 and not out.exists()


def bench_of(bundle: Path, tmp_path: Path, **changes: Any) -> Bench:
    opened = Bundle.open(bundle)
    frames = opened.golden().images
    values: dict[str, Any] = {"name": NAME, "effort": QUICK, "model": None, "engines": tmp_path}
    return Bench(bundle=opened, images=Images("golden", frames, frames), **(values | changes))


class Mixed(OrtBackend):
    """Gives the answers of a batch in the wrong order, and forgets to check what it is given."""

    def infer(self, inputs: Any) -> dict[str, np.ndarray]:
        outputs = super().infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return {name: value[::-1].copy() for name, value in outputs.items()}


def test_the_contract_finds_mixed_up_results(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(tiny_bundle, tmp_path)
    monkeypatch.setattr(Bench, "open_unmanaged", lambda self, batches=(1,): Mixed(self.bundle))
    monkeypatch.setattr(Bench, "open", open_mixed)
    found = contract(bench)
    broken = {name for name, item in found["checks"].items() if not item["ok"]}
    assert not found["ok"]
    assert {"batch_n", "padded_batch", "non_contiguous", "slot_partly_filled"} <= broken
    assert not {"frames_differ", "batch_1", "threads", "closed"} & broken


def open_mixed(self: Bench, batches: tuple[int, ...] = (1,), *, graph: bool = True) -> Any:
    import contextlib

    return contextlib.closing(Mixed(self.bundle))


def test_parity_counts_flips(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    class Shifted(OrtBackend):
        def infer(self, inputs: Any) -> dict[str, np.ndarray]:
            outputs = super().infer(inputs)
            return {"score": outputs["score"] + 1, "anomaly_map": outputs["anomaly_map"] + 1}

    bench = bench_of(tiny_bundle, tmp_path)
    scores = bench.bundle.golden().scores
    below = int((scores < np.median(scores)).sum())
    monkeypatch.setattr(Bench, "open", lambda self: contextlib.closing(Shifted(self.bundle)))
    found = gpu_compare.parity(bench)
    assert not found["ok"] and found["score_deviation_max"] == pytest.approx(1, abs=1e-4)
    assert found["relative"]["map_max"] == pytest.approx(1 / float(np.ptp(scores)), rel=1e-3)
    verdicts = found["verdicts"]["median of the reference"]
    assert verdicts["flips"] == below > 0 and len(verdicts["flipped"]) == below
    assert below / len(scores) < verdicts["rate_upper_bound"] <= 1


def test_the_naive_networks_give_the_verdicts_of_the_plain_definition() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from edgead.models.efficientad import anomaly_map
    from edgead.models.pdn import PDN
    from edgead.training.efficientad import build_model

    model = build_model(PDN("s"), seed=0).eval()
    images = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    with torch.inference_mode():
        local, logical = model(torch.from_numpy(images).permute(0, 3, 1, 2))
        expected = anomaly_map(local, logical, torch.tensor([1.0, 1.0, 0.0])).numpy()
    for channels_last in (False, True):
        scores, maps = gpu_compare.eager(model, "cpu", channels_last=channels_last)(images)
        np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-7)  # float32, other order of sums
        assert scores == maps.max(axis=(1, 2))


def test_comparison_with_peers(tiny_bundle: Path, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []
    found = gpu_compare.compare(
        bench_of(tiny_bundle, tmp_path), {"peer": lambda images: shapes.append(images.shape)}
    )
    assert set(shapes) == {(1, 256, 256, 3)}  # batch 8 is beyond a quick run
    assert set(found["batch_1"]["p50_ms"]) == {"peer", "infer", "slot"}
    rates = found["batch_1"]["images_per_s"]
    times = found["batch_1"]["times_naive"]["peer"]["by_images_per_s"]
    assert times["slot"] == pytest.approx(rates["slot"] / rates["peer"], abs=2e-3)


GPU_SECTIONS = "opened,contract,parity,latency,throughput,overhead,memory"


def check_gpu_run(out: Path, name: str) -> dict[str, Any]:
    """Nothing failed, both forms were timed; returns the results of the back end."""
    data = read(out)
    sections = {section: leaves.get(name, {}) for section, leaves in data["sections"].items()}
    assert not {section: leaf["error"] for section, leaf in sections.items() if "error" in leaf}
    found = {section: leaf["result"] for section, leaf in sections.items() if "result" in leaf}
    assert all(item["ok"] for item in found["contract"]["checks"].values()), found["contract"]
    assert found["parity"]["ok"]
    calls = {form: found["latency"][form]["calls"] for form in ("graph", "no_graph")}
    assert calls == {"graph": QUICK.calls, "no_graph": QUICK.calls}
    return found


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_tensorrt_on_the_fake_driver(
    name: str, fake_cuda: Any, run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake_tensorrt.make(name, fake_cuda.library)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("EDGEAD_CACHE", str(tmp_path / "engines"))
    fake_cuda.set_device(name="Fake GPU", major=8, minor=6)
    out = tmp_path / "results.json"
    assert run(out, "--backends", name, "--only", GPU_SECTIONS) == 0
    found = check_gpu_run(out, name)
    assert module.builds == 2  # one engine for batch 1, one for all batches; both are cached
    assert found["opened"]["gpu"]["name"] == "Fake GPU"
    assert found["overhead"]["infer_over_bare"] > 0
    word = "cuGraphLaunch" if name == "tensorrt" else "execute_async_v3"
    assert word in found["overhead"]["bare"]["what"]
    assert found["memory"]["device"]["first_kib"] > 0
    assert set(read(out)["sections"]["throughput"][name]["engines"]) == {"1", "1,2,4"}
    module.engines.clear()
    gc.collect()


def test_torch_cuda_without_its_gpu(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from edgead.runtime import torch_cuda

    on_the_cpu = functools.partial(torch_cuda.TorchCudaBackend, device="cpu")
    monkeypatch.setattr(torch_cuda, "TorchCudaBackend", on_the_cpu)
    monkeypatch.setattr(gpu_acceptance, "explain_auto", lambda: [])
    out, threads = tmp_path / "results.json", torch.get_num_threads()
    torch.set_num_threads(1)  # so small a graph only waits for more
    try:
        assert run(out, "--backends", "torch-cuda", "--only", GPU_SECTIONS) == 0
    finally:
        torch.set_num_threads(threads)
    found = check_gpu_run(out, "torch-cuda")
    assert found["opened"]["torch"] and found["overhead"]["infer_over_bare"] is None


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no NVIDIA GPU")
    out = tmp_path / "results.json"
    assert main(["--out", str(out), "--backends", "torch-cuda", "--quick"]) == 0
    found = check_gpu_run(out, "torch-cuda")
    assert found["overhead"]["infer_over_bare"] > 0
    assert found["naive"]["batch_1"]["images_per_s"]["naive"] > 0
    assert read(out)["sections"]["matmul"]["result"]["card"]["tflops"] > 0


def test_the_bundle_that_the_run_makes(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from edgead.benchmarks.cpu import random_bundle
    from edgead.export.graph import MergedGraph, flop_per_frame
    from edgead.runtime import replay

    model = random_bundle(tmp_path / "random.edgead", precision="fp16")
    bundle = Bundle.open(tmp_path / "random.edgead")
    assert bundle.manifest.precision == "fp16"
    backend = open_backend(bundle, NAME)
    assert replay(backend, bundle).ok
    backend.close()
    # PyTorch's own count of the same graph.
    assert count_flop(bundle.model_bytes())["flop_per_image"] == flop_per_frame(MergedGraph(model))


def test_a_cpu_slot_has_no_bare_launch(tiny_bundle: Path) -> None:
    backend = open_backend(Bundle.open(tiny_bundle), NAME)
    with pytest.raises(NotMeasured), bare_launch(backend.open_slot()):
        pass
    backend.close()


def test_sections_are_in_the_order_in_which_they_need_each_other() -> None:
    order = list(BACKEND_SECTIONS)
    assert order.index("throughput") < order.index("energy")  # energy is taken at the best cell
    assert gpu_acceptance.SECTIONS[:2] == ("doctor", "matmul")


def test_the_same_source_has_one_digest_installed_or_not(tmp_path: Path) -> None:
    root, site = Path(__file__).parents[2], tmp_path / "edgead"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "edgead", site, ignore=without)
    for name in ("benchmarks", "engines", "export"):
        shutil.copytree(root / name, site / name, ignore=without)
    code = "from edgead.benchmarks.gpu_record import source_sha256; print(source_sha256())"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == source_sha256()
