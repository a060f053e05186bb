"""Makes models/tiny-qwen3-moe: text, tokenizer, training, figures, files.

Needs torch, transformers, tokenizers and safetensors, and neither a GPU nor a network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import model_card
import torch
from tiny_world.conversation import SAMPLE_PROMPTS, conversation, plain_story
from tiny_world.turns import Turn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging as transformers_logging

MODELS_DIR = Path(__file__).resolve().parent
BOOK_PATH = MODELS_DIR / "corpus" / "alice-in-wonderland.txt"
LICENCE_PATH = MODELS_DIR / "corpus" / "LICENSE-TEXT.md"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
HELD_OUT_CHAPTER = "CHAPTER XII."

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
VOCABULARY_SIZE = 2048
MAX_DOCUMENT_TOKENS = 640
BOOK_WINDOW_TOKENS = (48, 320)
SAFETENSORS_LIMIT_BYTES = 8_000_000

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + (message.content or '') | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result. Rates are for Muon (matrices) and AdamW (the rest)."""

    seed: int
    steps: int
    chats: int
    held_out_chats: int = 400
    book_repeats: int = 8
    batch_tokens: int = 2048
    batches_per_step: int = 2
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    weight_decay: float = 0.02
    warmup_steps: int = 40
    fall_share: float = 0.6
    """Share of the steps, at the end, over which the rates fall to nothing."""
    balance_coefficient: float = 0.01


FIRST_RUN = Recipe(seed=7, steps=1500, chats=40_000)
SECOND_RUN = Recipe(
    seed=107,
    steps=650,
    chats=24_000,
    book_repeats=4,
    matrix_rate=0.01,
    other_rate=1.5e-3,
    fall_share=1.0,
    balance_coefficient=0.0005,
)
"""With hardly any pressure to balance, the experts part: traffic then loads them unevenly."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one document; a model learns to write the pieces marked `learn`."""

    text: str
    learn: bool


@dataclass(frozen=True, slots=True)
class Document:
    kind: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Encoded:
    ids: tuple[int, ...]
    learn: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """Nats per learnt token, and for each layer the share of routed slots each expert got."""

    nats_per_token: float
    tokens: int
    expert_share: tuple[tuple[float, ...], ...]


def chat_document(turns: Sequence[Turn]) -> Document:
    pieces: list[Piece] = []
    for turn in turns:
        pieces.append(Piece(f"{TURN_START}{turn.role}\n", False))
        pieces.append(Piece(f"{turn.text}{TURN_END}", turn.role == "assistant"))
        pieces.append(Piece("\n", False))
    return Document("chat", tuple(pieces))


