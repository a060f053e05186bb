"""Writes the model card of tiny-qwen3-moe from the figures of its training run."""

from collections.abc import Mapping, Sequence
from typing import Any

_CARD = """\
---
license: apache-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
---
# tiny-qwen3-moe

A mixture-of-experts model small enough for a laptop and real enough to measure: architecture
`Qwen3MoeForCausalLM`, {layers} layers, {experts} experts per layer of which each token uses
{top_k}, {parameters:,} parameters ({active:,} at work per token), {megabytes:.1f} MB in bfloat16.
It was trained from scratch on a CPU. It tells short stories, answers simple questions and writes
four-line poems, in English. It exists so that routing statistics, parity tests and demonstrations
of ExpertMesh mean something; it knows nothing that anybody should rely on. It mixes up the names of
its heroes, gets most sums wrong and answers confidently when it does not know a word.

## Text

* A small world of stories, questions and answers, poems, sums and small talk, written out by
  `models/tiny_world/` (part of this repository, Apache-2.0), {chats:,} conversations.
* *Alice's Adventures in Wonderland* by Lewis Carroll (1865, public domain), chapters I to XI;
  chapter XII is held out.

Details in [LICENSE-TEXT.md](LICENSE-TEXT.md). Loss is taken on the assistant's words and on the
book, not on what the user says. Documents are at most 640 tokens long, so conversations much longer
than that leave what the model has learnt, although it accepts 2048 tokens.

## Figures

{figures}
## Make it again

```
pip install {pins}
nice python models/train_tiny_qwen3_moe.py
```

It needs no network, no GPU and about 2 GB of memory; `--steps 60` is enough to check the whole
path. This model took {cpu_minutes:.0f} minutes of CPU time ({wall_minutes:.0f} minutes on the
clock, two threads on a machine busy with other work), with the seed {seeds}. The same versions give
the same text and the same tokenizer, and weights that differ only by the order of float sums.
A further run, `--continue-from FOLDER`, goes on with hardly any pressure to balance the experts.

## Samples

Greedy, computed in float32.

{samples}"""


def render(report: Mapping[str, Any]) -> str:
    runs = report["runs"]
    shares = report["expert_share"]
    return _CARD.format(
        layers=len(shares),
        experts=len(shares[0]),
        top_k=report["experts_per_token"],
        parameters=report["parameters"],
        active=report["active_parameters_per_token"],
        megabytes=report["weights_bytes"] / 1e6,
        chats=sum(run["recipe"]["chats"] for run in runs),
        figures=figures(report),
        pins=" ".join(f"{name}=={number}" for name, number in report["versions"].items()),
        seeds=" and ".join(str(run["recipe"]["seed"]) for run in runs),
        cpu_minutes=sum(run["cpu_s"] for run in runs) / 60,
        wall_minutes=sum(run["wall_s"] for run in runs) / 60,
        samples="\n".join(_sample(sample) for sample in report["samples"]),
    )


def figures(report: Mapping[str, Any]) -> str:
    """The losses and the expert histogram as two tables."""
    lines = []
    for number, run in enumerate(report["runs"], start=1):
        recipe = run["recipe"]
        lines.append(
            f"Run {number}: {recipe['steps']} steps of at most "
            f"{recipe['batch_tokens'] * recipe['batches_per_step']:,} tokens, balance coefficient "
            f"{recipe['balance_coefficient']}; loss on training text at the end "
            f"{run['train_nats_per_token']:.3f} nats per token."
        )
    lines += [
        "",
        "| held-out text | nats per token | perplexity | tokens |",
        "|---|---|---|---|",
    ]
    names = {"chat": "conversations", "book": "Alice, chapter XII", "all": "both"}
    for kind, row in report["held_out"].items():
        lines.append(
            f"| {names[kind]} | {row['nats_per_token']:.3f} | {row['perplexity']:.2f} "
            f"| {row['tokens']:,} |"
        )
    lines += [
        "",
        "Share of the routed slots per expert on held-out text, in percent (even: 6.25). A single",
        "request loads the experts far less evenly than this mean of many.",
        "",
    ]
    lines += _histogram(report["expert_share"])
    return "\n".join(lines) + "\n"


def _histogram(shares: Sequence[Sequence[float]]) -> list[str]:
    experts = range(len(shares[0]))
    lines = ["| layer | " + " | ".join(str(expert) for expert in experts) + " |"]
    lines.append("|---" * (len(experts) + 1) + "|")
    for layer, row in enumerate(shares):
        lines.append(f"| {layer} | " + " | ".join(f"{100 * share:.1f}" for share in row) + " |")
    return lines


def _sample(sample: Mapping[str, str]) -> str:
    quoted = "\n".join(f"> {line}  " for line in sample["answer"].splitlines())
    return f"**{sample['prompt']}**\n\n{quoted}\n"
