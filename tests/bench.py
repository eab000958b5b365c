"""How fast, against what: one command, one table, every figure a ratio within the same run.

    python tests/bench.py [--model FOLDER] [--data FILE] [rollout] [step] [scaling] [tiny]

`rollout` and `step` do what an R3 step does on F failures with G reflections each, and let others
do the same: transformers (what TRL's trainer stands on), vLLM's CPU build where --vllm names a
python that has it, and our own code with one row per reflection. Each contender runs in a fresh
process, and what it computes is compared before it is timed. The limit is what this machine's
fastest matrix product would take for the arithmetic that the work needs at least. `scaling` grows G
and the contexts. `tiny` is the R3 step of the tiny model with and without what is shared. Nothing
here is a test: times belong to a machine.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEW = 64  # tokens a turn, exactly: end-of-turn tokens are ignored
SMOL = dict(  # the shape of SmolLM2-135M, where no folder is given
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0,
    max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"], eos_token_id=2,
)  # fmt: skip


# -- The work --------------------------------------------------------------------------------------


def work(args) -> dict:
    """F contexts as token ids (question, tools, a failed attempt, the instruction to reflect), what
    comes between reflection and retry, and G reflections on each for the training step."""
    import random

    import torch

    from model import Tokenizer
    from r3 import Speaker
    from tasks import APIGen

    rng = random.Random(0)
    if args.context or not (Path(args.model) / "tokenizer.json").exists():
        length = args.context or 450
        contexts = [[rng.randrange(5, 40_000) for _ in range(length)] for _ in range(args.failures)]
        between = [rng.randrange(5, 40_000) for _ in range(16)]
    else:
        task, tokenizer = APIGen(), Tokenizer.from_pretrained(args.model)
        speaker, contexts = Speaker(None, tokenizer, task, NEW), []
        split = "all" if args.data else "train"
        for problem in task.load(args.data, split):
            wrong = json.dumps([{"name": "unknown", "arguments": {}}])
            turn = tokenizer.encode(wrong)
            bridge = tokenizer.bridge(task.reflect)
            context = speaker.question(problem) + tokenizer.next_turn(turn, bridge)
            if 350 <= len(context) <= 560 or not args.data:
                contexts.append(context)
            if len(contexts) == args.failures:
                break
        between = tokenizer.bridge(task.again)
    reflections = [
        [[rng.randrange(5, 40_000) for _ in range(NEW)] for _ in range(args.group)]
        for _ in contexts
    ]
    rewards = torch.tensor([[float(g % 3 == 0) for g in range(args.group)]] * len(contexts))
    return {
        "model": str(args.model), "contexts": contexts, "between": between, "group": args.group,
        "reflections": reflections, "rewards": rewards.tolist(), "repeat": args.repeat,
    }  # fmt: skip


def products(config: dict) -> tuple[int, int]:
    """Multiplications a token in the matrices of all layers, and in the head."""
    E, inner, layers = (
        config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    heads, shared = config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim") or E // heads
    return layers * E * (2 * heads * D + 2 * shared * D + 3 * inner), E * config["vocab_size"]


def attention(config: dict, pairs: float) -> float:
    """Multiplications for so many pairs of a query and a key: scores, and sums of values."""
    E, heads = config["hidden_size"], config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * (config.get("head_dim") or E // heads) * pairs


def rollout_flop(config: dict, w: dict) -> float:
    """The least that two turns need: each context once, each sampled or appended token once."""
    matrices, head = products(config)
    G, b = w["group"], len(w["between"])
    total = 0.0
    for C in map(len, w["contexts"]):
        total += C * matrices + attention(config, C * C / 2)
        rows = 2 * NEW + b - 1  # what a row reads after the context; the last token is not read
        pairs = rows * C + rows * rows / 2
        total += G * (rows * matrices + 2 * NEW * head + attention(config, pairs))
    return 2 * total


def step_flop(config: dict, w: dict, shared: bool) -> float:
    """Forward and backward (twice the forward) of a training step."""
    matrices, head = products(config)
    total = 0.0
    for C, group in zip(map(len, w["contexts"]), w["reflections"], strict=True):
        T, G = len(group[0]) - 1, len(group)  # the last token predicts nothing
        own = G * (T * matrices + (T + 1) * head + attention(config, T * C + T * T / 2))
        total += own + (1 if shared else G) * (C * matrices + attention(config, C * C / 2))
    return 3 * 2 * total


# -- The contenders, each in a process of its own --------------------------------------------------


def timed(function, w: dict) -> float:
    """Seconds, the least of a few runs. Memory is watched from here on."""
    Path(w.get("mark", os.devnull)).touch()
    times = []
    for _ in range(w["repeat"]):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return min(times)


def our_rollout(w: dict) -> dict:
    from model import Model, generate

    model, G = Model.from_pretrained(w["model"]), w["group"]

    def two_turns(temperature=1.0, G=G):
        options = dict(max_new_tokens=NEW, temperature=temperature)
        one = generate(model, w["contexts"], samples=G, **options)
        turns = [turn for group in one.tokens for turn in group]
        told = [turn[-1:] + w["between"] for turn in turns]
        two = generate(model, told, cache=one.cache, seed=1, **options)
        return [turns, [turn for [turn] in two.tokens]]

    return {"greedy": two_turns(0.0, 1), "seconds": timed(two_turns, w)}


def transformers_rollout(w: dict) -> dict:
    """Batched, padded on the left, its cache kept between the turns."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(w["model"], dtype=torch.float32)
    width = max(map(len, w["contexts"]))
    ids = torch.tensor([[0] * (width - len(c)) + c for c in w["contexts"]])
    live = torch.tensor([[0] * (width - len(c)) + [1] * len(c) for c in w["contexts"]])
    model.generation_config.eos_token_id = None

    def two_turns(sample=True, G=w["group"]):
        options = dict(max_new_tokens=NEW, do_sample=sample, return_dict_in_generate=True)
        options |= dict(top_k=0, pad_token_id=0) if sample else dict(pad_token_id=0)
        one = model.generate(ids, attention_mask=live, num_return_sequences=G, **options)
        rows = one.sequences
        told = torch.cat([rows, torch.tensor([w["between"]] * len(rows))], dim=1)
        mask = torch.ones_like(told)
        mask[:, :width] = live.repeat_interleave(G, dim=0)
        two = model.generate(
            told, attention_mask=mask, past_key_values=one.past_key_values, **options
        )
        return [rows[:, width:].tolist(), two.sequences[:, told.shape[1] :].tolist()]

    return {"greedy": two_turns(False, 1), "seconds": timed(two_turns, w)}


