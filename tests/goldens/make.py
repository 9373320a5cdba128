"""Make the golden checkpoints: `python tests/goldens/make.py [case ...]` (needs the extra `bench`).

Each case is a folder beside this file:

* `config.json`, `generation_config.json` and `model.safetensors` (or shards with an index), in the form in
  which transformers 5 writes them, with random weights that are all far from their initial values;
* `config_v4.json`, in most cases: the same model in the form of published checkpoints before transformers 5;
* `golden.safetensors`: `tokens` int32 [2, T], `logits` float32 [2, T, V] of a full forward pass over them,
  `prompt_lengths` int32 [2], and `greedy` int32 [2, 24], the tokens that greedy decoding adds to the prompt
  `tokens[i, :prompt_lengths[i]]`. Its metadata has one key, `about`: JSON with the case, seed and a note.

A seed is kept only if it is a fair test, see `unfair`. The same versions of torch and transformers give the
same files again.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from case import Case
from cases import CASES
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

HERE = Path(__file__).parent
NEW_TOKENS = 24
MIN_MARGIN = 1e-3
"""Least distance between the two best logits of a greedy step: no rounding may change the tokens."""
MAX_ROUNDING = 2e-5
"""Most that the logits may move from float32 to float64: tests can then ask for 1e-4."""
MIN_EFFECT = 1e-3
"""Least move of a logit when any one tensor, or any setting in `Case.matters`, changes."""


def implementation(case: Case) -> dict[str, Any]:
    """The plainest arithmetic that transformers offers."""
    return {"dtype": torch.float32, "attn_implementation": case.attention, "experts_implementation": "eager"}


def build(case: Case, config: Any, seed: int) -> Any:
    """A model with every parameter drawn anew: unit gain for matrices, spread norms and biases."""
    model = AutoModelForCausalLM.from_config(config, **implementation(case)).eval()
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=random)
        if "sinks" in name:
            parameter.data = draw
        elif "norm" in name or "ln_" in name or parameter.ndim == 1 or name.endswith("_bias"):
            parameter.data += 0.25 * draw
        elif parameter is model.get_input_embeddings().weight or "wpe" in name:
            parameter.data = case.embedding_scale * draw
        else:
            transposed = name.endswith(case.transposed)
            fan_in = parameter.shape[-2] if transposed else parameter.shape[-1]
            parameter.data = case.gain * draw / fan_in**0.5
    if case.dtype != "float32":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, case.dtype)).float()
    return model


@torch.no_grad()
def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of a full forward pass without a cache, int [B, T] -> float [B, T, V]."""
    if getattr(model.config, "rope_parameters", None) and "dynamic" in str(model.config.rope_parameters):
        # These frequencies depend on the longest sequence the module has seen, so it must have seen none.
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(model.config).to(rotary.inv_freq.dtype)
    return model(input_ids=tokens, use_cache=False).logits


def greedy(model: Any, prompt: torch.Tensor) -> tuple[list[int], float]:
    """The greedy tokens by a full forward pass a step, and the least margin between the two best logits."""
    tokens, margin = prompt[None], float("inf")
    for _ in range(NEW_TOKENS):
        best = forward(model, tokens)[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    return tokens[0, len(prompt) :].tolist(), margin


@torch.no_grad()
def cached_greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0, bos_token_id=None
    )
    model.generation_config = settings
    out = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]))
    return out[0, len(prompt) :].tolist()


