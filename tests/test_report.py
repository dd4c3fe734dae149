"""The report: its numbers against numpy, its files, and pictures of every unusual kind of run."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from kinml_fast import report
from kinml_fast.errors import InputError
from kinml_fast.metrics import Errors, ErrorSums
from kinml_fast.units import KCAL_PER_MOL

HEAD = (
    "epoch,split,energy_mae,energy_rmse,energy_max,forces_mae,forces_rmse,forces_max,lr,seconds,structures_per_second"
)


def metrics_csv(folder: Path, epochs: int = 5, splits=("train", "validation", "test"), forces: bool = False) -> Path:
    lines = [HEAD]
    for epoch in range(epochs):
        for number, split in enumerate(splits):
            error = (1 + number) * 10 / (1 + epoch)
            force = f"{2 * error},{3 * error},{9 * error}" if forces else ",,"
            lines.append(f"{epoch},{split},{0.8 * error},{error},{4 * error},{force},0.001,0.02,100000.0")
    path = folder / "metrics.csv"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def comparison(n: int, seed: int = 0, scale: float = 0.1) -> report.Comparison:
    rng = np.random.default_rng(seed)
    reference = rng.normal(-5261, 1.0, n)
    return [f"C5H5/{i + 1}" for i in range(n)], reference, reference + rng.normal(0, scale, n)


def is_picture(path: Path) -> bool:
    """A picture of some size that is not all white."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return min(pixels.shape[:2]) > 500 and (pixels < 0.9).any()


def r_squared(reference, predicted):
    """Coefficient of determination."""
    return 1 - np.square(reference - predicted).sum() / np.square(reference - reference.mean()).sum()


def test_errors():
    residuals = np.array([[0.1, -0.3], [0.2, 0.0]])
    errors = Errors.of(residuals)
    assert errors.mae == pytest.approx(0.15 * KCAL_PER_MOL, rel=1e-14)
    assert errors.rmse == pytest.approx((0.14 / 4) ** 0.5 * KCAL_PER_MOL, rel=1e-14)
    assert errors.max == pytest.approx(0.3 * KCAL_PER_MOL, rel=1e-14)
    assert np.isnan(Errors.of([np.nan, 0.0]).rmse)
    sums = np.array([[0.4, 0.1, 0.3], [0.2, 0.04, 0.2]])
    total = ErrorSums()
    total.add_groups(sums, 4)
    both = total.errors()
    assert (both.mae, both.rmse, both.max) == pytest.approx((errors.mae, errors.rmse, errors.max), rel=1e-14)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_comparisons_in_pieces_are_those_of_all_values(pieces):
    x, y = np.random.default_rng(0).normal(size=(2, 50)) + 7.0
    compared = report.Compared()
    for some in np.array_split(np.arange(50), pieces):
        compared.add(lambda i, some=some: f"s/{some[i]}", x[some], y[some])
    row, expected = compared.row("test", report.ENERGY), Errors.of(y - x)
    assert (row.count, row.worst) == (50, f"s/{np.argmax(np.abs(y - x))}")
    assert (row.errors.mae, row.errors.rmse, row.errors.max) == pytest.approx(
        (expected.mae, expected.rmse, expected.max)
    )
    assert row.r2 == pytest.approx(r_squared(x, y), rel=1e-12)
    assert compared.ranges.tolist() == [[x.min(), x.max()], [y.min(), y.max()]]
    assert compared.drawn[0].tolist() == x.tolist()
    assert np.isnan(report.Compared.of((["a", "b"], [1.0, 1.0], [1.0, 2.0])).row("test", report.ENERGY).r2)


def test_of_many_values_some_are_kept_and_the_worst_of_all(monkeypatch):
    monkeypatch.setattr(report, "KEPT", 300)
    x = np.arange(5000.0)
    y = x + np.where(x % 100 == 7, 50.0 + x, 0.001)
    compared = report.Compared()
    for some in np.array_split(np.arange(5000), 17):
        compared.add(str, x[some], y[some])
    drawn = compared.drawn[0]
    assert 300 <= len(drawn) <= 300 + 100
    assert set(x[x % 100 == 7]) <= set(drawn)
    assert abs(np.median(drawn[drawn % 100 != 7]) - 2500) < 600
    assert compared.row("test", report.ENERGY).count == 5000


