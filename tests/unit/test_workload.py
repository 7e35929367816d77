import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from block.core.rng import generator
from block.core.types import Request
from block.workload.arrivals import RateProfile, recorded_gaps
from block.workload.spec import Facts, Workload, generate, make

CONF = Path(__file__).parents[2] / "conf" / "workload"
NAMES = ("sharegpt", "arxiv", "azure_conv", "azure_code", "burstgpt")

# Mean prompt and response tokens of the originals: counted with awk in the trace files (BurstGPT: published).
MEANS = {
    "sharegpt": (245.75, 325.63),
    "arxiv": (2588.08, 291.43),
    "azure_conv": (1154.70, 211.13),
    "azure_code": (2047.85, 27.88),
    "burstgpt": (621.0, 126.0),
}


def lengths(requests: list[Request]) -> Any:
    return np.array([(request.prompt_tokens, request.output_tokens) for request in requests])


def arrivals(requests: list[Request]) -> Any:
    return np.array([request.arrival for request in requests])


def gaps(workload: Workload, seed: int = 0) -> Any:
    return np.diff(arrivals(generate(workload, seed)), prepend=0.0) * workload.qps


# --- generate ---------------------------------------------------------------------------------------------------------


def test_requests_are_numbered_in_order_of_arrival_and_know_their_length() -> None:
    requests = generate(Workload(num_requests=500), 0)
    assert [request.id for request in requests] == list(range(500))
    assert (np.diff(arrivals(requests)) >= 0).all()
    assert requests[0].arrival > 0
    assert all(request.predicted_output_tokens == request.output_tokens for request in requests)
    assert all(type(request.prompt_tokens) is int and type(request.arrival) is float for request in requests)


def test_a_seed_decides_everything() -> None:
    workload = Workload(num_requests=200)
    assert generate(workload, 3) == generate(workload, 3)
    assert not np.array_equal(lengths(generate(workload, 3)), lengths(generate(workload, 4)))
    assert not np.array_equal(arrivals(generate(workload, 3)), arrivals(generate(workload, 4)))


@pytest.mark.parametrize("other", [{"arrivals": "constant"}, {"arrivals": "gamma", "burst_shape": 0.25}, {"qps": 7.0}])
def test_arrivals_never_move_the_lengths(other: dict[str, Any]) -> None:
    base = lengths(generate(Workload(num_requests=300), 1))
    assert np.array_equal(lengths(generate(Workload(num_requests=300, **other), 1)), base)


@pytest.mark.parametrize("other", [{"name": "arxiv"}, {"max_total_tokens": 512}, {"source": "synthetic"}])
def test_lengths_never_move_the_arrivals(other: dict[str, Any]) -> None:
    base = arrivals(generate(Workload(num_requests=300), 1))
    assert np.array_equal(arrivals(generate(Workload(num_requests=300, **other), 1)), base)


@given(qps=st.floats(0.01, 1e4), process=st.sampled_from(["poisson", "gamma", "constant", "trace"]))
@settings(max_examples=30, deadline=None)
def test_a_rate_only_stretches_the_arrivals_and_is_met_exactly(qps: float, process: str) -> None:
    shape = 0.5 if process == "gamma" else 1.0
    slow, fast = (
        arrivals(generate(Workload("azure_code", 100, rate, arrivals=process, burst_shape=shape), 5))
        for rate in (1.0, qps)
    )
    assert fast * qps == pytest.approx(slow, rel=1e-12)
    assert fast[-1] == pytest.approx(100 / qps, rel=1e-12)


def test_a_million_requests_are_at_hand_and_balanced() -> None:
    requests = generate(Workload(num_requests=200_000), 0)
    assert len(requests) == 200_000
    assert lengths(requests).mean(axis=0) == pytest.approx(MEANS["sharegpt"], rel=2e-3)


def test_the_module_brings_no_heavy_imports() -> None:
    check = "import sys, block.workload.spec; print({'hydra', 'pandas', 'torch', 'omegaconf'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# --- arrivals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.25, 0.5, 2.0])
def test_gamma_gaps_have_the_variance_of_their_shape(shape: float) -> None:
    values = gaps(Workload(num_requests=50_000, arrivals="gamma", burst_shape=shape))
    assert values.var() == pytest.approx(1 / shape, rel=0.05)


