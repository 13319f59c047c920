"""The accuracy benchmark: lists, jobs, workers that die, and the table; trained on hardly anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edgead.benchmarks import accuracy, accuracy_job, accuracy_list, accuracy_table, accuracy_workers
from edgead.bundle import set_threshold
from edgead.detector import load
from edgead.errors import DataError
from edgead.evaluate import evaluate
from edgead.training.data import open_dataset

LISTS = Path(accuracy.__file__).parent / "lists"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
TINY = """
[defaults]
steps = 2
checkpoint_s = 0
seeds = [0, 1]
penalty = "natural"
teacher = "teacher.safetensors"
backend = "onnxruntime"

[[data]]
name = "tray"
path = "tray"
"""


@pytest.fixture(scope="module")
def root(
    demo_images: Path,
    natural_images: Path,
    random_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What TINY's paths are relative to. The tray has 2 good training and 2 test images."""
    folder = tmp_path_factory.mktemp("root")
    defect = min(path.name for path in (demo_images / "test").iterdir() if path.name != "good")
    for part, count in (
        ("train/good", 2), ("test/good", 1), (f"test/{defect}", 1), (f"ground_truth/{defect}", 1)
    ):  # fmt: skip
        (folder / "tray" / part).mkdir(parents=True)
        for file in sorted((demo_images / part).iterdir())[:count]:
            shutil.copy(file, folder / "tray" / part)
    shutil.copytree(natural_images, folder / "natural")
    shutil.copy(random_teacher, folder / "teacher.safetensors")
    return folder


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[accuracy_list.Job]:
    """The two jobs of TINY."""
    return accuracy_list.read_list(write(tmp_path_factory.mktemp("list"), TINY))


@pytest.fixture(scope="module")
def finished(
    root: Path, jobs: list[accuracy_list.Job], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of TINY's first job, done in this process. Leave it as it is."""
    folder = accuracy_job.prepare(tmp_path_factory.mktemp("out"), jobs[0], root)
    before = torch.get_num_threads()
    accuracy_job.run_job(folder, threads=1)
    torch.set_num_threads(before)
    assert (folder / "result.json").exists(), accuracy_job.read_outcome(folder)
    return folder


def write(folder: Path, text: str) -> Path:
    path = folder / "list.toml"
    path.write_text(text)
    return path


def outcome(folder: Path) -> dict[str, Any]:
    found = accuracy_job.read_outcome(folder)
    assert found is not None, f"{folder} has neither a result nor an error"
    return found


def figures(result: dict[str, Any]) -> dict[str, Any]:
    return {**result["figures"], "threshold": result["threshold"]}


# The list.


def test_a_list_value_is_an_axis_and_the_seed_varies_fastest(tmp_path: Path) -> None:
    text = '[defaults]\nminutes = [1, 3]\nseeds = [0, 1]\nmethod = ["efficientad-s", "efficientad-m"]\n'
    text += '[[data]]\nname = "a"\npath = "x"\n[[data]]\nname = "b"\npath = "y"\nsteps = 5\nseeds = 7\n'
    jobs = accuracy_list.read_list(write(tmp_path, text))
    found = [(j.name, j.method[-1], j.config["minutes"], j.config["seed"]) for j in jobs]
    assert len(found) == 2 * 2 * 2 + 2
    assert found[:3] == [("a", "s", 1, 0), ("a", "s", 1, 1), ("a", "m", 1, 0)]
    assert found[-2:] == [("b", "s", None, 7), ("b", "m", None, 7)]
    assert jobs[2].config["size"] == "m" and jobs[-1].config["steps"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no \\[\\[data\\]\\]"),
        ("x = ", "cannot read"),
        ('[[data]]\nname = "a"', "needs a name and a path"),
        ('[[data]]\nname = "../a"\npath = "a"', "letters, digits"),
        (
            '[[data]]\nname = "a"\npath = "a"\nstep = 3',
            "--step: not an option of --method efficientad-s",
        ),
        ('[[data]]\nname = "a"\npath = "a"\nsteps = 3\nminutes = 1', "choose one"),
        ('[[data]]\nname = "a"\npath = "a"\nsteps = 0', "at least one step"),
        ('[[data]]\nname = "a"\npath = "a"\nmethod = "patchcore"', "the methods are efficientad-s"),
        ('[[data]]\nname = "a"\npath = "a"\nprecision = "int8"', "the precisions fp32"),
        ('[[data]]\nname = "a"\npath = "a"\npublished = "mvtec/cup"', "no published figures"),
        ('[[data]]\nname = "a"\npath = "a"\nseeds = [1, 1]', "the same job twice"),
        ('[[data]]\nname = "a"\npath = "a"\nseeds = []', "a: seed: an empty list leaves no job"),
        (
            '[[data]]\nname = "a"\npath = "x"\n[[data]]\nname = "a"\npath = "y"',
            "a is the name of x and of y: .* a name of its own",
        ),
        ('[[data]]\nname = "a"\npath = "a"\n[more]\nx = 1', "nothing else; got more"),
    ],
)
def test_a_wrong_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy_list.read_list(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted(LISTS.glob("*.toml")), ids=lambda path: path.stem)
def test_committed_lists_are_valid_and_name_no_machine(path: Path) -> None:
    for job in accuracy_list.read_list(path):
        for named in (job.data, job.penalty, job.teacher):
            assert named is None or not Path(named).is_absolute()