def vllm_rollout(w: dict) -> dict:
    from vllm import LLM, SamplingParams

    longest = max(map(len, w["contexts"])) + 2 * NEW + len(w["between"])
    llm = LLM(
        w["model"],
        dtype="float32",
        enable_prefix_caching=True,
        max_model_len=longest + 1,
        gpu_memory_utilization=0.5,
    )  # of the main memory, here

    def say(prompts, n, greedy):
        limits = dict(max_tokens=NEW, min_tokens=NEW, ignore_eos=True, detokenize=False)
        sampling = SamplingParams(n=n, temperature=0.0 if greedy else 1.0, **limits)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(given, sampling, use_tqdm=False)
        return [[list(o.token_ids) for o in output.outputs] for output in outputs]

    def two_turns(greedy=False, G=w["group"]):
        llm.reset_prefix_cache()
        one = say(w["contexts"], G, greedy)
        told = [
            context + turn + w["between"]
            for context, turns in zip(w["contexts"], one, strict=True)
            for turn in turns
        ]
        two = say(told, 1, greedy)
        return [[turn for turns in one for turn in turns], [turn for [turn] in two]]

    return {"greedy": two_turns(True, 1), "seconds": timed(two_turns, w)}


def batch_of(w: dict):
    import torch

    import grpo

    rewards = torch.tensor(w["rewards"])
    contexts = [c for c in w["contexts"] for _ in range(w["group"])]
    reflections = [r for group in w["reflections"] for r in group]
    batch = grpo.reflection_batch(contexts, reflections, None, rewards)
    if w["group"] == 1:  # alone it has nothing to be compared with, and would be left out
        batch.advantages.fill_(1.0)
    return batch