def test_poisson_gaps_are_exponential_and_independent() -> None:
    values = gaps(Workload(num_requests=50_000))
    for probability in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(values, probability) == pytest.approx(-math.log1p(-probability), rel=0.05)
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(50_000)


def test_gamma_of_shape_one_is_poisson() -> None:
    assert np.array_equal(gaps(Workload(num_requests=99, arrivals="gamma")), gaps(Workload(num_requests=99)))


def test_constant_arrivals_are_evenly_spaced() -> None:
    requests = generate(Workload(num_requests=4, qps=2.0, arrivals="constant"), 0)
    assert arrivals(requests).tolist() == [0.5, 1.0, 1.5, 2.0]


def test_a_rate_profile_has_its_requests_in_every_piece() -> None:
    """A lap is 400 requests in 40 s: half in 10 s, at twice the mean rate; half in 30 s, at two thirds of it."""
    values = RateProfile(400, (10.0, 30.0)).gaps(40_000, generator(0, "test"))
    halves = np.cumsum(values)[199::200]
    busy, calm = np.diff(halves)[1::2], np.diff(halves)[::2]
    assert busy == pytest.approx(np.full(len(busy), 100), abs=12)
    assert calm == pytest.approx(np.full(len(calm), 300), abs=12)
    inside = values.reshape(-1, 200)[::2, 1:-1]
    assert inside.mean() == pytest.approx(0.5, rel=0.02)
    assert inside.std() == pytest.approx(0.5, rel=0.05)  # at random, as in a Poisson process


def test_a_rate_profile_is_cut_into_equally_many_requests() -> None:
    """Four requests in 9 s, and a mean gap of 3 s before they begin again."""
    assert RateProfile.fit(np.array([5.0, 5.5, 6.0, 14.0]), 2) == RateProfile(4, (1.0, 11.0))


def test_azure_arrivals_follow_the_tracked_profile() -> None:
    """The code trace is idle for minutes and then bursts: far from Poisson, whose gaps have variance 1."""
    assert gaps(Workload("azure_code", 8819, arrivals="trace")).var() > 10


def test_recorded_gaps_keep_their_proportions_and_start_over() -> None:
    assert recorded_gaps(6, np.array([7.0, 8.0, 11.0])) == pytest.approx([1, 0.5, 1.5, 1, 0.5, 1.5])


