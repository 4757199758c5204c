"""Golden metadata and tensors of all cases: PYTHONPATH=.. python make_golden_gguf_model.py LLAMA_CPP [CASE...]"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf_checkpoints_made as checkpoints
from gguf_cases_made import CASES

HERE = Path(__file__).parent


def main(llama_cpp: str, *names: str) -> None:
    for name in names or CASES:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as parent:
            folder = checkpoints.write(case, Path(parent))
            command = [
                sys.executable,
                str(HERE / "dump_converter.py"),
                llama_cpp,
                str(folder),
                *([case.pre] if case.pre else []),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(name, done.stderr[-3000:])
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        lines = [f" {json.dumps(line)}" for line in found["pairs"]]
        tensors = [f" {json.dumps(line)}" for line in found["tensors"]]
        text = '{"pairs": [\n' + ",\n".join(lines) + '\n], "tensors": [\n' + ",\n".join(tensors) + "\n]}\n"
        (HERE / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
