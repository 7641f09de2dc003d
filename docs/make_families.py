"""Write docs/families.md and the README's table of supported models: `python docs/make_families.py`.

Everything in them comes from the registry of families and from the tiny models of tests/tiny_models.py, which are made
and resolved as any model is; tests/test_readme.py renders both again and compares.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny_models  # noqa: E402
import torch  # noqa: E402

from pyarith.models.families import FAMILIES  # noqa: E402
from pyarith.models.sites import ModelSites, resolve  # noqa: E402
from pyarith.models.spec import FamilySpec  # noqa: E402
from pyarith.models.weights import read_mlp, read_norm  # noqa: E402

START, END = "<!-- families -->\n", "<!-- end of families -->"
NORMS = {"rms": "RMSNorm", "rms1p": "RMSNorm of 1 + weight", "layer": "LayerNorm"}
LAYOUTS = {"blocks": "one projection: q, k, v", "by_group": "one projection: q, k, v of each kv head"}
PAGE = """# Supported families

Written by `python docs/make_families.py` from the registry (`pyarith/models/families.py`) and from the tiny random
models of `tests/tiny_models.py`, resolved as any model is.

{table}
- **Block.** Serial: the MLP reads what attention has written. Parallel: both read the same stream. "Norms after": what
  attention and MLP write goes through a norm of its own before it is added.
- **Runs.** Fused: norms and MLPs of the replay run as pyarith's ops. Own modules: the model's own are called, with
  equal results. A module with hooks, an adapter, an overridden forward or an activation that the ops do not know is
  called too.
- **Refused.** A config attribute: models that set it. A function: it needs attention that goes through transformers'
  `AttentionInterface`. Behind that stands the self-check: rows recomposed from the registry must reproduce the model's
  own logits, or no result is given.
- **Tiny models tested.** *All tests*: literal oracle in fp64 (one hooked forward pass per head and MLP), both
  paddings, ablation, sweeps, analyses, tuning, deltas, state restored. *One case each*: the literal oracle and one
  case of most of the others (`tests/family_cases.py`, `tests/test_more_families.py`, `tests/test_moe.py`). No real
  checkpoint is part of the tests.
"""


def notes(spec: FamilySpec) -> str:
    """What is special about a family, in words."""
    found = [NORMS[spec.norm]]
    if spec.mlp_spec is not None:
        found += ["gated MLP" if spec.mlp_spec.gate or spec.mlp_spec.gate_up else "plain MLP"]
    found += ["mixture of experts"] if spec.router else []
    found += ["norms after attention and MLP"] if spec.attn_post_norm else []
    found += ["no norm before the MLP"] if spec.mlp_norm is None else []
    kinds = {one.parallel for one in (spec, *(replace(spec, **variant.then) for variant in spec.variants))}
    found += ["parallel or serial blocks"] if len(kinds) == 2 else ["parallel blocks"] if spec.parallel else []
    found += ["final softcap"] if spec.softcap else []
    found += ["residual multiplier"] if spec.residual_multiplier else []
    found += ["logit scale"] if spec.logit_multiplier or spec.logit_divisor else []
    found += [f"not with `{attribute}`" for attribute, _ in spec.refuse_if]
    return ", ".join(found)


def readme_table() -> str:
    """The table of supported models as the registry has it."""
    lines = ["| `model_type` | class in transformers | notes |", "|---|---|---|"]
    lines += [f"| `{s.name}` | `{s.model_class}` | {notes(s)} |" for s in in_order()]
    return "\n".join(lines) + "\n"


def in_order() -> list[FamilySpec]:
    return sorted(FAMILIES.values(), key=lambda spec: spec.name)


def block_kind(sites: ModelSites) -> str:
    block = sites.blocks[0]
    found = ["parallel" if sites.parallel else "serial"]
    found += ["norms after"] if block.attn_post_norm is not None else []
    found += ["no norm before the MLP"] if block.mlp_norm is None else []
    found += ["residual multiplier"] if sites.spec.residual_multiplier else []
    return ", ".join(found)


def mlp_kind(sites: ModelSites) -> str:
    spec = sites.spec.mlp_spec
    dense = [] if spec is None else ["gated" if spec.gate or spec.gate_up else "plain"]
    return " or ".join([*dense, *(["mixture of experts"] if sites.spec.router else [])])


def how_it_runs(sites: ModelSites) -> str:
    norms = [n for block in sites.blocks for n in (block.attn_post_norm, block.mlp_norm, block.mlp_post_norm)]
    fused_norms = all(read_norm(sites, norm) is not None for norm in [*norms, sites.final_norm] if norm is not None)
    mlps = {read_mlp(sites, block.mlp) is not None for block in sites.blocks}
    if fused_norms and mlps == {True}:
        return "fused"
    what = {frozenset([True]): "MLPs", frozenset([False]): "", frozenset([True, False]): "dense MLPs"}[frozenset(mlps)]
    fused = " and ".join(part for part in ("norms" if fused_norms else "", what) if part)
    return f"{fused} fused, experts in own modules" if sites.spec.router else f"{fused} fused, the rest in own modules"


def logits_kind(sites: ModelSites) -> str:
    found = ["scaled"] if sites.spec.logit_multiplier or sites.spec.logit_divisor else []
    found += ["bias"] if getattr(sites.unembed, "bias", None) is not None else []
    found += ["softcap"] if sites.spec.softcap else []
    return ", ".join(found) or "plain"


def refused(spec: FamilySpec) -> str:
    found = [f"`{attribute}`: {reason}" for attribute, reason in spec.refuse_if]
    found += ["`positions='end'`, `boost`, `attention_mass`"] if spec.own_attention else []
    found += ["prompts over `max_position_embeddings`"] if spec.position_table else []
    return "; ".join(found) or "-"


def tested(names: list[str]) -> str:
    full = [f"`{name}`" for name in names if name in tiny_models.NAMES]
    brief = [f"`{name}`" for name in names if name not in tiny_models.NAMES]
    parts = [f"all tests: {', '.join(full)}"] if full else []
    return "; ".join([*parts, *([f"one case each: {', '.join(brief)}"] if brief else [])])


def families_page() -> str:
    """docs/families.md."""
    found: dict[str, dict[str, ModelSites]] = {}
    for name in tiny_models.FAMILIES:
        sites = resolve(tiny_models.make(name, torch.float32))
        found.setdefault(sites.spec.name, {})[name] = sites
    head = ["family", "class", "norm", "block", "MLP", "runs", "queries, keys, values", "logits", "refused"]
    head += ["tiny models tested"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for spec in in_order():
        tiny = found[spec.name]
        first = next(iter(tiny.values()))
        layout = LAYOUTS[spec.qkv.order] if spec.qkv.qkv else "three projections"
        blocks, runs = (" / ".join(dict.fromkeys(map(kind, tiny.values()))) for kind in (block_kind, how_it_runs))
        cells = [f"`{spec.name}`", f"`{spec.model_class}`", NORMS[spec.norm], blocks, mlp_kind(first), runs, layout]
        cells += [logits_kind(first), refused(spec), tested(list(tiny))]
        lines.append(f"| {' | '.join(cells)} |")
    return PAGE.format(table="\n".join(lines) + "\n")


if __name__ == "__main__":
    (ROOT / "docs" / "families.md").write_text(families_page(), encoding="utf-8")
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    readme.write_text(before + START + readme_table() + END + rest.split(END)[1], encoding="utf-8")
