"""Prints what torch.compile makes of training steps with the kernels for an H200, as a JSON object per step.

A program, because the tests' process has defined the kernels for Triton's interpreter, which cannot be traced.

    python -m tests.catmodel.kernels.visible_steps STEP...

opaque: operators that stay whole. options: of each kernel, those that Inductor chooses from by timing if there are
several. launches: of our kernels, forward and backward. atomic: whether a kernel adds atomically, ours or Inductor's,
forward and backward. copied: results that are written to a copy of their tensor. compiled: our kernels, compiled with
the types of arguments in Inductor's code.
"""

import ast
import json
import re
import sys
import tempfile
from pathlib import Path

from torch._dynamo.utils import ReinplaceCounters

import catmodel.kernels
from tests.catmodel.generated_code import adds_atomically, code_of, graphs_of
from tests.catmodel.kernels.compile_generated import compile_kernels
from tests.catmodel.test_generated_code import training_step
from train.engine.deepspeed_engine import compile_settings

USER_KERNEL = re.compile(r"@triton_heuristics.user_autotune\(\s*configs=(\[.*\]),\n[^\n]*'kernel_name': '_(\w+)_\d+'")

if __name__ == "__main__":
    catmodel.kernels.register()
    catmodel.kernels.usable = lambda device, dtype: True
    for name in sys.argv[1:]:
        ReinplaceCounters.clear()
        graphs = graphs_of(*training_step(name))
        codes = code_of(graphs, compile_settings()["options"])
        operators = {str(node.target) for graph, _ in graphs for node in graph.graph.nodes}
        kernels = [pair for code in codes for pair in USER_KERNEL.findall(code)]
        with tempfile.TemporaryDirectory() as folder:
            compiled = [compile_kernels(code, Path(folder)) for code in codes]
        print(
            json.dumps(
                dict(
                    opaque=sorted(operator for operator in operators if operator.startswith("catmodel")),
                    options={kernel: ast.literal_eval(configs) for configs, kernel in kernels},
                    launches=[len(re.findall(r"^ +_\w+\.run\(", code, re.M)) for code in codes],
                    atomic=[adds_atomically(code) for code in codes],
                    copied=ReinplaceCounters.get_total_missed(),
                    compiled=compiled,
                )
            )
        )
