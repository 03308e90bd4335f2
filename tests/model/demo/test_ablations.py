"""`smca demo --ablations`: a set that is interrupted and goes on, and what its report makes of any part of it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from smca_model.demo.command import PACKAGES

for package in PACKAGES:
    pytest.importorskip(package)
if torch.cuda.is_available():
    pytest.skip("ablations compare times of a CPU", allow_module_level=True)

from smca_kernels.tools import cli  # noqa: E402
from smca_model.config import Config  # noqa: E402
from smca_model.demo import ablation_report, ablation_variants, ablations  # noqa: E402
from smca_model.demo.ablation_variants import VARIANTS, Variant  # noqa: E402
from smca_model.presets import PRESETS, configure  # noqa: E402
from smca_model.training.engine import Trainer, TrainingError  # noqa: E402
from smca_model.training.settings import Settings  # noqa: E402

STEPS = 4  # of a run of `miniature`


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two variants, one seed, four steps each."""
    monkeypatch.setattr(ablation_variants, "VARIANTS", tuple(v for v in VARIANTS if v.name in ("smca", "smca-3intra")))
    monkeypatch.setattr(ablations, "SEEDS", 1)
    monkeypatch.setattr(ablations, "DATA", {"train": 8, "val": 2, "size": 48, "seed": 0})
    training = {"epochs": 2, "lr_drop": 2, "batch_size": 4, "lr": 1e-4, "workers": 0, "flip": False, "crop": False}
    monkeypatch.setattr(ablations, "TRAINING", training)


def run_of(variant: str, seed: int, aps: list[float], seconds: float, **more: Any) -> dict[str, Any]:
    """A run with these AP, an epoch of so many CPU seconds each."""
    lines = [
        {"epoch": i, "AP": ap, "AP50": min(1.0, 2 * ap), "seconds": 3 * i * seconds, "cpu_seconds": i * seconds}
        for i, ap in enumerate(aps, 1)
    ]
    return {"variant": variant, "seed": seed, "evaluations": lines, "finished": True, "error": "", **more}


def row_of(found: dict[str, Any], variant: str) -> dict[str, Any]:
    (row,) = (row for row in found["variants"] if row["variant"] == variant)
    return dict(row)


# -------------------------------------------------------------------------------------------------------- the set


def test_an_interrupted_set_goes_on_in_the_middle_of_its_run(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[str, int]] = []
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        trained.append((Path(self.settings.out).name, self.step))
        if len(trained) == STEPS + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    threads = torch.get_num_threads()
    command = ["demo", "--ablations", "--out", str(tmp_path)]
    assert cli.main(command) == 130
    assert "interrupted: the same command goes on where it was" in capsys.readouterr().err
    folder = tmp_path / "ablations"
    first, second = folder / "runs" / "smca-0", folder / "runs" / "smca-3intra-0"
    record = (first / "run.json").read_bytes()
    assert (second / "checkpoint.pt").exists()
    assert not (second / "run.json").exists()

    assert cli.main(command) == 0
    assert trained == [(run.name, step) for run in (first, second) for step in range(STEPS)]
    assert (first / "run.json").read_bytes() == record
    results = json.loads((folder / "results.json").read_text())
    assert [(run["variant"], run["seed"], len(run["evaluations"])) for run in results["runs"]] == [
        ("smca", 0, 2),
        ("smca-3intra", 0, 2),
    ]
    times = [line["cpu_seconds"] for line in results["runs"][1]["evaluations"]]
    assert 0 < times[0] < times[1]
    assert results["runs"][0]["versions"]["torch"] == torch.__version__
    assert {path.name for path in folder.iterdir()} >= {"table.md", "curves.png", "plan.json", "data"}
    assert "seed 0; about 0 min of training left" in capsys.readouterr().out
    assert torch.get_num_threads() == threads
    assert cli.main(command) == 0
    assert len(trained) == 2 * STEPS