def our_step(w: dict, shared: bool = True) -> dict:
    """One failure a micro-batch: its context once, or (shared=False) in each of its G rows."""
    import grpo
    from model import Model

    model, batch = Model.from_pretrained(w["model"]), batch_of(w)
    longest = max(map(len, w["contexts"])) + w["group"] * NEW
    if not shared:
        longest, batch.group = w["group"] * (max(map(len, w["contexts"])) + NEW), 1
    settings = grpo.Settings(beta=0.0, micro_tokens=longest)
    return steps(model, lambda: grpo.gradients(model, None, batch, settings)["loss"], w)


def our_rows_step(w: dict) -> dict:
    return our_step(w, shared=False)


def transformers_step(w: dict) -> dict:
    """One row per reflection, 8 rows a micro-batch, logits of the completions only, as TRL does."""
    import torch
    import transformers

    import grpo

    model = transformers.AutoModelForCausalLM.from_pretrained(w["model"], dtype=torch.float32)
    model.train()
    batch = batch_of(w)
    tokens = sum(end - start for [(start, end)] in batch.spans)

    def gradients() -> float:
        total = 0.0
        for first in range(0, len(batch.ids), 8):
            rows, spans = batch.ids[first : first + 8], batch.spans[first : first + 8]
            width = max(end - start for [(start, end)] in spans)
            longest = max(start for [(start, _)] in spans)  # prompts padded on the left
            ids = [
                [0] * (longest - a) + row + [0] * (width - b + a)
                for row, [(a, b)] in zip(rows, spans, strict=True)
            ]
            live = [
                [0] * (longest - a) + [1] * len(row) + [0] * (width - b + a)
                for row, [(a, b)] in zip(rows, spans, strict=True)
            ]
            ids, live = torch.tensor(ids), torch.tensor(live)
            out = model(ids, attention_mask=live, logits_to_keep=width + 1, use_cache=False)
            log_p = out.logits[:, :-1].float().log_softmax(-1)
            chosen = log_p.gather(-1, ids[:, longest:, None]).squeeze(-1)
            A, mask = batch.advantages[first : first + 8], live[:, longest:].bool()
            loss = grpo.grpo_loss(
                chosen, chosen.detach(), None, A, mask, beta=0.0, normalizer=tokens
            )
            loss.backward()
            total += loss.item()
        return total

    return steps(model, gradients, w)


def steps(model, gradients, w: dict) -> dict:
    """A step, whose gradients are kept for comparison, and then steps against the clock.

    gradients() adds the gradients to the model's parameters and returns the loss.
    """
    import torch
    from safetensors.torch import save_file

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    loss = gradients()
    found = {name: p.grad.contiguous() for name, p in model.named_parameters()}
    save_file(found, w["gradient"])
    del found
    update()
    return {"loss": loss, "seconds": timed(lambda: (gradients(), update()), w)}


CONTENDERS = {
    f.__name__: f
    for f in (our_rollout, transformers_rollout, vllm_rollout, our_step, our_rows_step)
}
CONTENDERS["transformers_step"] = transformers_step


