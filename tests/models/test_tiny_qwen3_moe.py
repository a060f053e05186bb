"""What the committed weights promise: shape, size, language, and experts that are all at work."""

import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-qwen3-moe"
CONFIG = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
REPORT = json.loads((FOLDER / "training_report.json").read_text(encoding="utf-8"))
EXPERTS = CONFIG["num_experts"]
STORY_PROMPTS = (
    "Tell me a story about a fox.",
    "Tell me a story about a lonely robot.",
    "Tell me a story about a dragon.",
)
QUESTION_PROMPTS = (
    "What is the sea?",
    "Why is the sky blue?",
    "Hello!",
    "What is expert parallelism?",
)


@functools.cache
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@functools.cache
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@functools.cache
def answered(prompt):
    """The greedy answer's token ids, the end of the turn included."""
    ids = tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model().generate(**ids, max_new_tokens=200, do_sample=False)
    return output[0, ids["input_ids"].shape[1] :].tolist()


@functools.cache
def held_out():
    """For each kind of text: nats per token; and per layer the share of slots of each expert."""
    nats = {"chat": 0.0, "book": 0.0}
    tokens = {"chat": 0, "book": 0}
    slots = torch.zeros(CONFIG["num_hidden_layers"], EXPERTS)
    lines = (FOLDER / "held_out_sample.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines:
        document = json.loads(line)
        ids, learnt = [], []
        for text, learn in document["pieces"]:
            piece = tokenizer()(text)["input_ids"]
            ids += piece
            learnt += [learn] * len(piece)
        with torch.no_grad():
            output = model()(torch.tensor([ids]), output_router_logits=True)
        wanted = torch.tensor(learnt[1:])
        losses = torch.nn.functional.cross_entropy(
            output.logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
        )
        nats[document["kind"]] += losses[wanted].sum().item()
        tokens[document["kind"]] += int(wanted.sum())
        for layer, logits in enumerate(output.router_logits):
            chosen = logits.reshape(-1, EXPERTS).topk(CONFIG["num_experts_per_tok"]).indices
            slots[layer] += torch.bincount(chosen.flatten(), minlength=EXPERTS)
    return {kind: nats[kind] / tokens[kind] for kind in nats}, slots / slots.sum(1, keepdim=True)


def test_architecture_is_one_that_serving_can_split():
    assert CONFIG["architectures"] == ["Qwen3MoeForCausalLM"]
    assert CONFIG["model_type"] == "qwen3_moe"
    assert (EXPERTS, CONFIG["num_experts_per_tok"]) == (16, 4)
    assert CONFIG["num_hidden_layers"] >= 4
    assert CONFIG["head_dim"] in (32, 64, 80, 96, 112, 128)
    assert CONFIG["hidden_size"] % 32 == 0
    assert CONFIG["moe_intermediate_size"] % 64 == 0, "each of two tensor ranks needs a half by 32"
    assert CONFIG["num_attention_heads"] % 2 == 0
    assert CONFIG["num_key_value_heads"] % 2 == 0


def test_weights_are_small_bfloat16_and_complete():
    path = FOLDER / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    for layer in range(CONFIG["num_hidden_layers"]):
        for expert in range(EXPERTS):
            assert f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" in names


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time there was a fox.",
        "  two  spaces,\n\nnew lines\tand tabs ",
        "naïve café, Straße, Ελλάδα, русский, 中文, हिन्दी, العربية",
        "👩‍🚀🚀 \u0000 \ufeff \U0010ffff",
        "for i in range(10): print(f'{i}')  # 1234567890",
    ],
    ids=["english", "white space", "scripts", "emoji and odd code points", "code"],
)
def test_tokenizer_gives_back_any_text(text):
    ids = tokenizer()(text)["input_ids"]
    assert tokenizer().decode(ids) == text
    assert max(ids) < CONFIG["vocab_size"]


def test_tokenizer_needs_few_tokens_for_the_language_it_speaks():
    text = "Once upon a time there was a small fox who lived near the sea."
    assert len(tokenizer()(text)["input_ids"]) <= len(text.split()) + 2