def test_files_rows_and_table(tmp_path):
    energies = {split: comparison(n, seed) for seed, (split, n) in enumerate([("train", 900), ("test", 30)])}
    energies["validation"] = ([], np.empty(0), np.empty(0))
    folder = tmp_path / "report"
    rows = report.write_report(folder, metrics_csv(tmp_path), energies)
    assert sorted(path.name for path in folder.iterdir()) == [
        "errors.csv",
        "learning_curves.png",
        "parity_test.png",
        "parity_train.png",
    ]
    assert all(is_picture(path) for path in folder.glob("*.png"))
    assert [(row.split, row.quantity, row.count) for row in rows] == [
        ("train", report.ENERGY, 900),
        ("test", report.ENERGY, 30),
    ]
    for row in rows:
        labels, reference, predicted = energies[row.split]
        assert row.errors == Errors.of(predicted - reference)
        assert row.r2 == r_squared(reference, predicted)
        assert row.worst == labels[np.argmax(np.abs(predicted - reference))]

    with (folder / "errors.csv").open(encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file))
    assert [(w["split"], w["quantity"], w["unit"], int(w["count"])) for w in written] == [
        ("train", "energy", "kcal/mol", 900),
        ("test", "energy", "kcal/mol", 30),
    ]
    assert [float(w["rmse"]) for w in written] == [row.errors.rmse for row in rows]
    assert [w["worst"] for w in written] == [row.worst for row in rows]

    head, *lines = report.table(rows).splitlines()
    assert head.split() == ["split", "number", "MAE", "RMSE", "max", "R²", "unit", "worst"]
    for line, row in zip(lines, rows, strict=True):
        e = row.errors
        numbers = [f"{value:.3f}" for value in (e.mae, e.rmse, e.max)]
        expected = [row.split, "energy", f"{row.count:,}", *numbers, f"{row.r2:.5f}", "kcal/mol", row.worst]
        assert line.split() == expected


def test_forces_get_a_panel_and_rows_of_their_own(tmp_path):
    energies = {"train": comparison(50), "test": comparison(40)}
    rng = np.random.default_rng(3)
    reference = rng.standard_t(3, 25_000)
    forces = {"train": (["C5H5/1"] * 25_000, reference, reference + rng.standard_t(2, 25_000))}
    without = report.write_report(tmp_path / "a", metrics_csv(tmp_path), energies)
    rows = report.write_report(tmp_path / "b", metrics_csv(tmp_path, forces=True), energies, forces)
    assert [(row.split, row.quantity.name) for row in rows] == [
        ("train", "energy"),
        ("train", "forces"),
        ("test", "energy"),
    ]
    assert [row for row in rows if row.quantity is report.ENERGY] == without
    assert rows[1].errors == Errors.of(forces["train"][2] - reference)

    def size(path: Path) -> tuple[int, int]:
        return matplotlib.image.imread(path).shape[:2]

    height, width = size(tmp_path / "a" / "parity_train.png")
    assert size(tmp_path / "b" / "parity_train.png") == (height, 2 * width)
    assert size(tmp_path / "b" / "parity_test.png") == (height, width)
    assert size(tmp_path / "b" / "learning_curves.png")[0] > size(tmp_path / "a" / "learning_curves.png")[0]


def test_the_epoch_that_was_chosen_is_marked(tmp_path):
    """The best score need not have the lowest energy error."""
    curves = report.read_metrics(metrics_csv(tmp_path, forces=True))
    title = "best validation RMSE {} kcal/mol, {} kcal/mol/Å (epoch {})"
    for best, expected in ((None, ("4.00", "12.0", 4)), (1, ("10.0", "30.0", 1))):
        axes = report.draw_learning_curves(curves, best).axes
        assert axes[0].get_title(loc="left") == title.format(*expected)
        assert [list(ax.lines[-1].get_xdata()) for ax in axes[:2]] == [[expected[2]]] * 2
    assert report.draw_learning_curves(curves, 99).axes[0].get_title(loc="left") == ""


