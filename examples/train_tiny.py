"""Train the small language model that ships with lmppl (``lmppl/lm/tiny_weights``).

The shipped model was trained on text that ``tiny_corpus.py`` wrote: 21,300 review sentences and 1,700 sentences
about journeys sampled from SmolLM2-135M-Instruct, 9,000 review sentences of our own grammar and 5,900 stories
sampled from stories260K. Two runs of one CPU thread, on 4.0 and 2.8 million tokens; the second goes on from the
first with more reviews and without documents that have rare words, and ends at the mean of both runs' weights,
which scores better on held-out text than either:

    python examples/train_tiny.py --data corpus1/ --repeat reviews=2 travel=3 --steps 2400 --bf16 --out first
    python examples/train_tiny.py --data corpus2/ --repeat reviews=2 reviews2=2 travel=3 --steps 1600 --bf16 \
        --init first --average 0.5 --lr 2e-3 --min-count 5 --out tiny_weights

``--data`` is a text file or a folder of ``*.txt`` files; every non-empty line is one document. Lines that
differ only in case or punctuation count once. Part of every file is held out before anything is repeated,
and the model and an interpolated Kneser-Ney 5-gram over the same tokens are scored on it in bits per byte.
"""

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tiny_ngram import KneserNey
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS = 0, 1, 2
ATTENTION = "eager"  # the quickest to train on a CPU
Corpus = dict[str, list[str]]  # documents by the stem of the file they came from


def words(document: str) -> set[str]:
    return set(re.findall(r"[a-z'-]+", document.lower()))


def read_corpus(path: Path, held_out: float, min_count: int, seed: int) -> tuple[Corpus, Corpus]:
    """Distinct documents of ``path``, split into training and held-out ones.

    A document is left out of both if one of its words occurs in fewer than ``min_count`` documents: a model this
    small cannot learn a rare word, and misspells it.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    seen: set[str] = set()
    train: Corpus = {}
    held: Corpus = {}
    for file in files:
        documents = []
        for line in file.read_text(encoding="utf-8").splitlines():
            key = "".join(c for c in line.lower() if c.isalnum())
            if key and key not in seen:
                seen.add(key)
                documents.append(line.strip())
        random.Random(seed).shuffle(documents)
        cut = max(1, round(held_out * len(documents)))
        held[file.stem], train[file.stem] = documents[:cut], documents[cut:]
    count = Counter(w for part in (train, held) for texts in part.values() for text in texts for w in words(text))
    for part in (train, held):
        for name, texts in part.items():
            part[name] = [text for text in texts if all(count[word] >= min_count for word in words(text))]
    return train, held


def train_tokenizer(corpus: Corpus, vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts BOS before a text and decodes every text to itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for texts in corpus.values() for text in texts), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def new_model(vocab_size: int, args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3 // 32 * 32,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 32,
        max_position_embeddings=args.context,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=ATTENTION)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], context: int) -> list[list[int]]:
    """BOS, the text, EOS; a text that does not fit ``context`` is cut and gets no EOS."""
    return [[*ids, EOS][:context] for ids in tokenizer(list(texts)).input_ids]


def rows(documents: Sequence[list[int]], context: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless rows of ``context`` tokens, each filled with whole documents in random order, then padded."""
    row: list[int] = []
    while True:
        for index in rng.sample(range(len(documents)), len(documents)):
            if len(row) + len(documents[index]) > context:
                yield row + [PAD] * (context - len(row))
                row = []
            row = row + documents[index]


def loss_sum(model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, int]:
    """Summed negative log-likelihood (nats) of the tokens of ``ids`` (B, T) and their number.

    Several documents may share a row: each attends to itself only and counts positions from its own BOS,
    so that a document is scored just as if it stood alone. BOS and padding are not scored.
    """
    document = (ids == BOS).cumsum(1)
    allowed = (document[:, :, None] == document[:, None, :]).tril()
    mask = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, -math.inf)[:, None]
    place = torch.arange(ids.shape[1])
    positions = place - torch.where(ids == BOS, place, 0).cummax(1).values
    logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, :-1]
    target = ids[:, 1:].masked_fill((ids[:, 1:] == BOS) | (ids[:, 1:] == PAD), -100)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="sum")
    return loss, int((target >= 0).sum())