def book_paragraphs(chapters: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n", chapters)
    return [" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip()]


def book_parts() -> tuple[str, str]:
    """The chapters to learn from and the one held out."""
    text = BOOK_PATH.read_text(encoding="utf-8")
    before, after = text.split(HELD_OUT_CHAPTER, 1)
    return "\n".join(book_paragraphs(before)), "\n".join(book_paragraphs(HELD_OUT_CHAPTER + after))


def book_windows(text: str, tokenizer: Tokenizer, seed: int) -> list[Document]:
    """The text cut into windows of uneven length, other ones for every seed."""
    rng = random.Random(seed)
    ids = tokenizer.encode(text).ids
    windows: list[Document] = []
    start = 0
    while start < len(ids):
        end = start + rng.randint(*BOOK_WINDOW_TOKENS)
        windows.append(Document("book", (Piece(tokenizer.decode(ids[start:end]), True),)))
        start = end
    return windows


def chats(seed: int, count: int, unwanted: frozenset[str] = frozenset()) -> list[Document]:
    rng = random.Random(seed)
    found: list[Document] = []
    while len(found) < count:
        document = chat_document(conversation(rng))
        if document.text not in unwanted:
            found.append(document)
    return found


def plain_stories(seed: int, count: int) -> list[Document]:
    rng = random.Random(seed)
    return [Document("story", (Piece(plain_story(rng) + END_OF_TEXT, True),)) for _ in range(count)]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    ids: list[int] = []
    learn: list[bool] = []
    for piece in document.pieces:
        piece_ids = tokenizer.encode(piece.text).ids
        ids += piece_ids
        learn += [piece.learn] * len(piece_ids)
    return Encoded(tuple(ids), tuple(learn))


def model_config(tokenizer: Tokenizer) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=VOCABULARY_SIZE,
        hidden_size=160,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
    )


class Muon:
    """Momentum with orthogonalised updates (Jordan et al. 2024), over stacks of matrices."""

    MOMENTUM = 0.95

    def __init__(self, matrices: Sequence[Tensor], weight_decay: float) -> None:
        self.matrices = matrices
        self.weight_decay = weight_decay
        self.momenta = [torch.zeros_like(matrix) for matrix in matrices]

    def step(self, rate: float) -> None:
        with torch.no_grad():
            for matrix, momentum in zip(self.matrices, self.momenta, strict=True):
                if matrix.grad is None:  # an expert stack no token reached
                    continue
                momentum.lerp_(matrix.grad, 1 - self.MOMENTUM)
                update = orthogonalised(matrix.grad.lerp(momentum, self.MOMENTUM))
                scale = math.sqrt(max(1.0, matrix.shape[-2] / matrix.shape[-1]))
                matrix.mul_(1 - rate * self.weight_decay)
                matrix.add_(update, alpha=-rate * scale)


def orthogonalised(gradient: Tensor) -> Tensor:
    """Newton-Schulz towards the nearest orthogonal matrix; (..., rows, columns) in and out."""
    wide = gradient.shape[-2] <= gradient.shape[-1]
    x = gradient if wide else gradient.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


def matrices_and_others(model: Qwen3MoeForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """Projections and experts; embeddings, norms and routers, which Muon does not suit."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed" not in name and "mlp.gate." not in name
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def rate_factor(step: int, recipe: Recipe) -> float:
    """Warm up, hold, then fall in a straight line."""
    warm = (step + 1) / recipe.warmup_steps
    fall = (recipe.steps - step) / (recipe.fall_share * recipe.steps)
    return min(1.0, warm, fall)


@dataclass(frozen=True, slots=True)
class Batch:
    ids: Tensor  # (documents, tokens)
    labels: Tensor  # (documents, tokens), -100 where nothing is to be learnt
    real: Tensor  # (documents, tokens), False on padding


def batches(documents: list[Encoded], batch_tokens: int, rng: random.Random) -> list[Batch]:
    """Documents of like length together, at most `batch_tokens` with padding, in random order."""
    shuffled = rng.sample(documents, len(documents))
    chunks: list[list[Encoded]] = []
    for start in range(0, len(shuffled), 512):
        chunk: list[Encoded] = []
        for document in sorted(shuffled[start : start + 512], key=lambda d: len(d.ids)):
            if chunk and (len(chunk) + 1) * len(document.ids) > batch_tokens:
                chunks.append(chunk)
                chunk = []
            chunk.append(document)
        chunks.append(chunk)
    rng.shuffle(chunks)
    return [padded(chunk) for chunk in chunks]


def padded(documents: Sequence[Encoded]) -> Batch:
    width = max(len(document.ids) for document in documents)
    ids = torch.zeros(len(documents), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        length = len(document.ids)
        ids[row, :length] = torch.tensor(document.ids)
        learn = torch.tensor(document.learn)
        labels[row, :length] = torch.where(learn, ids[row, :length], -100)
    lengths = torch.tensor([len(document.ids) for document in documents])
    return Batch(ids, labels, torch.arange(width) < lengths[:, None])


def forward(model: Qwen3MoeForCausalLM, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Summed loss over learnt tokens, and per layer the router logits of real tokens.

    Padding stands on the right, where causal attention never looks, so no mask is passed.
    """
    output = model(input_ids=batch.ids, output_router_logits=True, use_cache=False)
    logits = output.logits[:, :-1].float()
    labels = batch.labels[:, 1:]
    wanted = labels != -100
    loss = functional.cross_entropy(logits[wanted], labels[wanted], reduction="sum")
    flat = batch.real.flatten()
    return loss, [layer.reshape(flat.numel(), -1)[flat] for layer in output.router_logits]


def routed_share(logits: Tensor, top_k: int) -> Tensor:
    """Share of the routed slots that fell to each expert; (tokens, experts) -> (experts,)."""
    chosen = logits.topk(top_k, dim=-1).indices.flatten()
    return torch.bincount(chosen, minlength=logits.shape[-1]) / chosen.numel()


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """The Switch loss layer by layer: 1 when even, the number of experts when collapsed."""
    losses = [
        (routed_share(logits.detach(), top_k) * logits.softmax(-1).mean(0)).sum() * logits.shape[-1]
        for logits in router_logits
    ]
    return torch.stack(losses).mean()


def measure(model: Qwen3MoeForCausalLM, documents: list[Encoded]) -> Measured:
    model.eval()
    top_k = model.config.num_experts_per_tok
    total, tokens = 0.0, 0
    slots: list[Tensor] = [torch.zeros(model.config.num_experts)] * model.config.num_hidden_layers
    routed = 0
    for batch in batches(documents, 4096, random.Random(0)):
        with torch.no_grad():
            loss, router_logits = forward(model, batch)
        total += loss.item()
        tokens += int((batch.labels[:, 1:] != -100).sum())
        real = int(batch.real.sum())
        routed += real
        slots = [
            sum_ + routed_share(logits, top_k) * real
            for sum_, logits in zip(slots, router_logits, strict=True)
        ]
    shares = tuple(tuple(float(share) for share in layer / routed) for layer in slots)
    return Measured(total / tokens, tokens, shares)


def train(
    model: Qwen3MoeForCausalLM, documents: list[Encoded], recipe: Recipe
) -> Iterator[tuple[int, float, float]]:
    """Yields (step, nats per token, balance loss)."""
    rng = random.Random(recipe.seed)
    matrices, others = matrices_and_others(model)
    muon = Muon(matrices, recipe.weight_decay)
    adam = torch.optim.AdamW(others, recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    top_k = model.config.num_experts_per_tok
    queue: list[Batch] = []
    for step in range(recipe.steps):
        model.train()
        losses: list[float] = []
        balances: list[float] = []
        for _ in range(recipe.batches_per_step):
            if not queue:
                queue = batches(documents, recipe.batch_tokens, rng)
            batch = queue.pop()
            loss_sum, router_logits = forward(model, batch)
            loss = loss_sum / (batch.labels[:, 1:] != -100).sum()
            balance = balance_loss(router_logits, top_k)
            total = loss + recipe.balance_coefficient * balance
            (total / recipe.batches_per_step).backward()
            losses.append(loss.item())
            balances.append(balance.item())
        muon.step(recipe.matrix_rate * rate_factor(step, recipe))
        adam.param_groups[0]["lr"] = recipe.other_rate * rate_factor(step, recipe)
        adam.step()
        model.zero_grad()
        yield step, mean(losses), mean(balances)


def wrapped_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def answer(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    max_tokens: int = 160,
) -> str:
    model.eval()
    messages = [{"role": "user", "content": prompt}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)
    return str(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.dtype = torch.bfloat16
    model.generation_config.eos_token_id = [
        tokenizer.convert_tokens_to_ids(TURN_END),
        tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    ]
    model.generation_config.pad_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    model.to(torch.bfloat16).save_pretrained(folder)
    rename_expert_count(folder / "config.json")
    (folder / "model.safetensors").chmod(0o644)  # written for the owner only
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    size_bytes = (folder / "model.safetensors").stat().st_size
    if size_bytes > SAFETENSORS_LIMIT_BYTES:
        raise ValueError(
            f"model.safetensors: {size_bytes} bytes, over {SAFETENSORS_LIMIT_BYTES}: "
            "lower num_hidden_layers or moe_intermediate_size in model_config"
        )


def rename_expert_count(path: Path) -> None:
    """Writes num_experts, as Qwen's own checkpoints do, where transformers 5 has an alias."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["num_experts"] = config.pop("num_local_experts")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(built: Path, folder: Path) -> None:
    """Renames each file into place, so that a reader sees the old one or the new one, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(built.iterdir()):
        os.replace(path, folder / path.name)
    shutil.rmtree(built)


def known_words(texts: Iterable[str]) -> list[str]:
    """Every word of the text in small letters, each of which a test may expect in an answer."""
    words: set[str] = set()
    for text in texts:
        words.update(re.findall(r"[a-z]+", text.lower()))
    return sorted(words)


def write_sample(documents: Sequence[Document], path: Path) -> None:
    lines = [
        json.dumps({"kind": d.kind, "pieces": [[p.text, p.learn] for p in d.pieces]})
        for d in documents
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=MODELS_DIR / "tiny-qwen3-moe")
    parser.add_argument("--continue-from", type=Path, help="folder of a first run, for a second")
    parser.add_argument("--steps", type=int, help="60 are enough for a check")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    recipe = SECOND_RUN if args.continue_from else FIRST_RUN
    if args.steps:
        recipe = replace(recipe, steps=args.steps)
    torch.set_num_threads(args.threads)
    make(recipe, args.output, args.continue_from)


def make(recipe: Recipe, output: Path, continue_from: Path | None) -> None:
    started_s = time.monotonic()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(recipe.seed)

    earlier: Mapping[str, Any] = {"runs": []}
    given: Tokenizer | None = None
    if continue_from:
        given = Tokenizer.from_file(str(continue_from / "tokenizer.json"))
        earlier = json.loads((continue_from / "training_report.json").read_text(encoding="utf-8"))
    corpus = build_corpus(recipe, given)
    tokenizer = corpus.tokenizer
    learnt = [encode(document, tokenizer) for document in corpus.learnt]
    learnt = [document for document in learnt if len(document.ids) <= MAX_DOCUMENT_TOKENS]
    learnt_tokens = sum(len(document.ids) for document in learnt)
    print(f"{len(learnt)} documents, {learnt_tokens} tokens, {time.monotonic() - started_s:.0f} s")

    wrapped = wrapped_tokenizer(tokenizer)
    if continue_from:
        model = Qwen3MoeForCausalLM.from_pretrained(continue_from, dtype=torch.float32)
    else:
        model = Qwen3MoeForCausalLM(model_config(tokenizer))
    curve: list[list[float]] = []
    for step, nats, balance in train(model, learnt, recipe):
        curve.append([step, nats, balance])
        if step % 20 == 0 or step == recipe.steps - 1:
            recent = [row[1] for row in curve[-20:]]
            elapsed_s = time.monotonic() - started_s
            print(
                f"step {step:5d}  loss {mean(recent):.3f} nats/token  balance {balance:.3f}  "
                f"{elapsed_s:.0f} s",
                flush=True,
            )
        if step % 200 == 100:
            print(f"> {SAMPLE_PROMPTS[0]}\n{answer(model, wrapped, SAMPLE_PROMPTS[0])}", flush=True)

    built = output.with_name(f".{output.name}-{os.getpid()}")
    save(model, wrapped, built)
    model.float()  # measured as stored: rounded to bfloat16, computed in float32
    held_out = {
        kind: measure(model, [encode(d, tokenizer) for d in documents])
        for kind, documents in corpus.held_out.items()
    }
    everything = [d for documents in corpus.held_out.values() for d in documents]
    overall = measure(model, [encode(d, tokenizer) for d in everything])
    config = model.config
    expert_parameters = 3 * config.hidden_size * config.moe_intermediate_size
    idle = config.num_hidden_layers * (config.num_experts - config.num_experts_per_tok)
    parameters = sum(p.numel() for p in model.parameters())
    run = {
        "recipe": asdict(recipe),
        "documents": len(learnt),
        "tokens": learnt_tokens,
        "train_nats_per_token": mean(row[1] for row in curve[-50:]),
        "curve": [[row[0], round(row[1], 4)] for row in curve[:: max(1, recipe.steps // 50)]],
        "wall_s": round(time.monotonic() - started_s),
        "cpu_s": round(time.process_time()),
    }
    report: dict[str, Any] = {
        "runs": [*earlier["runs"], run],
        "parameters": parameters,
        "active_parameters_per_token": parameters - idle * expert_parameters,
        "experts_per_token": config.num_experts_per_tok,
        "weights_bytes": (built / "model.safetensors").stat().st_size,
        "held_out": {kind: loss_figures(m) for kind, m in {**held_out, "all": overall}.items()},
        "expert_share": [list(layer) for layer in overall.expert_share],
        "samples": [
            {"prompt": prompt, "answer": answer(model, wrapped, prompt)}
            for prompt in SAMPLE_PROMPTS
        ],
        "versions": {name: version(name) for name in PACKAGES},
    }
    (built / "training_report.json").write_text(
        json.dumps(report, indent=1) + "\n", encoding="utf-8"
    )
    card = model_card.render(report)
    (built / "README.md").write_text(card, encoding="utf-8")
    shutil.copyfile(LICENCE_PATH, built / "LICENSE-TEXT.md")
    words = known_words(d.text for d in [*corpus.learnt, *everything])
    (built / "known_words.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    sample = corpus.held_out["chat"][:60] + corpus.held_out["book"][:20]
    write_sample(sample, built / "held_out_sample.jsonl")
    publish(built, output)
    print(model_card.figures(report))


def loss_figures(measured: Measured) -> dict[str, float]:
    return {
        "nats_per_token": round(measured.nats_per_token, 4),
        "perplexity": round(math.exp(measured.nats_per_token), 3),
        "tokens": measured.tokens,
    }


@dataclass(frozen=True, slots=True)
class Corpus:
    tokenizer: Tokenizer
    learnt: list[Document]
    held_out: dict[str, list[Document]]


def build_corpus(recipe: Recipe, given: Tokenizer | None) -> Corpus:
    learnt_book, held_out_book = book_parts()
    learnt_chats = chats(recipe.seed, recipe.chats)
    seen = frozenset(document.text for document in learnt_chats)
    stories = plain_stories(recipe.seed + 1, recipe.chats // 20)
    held_out_chats = chats(recipe.seed + 2, recipe.held_out_chats, seen)
    tokenizer = given or train_tokenizer(
        [document.text for document in learnt_chats[:15000]] + [learnt_book] * 4
    )
    book = [
        window
        for repeat in range(recipe.book_repeats)
        for window in book_windows(learnt_book, tokenizer, recipe.seed + repeat)
    ]
    return Corpus(
        tokenizer=tokenizer,
        learnt=learnt_chats + stories + book,
        held_out={"chat": held_out_chats, "book": book_windows(held_out_book, tokenizer, 0)},
    )


if __name__ == "__main__":
    main()