def resident(pid: int) -> int:
    """Bytes of a process and all that came from it, as Linux counts them."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                after = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = (
                    int(after[1]),
                    int(after[21]) * os.sysconf("SC_PAGE_SIZE"),
                )
            except OSError:
                pass
    family = {pid}
    for _ in range(4):
        family |= {child for child, (parent, _) in parents.items() if parent in family}
    return sum(parents[p][1] for p in family if p in parents)


def run(name: str, w: dict, python: str = sys.executable) -> dict:
    """A contender in a fresh process: what it says, and the most memory that it held."""
    with tempfile.TemporaryDirectory() as folder:
        given, said = Path(folder) / "work.json", Path(folder) / "said.json"
        mark = Path(folder) / "mark"
        given.write_text(json.dumps({**w, "mark": str(mark)}))
        command = [python, __file__, "--contender", name, str(given), str(said)]
        log = open(Path(folder) / "log", "w+")  # noqa: SIM115
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak, done = 0, threading.Event()

        def watch():
            nonlocal peak
            while not done.wait(0.5):
                peak = max(peak, resident(process.pid)) if mark.exists() else 0

        thread = threading.Thread(target=watch)
        thread.start()
        code = process.wait()
        done.set()
        thread.join()
        if code:
            log.seek(0)
            sys.exit(f"{name} failed:\n{log.read()[-3000:]}")
        return {**json.loads(said.read_text()), "peak": peak}


# -- The tables ------------------------------------------------------------------------------------


def matrix_rate() -> float:
    """Floating-point operations a second of a large matrix product."""
    import torch

    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / timed(lambda: a @ a, {"repeat": 10})


def agree(model: str, w: dict, one: list, other: list) -> None:
    """Greedy turns must be equal up to a step where the two best logits are within 1e-3."""
    import torch

    from model import Model

    network = Model.from_pretrained(model)
    for context, a1, a2, b1, b2 in zip(w["contexts"], *one, *other, strict=True):
        mine, theirs = (context + x1 + w["between"] + x2 for x1, x2 in ((a1, a2), (b1, b2)))
        at = len(os.path.commonprefix([mine, theirs]))
        if at < len(mine):
            with torch.no_grad():
                best = network(torch.tensor([mine[:at]]))[0, -1].topk(2).values
            if best[0] - best[1] > 1e-3:
                sys.exit(f"greedy outputs differ at token {at - len(context)}")


def table(title: str, rows: list[list]) -> None:
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(str(c).ljust(n) for c, n in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (n + 2) for n in widths) + "|")
    print(f"\n{title}\n\n" + "\n".join(lines), flush=True)


def rollout(args, config: dict, w: dict) -> None:
    rate, flop = matrix_rate(), rollout_flop(config, w)
    names = {"our_rollout": "this repository", "transformers_rollout": "transformers.generate"}
    if args.vllm:
        names["vllm_rollout"] = "vLLM (CPU)"
    found = {}
    for name in names:
        found[name] = run(name, w, args.vllm if name == "vllm_rollout" else sys.executable)
        agree(args.model, w, found["our_rollout"]["greedy"], found[name]["greedy"])
        print(f"{names[name]}: {found[name]['seconds']:.1f} s", flush=True)
    ours, limit = found["our_rollout"]["seconds"], flop / rate
    tokens = 2 * NEW * args.failures * args.group
    rows = [
        ["rollout", "seconds", "new tokens/s", "ours is faster by", "share of limit", "peak GB"]
    ]
    for name, label in names.items():
        s, peak = found[name]["seconds"], found[name]["peak"] / 1e9
        rows.append([label, f"{s:.1f}", f"{tokens / s:.0f}", f"{s / ours:.2f}x",
                     f"{limit / s:.0%}", f"{peak:.2f}"])  # fmt: skip
    rows.append(["limit", f"{limit:.1f}", f"{tokens / limit:.0f}", f"{limit / ours:.2f}x", "", ""])
    table(
        f"{args.failures} failures x {args.group} reflections of {NEW} tokens x a retry of {NEW}, "
        f"contexts of {min(map(len, w['contexts']))} to {max(map(len, w['contexts']))} tokens; "
        f"{flop / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s; equal greedy outputs",
        rows,
    )


def step(args, config: dict, w: dict) -> None:
    from safetensors.torch import load_file

    rate, parameters = matrix_rate(), sum(products(config))  # (norms are negligible)
    names = {
        "our_step": "this repository, context once", "our_rows_step": "one row per reflection",
        "transformers_step": "transformers, one row per reflection",
    }  # fmt: skip
    found, gradients, cosines = {}, {}, {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "gradient.safetensors")
            found[name] = run(name, {**w, "gradient": file})
            gradients[name] = load_file(file)
        dot = [
            sum((gradients[a][key] * gradients[b][key]).sum().item() for key in gradients[a])
            for a, b in ((name, "our_step"), (name, name), ("our_step", "our_step"))
        ]
        cosines[name] = dot[0] / (dot[1] * dot[2]) ** 0.5
        off = abs(found[name]["loss"] - found["our_step"]["loss"])
        if cosines[name] < 0.9999 or off > 1e-4:
            sys.exit(f"{name} computes another step: cosine {cosines[name]}, loss off by {off}")
        print(f"{names[name]}: {found[name]['seconds']:.1f} s", flush=True)
    ours = found["our_step"]["seconds"]
    rows = [["training step", "seconds", "ours is faster by", "TFLOP", "share of limit", "cosine",
             "GB above weights, gradients, moments"]]  # fmt: skip
    for name, label in names.items():
        s, flop = found[name]["seconds"], step_flop(config, w, shared=name == "our_step")
        above = (found[name]["peak"] - 16 * parameters) / 1e9
        rows.append([label, f"{s:.1f}", f"{s / ours:.2f}x", f"{flop / 1e12:.2f}",
                     f"{flop / rate / s:.0%}", f"{cosines[name]:.6f}", f"{above:.2f}"])  # fmt: skip
    ratio = step_flop(config, w, False) / step_flop(config, w, True)
    table(
        f"{args.failures} failures x {args.group} reflections of {NEW} tokens; "
        f"{rate / 1e9:.0f} GFLOP/s; ratio of the arithmetic {ratio:.2f}",
        rows,
    )


def scaling(args, config: dict) -> None:
    """Where time goes as groups and contexts grow, and what one more of either costs."""
    base = {**vars(args), "failures": 2, "context": 512, "group": 8}
    rows, took = [["", "rollout, s", "training step, s"]], {}
    grid = [{"group": G} for G in (1, 2, 4, 8, 16)] + [{"context": C} for C in (128, 256, 1024)]
    for change in grid:
        w = work(argparse.Namespace(**{**base, **change}))
        label = ", ".join(f"{k} {v}" for k, v in {"group": 8, "context": 512, **change}.items())
        with tempfile.TemporaryDirectory() as folder:
            w["gradient"] = str(Path(folder) / "gradient.safetensors")
            times = [run(name, w)["seconds"] for name in ("our_rollout", "our_step")]
        rows.append([label, *(f"{t:.2f}" for t in times)])
        took[next(iter(change.items()))] = times
    table(f"2 failures, {NEW} new tokens a turn", rows)
    for number, what in enumerate(("rollout", "training step")):
        row = (took["group", 16][number] - took["group", 1][number]) / (15 * 2)
        context = (took["context", 1024][number] - took["context", 128][number]) / 2 / 896
        print(f"{what}: {row:.2f} s a reflection, {512 * context:.2f} s a context of 512 tokens")


def tiny(args) -> None:
    """An R3 step of the tiny model: rollout and update, with and without what is shared."""
    import grpo
    import r3
    from model import generate
    from tasks import Countdown

    flags = argparse.Namespace(
        model=args.tiny_model, task="countdown", seed=0, device="cpu", temperature=1.0,
        cache_tokens=None, revision=None, compile=False, dtype=None, resume=None,
        max_new_tokens=None, date="2025-05-30", fresh=False, group=8,
    )  # fmt: skip
    speaker = r3.open_speaker(flags)
    r3.load_weights(flags, speaker)
    problems = Countdown(tiny=True).load(split="train")
    failures = [c for c in r3.attempt(speaker, problems, 1, (0, 0)) if not c.first.right][:32]
    bridge = speaker.tokenizer.bridge(speaker.task.reflect)
    contexts = [f.prompt + speaker.tokenizer.next_turn(f.attempt, bridge) for f in failures]
    keys = [(0, f.problem.id) for f in failures]
    options = dict(max_new_tokens=speaker.max_new_tokens, stop=speaker.tokenizer.stop_ids)

    def shared():
        reflected, cache = r3.reflect(speaker, failures, 8, (0, 0))
        return r3.retry(speaker, reflected, (0, 0), cache)

    def plain():
        """Each sample reads its context itself, and each turn is read from the beginning."""
        rows = [c for c in contexts for _ in range(8)]
        one = generate(
            speaker.model, rows, keys=[(*k, g) for k in keys for g in range(8)], **options
        )
        turns = [turn for [turn] in one.tokens]
        again = speaker.tokenizer.bridge(speaker.task.again)
        told = [c + speaker.tokenizer.next_turn(t, again) for c, t in zip(rows, turns, strict=True)]
        return generate(speaker.model, told, **options)

    tries = shared()
    import torch

    rewards = torch.tensor([float(c.second.right) for c in tries]).view(-1, 8)
    batch = grpo.reflection_batch(
        [c.context for c in tries],
        [c.reflection for c in tries],
        [c.logprobs["reflection"] for c in tries],
        rewards,
    )
    settings = grpo.Settings(beta=0.0)

    def update(group: int):
        batch.group = group
        grpo.gradients(speaker.model, None, batch, settings)
        speaker.model.zero_grad()

    rows = [["tiny model", "plain, s", "shared, s", "faster by"]]
    for label, one, other in (
        ("rollout", plain, shared),
        ("update", lambda: update(1), lambda: update(8)),
    ):
        one(), other()
        a, b = (timed(f, {"repeat": 3}) for f in (one, other))
        rows.append([label, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}x"])
    table(f"{len(failures)} failures x 8 reflections x a retry, turns as long as they are", rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="*", help="rollout, step, scaling, tiny (default: the first 2)"
    )
    parser.add_argument("--model", help="a Hugging Face folder (default: random, of a 135M shape)")
    parser.add_argument("--data", help="a file of function-calling problems, for real contexts")
    parser.add_argument("--vllm", help="a python that has vLLM's CPU build")
    parser.add_argument("--tiny-model", default="tiny", help="for the part called tiny")
    parser.add_argument("--failures", type=int, default=4, help="F")
    parser.add_argument("--group", type=int, default=8, help="G, reflections a failure")
    parser.add_argument(
        "--context", type=int, help="tokens of random contexts instead of real ones"
    )
    parser.add_argument("--repeat", type=int, default=2, help="runs, of which the fastest counts")
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    sys.path.insert(0, str(ROOT))
    if args.contender:
        name, given, said = args.contender
        found = CONTENDERS[name](json.loads(Path(given).read_text()))
        Path(said).write_text(json.dumps(found))
        return
    what = args.what or ["rollout", "step"]
    if "tiny" in what:
        tiny(args)
    if set(what) <= {"tiny"}:
        return
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            import torch

            from model import Model

            torch.manual_seed(0)
            Model(SMOL).save_pretrained(folder)
            args.model = folder
        config = json.loads((Path(args.model) / "config.json").read_text())
        if "rollout" in what:
            rollout(args, config, work(args))
        if "step" in what:
            step(args, config, work(args))
        if "scaling" in what:
            scaling(args, config)


if __name__ == "__main__":
    main()
