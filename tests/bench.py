"""How fast, against what: one command, one table, every figure a ratio within the same run.

    python tests/bench.py [--model FOLDER] [--data FILE] [rollout] [step] [tiny]

`rollout` and `step` do what an R3 step does on F failures with G reflections each, and let others
do the same: transformers (what TRL's trainer stands on), vLLM's CPU build where --vllm names a
python that has it, and our own model with one row per reflection. Each contender runs in a fresh
process, and what it computes is compared before it is timed. The limit is what this machine's
fastest matrix product would take for the arithmetic that the work needs at least. `tiny` is the R3
step of the tiny model with and without what is shared. Nothing here is a test: times belong to a
machine.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from drawn_apigen import DrawnAPIGen

import grpo
import r3
from model import Model, Tokenizer, generate

NEW = 64  # tokens a turn, exactly: end-of-turn tokens are ignored
SMOL = dict(  # the shape of SmolLM2-135M, where no folder is given
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0,
    max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"], eos_token_id=2,
)  # fmt: skip


# -- The work --------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> dict:
    """F contexts as token ids (question, tools, a failed attempt, the instruction to reflect), what
    comes between reflection and retry, and G reflections on each for the training step."""
    rng = random.Random(0)
    if args.context or not (Path(args.model) / "tokenizer.json").exists():
        length = args.context or 450
        contexts = [random_tokens(rng, length) for _ in range(args.failures)]
        between = random_tokens(rng, 16)
    else:
        contexts, between = real_contexts(args)
    reflections = [[random_tokens(rng, NEW) for _ in range(args.group)] for _ in contexts]
    return {
        "model": str(args.model), "contexts": contexts, "between": between, "group": args.group,
        "reflections": reflections, "repeat": args.repeat,
    }  # fmt: skip


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(5, 40_000) for _ in range(length)]


def real_contexts(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Function-calling problems as the model's chat template shows them after a wrong attempt."""
    task, tokenizer = DrawnAPIGen(), Tokenizer.from_pretrained(args.model)
    agent, contexts = grpo.Agent(None, tokenizer, task, NEW), []
    wrong = tokenizer.encode(json.dumps([{"name": "unknown", "arguments": {}}]))
    for problem in task.load(args.data, "all" if args.data else "train"):
        bridge = tokenizer.bridge(task.reflection_instruction)
        context = agent.attempt_prompt(problem) + tokenizer.next_turn(wrong, bridge)
        if 350 <= len(context) <= 560 or not args.data:
            contexts.append(context)
        if len(contexts) == args.failures:
            break
    return contexts, tokenizer.bridge(task.retry_instruction)


def products(config: dict) -> tuple[int, int]:
    """Multiplications a token in the matrices of all layers, and in the head."""
    E, layers = config["hidden_size"], config["num_hidden_layers"]
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    D, inner = config.get("head_dim") or E // heads, config["intermediate_size"]
    return layers * E * (2 * heads * D + 2 * shared * D + 3 * inner), E * config["vocab_size"]