# One job.


def test_figures_come_from_the_packed_bundle(root: Path, finished: Path) -> None:
    result = outcome(finished)
    with load(finished / "bundle.edgead", backend="onnxruntime", threads=1) as detector:
        again = json.loads(evaluate(detector, open_dataset(root / "tray")).to_json())
    assert figures(result) == {name: again[name] for name in figures(result)}
    assert result["counts"] == {name: again[name] for name in result["counts"]}
    assert result["ran"] == "onnxruntime fp32"
    assert result["train"]["steps"] == 2 and result["train"]["starts"] == 1


def test_each_method_has_its_own_settings() -> None:
    """ProtoAD has neither steps nor minutes; what only differs between methods has no column."""
    others = result_of("tray", 0, 0.5, method="protoad")
    del others["config"]["steps"], others["config"]["minutes"]
    others["config"]["max_prototypes"] = 64
    table = accuracy_table.results_table([result_of("tray", 0, 0.5), others])
    assert table.splitlines()[0].startswith("| data | method | seed | image AUROC |")
    others["config"]["max_prototypes"] = 65
    both = accuracy_table.results_table(
        [others, {**others, "config": {**others["config"], "max_prototypes": 9}}]
    )
    assert both.splitlines()[0].startswith("| data | method | max_prototypes | seed |")


def test_methods_without_penalty_images(root: Path, tmp_path: Path) -> None:
    text = '[defaults]\nmethod = "protoad"\nbackbone = "teacher.safetensors"\nbackend = "onnxruntime"\n'
    (job,) = accuracy_list.read_list(write(tmp_path, text + TINY[TINY.index("[[data]]") :]))
    folder = accuracy_job.prepare(tmp_path, job, root)
    accuracy_job.run_job(folder)
    result = outcome(folder)
    assert "error" not in result, result
    assert result["penalty_used"] is None
    assert result["weights_used"]["backbone"]["file"] == "teacher.safetensors"


def test_evaluation_sees_the_bundle_and_not_the_networks(finished: Path, tmp_path: Path) -> None:
    """Without weights in the run, and with a threshold that only the bundle has."""
    folder = tmp_path / finished.name
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    (folder / "run" / "detector.safetensors").unlink()
    set_threshold(folder / "bundle.edgead", -1e6)
    before = torch.get_num_threads()
    accuracy_job.run_job(folder, threads=1)
    torch.set_num_threads(before)
    result = outcome(folder)
    assert result["figures"]["image_auroc"] == outcome(finished)["figures"]["image_auroc"]
    assert result["figures"]["false_reject_rate"] == 1 and result["figures"]["missed_defect_rate"] == 0


def test_figures_do_not_depend_on_the_order_of_files(root: Path, finished: Path, tmp_path: Path) -> None:
    tray = tmp_path / "tray"
    for file in sorted((root / "tray").rglob("*"), reverse=True):
        if file.is_file():  # written in the opposite order, so that the system may list them so
            (tray / file.relative_to(root / "tray")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tray / file.relative_to(root / "tray"))
    dataset = open_dataset(tray)
    object.__setattr__(dataset, "test", dataset.test[::-1])
    with load(finished / "bundle.edgead", backend="onnxruntime", threads=1) as detector:
        again = json.loads(evaluate(detector, dataset).to_json())
    result = figures(outcome(finished))
    assert result == {name: again[name] for name in result}


