"""Pretrain the quickstart base model on the training side of the docstring corpus.

    nice python benchmarks/pretrain.py --tokens 20e6 --out DIR

A small Llama (12 blocks) with its own byte-level BPE tokenizer.  The held-out modules are never seen, neither by the
tokenizer nor by the model.  Docstrings are packed module by module, in file order, so that a sequence often holds
neighbours.  Hidden matrices are trained by Muon, the rest by AdamW; the learning rate warms up, stays, and falls
linearly over the last part (so a run can be stopped and resumed with another `--tokens`).  A checkpoint is written
every 200 steps; the same command resumes from it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from testbed.docstrings import Docstring, corpus_hash, load_docstrings

VOCABULARY = 8192
PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
SEQUENCE, MICRO_BATCH, BATCH = 128, 16, 32
WARM_UP_STEPS, DECAY_SHARE = 100, 0.3
MUON_RATE, ADAM_RATE = 0.02, 3e-3
HELD_OUT_SEQUENCES = 256


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    texts = load_docstrings(args.cache, print)
    train = [text for text in texts if not text.held_out]
    held_out = [text for text in texts if text.held_out]
    tokenizer = _tokenizer(args.out, train)
    order = random.Random(args.seed)
    stream = _Stream(_pack(tokenizer, train, order), order)
    held_out_ids = _pack(tokenizer, held_out, order)[:HELD_OUT_SEQUENCES]
    print(f"{len(train)} texts, {stream.ids.numel() / 1e6:.2f} M tokens; {len(held_out)} held out", flush=True)
    steps = int(args.tokens // (SEQUENCE * BATCH))
    model = LlamaForCausalLM(_config(tokenizer))
    _fit(model, stream, held_out_ids, steps, args)
    _save(model, tokenizer, args.out, corpus_hash(texts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=20e6, help="tokens of training in all")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "edge-testbed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C compiler)")
    return parser.parse_args()


def _tokenizer(out: Path, texts: list[Docstring]) -> PreTrainedTokenizerFast:
    file = out / "tokenizer.json"
    if not file.is_file():
        bpe = Tokenizer(models.BPE(unk_token=UNK))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[PAD, UNK, EOS],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator((text.text for text in texts), trainer)
        bpe.save(str(file))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token=PAD, unk_token=UNK, eos_token=EOS, model_max_length=512
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )


def _pack(tokenizer: PreTrainedTokenizerFast, texts: list[Docstring], order: random.Random) -> torch.Tensor:
    """Concatenate module by module (modules in random order) and cut into rows of SEQUENCE + 1 tokens."""
    modules = [list(group) for _, group in groupby(texts, key=lambda text: (text.package, text.module))]
    order.shuffle(modules)
    flat = [text.text for module in modules for text in module]
    ids = [token for row in tokenizer(flat)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
    rows = len(ids) // (SEQUENCE + 1)
    return torch.tensor(ids[: rows * (SEQUENCE + 1)], dtype=torch.int32).view(rows, SEQUENCE + 1)


class _Stream:
    """Batches without end: a new order of the rows in every epoch, the same for the same seed."""

    def __init__(self, ids: torch.Tensor, order: random.Random) -> None:
        self.ids, self.seed = ids, order.random()

    def batch(self, step: int) -> torch.Tensor:
        per_epoch = len(self.ids) // BATCH
        epoch, place = divmod(step, per_epoch)
        rows = list(range(len(self.ids)))
        random.Random(f"{self.seed}/{epoch}").shuffle(rows)
        return self.ids[rows[place * BATCH : (place + 1) * BATCH]].long()


def _fit(
    model: LlamaForCausalLM, stream: _Stream, held_out: torch.Tensor, steps: int, args: argparse.Namespace
) -> None:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.02),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [MUON_RATE, ADAM_RATE]
    checkpoint = args.out / "checkpoint.pt"
    start = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
        print(f"resumed at step {start}", flush=True)
    log = (args.out / "log.jsonl").open("a")
    run = torch.compile(model) if args.compile else model
    began, running = time.monotonic(), math.nan
    for step in range(start, steps):
        factor = _rate(step, steps)
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        micro_batches = stream.batch(step).split(MICRO_BATCH)
        loss = 0.0
        for rows in micro_batches:
            part = _loss(run, rows) / len(micro_batches)
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        running = loss if math.isnan(running) else 0.95 * running + 0.05 * loss
        if (step + 1) % 20 == 0:
            speed = (step + 1 - start) * SEQUENCE * BATCH / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {running:.3f}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * SEQUENCE * BATCH,
                "loss": running,
                "held_out": _evaluate(model, held_out),
            }
            print(json.dumps(entry), file=log, flush=True)
            print(entry, flush=True)
            state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step + 1}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)


def _rate(step: int, steps: int) -> float:
    decay = DECAY_SHARE * steps
    return min((step + 1) / WARM_UP_STEPS, 1.0, max(0.02, (steps - step) / decay))


def _loss(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=rows[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


@torch.no_grad()
def _evaluate(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    return sum(_loss(model, batch.long()).item() for batch in rows.split(MICRO_BATCH)) / (len(rows) / MICRO_BATCH)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, corpus: str) -> None:
    model.to(torch.bfloat16).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    (out / "model" / "corpus.json").write_text(json.dumps({"sha256": corpus}))


if __name__ == "__main__":
    main()