def test_of_many_points_the_worst_are_drawn():
    rng = np.random.default_rng(0)
    x, residual = rng.normal(size=(2, 50_000))
    drawn_x, drawn = report._thinned(x, residual)
    assert len(drawn) <= 20_000
    worst = np.argsort(np.abs(residual))[-50:]
    assert set(residual[worst]) <= set(drawn)
    assert set(zip(drawn_x, drawn, strict=True)) <= set(zip(x, residual, strict=True))


def test_density_is_highest_where_most_points_lie():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 0.1, 3000), rng.uniform(5, 10, 1000), [1e6]])
    y = np.concatenate([rng.normal(0, 0.1, 3000), rng.uniform(-3, 3, 1000), [1e6]])
    density = report._density(x, y)
    assert ((density >= 0) & (density <= 1)).all()
    assert np.median(density[:3000]) > 3 * np.median(density[3000:])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("reference", "error"),
    [
        ([-1.0], 0.5),
        ([-1.0, -2.0], 1e-9),
        (np.full(600, -1.0), 0.0),
        (np.full(600, -1.0), np.nan),
        (np.linspace(-1e5, 1e5, 700), 0.5),
    ],
    ids=["one", "two", "equal", "nan", "wide"],
)
def test_unusual_predictions_can_be_drawn(tmp_path, reference, error):
    labels, reference = ["H2/1"] * len(reference), np.array(reference)
    (row,) = report.write_report(tmp_path, metrics_csv(tmp_path), {"test": (labels, reference, reference + error)})
    assert is_picture(tmp_path / "parity_test.png")
    assert row.errors.max == pytest.approx(error * KCAL_PER_MOL, rel=1e-2, nan_ok=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        ["0,train,1.0,1.0,2.0,,,,0.001,0.1,10"],
        [f"{e},{s},nan,nan,nan,,,,0.001,0.1,10" for e in range(3) for s in ("train", "validation")],
        [f"{e},train,0.0,0.0,0.0,,,,0.0,0.1,10" for e in range(30)],
        [f"{e},{s},1.0,{1 + 0.001 * e},2.0,,,,1e-3,0.1,10" for e in range(30) for s in ("train", "validation")],
    ],
    ids=["one row", "nan", "zero", "flat"],
)
def test_unusual_runs_can_be_drawn(tmp_path, rows):
    path = tmp_path / "metrics.csv"
    path.write_text("\n".join([HEAD, *rows]) + "\n", encoding="ascii")
    report.write_report(tmp_path, path, {})
    assert is_picture(tmp_path / "learning_curves.png")


def test_metrics_are_read_by_split_and_column(tmp_path):
    metrics = report.read_metrics(metrics_csv(tmp_path, epochs=3, splits=("train", "test")))
    assert list(metrics) == ["train", "test"]
    np.testing.assert_array_equal(metrics["test"]["epoch"], [0, 1, 2])
    np.testing.assert_array_equal(metrics["test"]["energy_rmse"], [20, 10, 20 / 3])
    assert np.isnan(metrics["test"]["forces_mae"]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("", "has no columns epoch, split, energy_rmse"),
        ("a,b\n1,2\n", "has no columns epoch, split, energy_rmse"),
        (HEAD + "\n", "has no rows yet"),
        (HEAD + "\n0,train,1.0,oops,2.0,,,,0.001,0.1,10\n", "row 2 is damaged .*oops"),
        (HEAD + "\n0,train,1.0,1.0,2.0,,,,0.001,0.1,10,11\n", "row 2 is damaged .*too many"),
        (HEAD + "\n0,train,1.0,1.0,2.0,,,,0.001,0.1,10\n1,train,1.0\n", "row 3 is damaged .*too few"),
    ],
)
def test_metrics_that_are_none(tmp_path, text, message):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_text(text, encoding="ascii")
    with pytest.raises(InputError, match=message) as caught:
        report.write_report(tmp_path / "report", path, {})
    assert str(caught.value).startswith(f"{path}: ")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "report").write_text("a file")
    with pytest.raises(InputError, match="cannot be made"):
        report.write_report(tmp_path / "report", metrics_csv(tmp_path), {})


def test_arrays_of_unequal_length_are_refused(tmp_path):
    labels, reference, predicted = comparison(5)
    with pytest.raises(ValueError, match="4 predicted"):
        report.write_report(tmp_path, metrics_csv(tmp_path), {"test": (labels, reference, predicted[:4])})
