"""The report as a file: what is in it, where it comes from, what is never shown. test_report_browser.py opens it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import report_runs
from report_page import HOSTILE, Page, made

from pyarith.evaluation import TransferResult
from pyarith.reporting import SavedRun
from pyarith.reporting.report import blocks, write_report
from pyarith.reporting.report.sections import SECTIONS

STYLE = (Path(blocks.__file__).parent / "templates" / "style.css").read_text()


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return report_runs.write_all(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def page(whole):
    return made(whole)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "hostile"
    report_runs.write_run(path, signs=("+",), prompt=HOSTILE)
    report_runs.add_analysis(path, foreign=HOSTILE, prompt=HOSTILE)
    report_runs.add_transfer(path, task=HOSTILE)
    report_runs.add_compare(path, arm=HOSTILE)
    record = json.loads((path / "run.json").read_text())
    record["model"]["name"] = record["settings"]["model"] = HOSTILE
    record["command_line"] = ["/x/pyarith", "discover", HOSTILE, "\udcff"]
    (path / "run.json").write_text(json.dumps(record))
    return path


# one file that needs nothing


def test_nothing_is_fetched(page):
    names = ("src", "href", "srcset", "data", "action", "poster")
    addresses = [a[name] for _, a in page.tags for name in a if name in names]
    assert all(value.startswith("#") or value == "data:," for value in addresses), addresses
    assert not re.search(r"url\(|@import|https?:", "".join(page.styles) + page.scripts[1])
    assert {tag for tag, _ in page.tags} & {"iframe", "object", "embed", "base", "form", "img"} == set()


def test_the_page_allows_its_own_scripts_and_nothing_else(page):
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert len(page.scripts) == 2 and "default-src 'none'" in policy
    allowed = [f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in page.scripts]
    assert re.search("script-src ([^;]*)", policy).group(1).split() == allowed
    assert "http" not in policy and "unsafe-eval" not in policy
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]


def test_plotly_is_inside_once_and_the_file_stays_small(page):
    from plotly.offline import get_plotlyjs

    assert page.source.count(get_plotlyjs()) == 1
    assert len(page.source.encode()) < 8e6


# what is shown


def test_every_section_is_there_in_order(page):
    assert list(page.sections) == [section.id for section in SECTIONS]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} == set(page.sections)
    assert not any("makes it" in section["text"] for section in page.sections.values())


def test_missing_steps_are_named_with_their_command(tmp_path):
    path = report_runs.write_run(tmp_path / "a run")
    report = write_report(SavedRun.open(path))
    page = Page(report.path)
    assert report.shown == ("Overview", "Heads", "MLPs", "How sure", "Settings")
    for section, command in (("knockout", "knockout"), ("lens", "analyze"), ("transfer", "transfer")):
        text = page.sections[section]["text"]
        assert "Not done yet." in text and f"pyarith {command} '{path}' makes it." in text
        assert page.sections[section]["tables"] == page.sections[section]["figures"] == []
    assert f"Knock-outs: Not done yet. pyarith knockout '{path}'" in report.missing and len(report.missing) == 10


@pytest.mark.parametrize("number", [0, 1])
def test_heads_are_those_of_the_table(whole, page, number):
    rows = read(whole / ("add", "mul")[number] / "heads.csv")
    section, sign = page.sections["heads"], report_runs.SIGNS[number]
    figure = section["figures"][number]
    z, hover = figure["data"][0]["z"], figure["data"][0]["hovertext"]
    assert len(rows) == report_runs.LAYERS * report_runs.HEADS
    for row in rows:
        layer, head = int(row["layer"]), int(row["head"])
        assert z[layer][head] == pytest.approx(100 * float(row["effect"]), rel=1e-12)
        effect, change = f"{100 * float(row['effect']):+.1f}%", f"{float(row['logit_change']):+.2f} logits"
        interval = f"{100 * float(row['effect_low']):+.1f}% .. {100 * float(row['effect_high']):+.1f}%"
        for text in (f"head {layer}.{head}<", effect, change, f"95% interval {interval}", "noise floor 3e-06"):
            assert text in hover[layer][head], hover[layer][head]
        assert f"adjusted p {float(row['p_adjusted']):.2g}" in hover[layer][head]
    top, every = section["tables"][2 * number : 2 * number + 2]
    assert every[0] == ["head", "effect", "interval", "change in logits", "p", "adjusted p", "noise floor, logits"]
    assert [line[0] for line in every[1:]] == [f"{row['layer']}.{row['head']}" for row in rows]
    assert [line[1] for line in every[1:]] == [f"{100 * float(row['effect']):+.1f}%" for row in rows]
    assert top == every[:11]
    assert {(s["x0"] + 0.5, s["y0"] + 0.5) for s in figure["layout"]["shapes"]} == {
        (float(row["head"]), float(row["layer"])) for row in rows if row["key"] == "1"
    }
    key = report_runs.KEY[sign]
    assert [str(key)] == [line[1] for line in page.sections["overview"]["tables"][0][1:] if sign in line[0]]
    limits = {f["data"][0]["zmax"] for f in section["figures"]} | {-f["data"][0]["zmin"] for f in section["figures"]}
    assert limits == {max(abs(one) for f in section["figures"] for row in f["data"][0]["z"] for one in row)}


def test_mlps_have_their_intervals(whole, page):
    rows = sorted(read(whole / "add" / "mlps.csv"), key=lambda row: int(row["layer"]))
    bar = page.sections["mlps"]["figures"][0]["data"][0]
    effect = 100 * np.array([float(row["effect"]) for row in rows])
    assert bar["x"] == pytest.approx(effect)
    low, high = effect - bar["error_x"]["arrayminus"], effect + bar["error_x"]["array"]
    assert low == pytest.approx([100 * float(row["effect_low"]) for row in rows])
    assert high == pytest.approx([100 * float(row["effect_high"]) for row in rows])
    assert [line[0] for line in page.sections["mlps"]["tables"][0][1:]] == ["0", "1", "2"]


def test_what_is_needed_to_judge(whole, page):
    record = json.loads((whole / "run.json").read_text())
    summary = record["runs"]["+"]["summary"]
    table = {row[0]: row[1] for row in page.sections["judging"]["tables"][0]}
    assert table["corruption strength"] == f"{summary['strength']:.3f}"
    assert table["verification error, in logits"] == "2e-06" and table["noise floor, in logits"] == "3e-06"
    assert table["answered rightly"] == "97.2%" and table["key heads"] == "1 of 12"
    assert "path patching head -> logits" in page.sections["overview"]["text"]
    assert record["runs"]["+"]["confidence"]["method"] in page.sections["judging"]["text"]
    halves = page.sections["judging"]["tables"][1][1]
    assert halves[2] == f"{record['runs']['+']['stability']['spearman']['median']:+.2f}"


def test_knockout_lines_and_bands_are_those_of_the_record(whole, page):
    rows = json.loads((whole / "knockout" / "knockout.json").read_text())["curves"]["+"]["rows"]
    section = page.sections["knockout"]
    traces = section["figures"][0]["data"]
    lines = {trace["name"]: trace["y"] for trace in traces if "name" in trace}
    for arm, name in (("key", "key heads (top k)"), ("same_layer", "random heads of the same layers")):
        assert lines[name] == pytest.approx([100 * row["accuracy"] for row in rows if row["arm"] == arm])
    edges = [trace["y"] for trace in traces if trace["legendgroup"] == "random heads" and "name" not in trace]
    for edge, y in zip(("accuracy_min", "accuracy_max"), edges, strict=True):
        assert y == pytest.approx([100 * row[edge] for row in rows if row["arm"] == "random"])
    assert [trace["fill"] for trace in traces if "fill" in trace] == ["tonexty"] * 2  # the two controls with draws
    assert len(section["tables"][0]) == 1 + len(rows)
    assert section["tables"][0][1][3] == f"{100 * rows[0]['accuracy']:.1f}%"
    assert section["tables"][0][1][6] == f"{100 * rows[0]['accuracy'] - 100:+.1f}%"
    assert section["figures"][0]["layout"]["shapes"][0]["y0"] == pytest.approx(10.0)
    assert "accuracy 10.0%, logit +4.00" in section["text"] and "operand pair with the prompts" in section["text"]


def test_analyses_are_those_of_the_tables(whole, page):
    folder = whole / "analysis"
    masses = [row for row in read(folder / "attention.csv") if row["operator"] == "+"]
    roles, looked = page.sections["attention"]["figures"][:2]
    assert [trace["name"] for trace in roles["data"]][:3] == ["operand A", "operand B", "operator"]
    for trace, role in zip(roles["data"], ("operand_a", "operand_b", "operator"), strict=False):
        assert trace["x"] == pytest.approx([100 * float(row["mass"]) for row in masses if row["role"] == role])
    tokens = [row for row in read(folder / "attention_tokens.csv") if row["operator"] == "+"]
    assert np.ravel(looked["data"][0]["z"]) == pytest.approx([100 * float(row["attention"]) for row in tokens])
    assert looked["layout"]["xaxis"]["ticktext"] == ["zero", "t11", "t12", "t13", "t14", "t15"]
    curve = page.sections["cosines"]["figures"][0]["data"]
    answer = [float(row["answer"]) for row in read(folder / "mlp.csv") if row["operator"] == "+"]
    assert next(t["y"] for t in curve if t.get("name") == "cos(what the MLP adds, answer)") == pytest.approx(answer)
    points = json.loads((folder / "analysis.json").read_text())["mlp"]["+"]["points"]
    assert all(f"{name} at layer {layer}" in page.sections["cosines"]["text"] for name, layer in points.items())
    lens = page.sections["lens"]["tables"][0]
    first = [row for row in read(folder / "lens.csv") if row["operator"] == "+" and row["layer"] == "0"]
    before = [f"{row['text']!r}\u00a0{float(row['probability']):.3f}" for row in first if row["stage"] == "before"]
    assert lens[1][1] == "\n".join(before) and "'zero'" in lens[1][1]
    up = next(row for row in read(folder / "lens_promoted.csv") if row["operator"] == "+")
    assert lens[1][3].startswith(f"{up['text']!r}\u00a0{float(up['logits']):+.2f}")
    parts = [row for row in read(folder / "attribution.csv") if row["operator"] == "+"]
    z = page.sections["attribution"]["figures"][0]["data"][0]["z"]
    assert np.ravel(z) == pytest.approx([float(row["logit"]) for row in parts if row["kind"] == "head"])
    pair = read(folder / "overlap.csv")[0]
    assert page.sections["overlap"]["figures"][0]["data"][0]["z"] == [
        [None, pytest.approx(float(pair["spearman"]))],
        [pytest.approx(float(pair["spearman"])), None],
    ]


def test_transfer_is_the_result(whole, page):
    result = TransferResult.load(whole / "transfer" / "result.json")
    section = page.sections["transfer"]
    trace, expected = section["figures"][0]["data"][0], 100 * result.matrix()
    assert trace["z"][2] == [None, None] and np.array(trace["z"][:2], float) == pytest.approx(expected[:2])
    cell, row = result.cells[0], result.rows()[0]
    assert section["tables"][0][1][:7] == [
        *("two-digit sums", "key +", "1", "20", "100.0%", f"{100 * cell.accuracy:.1f}%"),
        f"{100 * cell.relative_drop_correct:+.1f}%",
    ]
    for text in (f"p 0.03, q {row['q']:.2g}", f"{100 * row['random_mean']:.1f}%", f"{100 * cell.low:+.1f}% .. "):
        assert text in trace["hovertext"][0][0], trace["hovertext"][0][0]
    assert "never gets these right, so there is nothing to knock out: never right." in section["text"]


def test_fine_tuning_is_the_step(whole, page):
    rows = read(whole / "tune" / "losses.csv")
    section = page.sections["tune"]
    trace = section["figures"][0]["data"][0]
    losses = [float(row["task_loss"]) for row in rows]
    assert len(rows) == 130 and len(trace["y"]) == 44  # means of three steps, the last of one
    assert trace["y"][0] == pytest.approx(sum(losses[:3]) / 3) and trace["y"][-1] == pytest.approx(losses[-1])
    for text in ("12,345 parameters", "1.2, 2.0", "MLPs of layers 2", "read by 1.3 too", f"{losses[-1]:.3f}"):
        assert text in section["text"], text


def test_ways_of_training_are_those_of_the_record(whole, page):
    record = json.loads((whole / "compare" / "compare.json").read_text())["comparison"]
    section = page.sections["compare"]
    data, layout = section["figures"][0]["data"], section["figures"][0]["layout"]
    for place, one in enumerate(record["summary"]):
        others, chosen, mean = data[3 * place : 3 * place + 3]
        own = [point for point in record["frontier"] if point["arm"] == one["arm"]]
        best = [point for point in own if point["rate"] == one["rate"]]
        assert chosen["x"] == pytest.approx([100 * point["gain"] for point in best])
        assert chosen["y"] == pytest.approx([100 * point["retention"] for point in best])
        assert len(others["x"]) == len(own) - len(best) == 2
        assert mean["x"] == pytest.approx([100 * one["target_change"]])
        assert mean["y"] == pytest.approx([100 * one["retention_change"]])
        assert layout["xaxis"]["range"][0] < min(chosen["x"]) and max(chosen["x"]) < layout["xaxis"]["range"][1]
        line = section["tables"][0][1 + place]
        assert line[0] == one["arm"] and line[3] == f"{100 * one['target']:.1f}%"
        assert line[4] == f"{100 * one['target_change']:+.1f}%" and line[2] == f"{one['n_parameters']:,}"
    assert section["tables"][0][1][6:] == ["n/a", "", "n/a"]
    assert section["tables"][0][2][6] == f"{100 * record['summary'][1]['difference']:+.1f}%"
    assert len(section["tables"][1]) == 1 + len(record["frontier"]) == 9


def test_how_it_was_made(whole, page):
    record, text = json.loads((whole / "run.json").read_text()), page.sections["provenance"]["text"]
    for value in (record["model"]["fingerprint"], record["runs"]["*"]["data"]["hash"], record["versions"]["torch"]):
        assert value in text
    steps = [row[0] for row in page.sections["provenance"]["tables"][0][1:]]
    assert steps == ["discover", "knockout", "analysis", "transfer", "tune", "compare", "profile"]


def test_one_operator_has_no_tabs_and_a_reason_for_what_was_not_done(hostile):
    page = made(hostile)
    assert not [a for _, a in page.tags if a.get("role") == "tab"]
    assert "Not done: the run has one operator." in page.sections["overlap"]["text"]
    assert page.sections["overlap"]["figures"] == []


def test_figures_are_what_plotly_knows(page):
    from plotly.graph_objects import Figure

    def coloured(value):
        if isinstance(value, dict):
            return {key: coloured(one) for key, one in value.items()}
        if isinstance(value, list):
            return [coloured(one) for one in value]
        scale = isinstance(value, str) and value in ("@diverging", "@sequential")
        return "RdBu" if scale else "#123456" if isinstance(value, str) and value.startswith("@") else value

    for section in page.sections.values():
        for figure in section["figures"]:
            Figure(coloured(figure))  # refuses unknown names and bad values


def test_colours_are_in_both_palettes(page):
    figures = json.dumps([section["figures"] for section in page.sections.values()])
    named = set(re.findall(r'"@([\w-]+)(?:/[\d.]+)?"', figures)) - {"diverging", "sequential"}
    named |= {"low", "low-1", "zero", "high-1", "high"}  # of the scales, in report.js
    light, dark = (set(re.findall(r"--([\w-]+): #[0-9a-f]{6}", part)) for part in STYLE.split("@media", 2)[:2])
    assert named <= light and light == dark and len(named) > 12


# foreign text


def test_foreign_text_stays_text(hostile):
    page = made(hostile)
    assert len(page.scripts) == 2 and not [tag for tag, _ in page.tags if tag in ("img", "b", "i")]
    assert page.source.count("<script>") == 2 and "onerror=&#34;" in page.source
    for name in ("attention", "lens", "transfer", "provenance"):
        assert HOSTILE in page.sections[name]["text"].replace("\\n", ""), name
    inside = json.dumps([section["figures"] for section in page.sections.values()])
    assert "onerror" in inside and not re.search(r"<(?!/?b>|br>)", inside)  # our own bold and line ends only
    assert "&lt;/script&gt;&lt;script&gt;" in inside and "&amp;lt;i&amp;gt;" in inside
    assert "49" not in page.sections["lens"]["tables"][0][1][1]  # no template in a template


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>&amp;", "a &lt;b&gt;&amp;amp;"),
        ("two\nlines\t", "two\\nlines\\t"),
        ("\u202eright to left", "\\u202eright to left"),
        ("\udcff", "\\udcff"),
        ("x" * 300, "x" * 199 + "\u2026"),
        ("7 \u00d7 8", "7 \u00d7 8"),
    ],
)
def test_labels(text, shown):
    assert blocks.label(text) == shown


def test_unknown_numbers_are_no_numbers():
    assert [form(float("nan")) for form in (blocks.percent, blocks.share, blocks.small)] == ["n/a"] * 3
    assert blocks.between(float("nan"), 1.0) == "" and blocks.number("") != blocks.number("")


def test_the_profile_shows_phases_ops_memory_and_the_forecast(page):
    section = page.sections["profile"]
    phases, compared, held, ops = section["tables"]
    assert phases[1:] == [
        ["replay", "1.5 s", "3 TFLOP", "5 GiB", "80%"],
        ["capture", "250 ms", "0 FLOP", "1 GiB", "50%"],
    ]
    assert compared[1:] == [
        ["capture FLOP", "100 GFLOP", "0 FLOP"],
        ["replay FLOP", "2.9 TFLOP", "3 TFLOP"],
        ["bytes beyond the model", "4 MiB", "3 MiB"],
        ["seconds", "1.6 s", "1.75 s"],
    ]
    assert held[1:] == [["replay rows", "2 MiB"], ["captured base", "1 MiB"]]
    assert ops[1][:3] == ["replay", "aten::mm", "64"]
    assert "products 2 TFLOP/s, copies 10 GiB/s" in section["text"] and "gave the same bits" in section["text"]
