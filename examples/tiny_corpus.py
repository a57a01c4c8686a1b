"""Write the corpus of the embedded language model by sampling two small teachers.

Four kinds of text, one document a line:

``reviews``  one or two short sentences of a stated mood about a film, a book, a meal or a hotel,
             continued by SmolLM2-135M-Instruct (Apache-2.0) from few-shot lists of our own sentences;
``travel``   the same about journeys and cities;
``stories``  stories for small children sampled from stories260K (MIT), cut at a sentence end;
``grammar``  review sentences from a small grammar of our own.

The corpus of the model in ``lmppl/lm/tiny_weights`` is the union of several runs of each kind with
different seeds; ``PROVENANCE.md`` beside the weights gives the counts.

    python examples/tiny_corpus.py reviews --teacher SMOLLM2_FOLDER --seconds 900 --out reviews.txt
    python examples/tiny_corpus.py travel  --teacher SMOLLM2_FOLDER --seconds 120 --out travel.txt
    python examples/tiny_corpus.py stories --teacher STORIES260K_FOLDER --seconds 200 --out stories.txt
    python examples/tiny_corpus.py grammar --count 6000 --out grammar.txt
"""

import argparse
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_grammar import grammar_sentence
from tiny_prompts import review_prompt, travel_prompt
from torch import Tensor
from torch.nn.functional import embedding
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaForCausalLM, rotate_half

SENTENCE = re.compile(r"[^.!?]+[.!?]+")
COARSE = re.compile(
    r"\b(shit|crap|dick|bitch|porn|sex|suicid|rape|rapist|kill|racis|fuck|slut|whore|nazi)", re.IGNORECASE
)
PLAIN = re.compile(r"[A-Za-z][A-Za-z ,.!?'-]*[.!?]")


def clean(text: str) -> str | None:
    """The first sentence or two of ``text`` if they are plain English of 4 to 26 words, else None.

    A long word or a run of three words that comes twice marks a teacher that has lost its thread.
    """
    text = " ".join("".join(SENTENCE.findall(text)[:2]).split())
    words = re.findall(r"[a-z'-]+", text.lower())
    long_words = [word for word in words if len(word) > 4 and word != "movie"]
    runs = list(zip(words, words[1:], words[2:], strict=False))
    repeats = len(set(long_words)) < len(long_words) or len(set(runs)) < len(runs)
    plain = PLAIN.fullmatch(text) and not COARSE.search(text) and not re.search(r"[.!?]{2}|,,| [,.!?-]|- |--|''", text)
    return text if plain and not repeats and 4 <= len(words) <= 26 else None


class SharedPrefixSampler:
    """Continue one prompt many times: its keys and values are computed, stored and read once for all rows.

    A row stops at a line break. Only tokens of plain English can be drawn, and only those at
    least ``min_p`` times as probable as the most probable one (temperature 1).
    """

    def __init__(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, min_p: float) -> None:
        self.model, self.tokenizer, self.min_p = model, tokenizer, min_p
        self.newline: int = tokenizer("\n", add_special_tokens=False).input_ids[0]
        texts = tokenizer.batch_decode([[i] for i in range(model.config.vocab_size)])
        keep = [i for i, s in enumerate(texts) if re.fullmatch(r" ?[A-Za-z]+|[,.!?]|'[a-z]{1,2}|-", s)]
        self.vocabulary = torch.tensor([self.newline, *keep])
        self.head = model.lm_head.weight[self.vocabulary].contiguous()

    def _attend(self, layer: int, q: Tensor, prefix: tuple[Tensor, Tensor], suffix: tuple[Tensor, Tensor]) -> Tensor:
        """Attention of ``q`` (B, G, R, D) to shared keys and values (G, P, D) and own ones (B, G, S, D)."""
        b, g, r, d = q.shape
        flat = q.transpose(0, 1).reshape(g, b * r, d)
        shared = (flat @ prefix[0].transpose(1, 2)).view(g, b, r, -1).transpose(0, 1)
        own = q @ suffix[0].transpose(2, 3)
        p = torch.cat([shared, own], -1).mul(d**-0.5).softmax(-1)
        p_shared, p_own = p.split([shared.shape[-1], own.shape[-1]], -1)
        out = (p_shared.transpose(0, 1).reshape(g, b * r, -1) @ prefix[1]).view(g, b, r, d).transpose(0, 1)
        return out + p_own @ suffix[1]

    @torch.inference_mode()
    def __call__(self, prompt: str, rows: int, max_new_tokens: int, generator: torch.Generator) -> list[str]:
        """``rows`` independent continuations of ``prompt``, without the prompt."""
        core, config = self.model.model, self.model.config
        groups, size = config.num_key_value_heads, config.head_dim
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        length = ids.shape[1]
        cache = self.model(ids[:, :-1], logits_to_keep=1).past_key_values
        prefix = [(layer.keys[0].float(), layer.values[0].float()) for layer in cache.layers]
        suffix = torch.zeros(config.num_hidden_layers, 2, rows, groups, max_new_tokens, size)
        out = torch.full((rows, max_new_tokens), self.newline)
        active, token = torch.arange(rows), ids[0, -1:].expand(rows)
        for step in range(max_new_tokens):
            x = embedding(token, core.embed_tokens.weight)
            cos, sin = core.rotary_emb(x[None], torch.tensor([[length - 1 + step]]))
            for i, block in enumerate(core.layers):
                h, attn = block.input_layernorm(x), block.self_attn
                q = attn.q_proj(h).view(len(x), groups, -1, size)
                k = attn.k_proj(h).view(len(x), groups, 1, size)
                q, k = (z * cos + rotate_half(z) * sin for z in (q, k))
                suffix[i, 0, active, :, step] = k[:, :, 0].float()
                suffix[i, 1, active, :, step] = attn.v_proj(h).view(len(x), groups, size).float()
                own = suffix[i][:, active, :, : step + 1]
                mixed = self._attend(i, q.float(), prefix[i], (own[0], own[1]))
                x = x + attn.o_proj(mixed.reshape(len(x), -1).to(x.dtype))
                x = x + block.mlp(block.post_attention_layernorm(x))
            probs = (core.norm(x) @ self.head.T).float().softmax(-1)
            probs[probs < self.min_p * probs.amax(-1, keepdim=True)] = 0
            token = self.vocabulary[torch.multinomial(probs, 1, generator=generator)[:, 0]]
            out[active, step] = token
            going = token != self.newline
            active, token = active[going], token[going]
            if not len(active):
                break
        return [text.split("\n")[0] for text in self.tokenizer.batch_decode(out)]