def test_a_job_is_told_by_all_that_its_figures_depend_on(
    root: Path, jobs: list[accuracy_list.Job], tmp_path: Path
) -> None:
    copy = tmp_path / "root"
    shutil.copytree(root, copy)

    def name(**changes: Any) -> str:
        for cached in (accuracy_job._data_hash, accuracy_job._names_hash):
            cached.cache_clear()
        job = accuracy_list.Job(**{**vars(jobs[0]), **changes})
        return accuracy_job.prepare(tmp_path / "out", job, copy).name

    first = name()
    assert first == accuracy_job.prepare(tmp_path / "out", jobs[0], root).name  # wherever the root is
    assert name(published="mvtec/bottle") == first  # a figure beside the others changes none of them
    names = [
        first,
        name(precision="fp16"),
        name(backend="openvino"),
        name(config={**jobs[0].config, "learning_rate": 2e-3}),
        name(teacher=None),
        name(teacher=None, backbone="teacher.safetensors"),
    ]
    with (copy / "teacher.safetensors").open("ab") as file:
        file.write(b" ")
    names += [name(), name(teacher=None, backbone="teacher.safetensors")]
    next((copy / "tray" / "test" / "good").iterdir()).unlink()
    names.append(name())
    shutil.copy(copy / "tray/train/good/000.jpg", copy / "tray/train/good/zzz.jpg")
    names.append(name())
    next((copy / "natural").iterdir()).unlink()
    names.append(name())
    assert len(set(names)) == len(names)


# Many jobs.


