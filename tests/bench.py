"""Compare the speed of this repository with that of others, in one table per part.

    python tests/bench.py [--model FOLDER] [--data FILE] [rollout] [step] [tiny]

`rollout` and `step` do what an R3 step does on F failures with G reflections each, and let other
implementations do the same work: transformers (on which TRL's trainer is built), vLLM's CPU build
if --vllm names a Python that has it, and our own model with one row per reflection. Each contender
runs in a fresh process, and before it is timed, its results are compared with ours. The row "limit"
is the time that this machine's fastest matrix product would take for the arithmetic that cannot be
avoided. `tiny` is the R3 step of the tiny model, with and without sharing the context.

Nothing here is a test, because times depend on the machine. Compare ratios within one run.
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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from drawn_apigen import DrawnAPIGen

import grpo
import r3
from grpo import PackedGroup, Turn
from model import Model, Tokenizer, generate

TURN_LENGTH = 64  # tokens per turn; end-of-turn tokens are ignored, so every turn has this length
SMOLLM2_135M = dict(  # the shape of SmolLM2-135M, used if no folder is given
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, rope_theta=100_000.0,
    max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
    architectures=["LlamaForCausalLM"], eos_token_id=2,
)  # fmt: skip

Workload = dict[str, Any]  # what `make_workload` returns; JSON, so that a process can be given it


# -- The work --------------------------------------------------------------------------------------
def make_workload(args: argparse.Namespace) -> Workload:
    """What every contender gets: F contexts as token ids (question, tools, a wrong attempt, the
    instruction to reflect), the bridge between reflection and retry, and G reflections on each
    context for the training step."""
    rng = random.Random(0)
    if args.context or not (Path(args.model) / "tokenizer.json").exists():
        length = args.context or 450
        contexts = [random_tokens(rng, length) for _ in range(args.failures)]
        bridge = random_tokens(rng, 16)
    else:
        contexts, bridge = real_contexts(args)
    reflections = [[random_tokens(rng, TURN_LENGTH) for _ in range(args.group)] for _ in contexts]
    return {
        "model": str(args.model), "contexts": contexts, "bridge": bridge,
        "group_size": args.group, "reflections": reflections, "repeat": args.repeat,
    }  # fmt: skip


def random_tokens(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(5, 40_000) for _ in range(length)]


def real_contexts(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Function-calling problems, rendered by the model's chat template, with a wrong attempt; and
    the bridge between reflection and retry."""
    task, tokenizer = DrawnAPIGen(), Tokenizer.from_pretrained(args.model)
    agent, contexts = grpo.Agent(None, tokenizer, task, TURN_LENGTH), []
    wrong_attempt = tokenizer.encode(json.dumps([{"name": "unknown", "arguments": {}}]))
    bridge = tokenizer.bridge(task.reflection_instruction)
    for problem in task.load(args.data, "all" if args.data else "train"):
        context = agent.attempt_prompt(problem) + tokenizer.append_bridge(wrong_attempt, bridge)
        if 350 <= len(context) <= 560 or not args.data:
            contexts.append(context)
        if len(contexts) == args.failures:
            break
    return contexts, tokenizer.bridge(task.retry_instruction)