def from_smollm2(kind: str, teacher: Path, seed: int, min_p: float) -> Iterator[str]:
    """Endless ``reviews`` or ``travel`` documents."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    sampler = SharedPrefixSampler(
        AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16), tokenizer, min_p=min_p
    )
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    while True:
        prompt, stem = (review_prompt if kind == "reviews" else travel_prompt)(rng)
        for text in sampler(prompt, 32, 32, generator):
            if (document := clean(stem + text)) and document not in prompt:
                yield document


@torch.inference_mode()
def from_stories260k(teacher: Path, seed: int) -> Iterator[str]:
    """Endless stories of at most 110 words, each cut at a sentence end."""
    tokenizer, model = AutoTokenizer.from_pretrained(teacher), AutoModelForCausalLM.from_pretrained(teacher)
    torch.manual_seed(seed)  # generate() takes no generator
    bos = torch.full((256, 1), model.config.bos_token_id)
    while True:
        ids = model.generate(
            bos,
            attention_mask=torch.ones_like(bos),
            do_sample=True,
            temperature=0.8,
            top_k=0,
            max_new_tokens=230,
        )
        for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
            words, sentences = 0, []
            for sentence in re.findall(r"[^.!?]+[.!?]+\"?", " ".join(text.split())):
                words += len(sentence.split())
                if words > 110:
                    break
                sentences.append(sentence)
            document = "".join(sentences).strip()
            if document.isascii() and document.count('"') % 2 == 0 and len(document.split()) >= 30:
                yield document


def from_grammar(seed: int) -> Iterator[str]:
    """Endless review sentences of our own grammar."""
    rng = random.Random(seed)
    while True:
        if document := clean(grammar_sentence(rng)):
            yield document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["reviews", "travel", "stories", "grammar"])
    parser.add_argument("--teacher", type=Path, help="folder of the teacher; not needed for the grammar")
    parser.add_argument("--out", type=Path, required=True, help="distinct documents are appended to this file")
    parser.add_argument("--count", type=int, default=10**9, help="stop after this many distinct documents")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--min-p", type=float, default=0.04, help="least token probability over the greatest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind == "grammar":
        documents = from_grammar(args.seed)
    elif args.teacher is None:
        parser.error(f"{args.kind} needs --teacher FOLDER")
    elif args.kind == "stories":
        documents = from_stories260k(args.teacher, args.seed)
    else:
        documents = from_smollm2(args.kind, args.teacher, args.seed, args.min_p)
    seen: set[str] = set()
    stop = time.monotonic() + args.seconds
    with args.out.open("a", encoding="utf-8") as file:
        for document in documents:
            if document not in seen:
                seen.add(document)
                file.write(document + "\n")
            if len(seen) >= args.count or time.monotonic() > stop:
                break
    print(f"{len(seen)} distinct documents -> {args.out}")


if __name__ == "__main__":
    main()
