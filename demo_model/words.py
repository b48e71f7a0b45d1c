"""The second stage of training: the text encoder learns to say what a prompt says."""

import os
import random
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3Model

from . import data, model
from .data import Prompts, Said, SaidBatches
from .plan import LOG_EVERY, Log, Plan, batches_from, rate_at, set_rate
from .world import is_held_out, sample_scene

WORDS_RATE = 1e-3  # peak learning rate
WORDS_DECAY_SHARE = 0.5  # of the words' steps
LAST_TOKENS = 4  # of a prompt, all of the chat template, carry what it says


def words_stage(prompts: Prompts, plan: Plan, log: Log) -> Qwen3Model:
    """The text encoder that knows its words: loaded if an earlier run taught it."""
    text_encoder = model.build_text_encoder(prompts.tokenizer).to(plan.device)
    saved = plan.work / "words.pt"
    if not saved.exists():
        start = time.perf_counter()
        train_words(text_encoder, prompts, plan, log)
        torch.save(text_encoder.state_dict(), plan.work / "words.partial")
        os.replace(plan.work / "words.partial", saved)
        log.spent("words", time.perf_counter() - start)
    text_encoder.load_state_dict(torch.load(saved, map_location=plan.device))
    return text_encoder.eval().requires_grad_(False)


def train_words(text_encoder: Qwen3Model, prompts: Prompts, plan: Plan, log: Log) -> None:
    """Teach the text encoder to say what a prompt says, from its last tokens.

    Flow matching alone finds the meaning of words very late: at most noise levels the picture
    itself tells more than they do."""
    head = nn.Linear(model.TEXT_DIM, sum(data.CLASS_COUNTS)).to(plan.device)
    optimizer = torch.optim.AdamW(
        [*text_encoder.parameters(), *head.parameters()], lr=WORDS_RATE, betas=(0.9, 0.98)
    )
    dataset = SaidBatches(prompts, plan.seed, plan.words_prompts)
    for step, said in enumerate(batches_from(dataset, range(plan.words_steps), plan)):
        set_rate(optimizer, rate_at(step, plan.words_steps, WORDS_RATE, WORDS_DECAY_SHARE))
        loss, _ = words_loss(text_encoder, head, said, plan.device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(text_encoder.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == plan.words_steps:
            log.loss(
                "words",
                step + 1,
                loss=loss.item(),
                right=read_right(text_encoder, head, plan, dataset),
            )


@torch.no_grad()
def read_right(
    text_encoder: Qwen3Model, head: nn.Linear, plan: Plan, dataset: SaidBatches
) -> float:
    """The share of held-out prompts whose every attribute is read."""
    rng = random.Random("held-out words")
    scenes = [sample_scene(rng, i % 2 == 1, is_held_out) for i in range(256)]
    _, right = words_loss(text_encoder, head, dataset.sample(rng, scenes), plan.device)
    return right.item()


def words_loss(
    text_encoder: Qwen3Model, head: nn.Linear, said: Said, device: str
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the attributes, and the share of prompts read wholly right."""
    ids, lengths = said.ids.to(device), said.lengths.to(device)  # [B, L], [B]
    targets = said.targets.to(device).repeat_interleave(LAST_TOKENS, 0)  # [B * last, attributes]
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        hidden = model.encode_text(text_encoder, ids)  # [B, L, TEXT_DIM]
    last = lengths[:, None] - 1 - torch.arange(LAST_TOKENS, device=device)  # [B, last]
    states = hidden[torch.arange(len(ids), device=device)[:, None], last].float().flatten(0, 1)
    states = F.rms_norm(states, states.shape[-1:])  # [B * last, TEXT_DIM], as the transformer reads
    logits = head(states).split(data.CLASS_COUNTS, dim=-1)  # each [B * last, classes]
    losses = [F.cross_entropy(x, y) for x, y in zip(logits, targets.T, strict=True)]
    guesses = torch.stack([x.argmax(-1) for x in logits], dim=1)  # [B * last, attributes]
    return torch.stack(losses).mean(), (guesses == targets).all(1).float().mean()