@torch.inference_mode()
def model_bits(model: LlamaForCausalLM, documents: Sequence[list[int]]) -> float:
    """Total bits of the tokenized documents under the model."""
    model.eval()
    total = 0.0
    for start in range(0, len(documents), 64):
        batch = documents[start : start + 64]
        width = max(map(len, batch))
        total += loss_sum(model, torch.tensor([ids + [PAD] * (width - len(ids)) for ids in batch]))[0].item()
    return total / math.log(2)


def train(model: LlamaForCausalLM, documents: Sequence[list[int]], args: argparse.Namespace) -> None:
    """AdamW with a linear warm-up and a cosine decay to zero."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    warm_up = max(1, min(200, args.steps // 10))
    stream = rows(documents, args.context, random.Random(args.seed))
    model.train()
    start, tokens, recent = time.monotonic(), 0, []
    for step in range(args.steps):
        rate = min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        batch = torch.tensor([next(stream) for _ in range(args.batch)])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss, count = loss_sum(model, batch)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += count
        recent.append(loss.item() / count)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            seconds = time.monotonic() - start
            mean = sum(recent) / len(recent)
            print(f"step {step + 1}  loss {mean:.3f}  {tokens / 1e6:.2f}M tokens  {seconds:.0f} s", flush=True)
            recent = []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="a text file or a folder of *.txt, one document a line"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and report.json")
    parser.add_argument("--repeat", nargs="*", default=[], metavar="FILE=K", help="show a file K times per epoch")
    parser.add_argument("--init", type=Path, help="go on from this folder's weights and tokenizer")
    parser.add_argument("--average", type=float, default=0.0, help="share of the weights of --init in the result")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=8, help="rows of --context tokens per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=2048, help="upper limit; never below 259 (bytes and specials)")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--held-out", type=float, default=0.025)
    parser.add_argument("--min-count", type=int, default=1, help="leave out documents with rarer words")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 matrix products while training")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    corpus, held = read_corpus(args.data, args.held_out, args.min_count, args.seed)
    if args.init is None:
        tokenizer = train_tokenizer(corpus, args.vocab, args.context)
        model = new_model(len(tokenizer), args)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init)
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32, attn_implementation=ATTENTION)
    repeats = {name: int(times) for name, times in (item.split("=") for item in args.repeat)}
    unique = {name: encode(tokenizer, texts, args.context) for name, texts in corpus.items()}
    shown = [ids for name, documents in unique.items() for ids in documents * repeats.get(name, 1)]
    initial = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, shown, args)
    if args.average:
        share = args.average
        model.load_state_dict({k: torch.lerp(v, initial[k], share) for k, v in model.state_dict().items()})

    held["all"] = [text for texts in held.values() for text in texts]
    unrounded = model_bits(model, encode(tokenizer, held["all"], args.context))
    model.half().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model.float()  # the rounded weights, so that the figures describe the file
    model.config.dtype = torch.float32  # stored as float16, loaded as float32
    model.config.save_pretrained(args.out)
    baseline = KneserNey([ids for documents in unique.values() for ids in documents], len(tokenizer))
    report: dict[str, dict[str, float]] = {}
    for name, texts in ((name, texts) for name, texts in held.items() if texts):
        ids = encode(tokenizer, texts, args.context)
        size = sum(len(text.encode()) for text in texts)
        ours, theirs = model_bits(model, ids) / size, baseline.bits(ids) / size
        report[name] = {"documents": len(texts), "bytes": size, "bits_per_byte": ours, "5-gram": theirs}
        print(f"{name:10s} {ours:.4f} bits per byte; 5-gram {theirs:.4f}; {1 - ours / theirs:.1%} fewer")
    report["all"]["float32"] = unrounded / report["all"]["bytes"]
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
