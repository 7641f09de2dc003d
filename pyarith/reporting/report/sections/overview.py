"""What was asked, of which model, and what is needed to judge the numbers that follow."""

from __future__ import annotations

from typing import Any

from pyarith.reporting.report.blocks import (
    Block,
    Table,
    Text,
    between,
    moment,
    number,
    plain,
    printable,
    share,
    signed,
    small,
)
from pyarith.reporting.report.sections.effects import sender_row, sender_table
from pyarith.reporting.report.sections.section import Section
from pyarith.reporting.report.source import Source

_READING = (
    "Effect: (patched logit - unpatched logit) / clean logit of the right answer, the mean over prompts. Corruption "
    "strength: P(answer | clean) - P(answer | corrupted); a weak corruption removes little, and small effects then say "
    "little. Noise floor: how far a head patched with its own clean output strays from the model's own logit, which is "
    "what rounding costs. Verification error: the largest difference, in logits, between this run and senders that "
    "were run again one by one with hooks. An effect says that a head carries something that differs between clean and "
    "corrupted prompt; whether the model needs the head takes a knock-out."
)


def build(source: Source) -> list[Block]:
    record = source.run.record
    model, runs = record["model"], record["runs"]
    size = f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']} on {model['device']}"
    kinds = sorted({str(run["data"].get("corruption", "not recorded")) for run in runs.values()})
    who = f"{printable(model['name'])} ({size}). Corruption: {printable(', '.join(kinds))}."
    return [
        Text(f"{who} Discovered {moment(record['started'])}."),
        *_strongest(source),
        *(Text(f"Quantity: {quantity}.", "note") for quantity in dict.fromkeys(r["quantity"] for r in runs.values())),
    ]


def judging(source: Source) -> list[Block]:
    return [
        Table(["", *source.titles.values()], _measures(source)),
        *_races(source),
        *_sureness(source),
        Text(_READING, "note"),
    ]


def _measures(source: Source) -> list[list[str]]:
    columns = [run["summary"] for run in source.run.record["runs"].values()]

    def row(what: str, cell: Any) -> list[str]:
        return [what, *(cell(column) for column in columns)]

    return [
        row("prompts", lambda c: str(c["prompts"])),
        row("left out: misaligned", lambda c: str(sum(c["misaligned_left_out"].values()))),
        row("left out: answered wrongly", lambda c: str(c["wrong_left_out"])),
        row("answered rightly", lambda c: share(c["accuracy"])),
        row("P(answer), clean prompt", lambda c: plain(c["p_clean"])),
        row("P(answer), corrupted prompt", lambda c: plain(c["p_corrupted"])),
        row("corruption strength", lambda c: plain(c["strength"])),
        row("still answered when corrupted", lambda c: share(c["corrupted_still_correct"])),
        row("answer logit, clean prompt", lambda c: plain(c["clean_logit"])),
        row("answer logit, corrupted prompt", lambda c: plain(c["corrupted_logit"])),
        row("clean logit <= 0, no ratio", lambda c: str(c["ratio_excluded"])),
        row("noise floor, in logits", lambda c: small(c["noise_floor"])),
        row("verification error, in logits", lambda c: small(number(c["verification_error"]))),
        row("key heads", lambda c: f"{len(c['key_heads'])} of {c['heads']}"),
    ]


def _strongest(source: Source) -> list[Block]:
    """The key heads of all operators in one table."""
    rows = [
        [source.titles[sign], *sender_row(row)]
        for sign in source.run.signs
        for row in source.table(sign, "heads.csv")
        if row["key"] == "1"
    ]
    thresholds = sorted({run["summary"]["threshold"] for run in source.run.record["runs"].values()})
    below = ", ".join(share(threshold, 0) for threshold in thresholds)
    if not rows:
        return [Text(f"No head has an effect below {below}.")]
    return [sender_table(rows, "head", f"Key heads: effect below {below}", first=("operator",), words=2)]


def _races(source: Source) -> list[Block]:
    """The top heads of runs with top_k, what is guaranteed, and what it cost."""
    rows, lines = [], []
    for sign, title in source.titles.items():
        top = source.run.top(sign)
        if top is None:
            continue
        for head in top.heads:
            interval = between(float(top.low[head]), float(top.high[head]), signed)
            cells = [signed(float(top.change[head])), interval, str(top.n_prompts[head])]
            rows.append([title, str(head), top.decision(head), *cells])
        spent = f"{top.n_used} of {top.n_given} prompts, {share(top.rows / top.rows_full, 0)} of the rows of a full run"
        lines.append(Text(f"{title}: {spent}; {top.guarantee}.", "note"))
    if not rows:
        return []
    columns = ["operator", "head", "decision", "change in logits", "interval", "prompts"]
    return [Table(columns, rows, "The heads that lower the answer's logit most, as far as they were raced", 3), *lines]


def _sureness(source: Source) -> list[Block]:
    """How intervals and p-values were made, whether halves of the prompts agree, or why there is no such thing."""
    how, halves, lines = [], [], []
    for sign, run in source.run.record["runs"].items():
        title, known, split = source.titles[sign], run.get("confidence", {}), run.get("stability", {})
        if "method" in known:
            how.append([title, f"{known['level']:g}", known["method"]])
        elif known.get("reason"):
            lines.append(f"{title}: no intervals or p-values: {known['reason']}")
        if "spearman" in split:
            rank, top = split["spearman"], split["top_jaccard"]
            halves.append(
                [
                    title,
                    str(split["clusters"]),
                    signed(rank["median"]),
                    between(rank["low"], rank["high"], signed),
                    str(split["top_k"]),
                    plain(top["median"], 2),
                    plain(split["top_jaccard_chance"], 2),
                ]
            )
        elif split.get("reason") and split["reason"] != known.get("reason"):
            lines.append(f"{title}: no split halves: {split['reason']}")
    columns = ["operator", "operand pairs", "Spearman", "over splits", "top", "Jaccard of the top", "by chance"]
    blocks: list[Block] = [Text(line, "note") for line in lines]
    if halves:
        blocks.append(Table(columns, halves, "Do halves of the prompts rank the heads alike?", folded=True))
    if how:
        columns = ["operator", "level", "intervals and p-values"]
        blocks.append(Table(columns, how, "How intervals and p-values were made", words=3, folded=True))
    return blocks


OVERVIEW = Section("overview", "Overview", build)
JUDGING = Section("judging", "How sure", judging)