def test_a_failed_job_stops_no_other_and_is_tried_again(
    root: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("seeds = [0, 1]", "seeds = 0")
    text = text.replace("[[data]]", '[[data]]\nname = "gone"\npath = "gone"\n[[data]]', 1)
    arguments = [str(write(tmp_path, text)), "--data", str(root), "--out", str(tmp_path / "out")]
    shutil.copytree(finished, tmp_path / "out" / "jobs" / finished.name)
    plot = tmp_path / "plot.svg"
    for attempt in (1, 2):
        assert accuracy.main([*arguments, "--plot", str(plot)]) == 1
        printed = capsys.readouterr().out
        assert "1 of 2 jobs were finished before" in printed
        assert "DataError: gone: no such folder" in printed and str(root) not in printed
        (gone,) = (tmp_path / "out" / "jobs").glob("gone-*")
        assert len((gone / "starts.jsonl").read_text().splitlines()) == attempt
    (kept,) = (tmp_path / "out" / "jobs").glob("tray-*")
    assert len((kept / "starts.jsonl").read_text().splitlines()) == 1
    record = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert [result["name"] for result in record["results"]] == ["tray"] and len(record["failures"]) == 1
    assert record["machine"]["cpu"]["model"] and record["git_commit"] is not None
    assert str(root) not in json.dumps(record) and str(tmp_path) not in json.dumps(record)
    page = (tmp_path / "out" / "accuracy.md").read_text()
    assert "| tray | efficientad-s | 0 |" in page and "trained on CPU, 1 threads" in page
    assert "<svg" in plot.read_text()


@pytest.mark.parametrize("dies", [1, 2])
def test_a_process_that_dies_is_started_once_more(
    dies: int, jobs: list[accuracy_list.Job], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for Python that kills itself `dies` times and then has a result."""
    folder = accuracy_job.prepare(tmp_path, jobs[0], root)
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'echo started >> "$3/calls"\n'
        f'if [ $(wc -l < "$3/calls") -le {dies} ]; then kill -9 $$; fi\n'
        'echo "{}" > "$3/result.json"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert list(accuracy_workers.one_by_one([folder], threads=1)) == [folder]
    assert (folder / "calls").read_text().count("started") == 2
    if dies == 1:
        assert outcome(folder) == {}
    else:
        assert outcome(folder)["error"] == "its process died 2 times, last with status -9"


def test_ray_survives_a_killed_worker_with_the_same_figures(
    root: Path, finished: Path, tmp_path: Path, ray_environment: dict[str, str]
) -> None:
    """Two workers; the one at seed 0 is killed while it trains, and its job goes on elsewhere.

    The figures equal those of one process that nobody disturbed, to the last bit.
    """
    pytest.importorskip("ray", reason="Ray is not installed")
    command = [sys.executable, "-m", "edgead.benchmarks.accuracy", write(tmp_path, TINY)]
    command += ["--data", root, "--out", tmp_path, "--ray", "local", "--workers", "2", "--threads", "1"]
    with subprocess.Popen(
        list(map(str, command)), env=ray_environment, stdout=subprocess.PIPE, text=True
    ) as driver:
        try:
            until(lambda: any(tmp_path.glob("jobs/tray-*-seed0-*/run/checkpoint.pt")), driver)
            (first,) = tmp_path.glob("jobs/tray-*-seed0-*")
            pid = json.loads((first / "starts.jsonl").read_text())["pid"]
            assert not (first / "run" / "run.json").exists(), "trained before it could be killed"
            os.kill(pid, signal.SIGKILL)
            printed, _ = driver.communicate(timeout=600)
        finally:
            driver.terminate()
    assert driver.returncode == 0, printed
    assert "mean (min..max) of 2" in printed
    (second,) = tmp_path.glob("jobs/tray-*-seed1-*")
    results = {folder: outcome(folder) for folder in (first, second)}
    assert [results[folder]["train"]["starts"] for folder in (first, second)] == [2, 1]
    pids = [json.loads(line)["pid"] for line in (first / "starts.jsonl").read_text().splitlines()]
    assert len(set(pids)) == 2
    assert first.name == finished.name and figures(results[first]) == figures(outcome(finished))
    assert losses(first) == losses(finished)
    assert losses(second) != losses(first)  # of another seed


@pytest.mark.parametrize(
    ("gpus", "workers", "expected"), [(0, 3, 3), (1, None, 1), (1, 3, 3), (2, 3, 2), (4, 2, 1)]
)
def test_jobs_that_share_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, workers: int | None, expected: int
) -> None:
    """As many jobs at a time as were asked for, also with fewer GPUs: Ray would let the others wait."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    started = {}
    monkeypatch.setattr(accuracy_workers, "_visible_gpus", lambda: gpus)
    monkeypatch.setattr(ray, "init", lambda **options: started.update(options))
    _, on_one = accuracy_workers._start_local(workers, threads=1)
    assert on_one == expected and started["num_gpus"] == gpus
    assert started["num_cpus"] == (workers or gpus)
    assert not gpus or gpus * on_one >= (workers or gpus)


@pytest.fixture
def ray_environment() -> Iterator[dict[str, str]]:
    """No reports, no memory monitor (the machine may be full), and short paths for its sockets."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    ours = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0", "RAY_TMPDIR": folder}
    yield {**os.environ, **ours}
    shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    while not condition():
        assert driver.poll() is None, f"ended early: {driver.communicate()[0]}"
        time.sleep(0.005)


def losses(folder: Path) -> list[list[str]]:
    """Step and losses of a run, without the seconds."""
    lines = (folder / "run" / "losses.csv").read_text().splitlines()
    return [line.split(",")[:1] + line.split(",")[2:] for line in lines]


# The table.


def result_of(name: str, seed: int, auroc: float | None, **changes: Any) -> dict[str, Any]:
    """A result as a job leaves it, as far as the table reads it."""
    config = {"size": "s", "steps": 10, "minutes": None, "seed": seed, **changes.pop("config", {})}
    empty = {
        "penalty": None, "teacher": None, "backbone": None, "precision": "fp32", "backend": "auto",
        "published": None,
    }  # fmt: skip
    return {
        "name": name,
        "method": "efficientad-s",
        "config": config,
        **empty,
        "figures": {key: auroc for key in accuracy_table.HEADER}
        | {"false_reject_rate": 0.25, "missed_defect_rate": 0.5},
        "counts": {"good_images": 4, "defect_images": 2, "false_rejects": 1, "missed_defects": 1},
        "train": {"steps": 10, "seconds": 60.0 * (seed + 1), "device": "CPU, 2 threads"},
        **changes,
    }


def test_table_has_seeds_their_range_and_the_published_figures() -> None:
    results = [result_of("cup", seed, auroc) for seed, auroc in ((2, 0.9), (0, 0.75), (1, 0.75))]
    results.append(result_of("bottle", 0, None, published="mvtec/bottle"))
    lines = accuracy_table.results_table(results).splitlines()
    assert lines[2] == (
        f"| cup | efficientad-s | 0 | {' | '.join(['0.7500'] * 5)} | 1 of 4 | 1 of 2 | 10 | 60 |"
    )
    wide = "0.8000 (0.7500..0.9000)"  # (0.75 + 0.75 + 0.9) / 3
    rates = "25.0% (25.0%..25.0%) | 50.0% (50.0%..50.0%)"
    assert lines[5] == (
        f"| cup | efficientad-s | mean (min..max) of 3 | {' | '.join([wide] * 5)} | {rates} | 10 | 120 |"
    )
    assert lines[6].startswith("| bottle | efficientad-s | 0 | - | - |")
    # nelson1425/EfficientAD, S, bottle: image AUROC 99.92 %, AU-PRO 95.19 %
    assert lines[7] == (
        "| bottle | efficientad-s | published | 0.9992 | - | 0.9519 | - | - | - | - | 70000 |  |"
    )
    assert len(lines) == 8


def test_what_varies_has_a_column() -> None:
    results = [result_of("cup", 0, 0.9, config={"learning_rate": rate}) for rate in (1e-4, 1e-3)]
    table = accuracy_table.results_table(results)
    assert "| method | learning_rate | seed |" in table
    assert "| efficientad-s | 0.001 | 0 |" in table
    assert len(accuracy_table.groups(results)) == 2
    results = [result_of("cup", 0, 0.9, backbone=name) for name in ("resnet18.pth", "mobilenet.pth")]
    assert "| resnet18.pth | 0 | 0.9000 |" in accuracy_table.results_table(results)


def test_plot_draws_accuracy_against_measured_minutes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    results = [
        result_of("cup", seed, 0.9 + seed / 100, config={"minutes": minutes},
                  train={"steps": 10, "seconds": 60.0 * minutes + seed})
        for minutes in (10, 1) for seed in (0, 2)
    ]  # fmt: skip
    expected = [(61 / 60, 0.91, 0.9, 0.92), (601 / 60, 0.91, 0.9, 0.92)]
    series = accuracy_table._series(results, "image_auroc")
    assert list(series) == ["cup, efficientad-s"]
    for point, wanted in zip(series["cup, efficientad-s"], expected, strict=True):
        assert point == pytest.approx(wanted)
    accuracy_table.plot(results, tmp_path / "new" / "plot.svg")
    first = (tmp_path / "new" / "plot.svg").read_bytes()
    accuracy_table.plot(results, tmp_path / "new" / "plot.svg")
    assert (tmp_path / "new" / "plot.svg").read_bytes() == first  # no date, no random names


def test_published_figures_average_to_the_published_means() -> None:
    """The source's own means over the 15 categories: S 99.03 / 93.28, M 99.09 / 93.74."""
    means = {"efficientad-s": (0.9903, 0.9328), "efficientad-m": (0.9909, 0.9374)}
    for method, (image, regions) in means.items():
        rows = [figures[method] for figures in accuracy_table.PUBLISHED.values()]
        assert len(rows) == 15
        # The means are printed with four digits.
        assert sum(row["image_auroc"] for row in rows) / 15 == pytest.approx(image, abs=5.1e-5)
        assert sum(row["au_pro_30"] for row in rows) / 15 == pytest.approx(regions, abs=5.1e-5)


def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["list.toml", "--out", str(tmp_path)]
    for extra in (["--workers", "2"], ["--ray", "local", "--workers", "0"]):
        with pytest.raises(SystemExit):
            accuracy.main([*arguments, *extra])
    assert accuracy.main([*arguments, "--data", "."]) == 1
    assert "cannot read this list" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(RESULTS.glob("accuracy_*.json")), ids=lambda file: file.stem)
def test_each_record_that_comes_with_it_can_be_drawn(file: Path) -> None:
    """Also that of methods whose settings have different names."""
    results = json.loads(file.read_text())["results"]
    assert accuracy_table._series(results, "image_auroc")
