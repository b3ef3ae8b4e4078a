"""Runs every command that the documentation shows, on small inputs, and keeps what it printed in ``docs/outputs``.

    python docs/make_outputs.py            # all of them, some six minutes on two cores
    python docs/make_outputs.py plan check # only these, and what they need

Pages include the files, so what they show is what the commands said when this was last run. Everything is made in a
temporary folder; commands see the repository's ``examples`` and ``benchmarks`` under their own names. Times that were
measured are of the machine named in ``docs/outputs/machine.txt``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "outputs"
CLUSTER = "--cluster examples/cluster_4cpu.yaml"

TRAIN = """steps: 6
optimizer: {name: adamw, lr: 1.5e-3}
data: {source: stdlib}
metrics: metrics.jsonl
timeline: measured.json
experts: {loads: loads.json}
"""

RECIPE = """merge_method: ties
base_model: base
models:
  - {model: math, parameters: {weight: 1.0, density: 0.5}}
  - {model: code, parameters: {weight: 0.7, density: 0.5}}
dtype: float32
out_dtype: bfloat16
"""

SIZES = "vision: [3, 3, 0, 2, 4, 3, 3, 2, 3, 2, 4, 1, 4, 1, 2, 1]\n"


@dataclass(frozen=True)
class Output:
    """Commands run one after another, shown together; ``needs``: outputs whose files they read."""

    commands: tuple[str, ...]
    needs: tuple[str, ...] = ()
    status: int = 0


VERBS = ("capture", "profile", "plan", "compare", "check", "simulate", "show", "export", "train", "calibrate",
         "experts", "place", "merge", "convert", "tune", "evaluate")

OUTPUTS: dict[str, Output] = {
    "help": Output(("mipipe --help",)),
    **{f"help_{verb}": Output((f"mipipe {verb} --help",)) for verb in VERBS},
    "capture": Output(("mipipe capture examples/qwen3_moe_tiny --seq 64 --batch 2 -o graph.json",)),
    "modes_made": Output(("mipipe capture graph.json --modes tensor,sequence,expert --team 2 -o modes.json",),
                         ("capture",)),
    "modes": Output(("mipipe show modes.json --modes 2",), ("modes_made",)),
    "show_graph": Output(("mipipe show graph.json",), ("capture",)),
    "profile": Output(("mipipe profile graph.json --groups 24 --workers 4 --fresh -o costs.json",), ("capture",)),
    "plan": Output((f"mipipe plan graph.json {CLUSTER} --microbatches 8 --costs costs.json --time-limit 8 --explain"
                    " -o plan.json",), ("profile",)),
    "teams": Output(("mipipe plan examples/llama3_8b --devices 16 --kind h100 --global-batch 64 --seq 8192"
                     " --time-limit 40",)),
    "teams_given": Output(("mipipe plan examples/llama3_8b --devices 16 --kind h100 --global-batch 64 --seq 8192"
                           " --degrees sequence=2,ranks=4,copies=2 --layers-per-stage 8,9,9,6 --schedule 1f1b",)),
    "check": Output(("mipipe check plan.json",), ("plan",)),
    "simulate": Output(("mipipe simulate plan.json -o timeline.json --program program.json",), ("plan",)),
    "check_refused": Output(("mipipe check swapped.json",), ("plan",), status=5),
    "infeasible": Output((f"mipipe plan graph.json {CLUSTER} --microbatches 8 --costs costs.json --memory 2MB"
                          " -o small.json",), ("profile",), status=3),
    "train": Output(("mipipe train --plan plan.json --graph graph.json --config train.yaml",), ("plan",)),
    "show_measured": Output(("mipipe show plan.json measured.json --html timeline.html --trace trace.json",),
                            ("train",)),
    "calibrate": Output(("mipipe calibrate measured.json --plan plan.json --costs costs.json --replan better.json"
                         " --time-limit 5",), ("train",)),
    "export": Output((f"mipipe plan graph.json {CLUSTER} --microbatches 8 --costs costs.json --placement v"
                      " --time-limit 4 -o v.json",
                      "mipipe export v.json --csv order.csv --trace trace.json",
                      "cut -c1-96 order.csv"), ("profile",)),
    "place": Output((f"mipipe place graph.json {CLUSTER} --costs costs.json --time-limit 5 -o assignment.json",),
                    ("profile",)),
    "experts": Output((f"mipipe experts --loads loads.json {CLUSTER} --replicas 4 -o map.json",), ("train",)),
    "pareto": Output((f"mipipe plan graph.json {CLUSTER} --microbatches 8 --costs costs.json --pareto"
                      " --time-limit 30",), ("profile",)),
    "compare": Output(("mipipe compare --ranks 8 --microbatches 20 --f 2 --i 2 --w 1",)),
    "compare_problem": Output(("mipipe compare --problem plan.json --schedules gpipe,1f1b,zb-h1,zb-v,dualpipe,mipipe"
                               " --time-limit 6",), ("plan",)),
    "methods": Output(("mipipe merge --methods",)),
    "merge": Output(("mipipe merge recipe.yaml -o merged --ranks 2 --memory 1GB --dry-run",
                     "mipipe merge recipe.yaml -o merged --ranks 2 --memory 1GB"), ("checkpoints",)),
    "checkpoints": Output(()),
    "convert": Output(("cat molae.yaml", "mipipe convert molae.yaml -o molae",
                       "mipipe capture molae --seq 64 -o molae.json"), ("mixture",)),
    "mixture": Output(()),
    "own_model": Output(("mipipe capture my_model:factory --set depth=8 -o own.json",
                         "mipipe profile own.json --workers 4 -o own_costs.json",
                         f"mipipe plan own.json {CLUSTER} --microbatches 4 --costs own_costs.json --time-limit 3"
                         " -o own_plan.json",
                         "mipipe train --model my_model:factory --plan own_plan.json --graph own.json --config"
                         " my_train.yaml")),
    "llava": Output(("mipipe capture benchmarks/llava_7b --seq 2048 --dtype bfloat16 -o llava.json",
                     "cat images.yaml",
                     "mipipe plan llava.json --cluster benchmarks/llava_7b/h100x8.yaml --microbatches 16"
                     " --granularity block --optimizer adamw_mixed --sizes images.yaml --activations 15GB"
                     " --time-limit 60 -o llava_plan.json")),
}


def main(wanted: list[str]) -> None:
    unknown = [name for name in wanted if name not in OUTPUTS]
    if unknown:
        sys.exit(f"make_outputs: unknown output {unknown[0]!r}; expected one of {', '.join(OUTPUTS)}")
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "machine.txt").write_text(f"{machine()}\n")
    done: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        for output in wanted or OUTPUTS:
            make(output, Path(name), done)


def prepare(folder: Path) -> None:
    """The files that commands read, and the repository's folders under their own names."""
    for shown in ("examples", "benchmarks"):
        (folder / shown).symlink_to(ROOT / shown)
    for file in ("my_model.py", "my_train.yaml"):
        shutil.copy(ROOT / "docs" / "examples" / file, folder / file)
    for file, text in (("train.yaml", TRAIN), ("recipe.yaml", RECIPE), ("images.yaml", SIZES)):
        (folder / file).write_text(text)