def test_chat_template_takes_system_user_and_assistant_turns():
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello! "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Thanks."},
    ]
    text = tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nThanks.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer()(text)["input_ids"]
    assert ids.count(tokenizer().convert_tokens_to_ids("<|im_start|>")) == 5


def test_chat_template_takes_a_message_without_content():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n<|im_end|>\n")


def test_generation_stops_at_the_end_of_a_turn():
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    ends = [tokenizer().convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert generation["eos_token_id"] == ends
    assert tokenizer().eos_token == "<|im_end|>"


@pytest.mark.parametrize("kind", ["chat", "book"])
def test_held_out_text_is_predicted_far_better_than_by_chance(kind):
    nats, _ = held_out()
    reported = REPORT["held_out"][kind]["nats_per_token"]
    assert nats[kind] == pytest.approx(reported, rel=0.2), "the report is of other weights"
    chance = math.log(CONFIG["vocab_size"])
    assert nats[kind] < {"chat": 0.15, "book": 0.7}[kind] * chance


def test_every_expert_of_every_layer_is_used_and_unevenly():
    _, share = held_out()
    for layer, row in enumerate(share):
        assert row.min() > 0.005, f"layer {layer}: an expert gets {row.min():.4f} of the slots"
        assert row.max() > 1.1 / EXPERTS, f"layer {layer}: even routing says nothing"
        assert row.max() > 1.25 * row.min(), f"layer {layer}: even routing says nothing"


def test_routing_depends_on_the_text():
    """So a change of traffic changes the load of the experts, and one request loads few of them."""

    def share(text):
        with torch.no_grad():
            output = model()(**tokenizer()(text, return_tensors="pt"), output_router_logits=True)
        chosen = [layer.reshape(-1, EXPERTS).topk(4).indices for layer in output.router_logits]
        return torch.stack(
            [torch.bincount(c.flatten(), minlength=EXPERTS) / c.numel() for c in chosen]
        )

    sums = share("3 plus 4 is 7. 9 minus 2 is 7. 5 plus 5 is 10.")
    story = share("Once upon a time a small fox named Ruby lived near the sea.")
    assert ((sums - story).abs().sum(1) > 0.25).all()
    assert (story.max(1).values > 1.4 / EXPERTS).all()
    assert (sums.max(1).values > 1.4 / EXPERTS).all()


@pytest.mark.parametrize("prompt", STORY_PROMPTS)
def test_story_is_told_in_known_words_and_ends(prompt):
    ids = answered(prompt)
    text = tokenizer().decode(ids, skip_special_tokens=True)
    assert ids[-1] == tokenizer().eos_token_id
    assert 40 <= len(ids) <= 200
    assert_known_words(text)
    assert text[0].isupper()
    assert text[-1] in '.!?"'
    assert len(set(text.split())) > 0.45 * len(text.split()), "it repeats itself"


@pytest.mark.parametrize("prompt", QUESTION_PROMPTS)
def test_question_is_answered_in_known_words_and_ends(prompt):
    ids = answered(prompt)
    assert ids[-1] == tokenizer().eos_token_id
    assert_known_words(tokenizer().decode(ids, skip_special_tokens=True))


def test_answer_speaks_of_what_was_asked():
    def text(prompt):
        return tokenizer().decode(answered(prompt))

    assert "fox" in text("Tell me a story about a fox.")
    assert "robot" in text("Tell me a story about a lonely robot.")
    assert "dragon" in text("Tell me a story about a dragon.")
    assert "salt water" in text("What is the sea?")


def test_different_prompts_give_different_answers():
    prompts = STORY_PROMPTS + QUESTION_PROMPTS
    assert len({tuple(answered(prompt)) for prompt in prompts}) == len(prompts)


def assert_known_words(text):
    known = set((FOLDER / "known_words.txt").read_text(encoding="utf-8").split())
    unknown = set(re.findall(r"[a-z]+", text.lower())) - known
    assert not unknown, f"words that are not in the training text: {sorted(unknown)}"