# --- lengths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_sketches_carry_the_mean_lengths_of_the_originals(name: str) -> None:
    count = {"azure_conv": 19_366, "azure_code": 8_819}.get(name, 10_000)  # a part of these is no mean of them
    runs = [lengths(generate(Workload(name, count, max_total_tokens=32_768), seed)) for seed in range(5)]
    prompt, output = np.mean(runs, axis=(0, 1))
    assert prompt == pytest.approx(MEANS[name][0], rel=1e-3)
    assert output == pytest.approx(MEANS[name][1], rel=2e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_of_a_run_barely_depends_on_the_seed(name: str) -> None:
    """Independent draws of 10,000 would spread by std / 100, that is by 0.3 to 1.1 % of the mean."""
    runs = [lengths(generate(Workload(name), seed)).sum(axis=1) for seed in range(8)]
    spread = np.std([run.mean() for run in runs])
    assert spread < np.std(runs[0]) / 100 / 20


def test_lengths_drift_as_in_the_trace() -> None:
    """Mean responses of the fifths of azure_conv, again when it runs out; and within a stretch there is no order.

    Those of a prompt's bin are drawn from all times, so the means differ by a little less than the trace's.
    """
    drawn = lengths(generate(Workload("azure_conv", 2 * 19_366, max_total_tokens=32_768), 0))[:, 1]
    fifths = [part.mean() for lap in np.split(drawn, 2) for part in np.array_split(lap, 5)]
    assert fifths == pytest.approx([254, 224, 140, 185, 250] * 2, rel=0.08)
    stretches = drawn[: 128 * 151].reshape(128, 151).astype(float)
    stretches -= stretches.mean(axis=1, keepdims=True)
    assert abs((stretches[:, 1:] * stretches[:, :-1]).mean() / stretches.var()) < 0.03


def test_lengths_come_in_random_order() -> None:
    totals = lengths(generate(Workload(), 0)).sum(axis=1)
    for lag in (1, 2):
        assert abs(np.corrcoef(totals[lag:], totals[:-lag])[0, 1]) < 4 / math.sqrt(len(totals))
    assert abs(np.corrcoef(totals, np.arange(len(totals)))[0, 1]) < 4 / math.sqrt(len(totals))


@given(longest=st.integers(2, 3000), seed=st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_a_request_longer_than_the_model_loses_prompt_first(longest: int, seed: int) -> None:
    whole = lengths(generate(Workload("arxiv", 200, max_total_tokens=10**6), seed))
    cut = lengths(generate(Workload("arxiv", 200, max_total_tokens=longest), seed))
    for (prompt, output), (cut_prompt, cut_output) in zip(whole, cut, strict=True):
        assert 1 <= cut_prompt <= prompt
        assert cut_output == min(output, longest - 1)
        assert cut_prompt + cut_output == min(prompt + cut_output, longest)


def test_synthetic_lengths_have_the_moments_asked_for() -> None:
    workload = Workload("any", source="synthetic", max_total_tokens=10**6, prompt_mean=900, prompt_cv=0.5, output_cv=2)
    drawn = lengths(generate(workload, 0))
    assert drawn.mean(axis=0) == pytest.approx([900, 256], rel=5e-3)
    assert drawn.std(axis=0) / drawn.mean(axis=0) == pytest.approx([0.5, 2.0], rel=0.1)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 4 / math.sqrt(len(drawn))


# --- traces -----------------------------------------------------------------------------------------------------------

OWN = "prompt_tokens,output_tokens,arrival\n10,1,5.0\n20,2,6.0\n30,3,9.0\n"


def own(tmp_path: Path, text: str = OWN, **settings: Any) -> Workload:
    path = tmp_path / "own.csv"
    path.write_text(text)
    return Workload("mine", source="trace", trace_path=str(path), **settings)


def test_a_trace_is_replayed_in_order_and_starts_over(tmp_path: Path) -> None:
    requests = generate(own(tmp_path, num_requests=4), 0)
    assert lengths(requests).tolist() == [[10, 1], [20, 2], [30, 3], [10, 1]]


def test_a_traces_own_times_are_scaled_to_the_rate(tmp_path: Path) -> None:
    requests = generate(own(tmp_path, num_requests=3, qps=0.5, arrivals="trace"), 0)
    assert arrivals(requests) == pytest.approx([2.0, 3.0, 6.0])


def test_without_a_rate_a_traces_own_times_stay_as_they_are(tmp_path: Path) -> None:
    workload = own(tmp_path, num_requests=None, qps=None, arrivals="trace")
    requests, facts = make(workload, 0)
    assert arrivals(requests).tolist() == [0.0, 1.0, 4.0]
    assert (facts.requests, facts.native_qps) == (3, 0.5)
    assert facts.lines()[1:] == ["recorded at 0.5 requests/s, replayed as it is"]
    again = arrivals(generate(own(tmp_path, num_requests=5, qps=None, arrivals="trace"), 0))
    assert again.tolist() == [0.0, 1.0, 4.0, 6.0, 7.0]  # a mean gap lies between two rounds


def test_without_a_rate_a_sketch_keeps_that_of_its_trace() -> None:
    requests = generate(Workload("azure_code", 8819, None, arrivals="trace"), 0)
    assert requests[-1].arrival == pytest.approx(3_436, rel=0.01)  # seconds that the trace lasts


def test_what_is_done_to_a_trace_is_told(tmp_path: Path) -> None:
    text = OWN + "50,60,10.0\n0,5,11.0\n5,0,12.0\n"
    settings = {"qps": 2.0, "arrivals": "trace", "max_total_tokens": 32}
    with pytest.raises(
        ValueError, match=r"workload.max_total_tokens=32: 2 of 4 requests of .*own.csv are longer, up to"
    ):
        generate(own(tmp_path, text, **settings), 0)
    requests, facts = make(own(tmp_path, text, too_long="cut", num_requests=3, **settings), 0)
    assert lengths(requests).tolist() == [[10, 1], [20, 2], [29, 3]]
    path = str(tmp_path / "own.csv")
    assert facts == Facts(
        requests=3,
        qps=2.0,
        native_qps=0.6,
        file=path,
        format="block",
        rows=6,
        dropped={"prompt_tokens below 1": 1, "output_tokens below 1": 1},
        unused=1,
        cut=1,
        mean_prompt=(20.0, pytest.approx(59 / 3)),  # type: ignore[arg-type]
        max_total_tokens=32,
    )
    assert facts.lines() == [
        f"{path}: 6 rows, read as block",
        "left out: 1 of 6 rows: prompt_tokens below 1",
        "left out: 1 of 6 rows: output_tokens below 1",
        "cut: 1 of 3 requests to 32 tokens, their prompts first (mean prompt 20 to 20)",
        "not replayed: the last 1 rows (workload.num_requests=null takes all)",
        "recorded at 0.6 requests/s, replayed at 2 (workload.qps=null replays it as it is)",
    ]
    assert facts.lines(searched=True)[-1] == "recorded at 0.6 requests/s, replayed at each rate that the search tries"
    requests, facts = make(own(tmp_path, text, too_long="drop", num_requests=5, **settings), 0)
    assert lengths(requests).tolist() == [[10, 1], [20, 2], [10, 1], [20, 2], [10, 1]]
    assert facts.dropped["longer than 32 tokens"] == 2
    assert "replayed 2.5 times, for 5 requests" in facts.lines()
    assert facts.native_qps == 0.6  # of the recording, not of what is left of it
    gaps = np.diff(arrivals(generate(own(tmp_path, text, too_long="drop", **{**settings, "qps": None}), 0)))[:3]
    assert gaps == pytest.approx([1, 1, 1])


def test_a_trace_that_changes_is_read_again(tmp_path: Path) -> None:
    assert lengths(generate(own(tmp_path, num_requests=1), 0)).tolist() == [[10, 1]]
    assert lengths(generate(own(tmp_path, OWN.replace("10,1", "11,1"), num_requests=1), 0)).tolist() == [[11, 1]]


def test_nothing_left_of_a_trace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"workload.too_long=drop: all requests of"):
        generate(own(tmp_path, max_total_tokens=5, too_long="drop"), 0)


def test_time_stamps_are_read_and_sorted_and_failed_requests_left_out(tmp_path: Path) -> None:
    text = "In,Out,At\n30,3,2023-11-16 18:00:09.0\n10,1,2023-11-16 18:00:05.0000000\n9,0,2023-11-16 18:00:00.0\n"
    columns = {"prompt_column": "In", "output_column": "Out", "time_column": "At"}
    requests = generate(own(tmp_path, text, num_requests=2, qps=1.0, arrivals="trace", **columns), 0)
    assert lengths(requests).tolist() == [[10, 1], [30, 3]]
    assert arrivals(requests) == pytest.approx([1.0, 2.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt_tokens,answer\n1,2\n", r"own.csv: has the columns prompt_tokens, answer, .*workload.output_column"),
        ("prompt_tokens,output_tokens\n1,many\n", r"own.csv: line 2: column 'output_tokens' .*holds 'many'"),
        ("prompt_tokens,output_tokens\n1,\n2,3\n", r"own.csv: line 2: column 'output_tokens' .*holds nothing"),
        ("prompt_tokens,output_tokens\n1,0\n", "no row has both"),
    ],
)
def test_a_malformed_trace_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        generate(own(tmp_path, text), 0)
    assert "\n" not in str(error.value)


def test_times_that_stand_still_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two different arrival times"):
        generate(own(tmp_path, "prompt_tokens,output_tokens,arrival\n1,1,3\n1,1,3\n", arrivals="trace"), 0)


def test_a_missing_trace_names_the_places_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(FileNotFoundError) as error:
        generate(Workload(source="trace"), 0)
    message = str(error.value)
    for part in (f"{tmp_path}/data/traces/", f"{tmp_path}/home/.cache/block/traces/", "scripts/fetch_data.py sharegpt"):
        assert part in message
    assert "\n" not in message
    with pytest.raises(FileNotFoundError, match=r"workload\.trace_path=nowhere\.csv: no such file"):
        generate(Workload(source="trace", trace_path="nowhere.csv"), 0)


def test_block_data_comes_before_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BLOCK_DATA", raising=False)
    for place, tokens in ((tmp_path / ".cache" / "block", 11), (tmp_path / "data", 22)):
        (place / "traces").mkdir(parents=True)
        (place / "traces" / "sharegpt_10k_llama2.csv").write_text(f"num_prefill_tokens,num_decode_tokens\n{tokens},1\n")
    assert generate(Workload(source="trace", num_requests=1), 0)[0].prompt_tokens == 11
    monkeypatch.setenv("BLOCK_DATA", str(tmp_path / "data"))
    assert generate(Workload(source="trace", num_requests=1), 0)[0].prompt_tokens == 22


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arrivals": "uniform"}, "workload.arrivals='uniform': choose from poisson, gamma, constant, trace"),
        ({"source": "file"}, "workload.source='file': choose from sketch, trace, synthetic"),
        ({"name": "alpaca"}, "workload.name='alpaca': choose from arxiv, .*sharegpt"),
        (
            {"name": "alpaca", "source": "trace"},
            r"workload\.trace_path=null: 'alpaca' has .* give FILE\.csv, or .*sharegpt",
        ),
        ({"num_requests": 10**19}, f"workload.num_requests={10**19}: must be at most 1,000,000,000"),
        ({"num_requests": 0}, "workload.num_requests=0: must be an integer >= 1"),
        ({"num_requests": 1.5}, "workload.num_requests=1.5: must be an integer >= 1"),
        ({"max_total_tokens": 1}, "workload.max_total_tokens=1: must be an integer >= 2"),
        ({"qps": 0.0}, "workload.qps=0.0: must be a finite number > 0"),
        ({"qps": math.inf}, "workload.qps=inf: must be a finite number > 0"),
        ({"qps": math.nan}, "workload.qps=nan: must be a finite number > 0"),
        ({"arrivals": "gamma", "burst_shape": -1.0}, "workload.burst_shape=-1.0: must be a finite number > 0"),
        ({"burst_shape": 0.5}, "workload.burst_shape=0.5: needs arrivals=gamma, not poisson"),
        ({"output_cv": 0.0}, "workload.output_cv=0.0: must be a finite number > 0"),
        ({"source": "synthetic", "prompt_mean": 4096.0}, r"workload.prompt_mean=4096.0: must be in \[1, max_total"),
        ({"arrivals": "trace"}, "workload.arrivals=trace: sharegpt with source=sketch has no arrival times; choose"),
        ({"arrivals": "trace", "source": "synthetic"}, "source=synthetic has no arrival times"),
        ({"trace_path": "a.csv"}, "workload.trace_path=a.csv: has no effect without workload.source=trace"),
        ({"prompt_column": "p"}, "workload.prompt_column=p: has no effect without workload.source=trace"),
        ({"output_column": "p"}, "workload.output_column=p: has no effect without workload.source=trace"),
        ({"time_column": "t"}, "workload.time_column=t: has no effect without workload.source=trace"),
        ({"time_unit": "s"}, "workload.time_unit=s: has no effect without workload.source=trace"),
        ({"format": "azure"}, "workload.format=azure: has no effect without workload.source=trace"),
        ({"source": "trace", "time_column": "t"}, "workload.time_column=t: has no effect without workload.arrivals"),
        ({"source": "trace", "time_unit": "ms"}, "workload.time_unit=ms: has no effect without workload.arrivals"),
        (
            {"source": "trace", "trace_path": "gpteacher", "format": "azure"},
            "workload.format=azure: has no effect on gpteacher",
        ),
        ({"prompt_mean": 512.0}, "workload.prompt_mean=512.0: has no effect without workload.source=synthetic"),
        ({"source": "trace", "output_cv": 2.0}, "workload.output_cv=2.0: has no effect without workload.source=synth"),
        ({"source": "trace", "format": "azur"}, r"workload.format=azur: did you mean azure\? choose from block"),
        ({"qps": None}, "workload.qps=null: arrivals=poisson has no times to replay"),
        ({"num_requests": None}, "workload.num_requests=null: source=sketch has no end; give a number"),
        ({"too_long": "shorten"}, "workload.too_long='shorten': choose from refuse, cut, drop"),
        ({"too_long": "drop"}, "workload.too_long=drop: source=sketch is cut; of a trace it can be chosen"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Workload(**values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_choice_builds_and_repeats_no_default(path: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[assignment]
    assert values.pop("defaults") == ["/schema/workload@_here_", "_self_"]
    defaults = {field.name: field.default for field in fields(Workload)}
    assert all(value != defaults[key] for key, value in values.items())
    if values.get("trace_path") == "???":
        values["trace_path"] = own(tmp_path).trace_path
    if values.get("max_total_tokens") == "${engine.max_model_len}":
        values["max_total_tokens"] = 4096
    assert len(generate(Workload(**values, num_requests=20), 0)) == 20


def test_the_choices_are_the_documented_ones() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == {*NAMES, "synthetic", "trace", "chat", "agent", "mooncake"}
