"""The main job on a real model: `make demo` prunes SmolLM2-135M-Instruct by 20 % with text that it writes itself.

Every step is a command that is printed before it runs. Perplexity is measured on prose that does not come from the
model: the language reference that ships with Python.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

PROMPT = "The best way to learn a new language is"


def run(*command: str) -> None:
    """Prints a command and runs it."""
    print("\n$ " + shlex.join(command), flush=True)
    subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]], check=True)


def generate(model: str, **options: object) -> str:
    """A greedy continuation of the prompt, as any user of transformers gets it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = {"gguf_file": Path(model).name} if model.endswith(".gguf") else {}
    folder = str(Path(model).parent) if gguf else model
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **gguf, **options)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    written = lm.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
    return str(tokenizer.decode(written[0], skip_special_tokens=True)).replace("\n", " ")


def main() -> None:
    """Inspects, prunes, and lets both models write a sentence."""
    model = sys.argv[1]
    out = next(p for p in (Path("runs") / f"demo{i or ''}" for i in range(1000)) if not p.exists())
    text = Path(".cache/python_reference.txt")
    text.parent.mkdir(exist_ok=True)
    text.write_text("\n\n".join(topics[name] for name in sorted(topics)), encoding="utf-8")

    run("secateur", "inspect", model)
    run(
        "secateur", "prune", model, "--sparsity", "0.2", "--data", "self", "--epochs", "2", "--steps", "40",
        "--seq-len", "256", "--batch-size", "2", "--held-out-tokens", "4096", "--eval-data", str(text),
        "--out", str(out),
    )  # fmt: skip
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    print(f"\ndense:  {generate(model)}")
    print(f"pruned: {generate(str(out / 'model'), trust_remote_code=True)}")


if __name__ == "__main__":
    main()