def multiplications_per_token(config: dict) -> tuple[int, int]:
    """Multiplications per token: those in the weight matrices of all layers, and in the head."""
    E, layers = config["hidden_size"], config["num_hidden_layers"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    D = config.get("head_dim") or E // H
    per_layer = E * (2 * H * D + 2 * K * D + 3 * config["intermediate_size"])
    return layers * per_layer, E * config["vocab_size"]


def attention_multiplications(config: dict, pairs: float) -> float:
    """Multiplications in the attention of all layers, for scores and for sums of values. pairs: the
    number of pairs of a query and a key."""
    E, H = config["hidden_size"], config["num_attention_heads"]
    D = config.get("head_dim") or E // H
    return 2 * config["num_hidden_layers"] * H * D * pairs


def rollout_flop(config: dict, work: Workload) -> float:
    """The smallest number of floating-point operations for two turns: each context is read once,
    and so is each token that follows it in a sample."""
    matrices, head = multiplications_per_token(config)
    total = 0.0
    for C in map(len, work["contexts"]):
        total += C * matrices + attention_multiplications(config, C * C / 2)
        T = 2 * TURN_LENGTH + len(work["bridge"]) - 1  # The last token is sampled, but never read.
        attention = attention_multiplications(config, T * C + T * T / 2)
        total += work["group_size"] * (T * matrices + 2 * TURN_LENGTH * head + attention)
    return 2 * total


def step_flop(config: dict, work: Workload, shared: bool) -> float:
    """The floating-point operations of a training step: a forward pass, and a backward pass that
    takes twice as many. shared: whether the G reflections share one context."""
    matrices, head = multiplications_per_token(config)
    total, G, T = 0.0, work["group_size"], TURN_LENGTH - 1  # The last token predicts nothing.
    for C in map(len, work["contexts"]):
        attention = attention_multiplications(config, T * C + T * T / 2)
        total += G * (T * matrices + (T + 1) * head + attention)
        context = C * matrices + attention_multiplications(config, C * C / 2)
        total += context if shared else G * context
    return 3 * 2 * total


# -- Contenders for the rollout, each in a process of its own --------------------------------------
def timed(function: Callable[[], Any], repeat: int) -> dict[str, float]:
    """Call a function `repeat` times. Returns the seconds of the fastest call, and the peak memory
    in bytes of this process and its children meanwhile, as Linux counts it."""
    for folder in process_folders():
        (folder / "clear_refs").write_text("5")  # resets the peak
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    peaks = [
        re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
        for folder in process_folders()
    ]
    return {"seconds": min(times), "peak": 1024 * sum(int(peak[1]) for peak in peaks if peak)}


def process_folders() -> list[Path]:
    """The folders in /proc of this process and of all its descendants."""
    folders = [Path("/proc/self")]
    for folder in folders:  # The list grows in this loop.
        for thread in (folder / "task").iterdir():
            children = (thread / "children").read_text().split()
            folders += [Path("/proc") / child for child in children]
    return folders


def our_rollout(work: Workload) -> dict:
    """This repository: the context is stored once for all samples, and the cache is kept."""
    model = Model.from_pretrained(work["model"])

    def two_turns(temperature=1.0, G=work["group_size"]):
        options = dict(max_new_tokens=TURN_LENGTH, temperature=temperature)
        first = generate(model, work["contexts"], num_samples=G, **options)
        turns = [turn for group in first.tokens for turn in group]
        prompts = [turn[-1:] + work["bridge"] for turn in turns]
        second = generate(model, prompts, cache=first.cache, seed=1, **options)
        return [turns, [turn for [turn] in second.tokens]]

    return {"greedy": two_turns(0.0, 1), **timed(two_turns, work["repeat"])}


def transformers_rollout(work: Workload) -> dict:
    """transformers: batched, padded on the left, and the cache is kept between the turns."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    contexts, C = work["contexts"], max(map(len, work["contexts"]))
    ids = torch.tensor([[0] * (C - len(c)) + c for c in contexts])
    attention_mask = torch.tensor([[0] * (C - len(c)) + [1] * len(c) for c in contexts])

    def two_turns(do_sample=True, G=work["group_size"]):
        options = dict(
            max_new_tokens=TURN_LENGTH, do_sample=do_sample, return_dict_in_generate=True,
            pad_token_id=0,
        )  # fmt: skip
        if do_sample:
            options["top_k"] = 0
        first = model.generate(
            ids, attention_mask=attention_mask, num_return_sequences=G, **options
        )
        rows = first.sequences
        prompts = torch.cat([rows, torch.tensor([work["bridge"]] * len(rows))], dim=1)
        mask = torch.ones_like(prompts)
        mask[:, :C] = attention_mask.repeat_interleave(G, dim=0)
        second = model.generate(
            prompts, attention_mask=mask, past_key_values=first.past_key_values, **options
        )
        return [rows[:, C:].tolist(), second.sequences[:, prompts.shape[1] :].tolist()]

    return {"greedy": two_turns(False, 1), **timed(two_turns, work["repeat"])}


def vllm_rollout(work: Workload) -> dict:
    """vLLM's CPU build, with prefix caching."""
    from vllm import LLM, SamplingParams

    longest = max(map(len, work["contexts"])) + 2 * TURN_LENGTH + len(work["bridge"])
    llm = LLM(
        work["model"], dtype="float32", enable_prefix_caching=True, max_model_len=longest + 1,
        gpu_memory_utilization=0.5,
    )  # fmt: skip

    def sample(prompts, num_samples, greedy):
        sampling = SamplingParams(
            n=num_samples, temperature=0.0 if greedy else 1.0, detokenize=False, ignore_eos=True,
            max_tokens=TURN_LENGTH, min_tokens=TURN_LENGTH,
        )  # fmt: skip
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(inputs, sampling, use_tqdm=False)
        return [[list(output.token_ids) for output in result.outputs] for result in results]

    def two_turns(greedy=False, G=work["group_size"]):
        llm.reset_prefix_cache()
        first, prompts = sample(work["contexts"], G, greedy), []
        for context, turns in zip(work["contexts"], first, strict=True):
            prompts += [context + turn + work["bridge"] for turn in turns]
        second = sample(prompts, 1, greedy)
        return [[turn for turns in first for turn in turns], [turn for [turn] in second]]

    return {"greedy": two_turns(True, 1), **timed(two_turns, work["repeat"])}


# -- Contenders for the training step: one failure with its G reflections per backward pass --------
LogprobFunction = Callable[[Any, PackedGroup], Tensor]  # (model, rows) -> (G, T)


def our_step(work: Workload) -> dict:
    """This repository: the context is computed once for all reflections."""
    return timed_steps(Model.from_pretrained(work["model"]), grpo.token_logprobs, work)


def our_rows_step(work: Workload) -> dict:
    """Our model, with the context in each of the G rows."""
    return timed_steps(Model.from_pretrained(work["model"]), row_logprobs, work)


def transformers_step(work: Workload) -> dict:
    """transformers, with the context in each of the G rows."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)
    return timed_steps(model.train(), transformers_logprobs, work)


def plain_rows(rows: PackedGroup) -> Tensor:
    """The ids of context and branch, one row per branch, padded with 0 on the right: (G, C + T)."""
    T = rows.mask.shape[1]
    padded = [rows.context + branch + [0] * (T - len(branch)) for branch in rows.branches]
    return torch.tensor(padded)


def row_logprobs(model: Model, rows: PackedGroup) -> Tensor:
    """`grpo.token_logprobs` of our model with one row per reflection: (G, T)."""
    hidden = model.hidden(plain_rows(rows))  # (G, C + T, E)
    hidden = hidden[:, len(rows.context) - 1 : -1][rows.mask]  # (N, E): what predicts the tokens
    logprobs = grpo.target_logprobs(model, hidden, rows.targets[rows.mask], 1.0)
    return torch.zeros(rows.mask.shape).masked_scatter(rows.mask, logprobs)


def transformers_logprobs(model, rows: PackedGroup) -> Tensor:
    """`grpo.token_logprobs` of a transformers model, computed as TRL does, with logits only for the
    completions: (G, T). All rows must have the same length."""
    ids, T = plain_rows(rows), rows.mask.shape[1]
    attention_mask = torch.ones_like(ids)
    output = model(ids, attention_mask=attention_mask, logits_to_keep=T + 1, use_cache=False)
    log_p = output.logits[:, :-1].float().log_softmax(-1)  # (G, T, V)
    return log_p.gather(-1, rows.targets[..., None]).squeeze(-1)


def make_rows(context: list[int], reflections: list[list[int]]) -> PackedGroup:
    """The rows of a group with these reflections on one context."""
    group = []
    for tokens in reflections:
        reflection = Turn(context, tokens, truncated=True, logprobs=[0.0] * len(tokens))
        group.append(grpo.Conversation(None, 0, Turn([], [], False), None, 0, reflection))
    return grpo.pack_group(group)


def backpropagate_steps(model, logprob_function: LogprobFunction, work: Workload) -> float:
    """Add the gradients of a step to those of the model's parameters, and return the loss. Every
    third reflection is rewarded."""
    G, loss_of_step = work["group_size"], 0.0
    rewards = torch.tensor([[float(g % 3 == 0) for g in range(G)]])
    # With G = 1 there is nothing to compare, and the advantage would be zero.
    A = grpo.group_advantages(rewards)[0] if G > 1 else torch.ones(1)
    weights = torch.full((G,), 1 / (len(work["contexts"]) * G * TURN_LENGTH))
    for context, reflections in zip(work["contexts"], work["reflections"], strict=True):
        rows = make_rows(context, reflections)
        logprobs = logprob_function(model, rows)  # (G, T)
        loss = grpo.grpo_loss(
            logprobs, logprobs.detach(), None, A, rows.mask, weights=weights, beta=0.0
        )
        loss.backward()
        loss_of_step += loss.item()
    return loss_of_step


def timed_steps(model, logprob_function: LogprobFunction, work: Workload) -> dict:
    """Make one step, whose gradients are written to the file work["gradient"], so that they can be
    compared. Then measure the time of further steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    loss = backpropagate_steps(model, logprob_function, work)
    gradients = {name: p.grad.contiguous() for name, p in model.named_parameters()}
    save_file(gradients, work["gradient"])
    del gradients
    optimizer.step()

    def one_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backpropagate_steps(model, logprob_function, work)
        optimizer.step()

    return {"loss": loss, **timed(one_step, work["repeat"])}


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


def run_contender(name: str, work: Workload, python: str = sys.executable) -> dict:
    """Call a contender in a fresh process, and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        work_file, result_file = Path(folder) / "work.json", Path(folder) / "result.json"
        work_file.write_text(json.dumps(work))
        command = [python, __file__, "--contender", name, str(work_file), str(result_file)]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            sys.exit(f"{name} failed:\n{finished.stderr[-3000:]}")
        return json.loads(result_file.read_text())


# -- The tables ------------------------------------------------------------------------------------
def matrix_rate() -> float:
    """Floating-point operations per second of a large matrix product."""
    a = torch.randn(2048, 2048)
    return 2 * 2048**3 / timed(lambda: a @ a, 10)["seconds"]


@torch.no_grad()
def check_greedy_outputs(model_folder: str, work: Workload, ours: list, theirs: list) -> None:
    """Exit unless the greedy turns of two contenders are equal, up to a token at which the two
    largest logits differ by less than 1e-3."""
    model = Model.from_pretrained(model_folder)
    for context, *turns in zip(work["contexts"], *ours, *theirs, strict=True):
        our_first, our_second, their_first, their_second = turns
        our_ids = context + our_first + work["bridge"] + our_second
        their_ids = context + their_first + work["bridge"] + their_second
        equal = len(os.path.commonprefix([our_ids, their_ids]))
        if equal < len(our_ids):
            best = model(torch.tensor([our_ids[:equal]]))[0, -1].topk(2).values
            if best[0] - best[1] > 1e-3:
                sys.exit(f"greedy outputs differ at token {equal - len(context)}")


def rollout(args: argparse.Namespace, config: dict, work: Workload) -> None:
    """Measure all contenders for the rollout, and print their table."""
    rate, flop, rows = matrix_rate(), rollout_flop(config, work), {}
    limit, tokens = flop / rate, 2 * TURN_LENGTH * args.failures * args.group
    for name, label in ROLLOUTS.items():
        if name == "vllm_rollout" and not args.vllm:
            continue
        python = args.vllm if name == "vllm_rollout" else sys.executable
        result = run_contender(name, work, python)
        seconds = result["seconds"]
        if name == "our_rollout":
            our_seconds, our_greedy = seconds, result["greedy"]
        check_greedy_outputs(args.model, work, our_greedy, result["greedy"])
        print(f"{label}: {seconds:.1f} s", flush=True)
        rows[label] = {
            "seconds": f"{seconds:.1f}", "new tokens/s": f"{tokens / seconds:.0f}",
            "ours is faster by": f"{seconds / our_seconds:.2f}x",
            "fraction of limit": f"{limit / seconds:.0%}",
            "peak GB": f"{result['peak'] / 1e9:.2f}",
        }  # fmt: skip
    rows["limit"] = {
        "seconds": f"{limit:.1f}", "new tokens/s": f"{tokens / limit:.0f}",
        "ours is faster by": f"{limit / our_seconds:.2f}x",
    }  # fmt: skip
    lengths = [len(context) for context in work["contexts"]]
    title = (
        f"rollout: {args.failures} failures x {args.group} reflections of {TURN_LENGTH} tokens, "
        f"each with a retry of {TURN_LENGTH}; contexts of {min(lengths)} to {max(lengths)} tokens; "
        f"{flop / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s; equal greedy outputs"
    )
    print("\n" + r3.markdown({title: rows}), flush=True)


def step(args: argparse.Namespace, config: dict, work: Workload) -> None:
    """Measure all contenders for the training step, and print their table."""
    rate, rows = matrix_rate(), {}
    parameters = sum(multiplications_per_token(config))  # approximately: without the norms
    for name, label in STEPS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "gradient.safetensors")
            result = run_contender(name, {**work, "gradient": file})
            gradient = load_file(file)
        seconds = result["seconds"]
        if name == "our_step":
            our_seconds, our_loss, our_gradient = seconds, result["loss"], gradient
        norms = (dot(gradient, gradient) * dot(our_gradient, our_gradient)) ** 0.5
        cosine = dot(gradient, our_gradient) / norms
        if cosine < 0.9999 or abs(result["loss"] - our_loss) > 1e-4:
            sys.exit(f"{name} computes another step: cosine {cosine}, loss {result['loss']}")
        print(f"{label}: {seconds:.1f} s", flush=True)
        flop = step_flop(config, work, shared=name == "our_step")
        rows[label] = {
            "seconds": f"{seconds:.1f}", "ours is faster by": f"{seconds / our_seconds:.2f}x",
            "TFLOP": f"{flop / 1e12:.2f}", "fraction of limit": f"{flop / rate / seconds:.0%}",
            "cosine of gradients": f"{cosine:.6f}", "GB above weights, gradients, moments":
            f"{(result['peak'] - 16 * parameters) / 1e9:.2f}",
        }  # fmt: skip
    ratio = step_flop(config, work, shared=False) / step_flop(config, work, shared=True)
    title = (
        f"training step: {args.failures} failures x {args.group} reflections of {TURN_LENGTH} "
        f"tokens; {rate / 1e9:.0f} GFLOP/s; one row per reflection needs {ratio:.2f} times the "
        "arithmetic"
    )
    print("\n" + r3.markdown({title: rows}), flush=True)


def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The dot product of two gradients, each a tensor for every parameter."""
    return sum((a[name] * b[name]).sum().item() for name in a)


# -- The tiny model --------------------------------------------------------------------------------
def tiny(args: argparse.Namespace) -> None:
    """Measure an R3 step of the tiny model, rollout and update, with and without sharing."""
    config = replace(r3.TINY, model=args.tiny_model)
    agent = r3.load_agent(config, r3.load_task(config))
    G, rng_prefix = config.group_size, (grpo.TRAIN, 0)
    problems = agent.task.load(split="train")
    attempts = grpo.attempt_all(agent, problems, 1, (grpo.COLLECT, 0))
    failures = [c for c in attempts if not c.attempt_verdict.correct][: config.batch_size]
    all_rows = [grpo.pack_group(group) for group in grpo.rollout(agent, failures, G, rng_prefix)]
    A = grpo.group_advantages(torch.eye(G)[:1])[0]

    def plain_rollout() -> None:
        """Each sample reads its context by itself, and each turn is read from the beginning."""
        copies = [replace(f, attempt_index=g) for f in failures for g in range(G)]
        reflected, _ = grpo.sample_reflections(agent, copies, 1, rng_prefix)
        grpo.sample_retries(agent, reflected, rng_prefix)

    def update(logprob_function: LogprobFunction) -> None:
        for rows in all_rows:
            logprobs = logprob_function(agent.model, rows)
            grpo.grpo_loss(logprobs, rows.old_logprobs, None, A, rows.mask, beta=0.0).backward()
        agent.model.zero_grad()

    pairs = {
        "rollout": (plain_rollout, lambda: grpo.rollout(agent, failures, G, rng_prefix)),
        "update": (lambda: update(row_logprobs), lambda: update(grpo.token_logprobs)),
    }
    table = {}
    for label, (plain, shared) in pairs.items():
        plain(), shared()  # The first calls are slower, and are not measured.
        plain_seconds, shared_seconds = (timed(f, 3)["seconds"] for f in (plain, shared))
        table[label] = {
            "plain, s": f"{plain_seconds:.2f}",
            "shared, s": f"{shared_seconds:.2f}",
            "faster by": f"{plain_seconds / shared_seconds:.2f}x",
        }
    title = f"tiny model: {len(failures)} failures x {G} reflections, each with a retry"
    print("\n" + r3.markdown({title: table}))


# -- The command line ------------------------------------------------------------------------------
PARTS = ("rollout", "step", "tiny")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_text = f"parts to measure: {', '.join(PARTS)} (default: rollout step)"
    parser.add_argument("parts", nargs="*", metavar="PART", help=help_text)
    help_text = "a Hugging Face folder (default: random weights in the shape of SmolLM2-135M)"
    parser.add_argument("--model", help=help_text)
    help_text = "a file of function-calling problems, from which contexts are made"
    parser.add_argument("--data", help=help_text)
    parser.add_argument("--vllm", help="path of a python that has vLLM's CPU build")
    parser.add_argument("--tiny-model", default="tiny", help="the model for the part tiny")
    parser.add_argument("--failures", type=int, default=4, help="F, the number of failures")
    parser.add_argument("--group", type=int, default=8, help="G, reflections on each failure")
    help_text = "use random contexts of this many tokens"
    parser.add_argument("--context", type=int, help=help_text)
    help_text = "number of runs; the fastest one counts"
    parser.add_argument("--repeat", type=int, default=2, help=help_text)
    parser.add_argument("--contender", nargs=3, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = parser().parse_args()
    if args.contender:
        name, work_file, result_file = args.contender
        result = globals()[name](json.loads(Path(work_file).read_text()))
        Path(result_file).write_text(json.dumps(result))
        return
    parts = args.parts or ["rollout", "step"]
    if not set(parts) <= set(PARTS):
        sys.exit(f"bench.py: the parts are {', '.join(PARTS)}")
    if "tiny" in parts:
        tiny(args)
    with tempfile.TemporaryDirectory() as folder:
        if not args.model and {"rollout", "step"} & set(parts):
            torch.manual_seed(0)
            Model(SMOLLM2_135M).save_pretrained(folder)
            args.model = folder
        for part, function in (("rollout", rollout), ("step", step)):
            if part in parts:
                config = json.loads((Path(args.model) / "config.json").read_text())
                function(args, config, make_workload(args))


if __name__ == "__main__":
    main()
