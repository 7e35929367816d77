import os
from pathlib import Path

import numpy as np
import pytest
from commands import load_script

from block.core.rng import generator
from block.workload.arrivals import RateProfile
from block.workload.length_sketch import LengthSketch
from block.workload.sharing_sketch import load_sketch
from block.workload.trace_formats import Columns, read
from block.workload.traces import TRACES

ROOT = Path(__file__).parents[2]
TRACKED = ROOT / "artifacts" / "workloads"
MEASURED = ("sharegpt", "arxiv", "azure_conv", "azure_code")


fit_workload = load_script("fit_workload")


@pytest.fixture
def data() -> Path:
    if "BLOCK_DATA" not in os.environ:
        pytest.skip("BLOCK_DATA is unset: the public traces are not here")
    return Path(os.environ["BLOCK_DATA"])


# --- measures ---------------------------------------------------------------------------------------------------------


def test_ks_distance_by_hand() -> None:
    assert fit_workload.ks_distance(np.array([1, 2, 3, 4]), np.array([3, 4, 5, 6])) == 0.5
    assert fit_workload.ks_distance(np.array([1, 1, 2, 9]), np.array([9, 2, 1, 1])) == 0.0


def test_rank_correlation_by_hand() -> None:
    """Ranks 1 2.5 2.5 4 against 1 2 3 4: covariance 4.5, variances 4.5 and 5, each summed over the four."""
    assert fit_workload.rank_correlation(np.array([1, 5, 5, 90]), np.array([1, 2, 3, 4])) == pytest.approx(
        4.5 / np.sqrt(4.5 * 5)
    )
    assert fit_workload.rank_correlation(np.array([1, 2, 3]), np.array([9, 5, 4])) == pytest.approx(-1)


# --- sketches ---------------------------------------------------------------------------------------------------------


def dependent_lengths() -> tuple[np.ndarray, np.ndarray]:
    rng = generator(0, "test.lengths")
    prompt = np.rint(rng.lognormal(5, 1, 5000)).astype(np.int64) + 1
    output = np.rint(rng.lognormal(3, 0.8, 5000) * np.sqrt(prompt) / 5).astype(np.int64) + 1
    return prompt, output


def test_a_sketch_keeps_means_marginals_and_dependence() -> None:
    prompt, output = dependent_lengths()
    sampled = LengthSketch.fit(prompt, output).sample(5000, generator(0, "test"))
    assert sampled[0].mean() == pytest.approx(prompt.mean(), rel=1e-3)
    assert sampled[1].mean() == pytest.approx(output.mean(), rel=5e-3)
    for original, drawn in zip((prompt, output), sampled, strict=True):
        assert fit_workload.ks_distance(original, drawn) < 0.01
    original = np.corrcoef(np.argsort(np.argsort(prompt)), np.argsort(np.argsort(output)))[0, 1]
    drawn = np.corrcoef(np.argsort(np.argsort(sampled[0])), np.argsort(np.argsort(sampled[1])))[0, 1]
    assert original > 0.3
    assert drawn == pytest.approx(original, abs=0.03)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 1000])
def test_any_number_of_requests_can_be_drawn(count: int) -> None:
    sketch = LengthSketch.fit(*dependent_lengths())
    prompt, output = sketch.sample(count, generator(1, "test"))
    assert len(prompt) == len(output) == count
    assert min(prompt.min(), output.min()) >= 1


def test_strata_are_each_hit_once() -> None:
    """The prompt's quantile function is the identity on 0..1000: 1000 requests fall one into each unit."""
    sketch = LengthSketch(np.array([0.0, 1000.0]), np.array([[0.0, 500.0], [500.0, 1000.0]]))
    prompt, output = sketch.sample(1000, generator(0, "test"))
    assert np.abs(np.sort(prompt) - np.arange(1000) - 0.5).max() <= 1
    assert np.abs(np.sort(output) - np.arange(1000) - 0.5).max() <= 1
    assert ((prompt > 501) <= (output >= 500)).all()


def test_a_constant_length_stays_constant() -> None:
    prompt, output = LengthSketch.fit(np.full(400, 7), np.full(400, 3)).sample(50, generator(0, "test"))
    assert set(prompt.tolist()) == {7}
    assert set(output.tolist()) == {3}


def test_quantile_functions_increase_even_at_jumps() -> None:
    lengths = np.repeat([5, 4000], 500)
    sketch = LengthSketch.fit(lengths, lengths)
    assert (np.diff(sketch.prompt) >= 0).all()
    assert (np.diff(sketch.output, axis=1) >= 0).all()


@pytest.mark.parametrize("requests", [4, 17, 100, 1000])
def test_short_traces_get_coarser_sketches(requests: int) -> None:
    prompt, output = (lengths[:requests] for lengths in dependent_lengths())
    sampled = LengthSketch.fit(prompt, output).sample(20_000, generator(0, "test"))
    assert sampled[0].mean() == pytest.approx(prompt.mean(), rel=0.01)
    assert sampled[1].mean() == pytest.approx(output.mean(), rel=0.03)
    with pytest.raises(ValueError, match="3 requests: a sketch needs at least 4"):
        LengthSketch.fit(prompt[:3], output[:3])


def test_a_sketch_survives_its_file(tmp_path: Path) -> None:
    profile, drift = RateProfile(9, (1.5, 0.25, 2.0)), np.arange(8).reshape(2, 4)
    sketch = LengthSketch(np.array([1.0, 2.5]), np.array([[3.0, 4.1]]), profile, drift, {"origin": "here"})
    sketch.save(tmp_path / "s.json")
    loaded = LengthSketch.load(tmp_path / "s.json")
    assert loaded.prompt.tolist() == [1.0, 2.5]
    assert loaded.output.tolist() == [[3.0, 4.1]]
    assert (loaded.profile, loaded.source) == (sketch.profile, sketch.source)
    assert loaded.drift is not None
    assert (loaded.drift == drift).all()