def make(name: str, folder: Path, done: set[str]) -> None:
    """Run one output's commands, and before them those it needs; write what they printed."""
    if name in done:
        return
    output = OUTPUTS[name]
    for needed in output.needs:
        make(needed, folder, done)
    if name == "checkpoints":
        checkpoints(folder)
    if name == "mixture":
        mixture(folder)
    if name == "check_refused":
        swap_first_actions(folder)
    shown = []
    for command in output.commands:
        print(f"$ {command}", flush=True)
        ran = subprocess.run(shlex.split(command), cwd=folder, capture_output=True, text=True, timeout=600,
                             env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb",
                                  "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(folder),
                                  "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
        if ran.returncode != output.status:
            sys.exit(f"make_outputs: {name}: status {ran.returncode}, expected {output.status}\n"
                     f"{ran.stdout}{ran.stderr}")
        shown.append(f"$ {folded(command)}\n{clean(ran.stdout + (ran.stderr if output.status else ''), folder)}")
    if shown:
        (FOLDER / f"{name}.txt").write_text("\n".join(shown))
    done.add(name)


def folded(command: str, width: int = 100) -> str:
    """A command on lines of at most ``width``, broken before an option."""
    lines = [""]
    for word in re.split(r" (?=-)", command):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines[-1] += " \\"
            lines.append("      " + word)
        else:
            lines[-1] += (" " if lines[-1] else "") + word
    return "\n".join(lines)


def clean(text: str, folder: Path) -> str:
    """Printed text without trailing blanks and without this machine's folders."""
    text = text.replace(str(folder) + "/", "").replace(str(ROOT) + "/", "")
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()) + "\n"


def swap_first_actions(folder: Path) -> None:
    """``swapped.json``: the plan with rank 1's first two actions exchanged."""
    data = json.loads((folder / "plan.json").read_text())
    order = data["schedule"]["ranks"][1]["compute"]
    if isinstance(order, str):
        words = order.split()
        data["schedule"]["ranks"][1]["compute"] = " ".join([words[1], words[0], *words[2:]])
    else:
        order[0], order[1] = order[1], order[0]
    (folder / "swapped.json").write_text(json.dumps(data))


def checkpoints(folder: Path) -> None:
    """Three small checkpoints that transformers can load: ``base``, and ``math`` and ``code`` near it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=1024, dtype="bfloat16")
    torch.manual_seed(0)
    base = LlamaForCausalLM(sizes).to(torch.bfloat16)
    base.save_pretrained(folder / "base")
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    for expert in ("math", "code"):
        base.load_state_dict({name: value + 0.01 * torch.randn_like(value) for name, value in weights.items()})
        base.save_pretrained(folder / expert)


def mixture(folder: Path) -> None:
    """A small mixture of experts that transformers can load, and a recipe for it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                           num_key_value_heads=2, head_dim=64, vocab_size=1024, num_experts=16, num_experts_per_tok=2,
                           dtype="bfloat16")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(sizes).to(torch.bfloat16).save_pretrained(folder / "mixture")
    (folder / "molae.yaml").write_text("method: molae\nmodel: mixture\ngroup: 8\n")


def machine() -> str:
    """The processor and its cores, as an output's times need them said."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model} processor, cores used: {cores}; shared with other jobs, no GPU"


if __name__ == "__main__":
    main(sys.argv[1:])