def unfair(case: Case, model: Any, tokens: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Why this seed would make a poor test, or None."""
    spread = float(logits.std())
    if not 0.3 < spread < 8:
        return f"logits spread by {spread:.2f}"
    rounding = float((forward(model.double(), tokens) - logits).abs().max())
    model.float()
    if rounding > MAX_ROUNDING:
        return f"float32 logits are off by {rounding:.1e}"
    for name, parameter in model.named_parameters():
        old = parameter.data
        parameter.data = old + 0.1 * old.std() * torch.randn_like(old)
        effect = float((forward(model, tokens) - logits).abs().max())
        parameter.data = old
        if effect < MIN_EFFECT:
            return f"{name} moves the logits by {effect:.1e} only"
    return None


def goldens(case: Case, config: Any) -> tuple[Any, dict[str, torch.Tensor], int]:
    """The first seed that makes a fair test: the model, its golden arrays and the seed."""
    lengths = torch.tensor(case.prompt_lengths, dtype=torch.int32)
    eos = {t for t in np.ravel(case.config.get("eos_token_id", [])).tolist() if t is not None}
    for seed in range(case.seed, case.seed + 200):
        torch.manual_seed(seed)
        model = build(case, config, seed)
        tokens = torch.randint(3, model.config.get_text_config().vocab_size, (2, case.length))
        logits = forward(model, tokens)
        reason = unfair(case, model, tokens, logits)
        if reason is None:
            rows = [greedy(model, row[:n]) for row, n in zip(tokens, lengths, strict=True)]
            if (margin := min(m for _, m in rows)) < MIN_MARGIN:
                reason = f"margin {margin:.1e}"
            elif any(len(set(row)) < 6 or eos & set(row) for row, _ in rows):
                reason = "dull or stopped text"
            elif any(cached_greedy(model, tokens[i, : lengths[i]]) != rows[i][0] for i in range(len(rows))):
                raise SystemExit(f"{case.name}: cached generation differs from full forward passes")
            else:
                greedy_tokens = torch.tensor([row for row, _ in rows], dtype=torch.int32)
                arrays = {"tokens": tokens.int(), "logits": logits.contiguous(), "greedy": greedy_tokens}
                return model, arrays | {"prompt_lengths": lengths}, seed
        print(f"{case.name}: seed {seed} passed over: {reason}", file=sys.stderr)
    raise SystemExit(f"{case.name}: no fair seed found")


def write_weights(case: Case, model: Any, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        **(case.generation or {"eos_token_id": case.config.get("eos_token_id")}),
        bos_token_id=case.config.get("bos_token_id"),
        pad_token_id=case.config.get("pad_token_id"),
    )
    dtype = getattr(torch, case.dtype)
    model.to(dtype).save_pretrained(folder, **({"max_shard_size": case.shard} if case.shard else {}))
    if case.rename:
        path = folder / "model.safetensors"
        tensors = case.rename(load_file(path))
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})


def check_folder(case: Case, folder: Path, arrays: dict[str, torch.Tensor]) -> None:
    """What was written must load, in both forms of the config, and give the golden logits."""
    forms = [folder / "config.json"]
    if case.v4 is not None:
        text = json.dumps(case.v4, indent=2) + "\n"
        forms.append(folder / "config_v4.json")
        forms[-1].write_text(text)
    tokens = arrays["tokens"].long()
    for form in forms:
        config = AutoConfig.for_model(**json.loads(form.read_text()))
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **implementation(case))
        difference = float((forward(model.eval(), tokens) - arrays["logits"]).abs().max())
        if difference > 1e-6:
            raise SystemExit(f"{case.name}: {form.name} as read back gives logits off by {difference:.1e}")
        for key, other in case.matters.items() if form.name == "config.json" else ():
            altered = json.loads(form.read_text())
            alter(altered, key.split("."), other)
            config = AutoConfig.for_model(**altered)
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, **implementation(case))
            effect = float((forward(model.eval(), tokens) - arrays["logits"]).abs().max())
            if effect < MIN_EFFECT:
                raise SystemExit(f"{case.name}: {key}={other!r} moves the logits by {effect:.1e} only")


def alter(settings: Any, path: list[str], value: Any) -> None:
    for key in path[:-1]:
        settings = settings[key]
    if path[-1] not in settings:
        raise SystemExit(f"there is no {path[-1]!r} among {sorted(settings)}")
    settings[path[-1]] = value


def make(case: Case) -> None:
    config = AutoConfig.for_model(case.family, **case.config)
    model, arrays, seed = goldens(case, config)
    folder, scratch = HERE / case.name, HERE / f".{case.name}.new"
    shutil.rmtree(scratch, ignore_errors=True)
    write_weights(case, model, scratch)
    about = {"case": case.name, "seed": seed, "transformers": transformers.__version__, "note": case.note}
    # One key alone: safetensors writes several in a random order.
    metadata = {"about": json.dumps(about)}
    save_file(arrays, scratch / "golden.safetensors", metadata=metadata)
    check_folder(case, scratch, arrays)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{case.name}: seed {seed}, logits spread by {arrays['logits'].std():.2f}, {size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the golden checkpoints again.")
    parser.add_argument("cases", nargs="*", metavar="case", help="names of cases (default: all)")
    names = parser.parse_args().cases
    known = {case.name: case for case in CASES}
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown cases {', '.join(unknown)}; there are: {', '.join(known)}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in names or known:
        make(known[name])


if __name__ == "__main__":
    main()