def test_a_sketch_with_times_keeps_when_long_requests_came() -> None:
    """Prompts grow and begin again half-way; responses go with them."""
    prompt = np.tile(np.arange(3200) + 1, 2)
    output = prompt // 8 + 1
    sketch = LengthSketch.fit(prompt, output, np.arange(6400) / 7)
    for original, drawn in zip((prompt, output), sketch.sample(6400, generator(0, "test")), strict=True):
        parts = [part.mean() for part in np.array_split(original, 16)]
        assert [part.mean() for part in np.array_split(drawn, 16)] == pytest.approx(parts, rel=0.05)


# --- command line -----------------------------------------------------------------------------------------------------


def test_a_trace_of_ones_own_becomes_a_sketch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, output = dependent_lengths()
    rows = [f"{p},{o},{0.5 * i}" for i, (p, o) in enumerate(zip(prompt, output, strict=True))]
    (tmp_path / "own.csv").write_text("in,out,t\n" + "\n".join(rows))
    arguments = ["--csv", str(tmp_path / "own.csv"), "--prompt-column", "in", "--output-column", "out"]
    assert fit_workload.main([*arguments, "--time-column", "t", "--out", str(tmp_path), "mine"]) == 0
    sketch = LengthSketch.load(tmp_path / "mine.json")
    assert sketch.profile == RateProfile(5000, (4.88,) * 512)  # 2,500 s in as many pieces
    assert sketch.drift is not None
    assert sketch.drift.sum() == 5000
    assert sketch.source["requests"] == 5000
    assert "mine: 5,000 requests" in capsys.readouterr().out


def test_without_its_trace_burstgpt_is_marked_as_published_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fit_workload.main(["--out", str(tmp_path), "burstgpt"]) == 0
    sketch = LengthSketch.load(tmp_path / "burstgpt.json")
    assert "published means only" in sketch.source["note"]
    prompt, output = sketch.sample(50_000, generator(0, "test"))
    assert (prompt.mean(), output.mean()) == pytest.approx((621, 126), rel=2e-3)


def test_traces_that_are_not_there_are_skipped_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fit_workload.main(["--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["burstgpt.json"]
    skipped = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert skipped == [f"{name}:" for name in (*MEASURED, "mooncake")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["alpaca"], "fit_workload: name='alpaca': choose from sharegpt, arxiv,"),
        (["sharegpt"], "fit_workload: no sharegpt_10k_llama2.csv: looked for"),
        (["--csv", "own.csv"], "fit_workload: --csv own.csv: give exactly one name"),
        (["--csv", "nowhere.csv", "mine"], "nowhere.csv"),
        (["--csv", "own.csv", "../../evil"], "fit_workload: name='../../evil': must be of letters"),
        (["--csv", "own.csv", "/evil"], "fit_workload: name='/evil': must be of letters"),
        (["--csv", "own.csv", ".hidden"], "fit_workload: name='.hidden': must be of letters"),
        (["--time-column", "at", "burstgpt"], "fit_workload: --time-column at: has no effect without --csv"),
        (["azure_con"], "did you mean azure_conv?"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fit_workload.main([*arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_sketch_is_written_over_only_if_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "burstgpt.json"
    kept.write_text("mine")
    arguments = ["burstgpt", "--out", str(tmp_path)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCK_DATA", str(tmp_path))
        patch.setenv("HOME", str(tmp_path))
        assert fit_workload.main(arguments) == 2
        assert "burstgpt.json: is there already" in capsys.readouterr().err
        assert kept.read_text() == "mine"
        assert fit_workload.main([*arguments, "--force"]) == 0
    assert kept.read_text() != "mine"


# --- the tracked sketches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MEASURED, "burstgpt", "mooncake"])
def test_tracked_sketches_are_small_and_name_their_source(name: str) -> None:
    path = TRACKED / f"{name}.json"
    assert path.stat().st_size <= 20_000
    assert "github.com/" in load_sketch(path).source["origin"]


@pytest.mark.parametrize("name", MEASURED)
def test_tracked_sketches_are_what_the_script_derives(name: str, data: Path, tmp_path: Path) -> None:
    assert fit_workload.main(["--out", str(tmp_path), name]) == 0
    tracked, derived = (LengthSketch.load(place / f"{name}.json") for place in (TRACKED, tmp_path))
    assert derived.prompt == pytest.approx(tracked.prompt, abs=0.2)
    assert derived.output == pytest.approx(tracked.output, abs=0.2)
    assert derived.profile == tracked.profile
    assert str(derived.drift) == str(tracked.drift)
    assert derived.source["sha256"] == tracked.source["sha256"]


@pytest.mark.parametrize("name", MEASURED)
def test_tracked_sketches_match_their_trace(name: str, data: Path) -> None:
    file = TRACES[name]
    trace = read(data / file.path, Columns(), timed=file.timed)
    prompt, output = LengthSketch.load(TRACKED / f"{name}.json").sample(len(trace.prompt), generator(1, "test"))
    original, drawn = trace.prompt + trace.output, prompt + output
    assert drawn.mean() == pytest.approx(original.mean(), rel=1e-3)
    assert drawn.std() == pytest.approx(original.std(), rel=1e-2)
    for probability in (0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        assert np.quantile(drawn, probability) == pytest.approx(np.quantile(original, probability), rel=0.03, abs=2)
    assert fit_workload.rank_correlation(prompt, output) == pytest.approx(
        fit_workload.rank_correlation(trace.prompt, trace.output), abs=0.03
    )