def attention(config: dict, pairs: float) -> float:
    """Multiplications for so many pairs of a query and a key: scores, and sums of values."""
    E, heads = config["hidden_size"], config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * (config.get("head_dim") or E // heads) * pairs


def rollout_flop(config: dict, w: dict) -> float:
    """The least that two turns need: each context once, each sampled or appended token once."""
    matrices, head = products(config)
    total = 0.0
    for C in map(len, w["contexts"]):
        total += C * matrices + attention(config, C * C / 2)
        rows = 2 * NEW + len(w["between"]) - 1  # read after the context; the last token is not
        pairs = rows * C + rows * rows / 2
        total += w["group"] * (rows * matrices + 2 * NEW * head + attention(config, pairs))
    return 2 * total


def step_flop(config: dict, w: dict, shared: bool) -> float:
    """Forward and backward (twice the forward) of a training step."""
    matrices, head = products(config)
    total, G, T = 0.0, w["group"], NEW - 1  # the last token predicts nothing
    for C in map(len, w["contexts"]):
        own = G * (T * matrices + (T + 1) * head + attention(config, T * C + T * T / 2))
        total += own + (1 if shared else G) * (C * matrices + attention(config, C * C / 2))
    return 3 * 2 * total


# -- Contenders for the rollout, each in a process of its own --------------------------------------


def timed(function, repeat: int) -> dict[str, float]:
    """Seconds, the least of a few runs; and the most bytes that this process and its children held
    meanwhile, as Linux counts them."""
    for folder in family():
        (folder / "clear_refs").write_text("5")  # the high-water mark begins anew
    times = []
    for _ in range(repeat):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    marks = [re.search(r"VmHWM:\s+(\d+)", (f / "status").read_text()) for f in family()]
    return {"seconds": min(times), "peak": 1024 * sum(int(mark[1]) for mark in marks if mark)}


def family() -> list[Path]:
    """This process and all that came from it, as folders of /proc."""
    found = [Path("/proc/self")]
    for folder in found:  # which grows
        for task in (folder / "task").iterdir():
            found += [Path("/proc") / child for child in (task / "children").read_text().split()]
    return found


def our_rollout(w: dict) -> dict:
    model = Model.from_pretrained(w["model"])

    def two_turns(temperature=1.0, G=w["group"]):
        options = dict(max_new_tokens=NEW, temperature=temperature)
        one = generate(model, w["contexts"], num_samples=G, **options)
        turns = [turn for group in one.tokens for turn in group]
        told = [turn[-1:] + w["between"] for turn in turns]
        two = generate(model, told, cache=one.cache, seed=1, **options)
        return [turns, [turn for [turn] in two.tokens]]

    return {"greedy": two_turns(0.0, 1), **timed(two_turns, w["repeat"])}


def transformers_rollout(w: dict) -> dict:
    """Batched, padded on the left, its cache kept between the turns."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(w["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    width = max(map(len, w["contexts"]))
    ids = torch.tensor([[0] * (width - len(c)) + c for c in w["contexts"]])
    attention_mask = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in w["contexts"]])

    def two_turns(sample=True, G=w["group"]):
        options = dict(max_new_tokens=NEW, do_sample=sample, return_dict_in_generate=True)
        options |= dict(top_k=0, pad_token_id=0) if sample else dict(pad_token_id=0)
        one = model.generate(ids, attention_mask=attention_mask, num_return_sequences=G, **options)
        rows = one.sequences
        told = torch.cat([rows, torch.tensor([w["between"]] * len(rows))], dim=1)
        mask = torch.ones_like(told)
        mask[:, :width] = attention_mask.repeat_interleave(G, dim=0)
        two = model.generate(
            told, attention_mask=mask, past_key_values=one.past_key_values, **options
        )
        return [rows[:, width:].tolist(), two.sequences[:, told.shape[1] :].tolist()]

    return {"greedy": two_turns(False, 1), **timed(two_turns, w["repeat"])}


def vllm_rollout(w: dict) -> dict:
    from vllm import LLM, SamplingParams

    longest = max(map(len, w["contexts"])) + 2 * NEW + len(w["between"])
    llm = LLM(
        w["model"], dtype="float32", enable_prefix_caching=True, max_model_len=longest + 1,
        gpu_memory_utilization=0.5,
    )  # fmt: skip

    def draw(prompts, n, greedy):
        limits = dict(max_tokens=NEW, min_tokens=NEW, ignore_eos=True, detokenize=False)
        sampling = SamplingParams(n=n, temperature=0.0 if greedy else 1.0, **limits)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, sampling, use_tqdm=False)
        return [[list(o.token_ids) for o in output.outputs] for output in outputs]

    def two_turns(greedy=False, G=w["group"]):
        llm.reset_prefix_cache()
        one, told = draw(w["contexts"], G, greedy), []
        for context, turns in zip(w["contexts"], one, strict=True):
            told += [context + turn + w["between"] for turn in turns]
        two = draw(told, 1, greedy)
        return [[turn for turns in one for turn in turns], [turn for [turn] in two]]

    return {"greedy": two_turns(True, 1), **timed(two_turns, w["repeat"])}


# -- Contenders for the training step: one failure with its G reflections a backward pass ----------


def our_step(w: dict) -> dict:
    """The context once."""
    return steps(Model.from_pretrained(w["model"]), grpo.token_logprobs, w)


def our_rows_step(w: dict) -> dict:
    """The context in each of the G rows."""
    return steps(Model.from_pretrained(w["model"]), row_logprobs, w)


def transformers_step(w: dict) -> dict:
    """The context in each of the G rows."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(w["model"], dtype=torch.float32)
    return steps(model.train(), transformers_logprobs, w)


def row_logprobs(model: Model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As grpo.token_logprobs, with one row per reflection."""
    hidden = model.hidden(ids)[:, :-1][mask[:, 1:]]  # (tokens, E)
    logprobs = grpo.score(model, hidden, ids[mask], 1.0)
    return torch.zeros(ids.shape).masked_scatter(mask, logprobs)


def transformers_logprobs(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As TRL computes them: logits of the completions only. All rows have one length here."""
    start = int(mask[0].int().argmax())
    own, seen = ids[:, start:], torch.ones_like(ids)
    out = model(ids, attention_mask=seen, logits_to_keep=own.shape[1] + 1, use_cache=False)
    log_p = out.logits[:, :-1].float().log_softmax(-1)  # (G, NEW, V)
    new = log_p.gather(-1, own[..., None]).squeeze(-1)
    return torch.nn.functional.pad(new, (start, 0))


def gradients(model, score, w: dict) -> float:
    """Add the gradients of a step to the model's parameters; returns the loss. Every third
    reflection is rewarded. score(model, ids, mask): as grpo.token_logprobs."""
    G, total = w["group"], 0.0
    rewards = torch.tensor([[float(g % 3 == 0) for g in range(G)]])
    # One that is alone has nothing to be compared with, and would be left out.
    A = grpo.group_advantages(rewards)[0] if G > 1 else torch.ones(1)
    for context, turns in zip(w["contexts"], w["reflections"], strict=True):
        ids = torch.tensor([context + turn for turn in turns])  # (G, T)
        mask = (torch.arange(ids.shape[1]) >= len(context)).repeat(G, 1)
        new = score(model, ids, mask)  # (G, T)
        normalizer = len(w["contexts"]) * G * NEW
        loss = grpo.grpo_loss(new, new.detach(), None, A, mask, beta=0.0, normalizer=normalizer)
        loss.backward()
        total += loss.item()
    return total


def steps(model, score, w: dict) -> dict:
    """A step, whose gradients are kept for comparison, and then steps against the clock."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    loss = gradients(model, score, w)
    save_file({name: p.grad.contiguous() for name, p in model.named_parameters()}, w["gradient"])
    optimizer.step()

    def one_more() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients(model, score, w)
        optimizer.step()

    return {"loss": loss, **timed(one_more, w["repeat"])}


# -- Processes -------------------------------------------------------------------------------------


ROLLOUTS = {
    "our_rollout": "this repository",
    "transformers_rollout": "transformers.generate",
    "vllm_rollout": "vLLM (CPU)",
}
STEPS = {
    "our_step": "this repository, context once",
    "our_rows_step": "one row per reflection",
    "transformers_step": "transformers, one row per reflection",
}


def run(name: str, w: dict, python: str = sys.executable) -> dict:
    """What a contender returns, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        given, said = Path(folder) / "work.json", Path(folder) / "said.json"
        given.write_text(json.dumps(w))
        command = [python, __file__, "--contender", name, str(given), str(said)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        return json.loads(said.read_text())


# -- The tables ------------------------------------------------------------------------------------


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / timed(lambda: a @ a, 10)["seconds"]


@torch.no_grad()
def agree(model: str, w: dict, one: list, other: list) -> None:
    """Greedy turns must be equal up to a step where the two best logits are within 1e-3."""
    network = Model.from_pretrained(model)
    for context, a1, a2, b1, b2 in zip(w["contexts"], *one, *other, strict=True):
        mine, theirs = (context + x1 + w["between"] + x2 for x1, x2 in ((a1, a2), (b1, b2)))
        at = len(os.path.commonprefix([mine, theirs]))
        if at < len(mine):
            best = network(torch.tensor([mine[:at]]))[0, -1].topk(2).values
            if best[0] - best[1] > 1e-3:
                sys.exit(f"greedy outputs differ at token {at - len(context)}")


def rollout(args: argparse.Namespace, config: dict, w: dict) -> None:
    rate, flop = matrix_rate(), rollout_flop(config, w)
    found, limit, rows = {}, flop / rate, {}
    tokens = 2 * NEW * args.failures * args.group
    for name, label in ROLLOUTS.items():
        if name == "vllm_rollout" and not args.vllm:
            continue
        found = run(name, w, args.vllm if name == "vllm_rollout" else sys.executable)
        s = found["seconds"]
        if name == "our_rollout":
            ours, greedy = s, found["greedy"]
        agree(args.model, w, greedy, found["greedy"])
        print(f"{label}: {s:.1f} s", flush=True)
        rows[label] = {
            "seconds": f"{s:.1f}", "new tokens/s": f"{tokens / s:.0f}",
            "ours is faster by": f"{s / ours:.2f}x", "share of limit": f"{limit / s:.0%}",
            "peak GB": f"{found['peak'] / 1e9:.2f}",
        }  # fmt: skip
    rows["limit"] = {
        "seconds": f"{limit:.1f}", "new tokens/s": f"{tokens / limit:.0f}",
        "ours is faster by": f"{limit / ours:.2f}x",
    }  # fmt: skip
    lengths = [len(context) for context in w["contexts"]]
    title = (
        f"rollout: {args.failures} failures x {args.group} reflections of {NEW} tokens x a retry "
        f"of {NEW}, contexts of {min(lengths)} to {max(lengths)} tokens; "
        f"{flop / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s; equal greedy outputs"
    )
    print("\n" + r3.markdown({title: rows}), flush=True)


def step(args: argparse.Namespace, config: dict, w: dict) -> None:
    rate, parameters = matrix_rate(), sum(products(config))  # (norms are negligible)
    rows = {}
    for name, label in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "gradient.safetensors")
            found, gradient = run(name, {**w, "gradient": file}), load_file(file)
        s = found["seconds"]
        if name == "our_step":
            ours, loss, mine = s, found["loss"], gradient
        cosine = dot(gradient, mine) / (dot(gradient, gradient) * dot(mine, mine)) ** 0.5
        if cosine < 0.9999 or abs(found["loss"] - loss) > 1e-4:
            sys.exit(f"{name} computes another step: cosine {cosine}, loss {found['loss']}")
        print(f"{label}: {s:.1f} s", flush=True)
        flop = step_flop(config, w, shared=name == "our_step")
        rows[label] = {
            "seconds": f"{s:.1f}", "ours is faster by": f"{s / ours:.2f}x",
            "TFLOP": f"{flop / 1e12:.2f}", "share of limit": f"{flop / rate / s:.0%}",
            "cosine": f"{cosine:.6f}", "GB above weights, gradients, moments":
            f"{(found['peak'] - 16 * parameters) / 1e9:.2f}",
        }  # fmt: skip
    ratio = step_flop(config, w, False) / step_flop(config, w, True)
    title = (
        f"training step: {args.failures} failures x {args.group} reflections of {NEW} tokens; "
        f"{rate / 1e9:.0f} GFLOP/s; ratio of the arithmetic {ratio:.2f}"
    )
    print("\n" + r3.markdown({title: rows}), flush=True)


def dot(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a)


# -- The tiny model --------------------------------------------------------------------------------


def tiny(args: argparse.Namespace) -> None:
    """An R3 step of the tiny model: rollout and update, with and without what is shared."""
    c = replace(r3.TINY, model=args.tiny_model)
    agent = r3.load_agent(c)
    problems = agent.task.load(split="train")
    conversations = grpo.attempt_all(agent, problems, 1, (grpo.COLLECT, 0))
    failures = [t for t in conversations if not t.attempt_verdict.correct][: c.batch_size]
    key = (grpo.TRAIN, 0)
    conversations = grpo.rollout(agent, failures, c.group_size, key)
    groups = [
        conversations[i : i + c.group_size] for i in range(0, len(conversations), c.group_size)
    ]
    A = grpo.group_advantages(torch.eye(c.group_size)[:1])[0]

    def plain():
        """Each sample reads its context itself, and each turn is read from the beginning."""
        alone = [replace(f, attempt_index=g) for f in failures for g in range(c.group_size)]
        reflected, _ = grpo.sample_reflections(agent, alone, 1, key)
        return grpo.sample_retries(agent, reflected, key)

    def update(score):
        for group in groups:
            ids, mask, old = grpo.reflection_rows(group)
            new = score(agent.model, ids, mask)
            grpo.grpo_loss(new, old, None, A, mask, beta=0.0).backward()
        agent.model.zero_grad()

    pairs = {
        "rollout": (plain, lambda: grpo.rollout(agent, failures, c.group_size, key)),
        "update": (lambda: update(row_logprobs), lambda: update(grpo.token_logprobs)),
    }
    rows = {}
    for label, (one, other) in pairs.items():
        one(), other()
        a, b = (timed(each, 3)["seconds"] for each in (one, other))
        rows[label] = {
            "plain, s": f"{a:.2f}",
            "shared, s": f"{b:.2f}",
            "faster by": f"{a / b:.2f}x",
        }
    title = f"tiny model: {len(failures)} failures x {c.group_size} reflections x a retry"
    print("\n" + r3.markdown({title: rows}))


# -- The command line ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", help="rollout, step, tiny (default: the first 2)")
    parser.add_argument("--model", help="a Hugging Face folder (default: random, of a 135M shape)")
    parser.add_argument("--data", help="a file of function-calling problems, for real contexts")
    parser.add_argument("--vllm", help="a python that has vLLM's CPU build")
    parser.add_argument("--tiny-model", default="tiny", help="for the part called tiny")
    parser.add_argument("--failures", type=int, default=4, help="F")
    parser.add_argument("--group", type=int, default=8, help="G, reflections a failure")
    parser.add_argument("--context", type=int, help="tokens of random contexts, not real ones")
    parser.add_argument("--repeat", type=int, default=2, help="runs, of which the fastest counts")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.contender:
        name, given, said = args.contender
        found = globals()[name](json.loads(Path(given).read_text()))
        Path(said).write_text(json.dumps(found))
        return
    what = args.what or ["rollout", "step"]
    if "tiny" in what:
        tiny(args)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model and {"rollout", "step"} & set(what):
            torch.manual_seed(0)
            Model(SMOL).save_pretrained(folder)
            args.model = folder
        for part, table in (("rollout", rollout), ("step", step)):
            if part in what:
                table(args, json.loads((Path(args.model) / "config.json").read_text()), work(args))


if __name__ == "__main__":
    main()