def test_a_folder_of_other_settings_is_refused(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations.check_plan(tmp_path / "ablations")
    monkeypatch.setitem(ablations.TRAINING, "epochs", 3)
    assert cli.main(["demo", "--ablations", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "holds ablations with other settings, training epochs 2 there, 3 here; choose another --out" in error
    assert not (tmp_path / "ablations" / "data").exists()


def test_a_run_that_is_not_finite_is_recorded_and_the_set_goes_on(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.train_step

    def train_step(self: Trainer, batches: Any) -> dict[str, float]:
        if Path(self.settings.out).name == "smca-0":
            raise TrainingError("step 0: the loss giou is nan")
        return real(self, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    ablations.run_ablations(tmp_path, seed=0)
    table = (tmp_path / "table.md").read_text()
    assert "- smca, seed 0: step 0: the loss giou is nan" in table
    assert "Finished runs: 1; under way or not finite: 1." in table


def test_a_damaged_record_ends_the_set_before_any_work(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "runs" / "smca-0" / "run.json"
    record.parent.mkdir(parents=True)
    record.write_text("{")
    monkeypatch.setattr(ablations, "train_one", lambda *_: pytest.fail("something was trained"))
    with pytest.raises(ValueError, match=r"run\.json can't be read"):
        ablations.run_ablations(tmp_path, seed=0)


def test_all_variants_come_with_one_seed_before_the_next(tmp_path: Path) -> None:
    jobs = ablations.list_jobs(tmp_path, 4)
    names = [variant.name for variant in VARIANTS]
    assert [(job.seed, job.variant) for job in jobs] == [(seed, name) for seed in (4, 5, 6) for name in names]


def test_compare_is_not_for_ablations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--ablations", "--compare", "--out", str(tmp_path)]) == 2
    assert "--compare can't be given with --ablations" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- the variants


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_small_variant_changes_what_the_papers_preset_changes(variant: Variant, tmp_path: Path) -> None:
    def changed(one: Config, base: Config) -> dict[str, Any]:
        return {name: value for name, value in vars(one).items() if value != vars(base)[name]}

    settings = ablations.settings_of(ablations.Job(variant.name, 0, tmp_path), tmp_path)
    small = configure(settings.preset, 10, **settings.model_overrides())
    paper = PRESETS[f"{variant.name}-r50"]
    base = "smca-ms" if len(paper.strides) > 1 else "smca"
    preset, overrides = ablations.small_model(base)
    base_settings = Settings(preset=preset, overrides=overrides)
    small_base = configure(base_settings.preset, 10, **base_settings.model_overrides())
    assert len(small.strides) == len(paper.strides)
    assert changed(small, small_base) == changed(paper, PRESETS[f"{base}-r50"])


def test_all_runs_of_a_set_differ_in_variant_and_seed_alone(tmp_path: Path) -> None:
    free = {"out", "weights", "seed", "preset", "overrides"}
    jobs = ablations.list_jobs(tmp_path, 0)
    common = [{k: v for k, v in vars(ablations.settings_of(job, tmp_path)).items() if k not in free} for job in jobs]
    assert all(each == common[0] for each in common)
    assert len({job.folder for job in jobs}) == ablations.SEEDS * len(VARIANTS)


# ------------------------------------------------------------------------------------------------------ the report


def test_equal_time_is_that_of_the_fastest_run_and_ap_there_is_interpolated() -> None:
    runs = [run_of("detr", 0, [0.1, 0.2], seconds=10.0), run_of("smca", 0, [0.2, 0.4, 0.8], seconds=16.0)]
    found = ablation_report.summarize(runs)
    assert found["equal_seconds"] == 20.0
    assert row_of(found, "detr")["AP_at_equal_time"] == pytest.approx(0.2)
    assert row_of(found, "smca")["AP_at_equal_time"] == pytest.approx(0.2 + 0.2 * 4 / 16)
    assert row_of(found, "smca")["AP"] == 0.8


def test_mean_and_spread_are_over_the_seeds_that_are_there() -> None:
    runs = [run_of("smca", seed, [ap], 1.0) for seed, ap in enumerate((0.2, 0.3, 0.7))]
    runs += [run_of("detr", 0, [0.1], 1.0), run_of("detr", 1, [0.9], 1.0, finished=False)]
    found = ablation_report.summarize(runs)
    smca, detr, single = (row_of(found, name) for name in ("smca", "detr", "smca-single"))
    assert (smca["seeds"], smca["AP"], smca["AP_deviation"]) == (3, pytest.approx(0.4), pytest.approx(0.07**0.5))
    assert (detr["seeds"], detr["AP"], detr["AP_deviation"]) == (1, 0.1, None)
    assert (single["seeds"], single["AP"]) == (0, None)


def test_pairs_are_compared_over_their_common_seeds_with_the_papers_order() -> None:
    best, good, level, absent = (
        Variant(name, (2,), name, ap) for name, ap in zip("abcd", (3.0, 2.0, 2.0, 1.0), strict=True)
    )
    values = {"a": {0: 0.5, 1: 0.2, 2: 0.9}, "b": {0: 0.4, 1: 0.4}, "c": {0: 0.6, 1: 0.6}}
    pairs = ablation_report.compare_order([absent, level, good, best], values)
    assert {(pair["higher"], pair["lower"]) for pair in pairs} == {("a", "b"), ("a", "c")}
    over_b = next(pair for pair in pairs if pair["lower"] == "b")
    assert over_b == {
        "higher": "a",
        "lower": "b",
        "paper": [3.0, 2.0],
        "here": [pytest.approx(0.35), pytest.approx(0.4)],
        "seeds": 2,
        "alike": 1,
        "agrees": False,
    }


def test_the_table_says_where_the_order_is_not_the_papers() -> None:
    runs = [run_of("detr", 0, [0.3], 1.0), run_of("smca-shared", 0, [0.2], 1.0), run_of("smca", 0, [0.4], 1.0)]
    plan = json.loads(json.dumps(ablations.make_plan()))
    text = ablation_report.format_report(plan, ablation_report.summarize(runs), runs)
    assert "At equal epochs **the order differs from the paper's** in 1 of 3 pairs" in text
    wrong = "- `smca-shared` is below `detr`: 0.200 and 0.300, the paper has 40.2 and 34.8; so in 1 of 1 seeds"
    assert text.count(wrong) == 2  # at equal epochs and at equal time
    rows = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")] for line in text.splitlines() if "|" in line
    }
    assert rows["`smca-shared`"][3:5] == ["1", "0.200"]
    assert rows["`smca-shared`"][8:11] == ["3", "40.2", "3"]
    assert rows["`detr`"][8:11] == ["2", "34.8", "5"]
    assert rows["`smca-fixed`"][3:5] == ["0", "–"]
    runs = [run_of("detr", 0, [0.1], 1.0), *runs[1:]]
    text = ablation_report.format_report(plan, ablation_report.summarize(runs), runs)
    assert "At equal epochs all 3 pairs are in the paper's order." in text


def test_a_set_without_a_finished_run_has_a_report(
    miniature: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations.check_plan(tmp_path)
    monkeypatch.setattr("sys.argv", ["ablation_report", str(tmp_path)])
    assert ablation_report.main() == 0
    assert "Finished runs: 0." in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_the_report_of_a_folder_without_a_set_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["ablation_report", str(tmp_path / "none")])
    assert ablation_report.main() == 2
    assert f"error: {tmp_path / 'none' / 'plan.json'} can't be read" in capsys.readouterr().err
